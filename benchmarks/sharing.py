"""One loader for K consumers against K loaders that each read for themselves.

    python benchmarks/sharing.py

Baseline: K loaders on the same store, in K processes or in K threads, as in a sweep that shares nothing. Ours: one
bfloat16 loader, served through shared memory to K processes (`serve_batches`) or shared by K threads
(`share_batches`); each consumer widens its copy. Page cache warm, float32 batches, consumers that only take. Figures
are rows a second of all consumers together; the first epoch, in which processes start and touch memory, is not counted.
"""

from __future__ import annotations

import multiprocessing
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from measure import HEADER, Figure, compare, embedded

import actcache as ac
from actcache.load import Batch

BATCH_ROWS = 4096
SITES = ["blocks.*.hook_resid_post"]
EPOCHS = 5
CONSUMERS = (2, 4)

Taken = tuple[float, float, int]
"""From when to when a consumer took, seconds of `monotonic`, and how many rows."""


def loader_of(path: Path, dtype: torch.dtype = torch.float32) -> ac.Loader:
    """All epochs."""
    return ac.Loader(ac.open_store(path), SITES, batch_rows=BATCH_ROWS, dtype=dtype, epochs=EPOCHS)


def take(batches: Iterable[Batch], batches_per_epoch: int) -> Taken:
    """All batches, those after the first epoch counted."""
    began, n_rows = monotonic(), 0
    for number, batch in enumerate(batches):
        if number == batches_per_epoch:
            began, n_rows = monotonic(), 0
        n_rows += len(batch.rows)
    return began, monotonic(), n_rows


def rows_per_s(taken: Iterable[Taken]) -> float:
    """Of all consumers together."""
    began, ended, n_rows = zip(*taken, strict=True)
    return float(sum(n_rows) / (max(ended) - min(began)))


def alone(path: Path, barrier: Any, results: Any) -> None:
    """A consumer with a loader of its own."""
    torch.set_num_threads(1)
    loader = loader_of(path)
    barrier.wait()
    results.put(take(loader, len(loader)))


def served(socket: Path, barrier: Any, results: Any) -> None:
    """A consumer that a server reads for."""
    torch.set_num_threads(1)
    with ac.ServedBatches(socket) as batches:
        results.put(take(batches, len(batches)))


def in_processes(
    work: Callable[..., None], place: Path, n: int, meanwhile: Callable[[], object] = lambda: None
) -> float:
    """Rate of n processes."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(n), context.SimpleQueue()
    processes = [context.Process(target=work, args=(place, barrier, results)) for _ in range(n)]
    for process in processes:
        process.start()
    meanwhile()
    taken = [results.get() for _ in processes]
    for process in processes:
        process.join()
    return rows_per_s(taken)


def in_threads(batches: list[tuple[Iterable[Batch], int]]) -> float:
    """Rate of a thread for each iterable."""
    taken: list[Taken] = []
    threads = [threading.Thread(target=lambda args=args: taken.append(take(*args))) for args in batches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return rows_per_s(taken)


def serve(path: Path, n: int) -> float:
    """Rate of n processes that one loader serves."""
    with tempfile.TemporaryDirectory(prefix="actcache-bench-") as folder, loader_of(path, torch.bfloat16) as loader:
        socket = Path(folder, "batches.sock")
        return in_processes(served, socket, n, lambda: ac.serve_batches(loader, socket, n))


def share(path: Path, n: int) -> float:
    """Rate of n threads that share a loader."""
    loader = loader_of(path, torch.bfloat16)
    consumers = ac.share_batches(loader, n, dtype=torch.float32)
    return in_threads([(consumer, len(loader)) for consumer in consumers])


def by_themselves(path: Path, n: int) -> float:
    """Rate of n threads with a loader each."""
    loaders = [loader_of(path) for _ in range(n)]
    return in_threads([(loader, len(loader)) for loader in loaders])


def figures(n_sequences: int = 2048, pairs: int = 3) -> list[Figure]:
    """Processes and threads, with each codec."""
    lm, blocks = embedded(n_sequences)
    found = []
    folder = Path(tempfile.mkdtemp(prefix="actcache-bench-"))
    settings = {"unit": "rows/s", "goal": 1.5, "pairs": pairs}
    try:
        for codec in ("lossless", "raw"):
            path = folder / f"{codec}.zarr"
            ac.extract(lm, blocks, SITES, path, codec=codec)
            found += [one(path, codec, n, **settings) for n in CONSUMERS for one in (of_processes, of_threads)]
    finally:
        shutil.rmtree(folder)
    return found


def of_processes(path: Path, codec: str, n: int, **settings: Any) -> Figure:
    """Served through shared memory, and each by itself."""
    name = f"{n} processes, `{codec}`"
    return compare(name, lambda: serve(path, n), lambda: in_processes(alone, path, n), **settings)


def of_threads(path: Path, codec: str, n: int, **settings: Any) -> Figure:
    """Shared within a process, and each by itself."""
    return compare(f"{n} threads, `{codec}`", lambda: share(path, n), lambda: by_themselves(path, n), **settings)


if __name__ == "__main__":
    print(HEADER, *(figure.row() for figure in figures()), sep="\n")
