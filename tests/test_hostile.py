"""Stores that somebody made to do harm: every verb ends in an error of ours, soon, in little memory, within the store.

Each store is attacked with in a process of its own, whose memory is limited and whose files are watched.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
from conftest import random_bits, random_blocks, spec_of, write_shards
from numcodecs import blosc, zstd

from actcache.errors import ActcacheError
from actcache.load import Loader
from actcache.spec import Site
from actcache.store import RowFilter, StoreWriter, delete_sites, export, open_store, repair, verify
from actcache.store.backends.objects import Objects
from actcache.store.format.keys import (
    LEDGER_KEY,
    ROW_ARRAYS,
    ROWS,
    commit_key,
    row_key,
    sharded_key,
    stats_key,
    token_key,
    total_key,
)
from actcache.store.format.records import checksum_place, read_record, record_length
from actcache.store.format.site_arrays import chunks_per_shard, index_of
from actcache.store.format.table_objects import put_table, sha256_of

pytestmark = pytest.mark.exhaustive

MOST_MEGABYTES = 100
MOST_SECONDS = 10
"""Of a core's time: how busy the machine is does not count."""
"""On a busy machine; a hundredth of it is usual."""
LOSSLESS, INT8, SPARSE = "blocks.0.hook_mlp_out", "blocks.1.hook_resid_post", "blocks.1.hook_mlp_out"


# --- what is done with a hostile store, in a process of its own -------------------------------------------------------


