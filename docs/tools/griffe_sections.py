"""For the site: sections such as `Raises:` that stand as one paragraph in the source, as one entry for each error.

In: `SiteError: no such site. IndexError: a row is out of range.`, over any number of lines. Out: two entries.
"""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

SECTION = re.compile(r"^(Raises|Warns):\n((?:[ \t]+\S.*\n?)+)", re.MULTILINE)
ENTRY = re.compile(r"(?<=[.;]) (?=[A-Z]\w*(?:Error|Warning): )")


def one_entry_each(docstring: str) -> str:
    """The docstring with every error or warning of its sections on a line of its own."""

    def entries(found: re.Match[str]) -> str:
        paragraph = " ".join(found[2].split())
        return f"{found[1]}:\n" + textwrap.indent("\n".join(ENTRY.split(paragraph)), "    ") + "\n"

    return SECTION.sub(entries, docstring)


class OneEntryEach(griffe.Extension):
    """Rewrites docstrings before they are parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called by griffe for every module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = one_entry_each(obj.docstring.value)
