"""Run every benchmark and write `docs/benchmarks.md`: the figures, the machine and the versions beside them.

    make benchmarks
    python benchmarks/run.py loader training    # only these; the rest of the page stays, with the day it was taken

Takes about half an hour on two cores. Each row compares two ways of doing the same work, run in turn on the
same data; only ratios are meant to be carried to other machines.
"""

from __future__ import annotations

import datetime
import sys
from pathlib import Path
from types import ModuleType

import durability
import extraction
import latency
import loader
import loader_cold
import plan
import sharing
import training
from measure import HEADER, machine

TARGET = Path(__file__).resolve().parents[1] / "docs" / "benchmarks.md"
TITLES = {
    "Extraction / bare forward of the same batches": extraction,
    "Extraction flushed / not flushed": durability,
    "Plan / extraction": plan,
    "Loader / rows in memory, a memory-mapped file, annbatch": loader,
    "Loader, page cache cold / reading in order": loader_cold,
    "Loader, requests 20 ms late / loader in a folder": latency,
    "One loader for K consumers / K loaders": sharing,
    "Training / bare torch loop of the same step": training,
}


def main(names: list[str]) -> None:
    """Measure all, or the modules that are named, and write."""
    unknown = set(names) - {module.__name__ for module in TITLES.values()}
    if unknown:
        raise SystemExit(
            f"no benchmark {', '.join(unknown)}; there are {', '.join(m.__name__ for m in TITLES.values())}"
        )
    kept = sections(TARGET.read_text()) if names and TARGET.exists() else {}
    for title, module in TITLES.items():
        if names and module.__name__ not in names:
            continue
        kept[title] = section(module)
        print(title, kept[title], sep="\n\n", flush=True)
        write(kept)


def section(module: ModuleType) -> str:
    """A module's text and figures, and the day."""
    today = datetime.datetime.now(tz=datetime.UTC).date()
    what = (module.__doc__ or "").split("\n\n")[-1].strip()
    rows = [figure.row() for figure in module.figures()]
    return "\n\n".join([f"Taken on {today}.", what, "\n".join([HEADER, *rows])])


def sections(page: str) -> dict[str, str]:
    """The sections of a page that was written before, by title."""
    parts = (part.split("\n\n", 1) for part in page.split("\n## ")[1:])
    return {title: text.strip() for title, text in parts}


def write(kept: dict[str, str]) -> None:
    """The page, in the order of `TITLES`."""
    parts = ["# Benchmarks", "Written by `make benchmarks`.", f"Machine: {machine()}."]
    parts += [part for title in TITLES if title in kept for part in (f"## {title}", kept[title])]
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