def verbs(path: Path, *, reading: bool = False) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Everything that can be done with a store, the reading first, and perhaps nothing else."""
    store = open_store(path)
    yield "repr", lambda: repr(store)
    yield "info", store.info
    yield "row ids", store.row_ids
    yield "row table", store.row_table
    yield "tokens", store.token_blocks
    yield "tokens of a shard", lambda: store.shard_tokens(0)
    yield "context of one row", lambda: store.context(0)
    for site in store.sites[:3]:
        yield "statistics", lambda site=site: store.stats(site)
        yield "one row", lambda site=site: store.read_stored(site, [0])
        yield "all rows", lambda site=site: store.read_stored(site, slice(None))
    yield "rows of a shard", lambda: store.kept_rows(0)
    yield "verify", lambda: verify(path)
    yield "loader", lambda: next(iter(Loader(store, ["*"], batch_rows=4)))
    late = RowFilter(positions=range(2, 99), documents=range(1 << 31))
    yield "loader of some rows", lambda: next(iter(Loader(store, ["*"], batch_rows=1, rows=late)))
    if reading:
        return
    yield "export", lambda: export(store, path.parent.parent / "export.zarr", codec="raw")
    yield "continue", lambda: write(path, store.spec)
    yield "add a site", lambda: write(path, replace(store.spec, sites=(*store.spec.sites, Site(name="x", shape=(3,)))))
    more = replace(open_store(path).spec, n_sequences=store.spec.n_sequences + 8)
    yield "extend", lambda: write(path, more)
    yield "repair", lambda: repair(path, verify(path))
    yield "delete a site", lambda: delete_sites(path, store.sites[:1])


def write(path: Path, spec: Any) -> None:
    blocks = random_blocks(99, spec.sequence_length).take(slice(spec.n_sequences))
    if spec.n_sequences < 99:
        spec = replace(spec, text={**spec.text, "tokens": blocks.digest()})
    with StoreWriter(path, spec, blocks, grow=True) as writer:
        for shard in writer.pending()[:4]:
            buffers, sequences = writer.acquire(shard), spec.shard_sequences(shard)
            for rows in buffers.rows.values():
                rows[: len(sequences) * spec.rows_per_sequence] = 0
            writer.submit(buffers, blocks.ids[sequences.start : sequences.stop])
        writer.finish()


def attack(path: Path, *, reading: bool = False) -> list[str]:
    """Do everything with a store; what came of it that must not."""
    wrong = watch(path)
    try:
        for verb, act in verbs(path, reading=reading):
            try:
                act()
            except (ActcacheError, IndexError) as error:
                if type(error) is IndexError and "one row" not in verb:
                    wrong.append(f"{verb}: {traceback.format_exc()}")
                if len(str(error)) > 2000:
                    wrong.append(f"{verb}: a message of {len(str(error))} characters")
            except BaseException:
                wrong.append(f"{verb}: {traceback.format_exc()}")
    except ActcacheError as error:
        if len(str(error)) > 2000:
            wrong.append(f"a message of {len(str(error))} characters")
    except BaseException:
        wrong.append(f"open: {traceback.format_exc()}")
    return wrong


def watch(path: Path) -> list[str]:
    """Files that are touched beside the store from now on: of what lies around it nothing may be."""
    touched: list[str] = []

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if (
            event.split(".")[0] in ("open", "os", "shutil")
            and arguments
            and isinstance(arguments[0], str | bytes | Path)
        ):
            place = os.path.realpath(os.fsdecode(arguments[0]))
            around, inside = str(path.parent), str(path)
            if event == "open" and place == around:  # to flush the name of the store in it
                return
            if (place + "/").startswith(around + "/") and not (place + "/").startswith(inside + "/"):
                touched.append(f"{event} of {place}")

    sys.addaudithook(note)
    return touched


def serve() -> None:
    """Fork a process for the stores named on each line of stdin, and print what came of them."""
    with tempfile.TemporaryDirectory() as folder:  # what is imported late does not count
        attack(make(Path(folder), sealed=True))
    gc.freeze()  # a fork is the quicker the less of it is changed
    for line in sys.stdin:
        out, send = os.pipe()
        if not os.fork():
            paths, reading = json.loads(line)
            signal.alarm(60 * MOST_SECONDS * len(paths))
            before = memory()
            resource.setrlimit(resource.RLIMIT_AS, (before["VmSize"] + (1 << 30),) * 2)
            began = time.process_time()
            wrong = [f"{path}: {wrong}" for path in paths for wrong in attack(Path(path), reading=reading)]
            # The stacks and arenas of the threads are not what a store has asked for.
            found = {
                "wrong": wrong,
                "bytes": memory()["VmHWM"] - before["VmRSS"],
                "seconds": time.process_time() - began,
            }
            os.write(send, json.dumps(found).encode())
            os._exit(0)
        os.close(send)
        with os.fdopen(out) as reader:
            print(reader.read() or '{"wrong": ["the process died"], "bytes": 0, "seconds": 0}', flush=True)
        os.wait()


def memory() -> dict[str, int]:
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {parts[0].rstrip(":"): int(parts[1]) << 10 for parts in lines if len(parts) == 3 and parts[2] == "kB"}


@pytest.fixture(scope="module")
def server():
    paths = [str(Path(__file__).parent), *sys.path]
    process = subprocess.Popen(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {paths!r}; import test_hostile; test_hostile.serve()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    yield process
    process.communicate("")


@pytest.fixture
def harmless(server) -> Callable[..., None]:
    """Attack with stores and see that nothing comes of it."""
    if not Path("/proc/self/status").exists():
        pytest.skip("memory is measured through /proc")

    def check(*paths: Path, reading: bool = False) -> None:
        bait = [file for path in paths for file in bait_of(path).rglob("*") if file.is_file()]
        around = [file.read_bytes() for file in bait]
        server.stdin.write(json.dumps([list(map(str, paths)), reading]) + "\n")
        server.stdin.flush()
        found = json.loads(server.stdout.readline())
        assert found["wrong"] == [], "\n".join(found["wrong"])
        assert found["bytes"] < MOST_MEGABYTES << 20
        assert found["seconds"] < MOST_SECONDS * len(paths)
        assert [file.read_bytes() for file in bait] == around

    return check


# --- how hostile stores are made --------------------------------------------------------------------------------------


def bait_of(path: Path) -> Path:
    return path.parent / "bait"


def make(folder: Path, *, sealed: bool) -> Path:
    """A sound store of 12 sequences in 3 shards, and files beside it that it must not reach."""
    path = folder / "inner" / "s.zarr"
    blocks = random_blocks(99, 9).take(slice(12))
    sites = (
        Site(name=LOSSLESS, shape=(12,)),
        Site(name=INT8, shape=(10,), codec="int8"),
        Site(name=SPARSE, shape=(12,), codec="sparse"),
    )
    spec = replace(spec_of(blocks, sequences_per_shard=4, rows_per_chunk=8), sites=sites)
    write_shards(path, spec, blocks, random_bits(spec))
    for name in ("acts/c.0.0", "commit/c.0.0", "ids/c.0.0", "tokens/ids/c.0.0", "sites/bait/acts/c.0.0"):
        (bait_of(path) / name).parent.mkdir(parents=True, exist_ok=True)
        (bait_of(path) / name).write_bytes(b"private")
    if not sealed:
        write_json(path, lambda about: about.update(state="open", fingerprint=None, digests=[]))
    return path


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> dict[str, Path]:
    """Folders with a sealed and an open store."""
    folders = {state: tmp_path_factory.mktemp(state) for state in ("sealed", "open")}
    for state, folder in folders.items():
        make(folder, sealed=state == "sealed")
    return folders


@pytest.fixture
def copy(template, tmp_path) -> Callable[..., Path]:
    """A new store, sealed or open."""
    numbers = count()

    def copied(state: str) -> Path:
        folder = tmp_path / str(next(numbers))
        shutil.copytree(template[state], folder)
        return folder / "inner" / "s.zarr"

    return copied


@pytest.fixture
def sealed(copy) -> Path:
    return copy("sealed")


@pytest.fixture
def unsealed(copy) -> Path:
    return copy("open")


def write_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the root's attributes."""
    root = json.loads((path / "zarr.json").read_text())
    change(root["attributes"]["actcache"])
    (path / "zarr.json").write_text(json.dumps(root))


