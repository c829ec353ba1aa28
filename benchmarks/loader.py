"""The loader against a random gather of the same rows in memory.

    python benchmarks/loader.py

Baseline: all rows in memory as bfloat16, and `rows[index].float()` for each batch of a global random permutation: what
one writes when everything fits. Ours: the loader on a store on disk (page cache warm), float32 out, checksums compared.
Figures are GB/s of bfloat16 payload. This is the second baseline: against the first, a gather into buffers that are
reused and stay in cache (5 to 10 GB/s on the same machine), an earlier loader reached 0.14 to 0.29, below the goal.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch
from measure import HEADER, Figure, compare, embedded, rate

import actcache as ac
from actcache.store import Store

BATCH_ROWS = 4096
SITE = "blocks.2.mlp.hook_post"


def gather_in_memory(rows_ND: torch.Tensor, seed: int) -> None:
    """Every row once, in random order, in float32 batches."""
    order = torch.randperm(len(rows_ND), generator=torch.Generator().manual_seed(seed))
    for rows in order[: len(order) // BATCH_ROWS * BATCH_ROWS].view(-1, BATCH_ROWS):
        rows_ND[rows].float()


def one(store: Store, site: str, pairs: int) -> Figure:
    """One epoch of the loader against one of the gather, in GB/s of stored-dtype payload."""
    rows_ND = store.read(site, slice(None))
    gigabytes = len(rows_ND) // BATCH_ROWS * BATCH_ROWS * rows_ND.shape[1] * 2 / 1e9
    loader = ac.Loader(store, [site], batch_rows=BATCH_ROWS)

    def epoch() -> None:
        for _ in loader:
            pass

    try:
        return compare(
            f"load `{site}`, `{store.spec.site(site).codec}`",
            lambda: rate(gigabytes, epoch),
            lambda: rate(gigabytes, lambda: gather_in_memory(rows_ND, 0)),
            unit="GB/s",
            goal=0.5,
            pairs=pairs,
        )
    finally:
        loader.close()


def figures(n_sequences: int = 2048, pairs: int = 3) -> list[Figure]:
    """A residual-stream site and a wide ReLU site, with each codec."""
    lm, blocks = embedded(n_sequences)
    sites = ["blocks.2.mlp.hook_in", SITE]
    found = []
    folder = Path(tempfile.mkdtemp(prefix="actcache-bench-"))
    try:
        for codec in ("lossless", "raw"):
            store = ac.extract(lm, blocks, sites, folder / f"{codec}.zarr", codec=codec)
            found += [one(store, site, pairs) for site in sites]
    finally:
        shutil.rmtree(folder)
    return found


if __name__ == "__main__":
    print(HEADER, *(figure.row() for figure in figures()), sep="\n")
