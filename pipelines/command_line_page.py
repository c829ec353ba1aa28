"""Write docs/reference/command-line.md from the command line's own help.

    python pipelines/command_line_page.py

A test holds that the page says what the help says.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from actcache.cli import build_app

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reference" / "command-line.md"
NOTE = "<!-- Written by `python pipelines/command_line_page.py`. -->"
PATTERN = re.compile(r"'([^'\n`]*\*[^'\n`]*)'")


def command_line_page() -> str:
    """The page: what every verb does, its arguments, options, choices and defaults."""
    app = build_app()
    arguments, sys.argv = sys.argv, ["actcache"]  # lines of usage begin with the running program
    try:
        text = app.generate_docs(output_format="markdown", usage_name="actcache")
    finally:
        sys.argv = arguments
    head, _, rest = text.partition("## Table of Contents\n")
    verbs = rest[rest.index("\n**") + 1 :]  # the groups of verbs
    head = head.replace("# actcache\n", f"# Command line\n\n{NOTE}\n", 1)
    page = f"{head.rstrip()}\n\n{app.help_epilogue}\n{verbs}"
    # A star in quotes is a pattern, and no emphasis.
    page = PATTERN.sub(r"`\1`", page)
    page = page.replace("\n* ", "\n- ")
    # Forges and the site make different anchors of its heading.
    page = re.sub(r"\[(`--install-completion`)\]\([^)]*\)", r"\1", page)
    return "\n".join(line.rstrip() for line in page.splitlines()).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(command_line_page(), encoding="utf-8")