def put(path: Path, key: str, values: Any) -> int:
    """Put a whole chunk of a table array; its checksum."""
    return put_table(Objects(path, read_only=False), key, np.asarray(values))[0]


def recommit(path: Path, column: str, shard: int, **changes: Any) -> None:
    """Change a commit record, whose digest is then right again; `checksums` maps places to values."""
    objects, spec = Objects(path, read_only=False), open_store(path).spec
    record = read_record(objects, spec, column, shard)
    checksums = list(record.checksums)
    for place, value in changes.pop("checksums", {}).items():
        checksums[place] = value
    record, length = replace(record, checksums=tuple(checksums), **changes), record_length(spec, column)
    put(path, commit_key(column, shard), np.frombuffer(record.to_bytes(length), np.uint8)[None])


def reseal(path: Path, *, ledger: Any = None, total: Any = None) -> None:
    """Put another ledger, or another total of the first site, and the digests that go with them."""
    store = open_store(path)
    values = [store.ledger, *map(store.total, store.sites)]
    if ledger is not None:
        put(path, LEDGER_KEY, ledger)
        values[0] = ledger
    if total is not None:
        put(path, total_key(LOSSLESS), total)
        values[1] = total
    write_json(path, lambda about: about.update(digests=[sha256_of(value) for value in values]))


def put_sharded(path: Path, site: str, chunks: list[bytes], index: Any = None) -> None:
    """Put the first shard of a site: chunks without their checksums, an index, and the record that goes with them."""
    spec = open_store(path).spec
    with_crc = [chunk + google_crc32c.value(chunk).to_bytes(4, "little") for chunk in chunks]
    if index is None:
        index = index_of([len(chunk) for chunk in with_crc], chunks_per_shard(spec))
    raw = np.asarray(index, "<u8").tobytes()
    crc = google_crc32c.value(raw)
    data = b"".join(with_crc) + raw + crc.to_bytes(4, "little")
    (path / sharded_key(site, "acts", 0)).write_bytes(data)
    checksums = {i: google_crc32c.value(chunk) for i, chunk in enumerate(chunks)}
    recommit(path, site, 0, checksums={**checksums, checksum_place(spec, 0, len(index)): crc})


