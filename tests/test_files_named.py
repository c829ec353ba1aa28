"""Files that docs, docstrings and comments name are there under that name."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PLACES = ("actcache", "benchmarks", "pipelines", "tests", ".ci")
OF_OTHERS = {"activation_scaler.py"}
"""Files of other packages."""
NAMED = re.compile(r"`((?:[\w.-]+/)*[\w-]+\.py)`")


def test_every_file_that_is_named_exists():
    files = [path for place in PLACES for path in (ROOT / place).rglob("*.py")]
    known = {"/" + path.relative_to(ROOT).as_posix() for path in files}
    texts = [*files, *ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    named = [(path, name) for path in texts for name in NAMED.findall(path.read_text())]
    assert len(named) > 20
    missing = [
        f"{path.relative_to(ROOT)} names {name}"
        for path, name in named
        if name not in OF_OTHERS and not any(file.endswith(f"/{name}") for file in known)
    ]
    assert not missing, "\n".join(missing)
