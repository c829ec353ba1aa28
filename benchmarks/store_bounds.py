"""Figures of the store that have no baseline: the parts of writing, how soon a large store is open, and memory.

In: sizes. Out: rows of the table that `store.py` puts below its comparisons.
"""

from __future__ import annotations

import resource
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter, thread_time

import google_crc32c
import numpy as np
from store_data import Data, compressor_of, of_shard

from actcache.memory import keep_freed_memory
from actcache.order import permutation
from actcache.spec import Site, StoreSpec, TokenBlocks
from actcache.store import StoreWriter, open_store
from actcache.store.backends.objects import Objects
from actcache.store.format import metadata
from actcache.store.format.keys import columns_of, commit_key, stats_key, total_key
from actcache.store.format.records import HEAD_BYTES, Record, record_length, stats_place
from actcache.store.format.root import Root, write_root
from actcache.store.format.site_arrays import arrays_of
from actcache.store.format.stats import LineBuilder, line_length
from actcache.store.format.table_objects import encode_table, put_table
from actcache.store.writing.seal import sealed_root

THREADS = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """A figure that has a bound and no baseline."""

    name: str
    """What was done."""
    value: float
    """What came out."""
    unit: str
    """Its unit."""
    goal: str
    """What it should be."""

    def row(self) -> str:
        """A line of the table in the docs."""
        return f"| {self.name} | **{self.value:,.3g}** | {self.unit} | {self.goal} |"


MEASURED_HEADER = "| what | measured | unit | goal |\n|---|---|---|---|"


def parts(data: Data, codec: str, folder: Path) -> list[tuple[str, float]]:
    """Seconds of one thread's processor time for a gigabyte, part by part of what the writer does."""
    spec = data.spec(codec)
    name, site = spec.sites[0].name, spec.sites[0]
    rows, chain = of_shard(data, spec, name, 0), arrays_of(spec, site)[0].chain
    order = permutation(len(rows), 0, 0)
    starts = range(0, len(rows) - spec.rows_per_chunk + 1, spec.rows_per_chunk)
    chunk = np.empty((spec.rows_per_chunk, site.width), np.uint16)
    payloads = [bytes(chain.encode(rows[start : start + len(chunk)])[0]) for start in starts]
    builder, compressor = LineBuilder(site.width, "bfloat16"), compressor_of(spec)

    def gather() -> None:
        for start in starts:
            np.take(rows, order[start : start + len(chunk)], axis=0, out=chunk, mode="clip")

    def gather_and_measure() -> None:
        for start in starts:
            builder.take(rows, order[start : start + len(chunk)], chunk)

    def encode() -> None:
        for start in starts:
            compressor.compress(rows[start : start + len(chunk)].view(np.uint8), rows.itemsize)

    def checksum() -> None:
        for payload in payloads:
            google_crc32c.value(payload)

    def put() -> None:
        (folder / "part").unlink(missing_ok=True)
        with (folder / "part").open("wb", buffering=0) as file:
            for payload in payloads:
                file.write(payload)

    ways = {
        "compress": encode,
        "write to files": put,
        "shuffle alone (`numpy.take`)": gather,
        "shuffle and statistics in one": gather_and_measure,
        "crc32c": checksum,
        "order of the shuffle, once for all sites": lambda: permutation(len(rows), 0, 0),
    }
    gigabytes = len(starts) * chunk.nbytes / 1e9
    shares = {"order of the shuffle, once for all sites": 1 / len(spec.sites)}
    return [(what, _processor_time(way) * shares.get(what, 1) / gigabytes) for what, way in ways.items()]


def _processor_time(way: Callable[[], object]) -> float:
    times = []
    for _ in range(5):
        began = thread_time()
        way()
        times.append(thread_time() - began)
    return statistics.median(times)


def part_rows(data: Data, presets: tuple[str, ...]) -> list[str]:
    """A table of the parts of writing."""
    with tempfile.TemporaryDirectory(prefix="actcache-bench-") as folder:
        found = [dict(parts(data, codec, Path(folder))) for codec in presets]
    head = ["| part | " + " | ".join(f"`{codec}`" for codec in presets) + " |", "|---" * (len(presets) + 1) + "|"]
    return head + ["| " + " | ".join([what, *(f"{part[what]:.3f}" for part in found)]) + " |" for what in found[0]]


def wide_spec(n_shards: int, n_sites: int, sequences_per_shard: int = 1, width: int = 1) -> StoreSpec:
    """A store of many shards that hold next to nothing."""
    return StoreSpec(
        sites=tuple(Site(name=f"blocks.{i}.hook_resid_post", shape=(width,), codec="raw") for i in range(n_sites)),
        n_sequences=n_shards * sequences_per_shard,
        sequence_length=8,
        sequences_per_shard=sequences_per_shard,
        rows_per_chunk=7,
        text={"tokens": ""},
    )