# --- the root ---------------------------------------------------------------------------------------------------------

NUMBERS = [0, -1, 1.5, 1e300, "8", None, True, [1], {}, 2**40, 10**12, 2**63, 10**4000]
BOMB = [{"name": "blosc", "configuration": {"cname": "zstd"}}] * 9
ATTRIBUTES: list[tuple[str, list[Any]]] = [
    *(
        (f"spec.{name}", NUMBERS)
        for name in ("n_sequences", "sequence_length", "sequences_per_shard", "rows_per_chunk")
    ),
    ("spec.skip_first", [value for value in NUMBERS if value != 0]),
    ("spec.seed", ["8", 1.5, None, []]),
    ("spec.dtype", ["float64", "object", 5, [], None]),
    ("spec.model", [None, 5, "x", [1]]),
    ("spec.text", [None, 5, "x", [1], {"tokens": 5}, {"tokens": None}, {"parts": 5}]),
    ("spec.sites", [None, 5, "x", {}, [], [None], [[]], [{}]]),
    ("spec.sites.0", [{"name": "x"}, {"name": "x", "shape": [1], "codec": "raw", "more": 1}]),
    ("spec.sites.0.shape", [*NUMBERS, [], [0], [-1], ["a"], [[1]], [2**40], [2**32, 2**32], [1.5], [1] * 100_000]),
    ("spec.sites.0.codec", [None, 5, [], {}, "pickle", "", "[" * 4000, "[" * 100_000, '[{"name":"numcodecs.pickle"}]']),
    ("spec.sites.0.codec", ['[{"id":"pickle"}]', '[{"name":"../x"}]', '[{"name":"vlen-utf8"}]', json.dumps(BOMB)]),
    ("spec.sites.0.codec", ["int8", '[{"name":"blosc","configuration":{"blocksize":1e99}}]', "x" * 10_000_000]),
    ("spec.sites.0.feature_exponents", [5, "x", [1], [200] * 12, [1.5] * 12, [None] * 12]),
    (
        "spec.sites.0.name",
        ["", ".", "..", "...", "../../bait", "../../../bait", "bait", "a/../../bait", "a\0b", "\ud800"],
    ),
    (
        "spec.sites.0.name",
        ["rows", "tokens", "zarr.json", "%2E%2E", "a" * 300, "\x00" * 90, "x" * 10_000_000, 5, None, []],
    ),
    ("spec.sites.0.name", [SPARSE, "sites", "acts", "c", "CON", "a\nb", "~", "$HOME", "file:///etc", "s3://x"]),
    ("state", ["done", 5, None, [], "Sealed"]),
    ("fingerprint", [5, None, [], "0" * 64]),
    ("digests", [5, None, [], "x", [5] * 4, [None] * 4, ["0"] * 4, ["0" * 64] * 99]),
    ("format_version", [0, -1, 2, 99, "1", 1.0, True, None, [], 10**300]),
    ("spec", [None, 5, [], "x", {}]),
]


