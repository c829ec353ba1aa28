"""For the site: docstrings as its tools expect them, so that the sources may stay compact.

Sections such as `Raises:` stand as one paragraph in the source, `SiteError: no such site. IndexError: a row is out of
range.`, over any number of lines; they become one entry for each error. Trees that are drawn with lines become blocks
of text.
"""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

SECTION = re.compile(r"^(Raises|Warns):\n((?:[ \t]+\S.*\n?)+)", re.MULTILINE)
TREE = re.compile(r"(?:^\S+\n)?(?:^[├└│].*\n?)+", re.MULTILINE)
ENTRY = re.compile(r"(?<=[.;]) (?=[A-Z]\w*(?:Error|Warning): )")


def one_entry_each(docstring: str) -> str:
    """The docstring with every error or warning of its sections on a line of its own."""

    def entries(found: re.Match[str]) -> str:
        paragraph = " ".join(found[2].split())
        return f"{found[1]}:\n" + textwrap.indent("\n".join(ENTRY.split(paragraph)), "    ") + "\n"

    return SECTION.sub(entries, docstring)


def trees_as_blocks(docstring: str) -> str:
    """The docstring with every drawn tree between fences."""
    return TREE.sub(lambda tree: f"```text\n{tree[0].rstrip()}\n```\n", docstring)


class Docstrings(griffe.Extension):
    """Rewrites docstrings before they are parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called by griffe for every module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = trees_as_blocks(one_entry_each(obj.docstring.value))