def make_many_shards(path: Path, spec: StoreSpec, *, sealed: bool) -> None:
    """A store with all metadata and records of its shards, but without their activations, which opening never reads."""
    objects = Objects(path, read_only=False)
    write_root(objects, Root(state="creating", spec=spec))
    metadata.write_metadata(objects, spec)
    line = np.zeros(line_length(spec.sites[0].width))
    line_crc, line_data = encode_table(line[None])
    checksums = [0] * (stats_place(spec) + 1)
    checksums[stats_place(spec)] = line_crc
    record = Record(n_rows=spec.rows_per_shard, n_bytes=100, checksums=tuple(checksums))
    records = [np.frombuffer(record.to_bytes(record_length(spec, column)), np.uint8) for column in columns_of(spec)]
    if not sealed:
        write_root(objects, Root(state="open", spec=spec))
        for column, values in zip(columns_of(spec), records, strict=True):
            data = encode_table(values[None])[1]
            _write_many(path, (commit_key(column, shard) for shard in range(spec.n_shards)), data)
        for site in spec.sites:
            _write_many(path, (stats_key(site.name, shard) for shard in range(spec.n_shards)), line_data)
        return
    heads = np.stack([values[:HEAD_BYTES] for values in records])
    ledger = np.ascontiguousarray(np.broadcast_to(heads, (spec.n_shards, *heads.shape)))
    ledger[:, :, :32] = np.random.default_rng(0).integers(0, 256, (*ledger.shape[:2], 32))  # digests do not compress
    for site in spec.sites:
        put_table(objects, total_key(site.name), line)
    metadata.put_ledger(objects, spec, ledger)
    write_root(objects, sealed_root(spec, ledger, [line] * len(spec.sites)))


def _write_many(path: Path, keys: Iterable[str], data: bytes) -> None:
    """The same bytes under each key, stored once: hard links are made sooner than files."""
    first: Path | None = None
    for key in keys:
        if first is None:
            first = path / key
            first.parent.mkdir(parents=True, exist_ok=True)
            first.write_bytes(data)
        else:
            (path / key).hardlink_to(first)


def opening(folder: Path, n_shards: int, n_sites: int) -> list[Measured]:
    """How long it takes to open a store of many shards, finished and unfinished, and to sum it up."""
    found = []
    path, spec = folder / "many.zarr", wide_spec(n_shards, n_sites)
    for sealed in (True, False):
        make_many_shards(path, spec, sealed=sealed)
        what = f"store of {n_shards:,} shards x {n_sites} sites, {'sealed' if sealed else 'unfinished'}"
        times = [
            (_seconds(lambda: _open(path)), _seconds(lambda: open_store(path).info()))
            for _ in range(3 if sealed else 1)
        ]
        for name, seconds in zip(("open, count rows", "open, `info`"), zip(*times, strict=True), strict=True):
            found.append(
                Measured(name=f"{name}: {what}", value=statistics.median(seconds), unit="s", goal="less than 1")
            )
        shutil.rmtree(path)
    return found


def _open(path: Path) -> int:
    return open_store(path).n_rows


def _seconds(work: Callable[[], object]) -> float:
    began = perf_counter()
    work()
    return perf_counter() - began


def memory(n_shards: int, sequences_per_shard: int) -> float:
    """Peak memory that the writer adds to a process, as a multiple of one shard of all sites before compression."""
    keep_freed_memory()
    data = np.random.default_rng(0)

    def write(path: Path, spec: StoreSpec) -> None:
        ids = np.zeros((spec.n_sequences, spec.sequence_length), np.uint32)
        blocks = TokenBlocks(ids=ids, document=ids, description={})
        spec = replace(spec, text={"tokens": blocks.digest()})
        with StoreWriter(path, spec, blocks, threads=THREADS) as writer:
            for shard in writer.pending():
                buffers, sequences = writer.acquire(shard), spec.shard_sequences(shard)
                for rows in buffers.rows.values():
                    for block in np.array_split(rows, 16):
                        block[:] = data.integers(0x3F00, 0x4000, block.shape, np.uint16)
                writer.submit(buffers, ids[sequences.start : sequences.stop])
            writer.finish()

    with tempfile.TemporaryDirectory(prefix="actcache-bench-") as folder:
        write(Path(folder, "warm.zarr"), wide_spec(2, 2, 4, 16))
        before = _peak_bytes()
        spec = wide_spec(n_shards, 4, sequences_per_shard, 256)
        write(Path(folder, "s.zarr"), spec)
        return (_peak_bytes() - before) / (spec.rows_per_shard * 4 * 256 * 2)


def _peak_bytes() -> int:
    """Peak of this process; `ru_maxrss` may be that of the process that started it."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(peak.split()[1]) * 1024


def memory_figures(sizes: tuple[int, int], sequences_per_shard: int) -> list[Measured]:
    """The same for a small and a large store, each in a process of its own."""
    found = []
    for n_shards in sizes:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            times = pool.submit(memory, n_shards, sequences_per_shard).result()
        name = f"peak memory of the writer, store of {n_shards} shards"
        found.append(Measured(name=name, value=times, unit="shards of all sites", goal="at most 3, whatever the size"))
    return found


def bounds(
    n_shards: int = 10_000,
    n_sites: int = 24,
    memory_shards: tuple[int, int] = (6, 24),
    memory_sequences: int = 2048,
    where: Path | None = None,
) -> list[Measured]:
    """Every figure that has a bound and no baseline."""
    with tempfile.TemporaryDirectory(prefix="actcache-bench-", dir=where) as folder:
        found = opening(Path(folder), n_shards, n_sites)
    return found + memory_figures(memory_shards, memory_sequences)
