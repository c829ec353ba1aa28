"""The loader on a store that answers 20 ms late, against the same store in a folder.

    python benchmarks/latency.py

Baseline: three epochs of the loader on a folder (page cache warm). Ours: the same epochs through
obstore, as a bucket is read, where every request waits 20 ms first; commit records and indexes of all shards are
fetched in it too. Figures are GB/s of bfloat16 payload.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import obstore
from measure import HEADER, Figure, compare, embedded, rate
from zarr.storage import ObjectStore

import actcache as ac
from actcache.store import Objects

DELAY_S = 0.02
BATCH_ROWS = 4096
EPOCHS = 3
_REQUESTS = ("get", "span", "read_into", "tail", "size", "put", "create", "names", "delete")
SITES = ["blocks.2.mlp.hook_in", "blocks.2.hook_resid_post"]


class Late:
    """A way to a store's objects on which every request waits, in the thread that makes it, as those to buckets do."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._backend, name)
        return self._later(found) if name in _REQUESTS else found

    @staticmethod
    def _later(request: Callable[..., Any]) -> Callable[..., Any]:
        def later(*arguments: Any) -> Any:
            time.sleep(DELAY_S)
            return request(*arguments)

        return later


def far_away(path: Path, *, read_only: bool = True) -> Objects:
    """The store in a folder that exists, through obstore as a bucket would be, and late."""
    objects = Objects(ObjectStore(obstore.store.LocalStore(path), read_only=read_only), read_only=read_only)
    objects.backend = Late(objects.backend)  # type: ignore[assignment]  # a proxy: has all of its methods
    return objects


def figures(n_sequences: int = 4096, pairs: int = 3) -> list[Figure]:
    """One epoch with two sites, for each of the codecs that decode at different speeds."""
    lm, blocks = embedded(n_sequences)
    found = []
    folder = Path(tempfile.mkdtemp(prefix="actcache-bench-"))
    try:
        for codec in ("lossless", "int8"):
            path = folder / f"{codec}.zarr"
            store = ac.extract(lm, blocks, SITES, path, codec=codec)
            gigabytes = EPOCHS * store.info()["raw_bytes"] / 1e9

            def epochs(objects: Objects, gigabytes: float = gigabytes) -> float:
                with ac.Loader(ac.open_store(objects), SITES, batch_rows=BATCH_ROWS, epochs=EPOCHS) as loader:
                    return rate(gigabytes, lambda: [None for _ in loader])

            def late(path: Path = path) -> float:
                return epochs(far_away(path))

            def here(path: Path = path) -> float:
                return epochs(Objects(path, read_only=True))

            name = f"load two sites, `{codec}`, {1000 * DELAY_S:.0f} ms late"
            found.append(compare(name, late, here, unit="GB/s", goal=0.8, pairs=pairs))
    finally:
        shutil.rmtree(folder)
    return found


if __name__ == "__main__":
    print(HEADER, *(figure.row() for figure in figures()), sep="\n")
