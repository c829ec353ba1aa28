"""What README and docs show is run: every python and bash block, in order, and every verb that they name.

The tests run this file as a program, once a document, so that the blocks of a document share one interpreter and its
imports: `python tests/test_readme.py README.md` in an empty folder.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
MOST_SECONDS = 1800
"""For a document: so much that a slow or busy machine is no failure, and a document that hangs is one."""
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(text: str) -> Iterator[tuple[str, int, str]]:
    """(language, line, code) of each fenced block that is meant to be run; commands of make are left out."""
    for found in FENCE.finditer(text):
        language, code = found.groups()
        if language == "bash":
            code = "".join(line for line in code.splitlines(keepends=True) if not line.startswith("make"))
        if language in ("python", "bash"):
            yield language, text[: found.start()].count("\n") + 2, code


def run_document(document: Path) -> None:
    """Run the blocks of a document in the current folder; the first that fails is shown."""
    text = document.read_text(encoding="utf-8")
    shared: dict[str, Any] = {"__name__": "__main__"}
    for language, line, code in blocks(text):
        print(f"--- {document.name}, line {line}\n{code}", flush=True)
        if language == "bash":
            subprocess.run(["bash", "-c", f"set -eu\n{code}"], check=True)
        else:
            # Blank lines in front, so that a traceback gives the document's line numbers.
            exec(compile("\n" * (line - 1) + code, document.name, "exec"), shared)


def environment(folder: Path) -> dict[str, str]:
    """Few threads, no network, this checkout's package, and its `actcache` first on the path."""
    programs = Path(sys.executable).parent
    if shutil.which("actcache", path=str(programs)) is None:  # not installed, only importable
        programs = folder / "bin"
        programs.mkdir()
        script = programs / "actcache"
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m actcache "$@"\n')
        script.chmod(0o755)
    changes = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    return {**os.environ, **changes, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}


def name_of(document: Path) -> str:
    """Its path in the repository."""
    return str(document.relative_to(ROOT))


def with_blocks() -> list[Path]:
    """Documents with blocks; those whose sections need packages of others are run by `test_adapters_docs.py`."""
    texts = {document: document.read_text(encoding="utf-8") for document in DOCUMENTS}
    return [document for document, text in texts.items() if any(blocks(text)) and "<!-- needs:" not in text]


@pytest.fixture(scope="module")
def started(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[Path, tuple[subprocess.Popen[bytes], Path]]]:
    """A process for each document that was chosen, all at once: each uses one core. What it says goes to a file."""
    runs = {}
    chosen = {item.callspec.params["document"] for item in request.session.items if "started" in item.fixturenames}
    with ExitStack() as undo:
        for document in sorted(chosen):
            folder = tmp_path_factory.mktemp(document.stem)
            (folder / "work").mkdir()
            said = undo.enter_context((folder / "said.txt").open("wb"))
            command = [sys.executable, __file__, str(document)]
            process = subprocess.Popen(
                command, cwd=folder / "work", env=environment(folder), stdout=said, stderr=subprocess.STDOUT
            )
            undo.callback(process.wait)
            undo.callback(process.kill)
            runs[document] = (process, folder / "said.txt")
        yield runs


@pytest.mark.parametrize(
    "document",
    [pytest.param(path, marks=[pytest.mark.exhaustive] if path != DOCUMENTS[0] else []) for path in with_blocks()],
    ids=name_of,
)
def test_blocks_run(document: Path, started: dict[Path, tuple[subprocess.Popen[bytes], Path]]) -> None:
    process, said = started[document]
    returncode = process.wait(timeout=MOST_SECONDS)
    shown = said.read_text(encoding="utf-8")
    assert returncode == 0, shown[-8000:]
    assert "Exception ignored" not in shown, shown[-8000:]


def test_there_is_something_to_run() -> None:
    languages = [language for language, _, _ in blocks(DOCUMENTS[0].read_text(encoding="utf-8"))]
    assert {"python", "bash"} <= set(languages)


def test_a_failing_block_is_shown(tmp_path: Path) -> None:
    document = tmp_path / "bad.md"
    document.write_text("# Title\n\n```bash\nfalse\ntrue\n```\n\n```python\nprint('never')\n```\n")
    done = subprocess.run(
        [sys.executable, __file__, str(document)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "bad.md, line 4\nfalse" in done.stdout
    assert "never" not in done.stdout


def verbs_named(text: str) -> set[str]:
    """Verbs in code: at the beginning of a command, or after a backtick."""
    commands = "\n".join(code for language, code in FENCE.findall(text) if language in ("bash", "console"))
    return {
        *re.findall(r"^actcache ([a-z][a-z-]*)", commands, re.MULTILINE),
        *re.findall(r"`actcache ([a-z][a-z-]*)", text),
    }


def test_verbs_named_are_those_there_are() -> None:
    from actcache.cli import build_app

    there = {name for name in build_app() if not name.startswith("-")}
    readme = DOCUMENTS[0].read_text(encoding="utf-8")
    assert verbs_named(readme) == there
    for document in DOCUMENTS[1:]:
        assert verbs_named(document.read_text(encoding="utf-8")) <= there


if __name__ == "__main__":
    run_document(Path(sys.argv[1]))