@pytest.mark.parametrize(
    ("place", "values"), ATTRIBUTES, ids=[f"{i}-{place}" for i, (place, _) in enumerate(ATTRIBUTES)]
)
def test_root_attributes(copy, harmless, place, values):
    *parents, last = [int(part) if part.isdecimal() else part for part in place.split(".")]
    paths = []
    for number, value in enumerate(values):
        path = copy(("sealed", "open")[number % 2])
        if value == "bait":  # by its absolute path
            value = str(bait_of(path))

        def change(about: Any, value: Any = value) -> None:
            for parent in parents:
                about = about[parent]
            about[last] = value

        write_json(path, change)
        paths.append(path)
    harmless(*paths)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"\xff\xfe",
        b'{"attributes": {"actcache": []}}',
        b'{"attributes": {"actcache": {"format_version": 1}}}',
        b"[" * 5_000_000,
        b'{"attributes":' * 500_000,
        b"[" + b"[]," * 2_000_000 + b"[]]",
        b"9" * 7_000_000,
        b'{"attributes": {"actcache": {"format_version": 1, "spec": ' + b"[" * 900 + b"]" * 900 + b"}}}",
        b" " * 50_000_000,
    ],
    ids=range(13),
)
def test_root_files(sealed, harmless, text):
    (sealed / "zarr.json").write_bytes(text)
    harmless(sealed)


@pytest.mark.parametrize("state", ["sealed", "open"])
@pytest.mark.parametrize(
    "sizes",
    [
        {"n_sequences": 4 << 20},
        {"n_sequences": 1 << 20, "sequences_per_shard": 1, "rows_per_chunk": 8},
        {"sequences_per_shard": 1 << 22, "rows_per_chunk": 8, "n_sequences": 1 << 22},
        {"sequences_per_shard": 1 << 21, "rows_per_chunk": 1 << 23, "n_sequences": 1 << 21},
        {"sequences_per_shard": 1 << 15, "rows_per_chunk": 1, "n_sequences": 1 << 30},
    ],
    ids=["shards", "shards of one chunk", "a long shard", "a large chunk", "many rows"],
)
def test_sizes_that_are_possible_but_not_there(copy, harmless, sizes, state):
    """Nothing is allocated for what the store claims to hold and does not."""
    path = copy(state)
    write_json(path, lambda about: about["spec"].update(sizes))
    harmless(path, reading=True)  # who goes on writing a store gives memory to its shards


# --- objects whose checksums are right --------------------------------------------------------------------------------


@pytest.mark.parametrize("n_rows", [33, 2**31, 2**40, 2**63, 2**64 - 1])
def test_ledgers_with_more_rows_than_there_can_be(sealed, harmless, n_rows):
    ledger = open_store(sealed).ledger.copy()
    ledger[:, :, 32:40] = np.frombuffer(np.uint64(n_rows).tobytes(), np.uint8)
    reseal(sealed, ledger=ledger)
    harmless(sealed)


def test_a_ledger_that_expands_to_millions_of_shards(sealed, harmless):
    n_shards = (1 << 28) // 48 // 4 - 1
    ledger = np.zeros((n_shards, 4, 48), np.uint8)
    reseal(sealed, ledger=ledger)
    write_json(sealed, lambda about: about["spec"].update(n_sequences=4 * n_shards))
    assert (sealed / LEDGER_KEY).stat().st_size < 1 << 21
    harmless(sealed, reading=True)


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0, 1e300])
def test_statistics_that_are_no_statistics(sealed, harmless, value):
    reseal(sealed, total=np.full(3 * 12 + 6, value))
    harmless(sealed)


@pytest.mark.parametrize("column", [ROWS, LOSSLESS, INT8])
@pytest.mark.parametrize("n_rows", [0, 1, 31, 33, 2**31, 2**63, 2**64 - 1])
def test_commit_records_with_other_numbers_of_rows(unsealed, harmless, column, n_rows):
    recommit(unsealed, column, 0, n_rows=n_rows)
    harmless(unsealed)


@pytest.mark.parametrize(
    ("array", "value"), [(name, value) for name in ROW_ARRAYS for value in (0, 4, 9, 2**31, 2**32 - 1)]
)
def test_row_tables_of_rows_that_there_cannot_be(unsealed, harmless, array, value):
    crc = put(unsealed, row_key(array, 0), np.full(32, value, np.uint32))
    recommit(unsealed, ROWS, 0, checksums={ROW_ARRAYS.index(array): crc})
    harmless(unsealed)


