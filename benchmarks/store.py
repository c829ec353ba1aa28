"""The store against what the codecs and the disk allow, and against zarr-python's own sharded arrays.

    python benchmarks/store.py --out docs/store-speed.md

Data: eight residual-stream sites of the embedded model, 627 MB of bfloat16, in memory before anything is timed. Rates
are GB/s of these bytes before compression (reading and checking whole files: of stored bytes), two threads each, local
disk, page cache warm unless a row says cold. Nothing is flushed, neither by us nor by the baselines (what that costs is
in `durability.py`). All baselines run in turn with ours, on the same data:

- write ceiling: the same chunks are encoded, each thread writes what comes out to plain files. It neither
  shuffles rows, nor takes statistics, nor checksums, all of which the store does.
- read ceiling: the same chunks in the same random order, read from files that stay open and decompressed by numcodecs
  into a buffer that is reused. Nothing is checked.
- scan ceiling: every file of the store read whole into buffers that are reused. Nothing is checked.
- zarr-python: the same arrays, chunks, shards and codecs, in its default configuration.
"""

from __future__ import annotations

import argparse
import datetime
import inspect
import os
import random
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from measure import HEADER, Figure, compare, machine, rate
from numpy.typing import NDArray
from store_bounds import MEASURED_HEADER, THREADS, bounds, part_rows
from store_data import Data, compressor_of, expander_of, of_shard, recorded

from actcache.memory import Scratch, keep_freed_memory
from actcache.spec import StoreSpec
from actcache.store import Store, StoreWriter, open_store, to_write
from actcache.store.format.keys import sharded_key
from actcache.store.format.site_arrays import arrays_of, chunks_per_shard
from actcache.store.maintenance.verify import verify

_CHECKSUM_BYTES = 4
_INDEX_ENTRY_BYTES = 16

PRESETS = ("lossless",)

# --- ways of writing -----------------------------------------------------------------------------------------------


def write_store(data: Data, spec: StoreSpec, path: Path, *, durable: bool = False) -> Store:
    """Through the store's writer, from rows that are in memory already: what the forward pass does is not timed."""
    shutil.rmtree(path, ignore_errors=True)
    with StoreWriter(to_write(path, durable=durable), spec, data.blocks, threads=THREADS) as writer:
        for shard in writer.pending():
            buffers, ids = writer.acquire(shard), spec.shard_sequences(shard)
            for name in buffers.rows:
                buffers.rows[name] = of_shard(data, spec, name, shard)
            writer.submit(buffers, data.blocks.ids[ids.start : ids.stop])
        return writer.finish()


