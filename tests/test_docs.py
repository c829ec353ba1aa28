"""The pages hold together: headings, fences, links, the site's navigation, and the reference of every public name.

Nothing here needs the site's tools; `make docs` builds the site itself, strictly.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_readme import DOCUMENTS, FENCE, ROOT, name_of

import actcache

DOCS = ROOT / "docs"
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
LANGUAGES = {"", "python", "pycon", "bash", "console", "text", "sh", "json", "yaml"}
every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)


def prose(text: str) -> str:
    """A page without its fenced blocks."""
    return FENCE.sub("", text)


def wrong_headings(text: str) -> list[str]:
    """Headings that are no single clean line: halves of sentences, of quotes or of code, as edits leave them behind."""
    return [line for line in re.findall(r"^#+.*$", prose(text), re.MULTILINE) if not is_clean(line)]


def is_clean(heading: str) -> bool:
    """Whether a heading is a few words, perhaps with code, and nothing else."""
    found = re.fullmatch(r"#{1,6} (\S.{0,80})", heading)
    if not found or found[1] != found[1].strip():
        return False
    words = re.sub(r"`[^`]+`", "code", found[1])
    in_pairs = all(words.count(opening) == words.count(closing) for opening, closing in ["()", "[]", "{}"])
    in_sentences = re.search(r"[.!;]['\"”)]*(\s|$)", words)
    return in_pairs and not in_sentences and words.count('"') % 2 == 0 and not re.search(r"[`=<>\\]|\*\*|\d\.$", words)


def wrong_fences(text: str) -> list[str]:
    """Fences that are never closed, or that begin with something else than a language."""
    wrong, opened = [], ""
    for number, line in enumerate(text.splitlines(), 1):
        found = re.match(r"\s*(```+|~~~+)(.*)$", line)
        if not found:
            continue
        if not opened:
            opened = found[1]
            if found[2] not in LANGUAGES:
                wrong.append(f"line {number}: {line}")
        elif found[2]:
            wrong.append(f"line {number}: {line} within a block")
        elif found[1] == opened:
            opened = ""
    return [*wrong, "the last block is not closed"] if opened else wrong


def anchors(document: Path) -> set[str]:
    """Anchors of a document's headings, as forges and the site make them."""
    headings = re.findall(r"^#+ (.*)$", prose(document.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_document
def test_headings_are_clean(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    assert wrong_headings(text) == []
    titles = re.findall(r"^# .*$", prose(text), re.MULTILINE)
    sections = re.findall(r"^## .*$", prose(text), re.MULTILINE)
    assert len(titles) == 1
    assert len(sections) == len(set(sections))


@every_document
def test_fences_are_closed(document: Path) -> None:
    assert wrong_fences(document.read_text(encoding="utf-8")) == []


def glued_lists(text: str) -> list[str]:
    """First items of lists that follow a line of text: forges show a list there, and the site does not."""
    item = r"(?:[-*+]|\d+\.) "
    lines = prose(text).splitlines()
    return [
        line
        for before, line in zip(["", *lines], lines, strict=False)
        if re.match(item, line) and before and not re.match(rf"{item}| ", before)
    ]


@every_document
def test_lists_begin_behind_an_empty_line(document: Path) -> None:
    assert glued_lists(document.read_text(encoding="utf-8")) == []


def test_a_list_that_is_glued_to_its_sentence_is_seen() -> None:
    assert glued_lists("Words:\n- one\n- two\n") == ["- one"]
    assert glued_lists("Words:\n\n- one\n  goes on\n- two\n1. three\n") == []


@every_document
def test_no_table_has_a_bar_in_code(document: Path) -> None:
    """Forges take `\\|` for a bar there, and the site shows the backslash: `<code>&#124;</code>` is read by both."""
    rows = re.findall(r"^\|.*$", prose(document.read_text(encoding="utf-8")), re.MULTILINE)
    assert [row for row in rows if "\\|" in row] == []


@every_document
def test_nothing_is_left_over_in_plain_view(document: Path) -> None:
    """No half of a comment, and no conflict of a merge."""
    text = document.read_text(encoding="utf-8")
    assert not re.search(r"^(<<<<<<<|>>>>>>>|=======$)", text, re.MULTILINE)
    text = re.sub(r"^<!--.*?-->$", "", prose(text), flags=re.MULTILINE | re.DOTALL)
    assert "<!--" not in text
    assert "-->" not in text


@every_document
def test_links_lead_somewhere(document: Path) -> None:
    missing = []
    for link in LINK.findall(prose(document.read_text(encoding="utf-8"))):
        if re.match(r"[a-z-]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        if not target.exists() or (anchor and anchor not in anchors(target)):
            missing.append(link)
    assert not missing


@pytest.mark.parametrize(
    "heading",
    [
        '## Text". Uses ac, lm (Tiny) and tokenizer',
        "## Text.",
        "##Text",
        "## The `read_texts",
        "## Text (and more",
        "## A sentence. And another",
        "## x = 1",
        "## " + "far too long " * 9,
    ],
)
def test_a_broken_heading_is_seen(heading: str) -> None:
    assert wrong_headings(f"# Title\n\n{heading}\n\nWords.\n") == [heading]


def test_a_broken_fence_is_seen() -> None:
    assert wrong_fences("```python\nx = 1\n```\n") == []
    assert wrong_fences("```python\nx = 1\n") == ["the last block is not closed"]
    assert wrong_fences("```python\n```bash\n```\n") == ["line 2: ```bash within a block"]
    assert wrong_fences("```pyhton\n```\n") == ["line 1: ```pyhton"]


def navigation() -> list[str]:
    """Every page of the site's navigation, in order."""
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    part = yaml.safe_load(text[text.index("\nnav:") : text.index("\ntheme:")])

    def pages(entry: Any) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        else:
            for inner in entry if isinstance(entry, list) else entry.values():
                yield from pages(inner)

    return list(pages(part["nav"]))


def test_every_page_is_in_the_navigation_once() -> None:
    there = sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))
    assert sorted(navigation()) == there


def referred() -> list[str]:
    """What the reference shows, in order."""
    pages = [DOCS / page for page in navigation() if page.startswith("reference/")]
    return [
        name for page in pages for name in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    ]


def public_adapters() -> set[str]:
    """Functions and classes that a module in `actcache.adapters` offers; protocols describe what a peer gives."""
    names = set()
    for path in (ROOT / "actcache" / "adapters").glob("*.py"):
        if path.stem in ("__init__", "require", "resumable"):
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            is_protocol = isinstance(node, ast.ClassDef) and any(ast.unparse(base) == "Protocol" for base in node.bases)
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_" and not is_protocol:
                names.add(f"actcache.adapters.{path.stem}.{node.name}")
    return names


def test_the_reference_has_every_public_name_once() -> None:
    shown = referred()
    assert len(shown) == len(set(shown))
    assert {name for name in shown if name.count(".") == 1} - {"actcache.errors"} == {
        f"actcache.{name}" for name in actcache.__all__
    }
    assert {name for name in shown if name.startswith("actcache.adapters.")} == public_adapters()
    overview = (DOCS / "reference" / "index.md").read_text(encoding="utf-8")
    assert [name for name in actcache.__all__ if f"`{name}`" not in overview] == []


def test_the_page_of_the_command_line_says_what_its_help_says() -> None:
    sys.path.insert(0, str(ROOT / "pipelines"))
    from command_line_page import PAGE, command_line_page

    way_out = "run `python pipelines/command_line_page.py`"
    assert PAGE.read_text(encoding="utf-8") == command_line_page(), way_out


def test_the_picture_is_what_its_script_draws() -> None:
    sys.path.insert(0, str(ROOT / "pipelines"))
    from draw_road import PICTURE, picture

    assert PICTURE.read_text(encoding="utf-8") == picture()


def test_the_readme_shows_the_figures_of_the_benchmarks_page() -> None:
    sys.path.insert(0, str(ROOT / "pipelines"))
    from update_readme import SHOWN, benchmark_table, replace_region

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = benchmark_table((DOCS / "benchmarks.md").read_text(encoding="utf-8"))
    assert replace_region(readme, "benchmarks", table) == readme
    assert all(row in table for rows in SHOWN.values() for row in rows)


def test_the_template_for_problems_asks_for_what_is_needed() -> None:
    """It is valid, and the commands that it names exist."""
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text(encoding="utf-8"))
    asked = {field["id"]: field["attributes"] for field in form["body"]}
    assert all(attributes["label"] for attributes in asked.values())
    assert "`actcache info STORE --json`" in asked["info"]["description"]
    assert "`actcache --version`" in asked["versions"]["description"]
    assert asked.keys() >= {"command", "output", "info", "versions"}