FAR = 2**64 - 1


HERE, ELSEWHERE = {(0, 0): FAR, (0, 1): FAR}, {(3, 0): FAR, (3, 1): FAR}
INDEXES: list[dict[tuple[int, int], int]] = [HERE, ELSEWHERE, {(0, 1): FAR}, {(0, 0): 2**64 - 16, (0, 1): 32}]
INDEXES += [{(0, 0): FAR - 1}, {(0, 0): 2**63}, {(0, 1): 2**60}, {(0, 1): 2**31}, {(1, 0): 10**6}, {(3, 1): 0}]


@pytest.mark.parametrize("change", INDEXES)
def test_indexes_that_point_elsewhere(unsealed, harmless, change):
    rng = np.random.default_rng(0)
    chunks = [bytes(blosc.compress(rng.bytes(8 * 12 * 2), b"zstd", 1)) for _ in range(4)]
    index = index_of([len(chunk) + 4 for chunk in chunks], 4)
    for place, value in change.items():
        index[place] = value
    put_sharded(unsealed, LOSSLESS, chunks, index)
    harmless(unsealed)


def bombs() -> dict[str, bytes]:
    """Few bytes that announce, or really hold, very many."""
    zeros = np.zeros(1 << 30, np.uint8)
    packed = bytes(blosc.compress(zeros, b"zstd", 9, blosc.NOSHUFFLE))
    small = bytes(blosc.compress(zeros[: 8 * 12 * 2], b"zstd", 9))
    claims = small[:4] + (2**31 - 1).to_bytes(4, "little") + small[8:]
    blocks = small[:8] + (2**31 - 1).to_bytes(4, "little") + small[12:]
    short = small[:12] + (2**31 - 1).to_bytes(4, "little")
    frame = bytes(zstd.compress(zeros, 19))
    unknown = frame[:4] + bytes([0]) + frame[5:]
    many = bytes(zstd.compress(zeros[: 8 * 12 * 2], 1)) * 1000
    return {"blosc": packed, "claims": claims, "blocks": blocks, "short": short} | {
        "zstd": frame,
        "unknown": unknown,
        "many frames": many,
        "nothing": b"",
    }


@pytest.fixture(scope="module")
def bomb():
    return bombs()


@pytest.mark.parametrize("site", [LOSSLESS, SPARSE, INT8])
@pytest.mark.parametrize("name", ["blosc", "claims", "blocks", "short", "zstd", "unknown", "many frames", "nothing"])
def test_chunks_that_expand(unsealed, harmless, bomb, name, site):
    assert len(bomb[name]) < 1 << 21
    put_sharded(unsealed, site, [bomb[name]] * 4)
    harmless(unsealed)


@pytest.mark.parametrize("name", ["blosc", "claims", "blocks", "short", "zstd", "nothing"])
@pytest.mark.parametrize("kind", ["ledger", "total", "tokens", "rows", "stats", "commit"])
def test_tables_that_expand(sealed, harmless, bomb, name, kind):
    keys = {"ledger": LEDGER_KEY, "total": total_key(LOSSLESS), "tokens": token_key("ids", 0)}
    keys |= {"rows": row_key("token", 0), "stats": stats_key(LOSSLESS, 0)}
    key = keys.get(kind, commit_key(LOSSLESS, 0))
    (sealed / key).write_bytes(bomb[name] + google_crc32c.value(bomb[name]).to_bytes(4, "little"))
    harmless(sealed)


@pytest.mark.parametrize(
    "text", [b"", b"[" * 500_000, b"null", b"5", b"9" * 10_000, b'{"shape": [1e999]}', b" " * 10**7]
)
def test_metadata_of_arrays(sealed, harmless, text):
    for file in sealed.rglob("zarr.json"):
        if file != sealed / "zarr.json":
            file.write_bytes(text)
    harmless(sealed)


