"""Run every benchmark and write `docs/benchmarks.md`: the figures, the machine and the versions beside them.

    make benchmarks

Takes about a quarter of an hour on two cores. Each row compares two ways of doing the same work, run in turn on the
same data; only ratios are meant to be carried to other machines.
"""

from __future__ import annotations

import datetime
from pathlib import Path

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
    "Plan / extraction": plan,
    "Loader / rows in memory, a memory-mapped file, annbatch": loader,
    "Loader, page cache cold / reading in order": loader_cold,
    "Loader, requests 20 ms late / loader in a folder": latency,
    "One loader for K consumers / K loaders": sharing,
    "Training / bare torch loop of the same step": training,
}


def main() -> None:
    """Measure and write."""
    today = datetime.datetime.now(tz=datetime.UTC).date()
    parts = ["# Benchmarks", f"Written by `make benchmarks` on {today}.", f"Machine: {machine()}."]
    for title, module in TITLES.items():
        doc = (module.__doc__ or "").split("\n\n")
        found = module.figures()
        parts += [f"## {title}", doc[-1].strip(), HEADER + "\n" + "\n".join(figure.row() for figure in found)]
        print("\n\n".join(parts[-3:]), flush=True)
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
