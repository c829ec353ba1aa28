"""Every public name has a worked example in its docstring, and every example gives what it says.

The examples share what `docs/reference/index.md` makes first, which is run from that page.
"""

from __future__ import annotations

import doctest
import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import test_readme

import actcache

PAGE = test_readme.ROOT / "docs" / "reference" / "index.md"


@contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """The current folder changed; not by monkeypatch, which is made for one test."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def examples_of(docstring: str) -> list[doctest.Example]:
    """The examples of a docstring's last section, which has to be called `Examples:`."""
    text, heading, section = inspect.cleandoc(docstring).partition("\nExamples:\n")
    assert ">>>" not in text, "examples stand below `Examples:`"
    return doctest.DocTestParser().get_examples(inspect.cleandoc(section)) if heading else []


def failures(name: str, examples: list[doctest.Example], names: dict[str, Any]) -> str:
    """What differs when the examples are run, as doctest shows it, or nothing. What they make is put into `names`."""
    said: list[str] = []
    test = doctest.DocTest(examples, {}, name, None, None, None)
    test.globs = names
    doctest.DocTestRunner(verbose=False).run(test, out=said.append, clear_globs=False)
    return "".join(said)


@pytest.fixture(scope="module")
def made_first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder with the small store of the reference, and the names that all examples use."""
    folder = tmp_path_factory.mktemp("reference")
    names: dict[str, Any] = {}
    with working_in(folder):
        for _, _, code in test_readme.blocks(PAGE.read_text(encoding="utf-8")):
            exec(code, names)
    return folder, names


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", actcache.__all__)
def test_the_example_of_a_public_name_runs(name: str, made_first: tuple[Path, dict[str, Any]]) -> None:
    folder, names = made_first
    public = getattr(actcache, name)
    examples, here = examples_of(public.__doc__), dict(names)
    assert examples, f"{name} has no example"
    assert any(example.want for example in examples), f"the example of {name} shows nothing"
    with working_in(folder):
        assert failures(name, examples, here) == ""
    is_called = any(f"ac.{name}" in example.source for example in examples)
    is_made = isinstance(public, type) and any(isinstance(value, public) for value in here.values())
    assert is_called or is_made, f"the example of {name} has nothing to do with it"


def test_an_example_that_says_something_else_is_noticed() -> None:
    docstring = "One line.\n\n    Examples:\n        >>> 1 + 1\n        3\n    "
    assert "Expected" in failures("wrong", examples_of(docstring), {})
    assert failures("right", examples_of(docstring.replace("3", "2")), {}) == ""
    assert examples_of("One line.\n\n    Raises:\n        ValueError: never.\n    ") == []
