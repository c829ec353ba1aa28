"""The loader on a store that is not in the page cache, against reading the same bytes from the disk in order.

    python benchmarks/loader_cold.py

Data: 1,025,100 rows of 768 bfloat16 values, the residual streams of six tokens in a row side by side: 1.6 GB, no row
twice, on a local disk. Before each run its files are dropped from the page cache; the counter in /proc/self/io shows
whether they came from the disk. Ours: one epoch of the loader in batches of 4,096, float32, in windows of a
sixteenth of the store, so that there are several, as in a larger store. Baseline: the files that hold the values, one
after another in reads of 8 MiB, by one thread or by two, whichever is faster; nothing is done with them. Figures are
GB/s of stored bytes. The last row is for comparison, in MB/s of values: `torch.from_numpy(rows[index])` for random rows
of one memory-mapped file, for the first batch of an epoch alone. If the file is larger than memory, the whole epoch is
as slow; here, later batches would find in the cache what the system had read around the rows of the first.
"""

from __future__ import annotations

import os
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from loader import batches_of_rows, load
from loader_data import BATCH_ROWS, SITE, store_of, wide
from measure import HEADER, Figure, compare, rate
from store import forget
from store_data import Data

import actcache as ac
from actcache.store import Store
from actcache.store.format.keys import sharded_key

CODECS = ("lossless", "raw")
_MEMORY = "200MB"
_READ_BYTES = 8 << 20
_FROM_DISK = 0.9
"""Share of the bytes that has to come from the disk, or the page cache had them."""


def cold(files: list[Path], n_bytes: int, work: Callable[[], object]) -> float:
    """GB/s of work that reads so many bytes of these files, none of which is in the page cache."""
    forget(files)
    before = bytes_from_disk()
    reached = rate(n_bytes / 1e9, work)
    found = bytes_from_disk() - before
    if found < _FROM_DISK * n_bytes:
        warnings.warn(f"{found:,} of {n_bytes:,} bytes came from a disk, as far as can be told", stacklevel=2)
    return reached


def bytes_from_disk() -> int:
    """What this process has read so far that was not in the page cache; 0 where the system does not say."""
    counters = Path("/proc/self/io")
    lines = counters.read_text().splitlines() if counters.exists() else []
    return sum(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def read_in_order(files: list[Path], threads: int) -> int:
    """Every byte of the files once, into buffers that are reused; how many that were."""
    buffers = threading.local()

    def read(place: tuple[int, int]) -> int:
        if not hasattr(buffers, "bytes"):
            buffers.bytes = bytearray(_READ_BYTES)
        return os.preadv(place[0], [buffers.bytes], place[1])

    descriptors = [os.open(file, os.O_RDONLY) for file in files]
    try:
        sizes = [os.fstat(descriptor).st_size for descriptor in descriptors]
        places = [(d, at) for d, size in zip(descriptors, sizes, strict=True) for at in range(0, size, _READ_BYTES)]
        with ThreadPoolExecutor(threads) as pool:
            return sum(pool.map(read, places))
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def against_the_disk(store: Store, pairs: int) -> tuple[Figure, ac.LoaderStats]:
    """An epoch of all values against their files, and what the loader's time went into over all its runs."""
    shards = range(store.spec.n_shards)
    files = [Path(store.path, sharded_key(SITE, "acts", shard)) for shard in shards]
    n_bytes = sum(file.stat().st_size for file in files)

    def in_order(threads: int) -> float:
        return cold(files, n_bytes, lambda: read_in_order(files, threads))

    threads = max((1, 2), key=in_order)
    name = f"`{store.spec.site(SITE).codec}` / reading in order, {threads} thread{'s' * (threads > 1)}"
    with ac.Loader(store, [SITE], batch_rows=BATCH_ROWS, memory=_MEMORY, drop_last=False) as loader:
        figure = compare(
            name,
            lambda: cold(files, n_bytes, lambda: load(loader)),
            lambda: in_order(threads),
            unit="GB/s",
            goal=0.8,
            pairs=pairs,
        )
        return figure, loader.stats()


def against_random_rows(store: Store, data: Data, bits: Path, pairs: int) -> tuple[Figure, ac.LoaderStats]:
    """An epoch against a batch of random rows of one file."""
    rows = data.rows[SITE][: store.n_rows // BATCH_ROWS * BATCH_ROWS]
    rows.tofile(bits)
    files = [file for file in Path(store.path).rglob("*") if file.is_file()]
    batch_bytes = BATCH_ROWS * rows.shape[1] * rows.itemsize
    with ac.Loader(store, [SITE], batch_rows=BATCH_ROWS, memory=_MEMORY, drop_last=False) as loader:
        figure = compare(
            f"`{store.spec.site(SITE).codec}` / np.memmap, random rows",
            lambda: 1000 * cold(files, data.rows[SITE].nbytes, lambda: load(loader)),
            lambda: 1000 * cold([bits], batch_bytes, lambda: first_batch(bits, rows.shape[1])),
            unit="MB/s",
            goal=None,
            pairs=pairs,
        )
        return figure, loader.stats()


def first_batch(bits: Path, width: int) -> torch.Tensor:
    """Random rows of a file that is mapped for them, and not longer: the system drops no page that is."""
    rows_ND = np.memmap(bits, np.uint16, "r").reshape(-1, width)
    return torch.from_numpy(rows_ND[batches_of_rows(len(rows_ND), 0)[0].numpy()])


def measured(n_sequences: int, pairs: int) -> Iterator[tuple[Figure, ac.LoaderStats]]:
    """Each comparison with the statistics of the loader in it."""
    data = wide(n_sequences)
    with tempfile.TemporaryDirectory(prefix="actcache-bench-") as name:
        for codec in CODECS:
            store = store_of(data, codec, Path(name))
            yield against_the_disk(store, pairs)
        yield against_random_rows(store, data, Path(name, "rows.bits"), pairs)


def figures(n_sequences: int = 4020, pairs: int = 3) -> list[Figure]:
    """Every comparison."""
    return [figure for figure, _ in measured(n_sequences, pairs)]


if __name__ == "__main__":
    print(HEADER)
    spent = []
    for figure, stats in measured(4020, 3):
        print(figure.row(), flush=True)
        spent.append(f"- {figure.name}: {stats}")
    print(*spent, sep="\n")