def write_ceiling(data: Data, spec: StoreSpec, path: Path) -> None:
    """Nothing but encoding and files."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    codec = compressor_of(spec)

    def one(job: tuple[int, str]) -> None:
        rows = of_shard(data, spec, job[1], job[0])
        with (path / f"{job[1]}.{job[0]}").open("wb", buffering=0) as file:
            for start in range(0, len(rows), spec.rows_per_chunk):
                file.write(codec.compress(rows[start : start + spec.rows_per_chunk].view(np.uint8), rows.itemsize))

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(one, [(shard, name) for shard in range(spec.n_shards) for name in data.rows]))


def write_zarr(data: Data, spec: StoreSpec, path: Path) -> None:
    """The same arrays by zarr-python alone."""
    shutil.rmtree(path, ignore_errors=True)
    group = zarr.open_group(path, mode="w")
    for site in spec.sites:
        first = arrays_of(spec, site)[0]
        array = group.create_array(
            site.name,
            shape=(spec.n_rows, site.width),
            chunks=(spec.rows_per_chunk, site.width),
            shards=(spec.rows_per_shard, site.width),
            dtype=first.dtype,
            **first.chain.zarr_codecs(first.dtype),
        )
        array[:] = data.rows[site.name]


def write_figures(data: Data, codec: str, folder: Path, pairs: int) -> list[Figure]:
    """Writing, against the ceiling and against zarr-python."""
    spec, amount = data.spec(codec), data.gigabytes
    ours = partial(rate, amount, lambda: write_store(data, spec, folder / "ours.zarr"))
    others: list[tuple[str, Callable[[], object], float, int]] = [
        ("write ceiling", lambda: write_ceiling(data, spec, folder / "ceiling"), 0.8, pairs),
        ("zarr-python", lambda: write_zarr(data, spec, folder / "theirs.zarr"), 2.5, max(1, pairs // 2)),
    ]
    found = [
        compare(f"write `{codec}` / {name}", ours, partial(rate, amount, way), unit="GB/s", goal=goal, pairs=n)
        for name, way, goal, n in others
    ]
    shutil.rmtree(folder / "ceiling")
    return found


# --- ways of reading -----------------------------------------------------------------------------------------------

Place = tuple[str, int, int]
"""Site, shard, chunk."""


def in_threads(places: list[Place], work: Callable[[Iterable[Place]], None]) -> None:
    """Each thread takes every n-th place."""
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(work, [places[i::THREADS] for i in range(THREADS)]))


def read_figures(store: Store, theirs: Path, codec: str, pairs: int) -> list[Figure]:
    """Random chunks into a buffer that is reused, against numcodecs and against zarr-python."""
    spec, n_chunks = store.spec, chunks_per_shard(store.spec)
    shape = (spec.rows_per_chunk, spec.sites[0].width)
    # Whole chunks only: the last shard may end earlier.
    whole = [len(spec.shard_rows(shard)) // spec.rows_per_chunk for shard in range(spec.n_shards)]
    places = [(name, s, c) for name in store.sites for s in range(spec.n_shards) for c in range(whole[s])]
    random.Random(0).shuffle(places)
    amount = len(places) * int(np.prod(shape)) * 2 / 1e9

    def ours(mine: Iterable[Place]) -> None:
        out, scratch = np.empty(shape, np.uint16), Scratch()
        for place in mine:
            store.read_chunk(*place, out, scratch)

    group = zarr.open_group(theirs, mode="r")
    arrays: dict[str, Any] = {name: group[name] for name in store.sites}

    def zarrs(mine: Iterable[Place]) -> None:
        for name, shard, chunk in mine:
            start = (shard * n_chunks + chunk) * spec.rows_per_chunk
            arrays[name][start : start + spec.rows_per_chunk]

    with _opened_shards(store) as shards:

        def ceiling(mine: Iterable[Place]) -> None:
            out, scratch, codec = np.empty(shape, np.uint16), Scratch(), expander_of(spec)
            for name, shard, chunk in mine:
                descriptor, index = shards[name, shard]
                offset, size = index[chunk].tolist()
                stored = scratch.take(size)
                os.preadv(descriptor, [stored], offset)
                codec.decode(stored[:-_CHECKSUM_BYTES], out=out)

        return [
            compare(
                f"read chunks, `{codec}` / {name}",
                partial(rate, amount, lambda: in_threads(places, ours)),
                partial(rate, amount, partial(in_threads, places, way)),
                unit="GB/s",
                goal=goal,
                pairs=n,
            )
            for name, way, goal, n in (("read ceiling", ceiling, 0.85, pairs), ("zarr-python", zarrs, 2.5, pairs // 2))
            if n
        ]


@contextmanager
def _opened_shards(store: Store) -> Iterator[dict[tuple[str, int], tuple[int, NDArray[np.uint64]]]]:
    """Descriptor and chunk index of every shard object, by site and shard."""
    found: dict[tuple[str, int], tuple[int, NDArray[np.uint64]]] = {}
    n_bytes = chunks_per_shard(store.spec) * _INDEX_ENTRY_BYTES
    try:
        for name in store.sites:
            for shard in range(store.spec.n_shards):
                descriptor = os.open(Path(store.path, sharded_key(name, "acts", shard)), os.O_RDONLY)
                stored = os.pread(descriptor, n_bytes, os.fstat(descriptor).st_size - n_bytes - _CHECKSUM_BYTES)
                found[name, shard] = descriptor, np.frombuffer(stored, "<u8").reshape(-1, 2)
        yield found
    finally:
        for descriptor, _ in found.values():
            os.close(descriptor)


# --- the whole store -----------------------------------------------------------------------------------------------


def scan_figures(store: Store, codec: str, pairs: int) -> list[Figure]:
    """`verify` against reading the same files whole."""
    files = [file for file in Path(store.path).rglob("*") if file.is_file()]
    amount, largest = sum(file.stat().st_size for file in files) / 1e9, max(file.stat().st_size for file in files)

    def check() -> None:
        if verify(store.path, threads=THREADS):
            raise RuntimeError(f"{store.path} is damaged")

    def read() -> None:
        buffers = threading.local()
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(lambda file: _read_whole(file, buffers, largest), files))

    def cold(way: Callable[[], None]) -> float:
        forget(files)
        return rate(amount, way)

    return [
        compare(
            f"verify, `{codec}`, from disk / scan ceiling",
            lambda: cold(check),
            lambda: cold(read),
            unit="GB/s",
            goal=0.8,
            pairs=pairs,
        ),
        compare(
            f"verify, `{codec}`, from the page cache / scan ceiling",
            lambda: rate(amount, check),
            lambda: rate(amount, read),
            unit="GB/s",
            goal=0.8,
            pairs=pairs,
        ),
    ]


def _read_whole(file: Path, buffers: threading.local, largest: int) -> None:
    if not hasattr(buffers, "bytes"):
        buffers.bytes = memoryview(bytearray(largest))
    descriptor, done = os.open(file, os.O_RDONLY), 0
    try:
        while n := os.preadv(descriptor, [buffers.bytes[done:]], done):
            done += n
    finally:
        os.close(descriptor)


def forget(files: list[Path]) -> None:
    """Drop the files from the page cache, where the system lets us say so."""
    if not hasattr(os, "posix_fadvise"):
        return
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


# --- all together --------------------------------------------------------------------------------------------------


def figures(data: Data, pairs: int = 5, presets: tuple[str, ...] = PRESETS, where: Path | None = None) -> list[Figure]:
    """Every comparison with a baseline."""
    keep_freed_memory()
    found: list[Figure] = []
    folder = Path(tempfile.mkdtemp(prefix="actcache-bench-", dir=where))
    try:
        for codec in presets:
            found += write_figures(data, codec, folder, pairs)
            store = open_store(folder / "ours.zarr")
            found += read_figures(store, folder / "theirs.zarr", codec, pairs)
            found += scan_figures(store, codec, pairs) if codec == presets[0] else []
    finally:
        shutil.rmtree(folder)
    return found


def sections(where: Path | None = None) -> Iterator[str]:
    """The page for the docs, section by section as they are measured."""
    data = recorded(1200)
    doc = inspect.cleandoc(__doc__ or "").split("\n\n", 2)
    yield "# How fast the store is"
    today = datetime.datetime.now(tz=datetime.UTC).date()
    yield f"Written by `python benchmarks/store.py --out docs/store-speed.md` on {today}."
    yield f"Machine: {machine()}."
    yield from (doc[0], doc[2])
    yield "## Against baselines"
    yield "\n".join([HEADER, *(figure.row() for figure in figures(data, where=where))])
    yield "## Where the writer's time goes"
    yield "Seconds of one core for a gigabyte before compression. The write ceiling does the first two."
    yield "\n".join(part_rows(data, PRESETS))
    yield "## Bounds"
    yield "\n".join([MEASURED_HEADER, *(bound.row() for bound in bounds(where=where))])


def main() -> None:
    """Measure, print, and write the page."""
    parser = argparse.ArgumentParser(description="The store against what the codecs and the disk allow.")
    parser.add_argument("--out", type=Path, help="page to write, such as docs/store-speed.md")
    parser.add_argument("--folder", type=Path, help="disk to measure; by default the system's temporary folder")
    options = parser.parse_args()
    page = []
    for section in sections(options.folder):
        print(section, flush=True)
        page.append(section)
    if options.out:
        options.out.write_text("\n\n".join(page) + "\n")


if __name__ == "__main__":
    main()
