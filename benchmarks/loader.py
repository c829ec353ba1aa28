"""The loader against what one does without it: rows in memory, a memory-mapped file, annbatch.

    python benchmarks/loader.py

Data: 204,800 rows of 768 bfloat16 values, the residual streams of six tokens in a row side by side, 315 MB, in the page
cache. Each way delivers every row once an epoch in batches of 4,096, as float32 unless stated otherwise, to a consumer
that only takes them. Figures are GB/s of bfloat16 payload over three epochs in a row; for a single epoch, the start and
end of the reading included, the loader's are up to a tenth lower. Ours: the loader on a store on disk, with default
settings, checksums compared. Baselines, in turn with it:

- in memory: all rows as one bfloat16 tensor, and `rows[index].float()` for each batch of a global permutation.
- np.memmap: one file of the same bits, and `torch.from_numpy(rows[index]).view(torch.bfloat16).float()`, in the same
  way. Sorting the index of a batch gains nothing.
- annbatch 0.3.1: its `Loader` with the codecs of zarrs, in a process of its own, on a sharded Zarr array of the same
  rows in the same order. The fastest way found is an array of the same bits, in chunks of 1,024 rows of which
  it holds 100, as many rows as our two windows have, each batch widened with numpy: uncompressed, or with lz4 and
  bitshuffle. Its defaults are float32 values in chunks of 64 rows, lz4 and shuffle, 16,384 rows held.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from loader_annbatch import COMPRESSED, DEFAULTS, UNCOMPRESSED, MissingPeerError, Peer, environment
from loader_data import BATCH_ROWS, SITE, store_of, wide
from measure import HEADER, Figure, compare, rate
from numpy.typing import NDArray

import actcache as ac
from actcache.memory import keep_freed_memory
from actcache.store import Store

EPOCHS = 3
CODECS = ("lossless", "raw", "int8")
GOALS = [
    ("lossless", "annbatch, lz4", 2.5),
    ("lossless", "annbatch, its defaults", 2.5),
    ("lossless", "in memory", 0.8),
    ("raw", "annbatch, uncompressed", None),
    ("raw", "in memory", 1.0),
    ("raw", "np.memmap", 1.0),
    ("int8", "in memory", 1.0),
    ("int8", "np.memmap", 1.0),
]
"""Store, baseline, and what the one should reach over the other."""
BFLOAT16_GOAL = 1.3
"""Of bfloat16 batches over float32 ones of the same store."""
_PEERS = {
    "annbatch, lz4": COMPRESSED,
    "annbatch, its defaults": DEFAULTS,
    "annbatch, uncompressed": UNCOMPRESSED,
}


def batches_of_rows(n_rows: int, epoch: int) -> torch.Tensor:
    """`(batches, B)` all rows in random order."""
    return torch.randperm(n_rows, generator=torch.Generator().manual_seed(epoch)).view(-1, BATCH_ROWS)


def gather_in_memory(rows_ND: torch.Tensor) -> None:
    """Epochs from one tensor."""
    for epoch in range(EPOCHS):
        for index in batches_of_rows(len(rows_ND), epoch):
            rows_ND[index].float()


def gather_from_file(rows_ND: NDArray[np.uint16]) -> None:
    """Epochs from one memory-mapped file."""
    for epoch in range(EPOCHS):
        for index in batches_of_rows(len(rows_ND), epoch).numpy():
            torch.from_numpy(rows_ND[index]).view(torch.bfloat16).float()


def load(loader: ac.Loader) -> None:
    """Epochs of ours."""
    for _ in loader:
        pass


@contextmanager
def baselines(rows_ND: torch.Tensor, folder: Path, *, install: bool) -> Iterator[dict[str, Callable[[], float]]]:
    """What each baseline reaches, in GB/s; of annbatch nothing where it cannot be had."""
    gigabytes, width = EPOCHS * rows_ND.nbytes / 1e9, rows_ND.shape[1]
    file, bits = folder / "rows.bits", rows_ND.view(torch.uint16).numpy()
    bits.tofile(file)
    mapped = np.memmap(file, np.uint16, "r").reshape(-1, width)
    found: dict[str, Callable[[], float]] = {
        "in memory": partial(rate, gigabytes, lambda: gather_in_memory(rows_ND)),
        "np.memmap": partial(rate, gigabytes, lambda: gather_from_file(mapped)),
    }
    try:
        python = environment(install=install)
    except MissingPeerError as missing:
        print(f"annbatch is left out: {missing}", file=sys.stderr)
        yield found
        return
    sizes = {"bits": str(file), "width": width, "batch_size": BATCH_ROWS, "epochs": EPOCHS}
    with ExitStack() as stack:
        for name, way in _PEERS.items():
            peer = stack.enter_context(Peer(python, folder=str(folder / f"{name}.zarr"), **sizes, **way))
            if peer.sum_of_bits != int(bits.sum(dtype=np.uint64)):
                raise RuntimeError(f"{name}: it delivers other values than it was given")
            found[name] = partial(_reached_by, peer, gigabytes)
        yield found


def _reached_by(peer: Peer, gigabytes: float) -> float:
    return gigabytes / peer.epochs()


def loaded(store: Store, dtype: torch.dtype) -> tuple[ac.Loader, Callable[[], float]]:
    """A loader, and what it reaches in GB/s."""
    loader = ac.Loader(store, [SITE], batch_rows=BATCH_ROWS, dtype=dtype, epochs=EPOCHS)
    gigabytes = EPOCHS * len(loader) * BATCH_ROWS * store.spec.site(SITE).width * 2 / 1e9
    return loader, partial(rate, gigabytes, partial(load, loader))


def against(store: Store, name: str, baseline: Callable[[], float], goal: float | None, pairs: int) -> Figure:
    """Float32 batches against a baseline."""
    loader, ours = loaded(store, torch.float32)
    with loader:
        name = f"`{store.spec.site(SITE).codec}` / {name}"
        return compare(name, ours, baseline, unit="GB/s", goal=goal, pairs=pairs)


def as_bfloat16(store: Store, pairs: int) -> Figure:
    """Batches of one store in its own precision against float32 ones."""
    narrow, ours = loaded(store, torch.bfloat16)
    widened, baseline = loaded(store, torch.float32)
    with narrow, widened:
        name = f"`{store.spec.site(SITE).codec}` as bfloat16 / as float32"
        return compare(name, ours, baseline, unit="GB/s", goal=BFLOAT16_GOAL, pairs=pairs)


def figures(n_sequences: int = 804, pairs: int = 3, *, install: bool = True) -> list[Figure]:
    """Every comparison; the environment of annbatch is made where there is none, if `install` says so."""
    keep_freed_memory()
    data = wide(n_sequences)
    with tempfile.TemporaryDirectory(prefix="actcache-bench-") as name:
        stores = {codec: store_of(data, codec, Path(name)) for codec in CODECS}
        whole = stores["raw"].n_rows // BATCH_ROWS * BATCH_ROWS
        rows_ND = stores["raw"].read(SITE, slice(0, whole))
        with baselines(rows_ND, Path(name), install=install) as ways:
            found = [against(stores[codec], way, ways[way], goal, pairs) for codec, way, goal in GOALS if way in ways]
        return found + [as_bfloat16(store, pairs) for store in stores.values()]


if __name__ == "__main__":
    print(HEADER, *(figure.row() for figure in figures()), sep="\n")
