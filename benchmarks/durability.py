"""What it costs that committed shards are on the disk.

    python benchmarks/durability.py --sequences 1536 --pairs 5

Extraction with `fsync` (the default) against `durable=False`, sites and codec the same, shards of the default size; and
the writer alone, which has the rows in memory already and is bound by the disk then. Each run begins when the disk has
nothing left to write. Rates are those of the clock, and of the processors' time (user and system, all threads), which a
machine that is busy with other things disturbs less. Goal: at most 3 % of extraction on a local disk.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from time import perf_counter

from measure import HEADER, Figure, embedded, figure_of, machine
from store import write_store
from store_data import recorded

import actcache as ac
from actcache.memory import keep_freed_memory
from actcache.spec import StoreSpec

SITES = {2: ["blocks.2.mlp.hook_in", "blocks.2.hook_mlp_out"], 8: ["blocks.*.mlp.hook_in", "blocks.*.hook_mlp_out"]}
GOAL = 0.97
Work = Callable[[Path, bool], object]
"""Makes a store at a place, flushed or not."""


@contextmanager
def _folder(where: Path | None) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="actcache-bench-", dir=where))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def _rates(work: Work, path: Path, durable: bool, amount: float) -> tuple[float, float]:
    """Amount a second of the clock, and a second of the processors."""
    shutil.rmtree(path, ignore_errors=True)
    os.sync()
    before, began = os.times(), perf_counter()
    work(path, durable)
    seconds, after = perf_counter() - began, os.times()
    return amount / seconds, amount / (after.user + after.system - before.user - before.system)


def compared(
    name: str, work: Work, amount: float, unit: str, goal: float | None, pairs: int, where: Path | None
) -> list[Figure]:
    """Flushed against not flushed, in turn, the one first and then the other; one pair before warms caches."""
    runs: list[dict[bool, tuple[float, float]]] = []
    with _folder(where) as folder:
        for pair in range(pairs + 1):
            order = (True, False) if pair % 2 else (False, True)
            runs.append({durable: _rates(work, folder / "acts.zarr", durable, amount) for durable in order})
    return [
        figure_of(f"{name}, by the {clock}", [(run[True][i], run[False][i]) for run in runs[1:]], unit=unit, goal=goal)
        for i, clock in enumerate(("clock", "processors"))
    ]


def figures(n_sequences: int = 1536, pairs: int = 5, where: Path | None = None) -> list[Figure]:
    """Extraction of 2 and of 8 sites, and the writer alone."""
    keep_freed_memory()
    lm, blocks = embedded(n_sequences)

    def extract(sites: list[str], path: Path, durable: bool) -> None:
        ac.extract(lm, blocks, sites, path, durable=durable)

    found: list[Figure] = []
    for n_sites, sites in SITES.items():
        work = partial(extract, sites)
        name = f"extract, {n_sites} sites of `{lm.name}`, `lossless`"
        found += compared(name, work, blocks.ids.size, "tokens/s", GOAL, pairs, where)
    data = recorded(n_sequences)
    for codec in ("lossless", "raw"):
        spec = data.spec(codec)

        def write(path: Path, durable: bool, spec: StoreSpec = spec) -> None:
            write_store(data, spec, path, durable=durable)

        found += compared(f"writer alone, 8 sites, `{codec}`", write, data.gigabytes, "GB/s", None, pairs, where)
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sequences", type=int, default=1536)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="disk to measure; by default the system's temporary folder")
    options = parser.parse_args()
    print(machine())
    print(HEADER, *(figure.row() for figure in figures(options.sequences, options.pairs, options.folder)), sep="\n")


if __name__ == "__main__":
    main()
