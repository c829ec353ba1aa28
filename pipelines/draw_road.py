"""Draw docs/assets/road.svg, the picture of README and the first page: from text to batches.

    python pipelines/draw_road.py

Boxes have a fill and text of their own, and lines a middle grey, so that it can be read on white and on black.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "assets" / "road.svg"
WIDTH, HEIGHT, TOP, GAP = 164, 128, 30, 26
INDIGO, ORANGE, TEAL = ("#e8eaf6", "#303f9f"), ("#fff3e0", "#b25000"), ("#e0f2f1", "#00695c")
"""Fill, and ink of title and border."""
BOXES = [
    ("once", "text", ["files, datasets,", "chats or token ids,", "packed into", "sequences"], INDIGO),
    ("once", "model", ["one forward pass,", "only as far as the", "last site that", "you name"], INDIGO),
    ("kept", "acts.zarr", ["small and checked;", "sites aligned;", "each row knows", "its token"], ORANGE),
    ("many times", "loader", ["shuffled by a seed,", "resumed exactly,", "on any number", "of ranks"], TEAL),
    ("many times", "trainers", ["SAELens, sparsify,", "Lightning, JAX, ...", "your own, or the", "one included"], TEAL),
]


def box(place: int, when: str, title: str, lines: list[str], colours: tuple[str, str]) -> list[str]:
    """One box with its title and lines, and how often it is run above it."""
    left, (fill, ink) = 4 + place * (WIDTH + GAP), colours
    middle = left + WIDTH / 2
    drawn = [
        f'<text x="{middle}" y="{TOP - 12}" class="when">{escape(when)}</text>',
        f'<rect x="{left}" y="{TOP}" width="{WIDTH}" height="{HEIGHT}" rx="10" fill="{fill}" stroke="{ink}"/>',
        f'<text x="{middle}" y="{TOP + 27}" class="title" fill="{ink}">{escape(title)}</text>',
    ]
    drawn += [
        f'<text x="{middle}" y="{TOP + 51 + 19 * number}" class="line">{escape(line)}</text>'
        for number, line in enumerate(lines)
    ]
    return drawn


def arrow(place: int) -> str:
    """The arrow that leads to box `place`."""
    start, y = 4 + place * (WIDTH + GAP) - GAP + 4, TOP + HEIGHT / 2
    stop = start + GAP - 8
    return f'<path d="M{start} {y}H{stop}m-8 -6l8 6l-8 6" fill="none" stroke="#8a8f98" stroke-width="2"/>'


def picture() -> str:
    """The whole picture as SVG."""
    width, height = 8 + len(BOXES) * WIDTH + (len(BOXES) - 1) * GAP, TOP + HEIGHT + 6
    style = (
        "text{font-family:system-ui,-apple-system,'Segoe UI',Helvetica,Arial,sans-serif;text-anchor:middle}"
        ".title{font-size:19px;font-weight:600}.line{font-size:14px;fill:#37404a}.when{font-size:13px;fill:#8a8f98}"
    )
    parts = [part for place, about in enumerate(BOXES) for part in box(place, *about)]
    parts += [arrow(place) for place in range(1, len(BOXES))]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">'
    title = "<title>From text to batches: the model runs once, trainers read many times</title>"
    return "\n".join([head, title, f"<style>{style}</style>", *parts, "</svg>", ""])


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