@pytest.mark.parametrize(
    "shape", [[2**62, 9], [13, 9], [10**6, 9], [-1, 9], [12.5, 9], ["12", 9], [], 12, None, [10**400, 9]]
)
def test_metadata_that_says_the_store_is_growing(sealed, harmless, shape):
    file = sealed / "tokens/ids/zarr.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "shape": shape}))
    harmless(sealed)


# --- files that are no files ------------------------------------------------------------------------------------------

EVERY_KIND = ["zarr.json", "ledger/c.0.0.0", "tokens/ids/c.0.0", "rows/token/c.0", "rows/commit/c.0.0"]
EVERY_KIND += [f"sites/{LOSSLESS}/{name}" for name in ("acts/c.0.0", "stats/c.0.0", "commit/c.0.0", "total/c.0")]


@pytest.mark.parametrize("state", ["sealed", "open"])
@pytest.mark.parametrize("key", EVERY_KIND)
def test_files_of_a_terabyte_without_content(copy, harmless, key, state):
    path = copy(state)
    with suppress(OSError):
        os.truncate(path / key, 1 << 40)
    harmless(path)


@pytest.mark.parametrize("key", EVERY_KIND)
def test_folders_in_place_of_files(sealed, harmless, key):
    (sealed / key).unlink()
    (sealed / key).mkdir()
    harmless(sealed, reading=True)


@pytest.mark.parametrize("key", EVERY_KIND)
def test_pipes_in_place_of_files(sealed, harmless, key):
    (sealed / key).unlink()
    os.mkfifo(sealed / key)
    harmless(sealed, reading=True)


@pytest.mark.parametrize("key", [key for key in EVERY_KIND if key != "zarr.json"])
def test_links_in_place_of_files_are_not_written_through(sealed, harmless, key):
    (sealed / key).unlink()
    (sealed / key).symlink_to(bait_of(sealed) / "acts/c.0.0")
    before = (bait_of(sealed) / "acts/c.0.0").read_bytes()
    assert verify(sealed)
    with suppress(ActcacheError):
        repair(sealed, verify(sealed))
    with suppress(ActcacheError):
        delete_sites(sealed, [LOSSLESS])
    assert (bait_of(sealed) / "acts/c.0.0").read_bytes() == before


@pytest.mark.parametrize("state", ["sealed", "open"])
@pytest.mark.parametrize(
    "folder", ["sites", "tokens", "rows", "ledger", "tokens/ids", f"sites/{LOSSLESS}", f"sites/{LOSSLESS}/acts"]
)
def test_links_in_place_of_folders_lead_no_writer_out(copy, folder, state):
    path = copy(state)
    shutil.copytree(path / folder, bait_of(path) / "linked")
    shutil.rmtree(path / folder)
    (path / folder).symlink_to(bait_of(path) / "linked", target_is_directory=True)
    before = {file: file.read_bytes() for file in bait_of(path).rglob("*") if file.is_file()}
    for _, act in verbs(path):
        with suppress(ActcacheError):
            act()
    assert {file: file.read_bytes() for file in bait_of(path).rglob("*") if file.is_file()} == before


def test_strange_names_beside_the_records(unsealed, harmless):
    folder = unsealed / "rows/commit"
    for name in ("c.99999999999999999999.0", "c.-1.0", "c.1e9.0", "c.٣.0", "c.00.0", "c..0", "c.0", "x", "c.0.0.0"):
        (folder / name).write_bytes(b"")
    assert open_store(unsealed).committed == [0, 1, 2]
    harmless(unsealed)


def test_a_sound_store_passes(sealed, harmless, tmp_path):
    """The same verbs do their work on a store that is no trap, so that the others are not refused for nothing."""
    copy = tmp_path / "inner" / "copy.zarr"
    shutil.copytree(sealed, copy)
    for _, act in verbs(copy):
        act()
    harmless(sealed)
