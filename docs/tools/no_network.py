"""For the site: the build fails if a built page would load anything from a network."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError

TAG = re.compile(
    r"<(?:script|img|iframe|source|video|audio|embed)\b[^>]*?\bsrc=[\"']?(?:https?:)?//[^>]*>", re.IGNORECASE
)
SHEET = re.compile(
    r"<link\b(?=[^>]*\brel=[\"']?(?:stylesheet|icon|preload|preconnect))[^>]*\bhref=[\"']?(?:https?:)?//[^>]*>"
)
STYLE = re.compile(r"(?:@import\s+[\"']|url\(\s*[\"']?)(?:https?:)?//[^)\"']*")


def on_post_build(config: Any, **kwargs: Any) -> None:
    """Called by mkdocs when all pages are written."""
    for path in sorted(Path(config.site_dir).rglob("*")):
        if path.suffix in (".html", ".css"):
            text = path.read_text(encoding="utf-8")
            for pattern in (TAG, SHEET) if path.suffix == ".html" else (STYLE,):
                if found := pattern.search(text):
                    raise PluginError(f"{path}: a page may load nothing from a network, and this one has {found[0]}")
