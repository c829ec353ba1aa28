"""The examples for other people's trainers, run with those trainers, each section of `docs/adapters.md` by itself.

What a section needs stands below its heading, `<!-- needs: NAME -->`, with the names of lists in `tests/peers`; without
such a line it needs nothing but us. The blocks before the first section are run before those of each.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import peers
import pytest
import test_readme

DOCUMENT = peers.ROOT / "docs" / "adapters.md"
NEEDS = re.compile(r"^<!-- needs: (.*) -->$", re.MULTILINE)


def parts_of(text: str) -> dict[str, str]:
    """The document once for each section that has something to run, all the other sections blanked out.

    Blank lines in their place, so that a traceback gives the document's line numbers.
    """
    starts = [found.start() for found in re.finditer(r"^## ", text, re.MULTILINE)]
    parts = {}
    for start, stop in zip(starts, [*starts[1:], len(text)], strict=True):
        section = text[start:stop]
        if any(test_readme.blocks(section)):
            blank = "\n" * text[starts[0] : start].count("\n")
            parts[section.splitlines()[0].removeprefix("## ")] = text[: starts[0]] + blank + section
    return parts


PARTS = parts_of(DOCUMENT.read_text(encoding="utf-8")) if DOCUMENT.exists() else {}


def needed(part: str) -> list[str]:
    return [name.strip() for line in NEEDS.findall(part) for name in line.split(",")]


@pytest.mark.exhaustive
@pytest.mark.parametrize("heading", PARTS)
def test_the_examples_of_a_section_run(heading: str, tmp_path: Path) -> None:
    part, work = tmp_path / DOCUMENT.name, tmp_path / "work"
    part.write_text(PARTS[heading], encoding="utf-8")
    work.mkdir()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [sys.executable, test_readme.__file__, str(part)],
        cwd=work,
        env={**peers.environment(*needed(PARTS[heading])), "PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout[-8000:]
    assert "Exception ignored" not in done.stdout, done.stdout[-8000:]


def test_a_section_is_run_with_what_stands_before_all_of_them_and_alone() -> None:
    block = "```python\nprint({})\n```\n"
    text = (
        f"# Title\n{block.format(0)}## One\n<!-- needs: a, b -->\n{block.format(1)}## Text\n\n## Two\n{block.format(2)}"
    )
    parts = parts_of(text)
    assert list(parts) == ["One", "Two"]
    assert [needed(part) for part in parts.values()] == [["a", "b"], []]
    for number, part in enumerate(parts.values(), 1):
        assert [code for _, _, code in test_readme.blocks(part)] == ["print(0)\n", f"print({number})\n"]
        line = text.splitlines().index(f"print({number})") + 1
        assert [line for _, line, _ in test_readme.blocks(part)][1] == line
