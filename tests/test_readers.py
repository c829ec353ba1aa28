"""Plain Zarr for everyone else: what other readers make of our stores, without any help of ours, is what we wrote."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from conftest import random_bits, random_blocks, spec_of, write_shards
from numpy.typing import NDArray
from zarr_digests import array_paths, digest

from actcache.memory import Scratch
from actcache.spec import Site
from actcache.store import PRESETS, Store, export, open_store
from actcache.store.codecs import StoredArray
from actcache.store.format.keys import (
    ABSENT_ROW,
    ROW_ARRAYS,
    TOKEN_ARRAYS,
    column_prefix,
    columns_of,
    sharded_key,
    site_prefix,
)
from actcache.store.format.records import read_total, record_length
from actcache.store.format.site_arrays import arrays_of, chunks_per_shard

ROOT = Path(__file__).resolve().parents[1]
LATEST = ("zarr>=3.4,<4", "numpy")
"""What the second environment has; no more, so that nothing else helps zarr."""

CODECS = tuple(PRESETS)
SITES = tuple(
    Site(name=f"blocks.{i}.attn/hook z%\\{codec}", shape=(2, 3 + i), codec=codec) for i, codec in enumerate(CODECS)
)
"""One of each codec, of widths of their own; names that no file system takes as they are."""


@pytest.fixture(scope="module", params=["bfloat16", "float16", "float32", "rows left out"])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, dict[str, Any]]:
    """A sealed store of 21 sequences in 3 shards, the last one partial, and the values that were given for it."""
    folder, blocks = tmp_path_factory.mktemp("readers"), random_blocks(21, 13)
    dtype = request.param if request.param in ("bfloat16", "float16", "float32") else "bfloat16"
    spec = replace(spec_of(blocks, dtype=dtype), sites=SITES)
    bits = random_bits(spec)
    store = write_shards(folder / "whole.zarr", spec, blocks, bits)
    if request.param == "rows left out":
        kept = np.random.default_rng(5).random(spec.n_rows) < 0.4
        kept[spec.rows_per_shard : 2 * spec.rows_per_shard] = False  # a shard without any row
        store = export(store, folder / "part.zarr", rows=kept)
    assert store.sealed
    return store, bits


def our_arrays(store: Store) -> dict[str, NDArray[Any]]:
    """Every array of a store as our own reader has it, bit for bit as stored."""
    spec, names = store.spec, columns_of(store.spec)
    arrays = {f"tokens/{name}": store.tokens(name) for name in TOKEN_ARRAYS}
    shards = range(spec.n_shards)
    for name in ROW_ARRAYS:
        table = np.full((spec.n_shards, spec.rows_per_shard), ABSENT_ROW, np.uint32)
        for shard in shards:
            part = store.shard_row_table(shard)[name]
            table[shard, : len(part)] = part
        arrays[f"rows/{name}"] = table.reshape(-1)[: spec.n_rows]
    for column in names:
        length = record_length(spec, column)
        records = b"".join(store.record(column, shard).to_bytes(length) for shard in shards)
        arrays[f"{column_prefix(column)}/commit"] = np.frombuffer(records, np.uint8).reshape(-1, length)
    for site in spec.sites:
        prefix = site_prefix(site.name)
        arrays[f"{prefix}/stats"] = np.stack([store.shard_line(site.name, shard) for shard in shards])
        arrays[f"{prefix}/total"] = read_total(store.objects, site)
        arrays |= {f"{prefix}/{array.name}": sharded_values(store, site, array) for array in arrays_of(spec, site)}
    return {**arrays, "ledger": store.ledger}


def sharded_values(store: Store, site: Site, array: StoredArray) -> NDArray[Any]:
    """A sharded array from its chunks; those that a shard does not have are zeros to every reader."""
    spec, scratch = store.spec, Scratch()
    values = np.zeros((spec.n_shards * spec.rows_per_shard, *array.row_shape), array.dtype)
    chunks = values.reshape(-1, spec.rows_per_chunk, *array.row_shape)
    for shard in range(spec.n_shards):
        for chunk in range(-(-int(store.shard_n_rows[shard]) // spec.rows_per_chunk)):
            out = chunks[shard * chunks_per_shard(spec) + chunk]
            store.read_chunk(site.name, shard, chunk, out, scratch, array=array.name)
    return values[: spec.n_rows]


def with_zarr(store: Store) -> Iterator[tuple[str, NDArray[Any]]]:
    group = zarr.open_group(store.path, mode="r")
    yield from ((path, group[path][:]) for path in array_paths(store.path))


def with_zarrs(store: Store) -> Iterator[tuple[str, NDArray[Any]]]:
    """zarr-python with the codecs and the file access of zarrs, which is told to refuse what it cannot do itself."""
    pytest.importorskip("zarrs", reason="needs zarrs: pip install zarrs")
    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline", "codec_pipeline.strict": True}):
        yield from with_zarr(store)


def with_tensorstore(store: Store) -> Iterator[tuple[str, NDArray[Any]]]:
    tensorstore = pytest.importorskip("tensorstore", reason="needs tensorstore: pip install tensorstore")
    for path in array_paths(store.path):
        place = {"driver": "file", "path": f"{store.path}/{path}/"}
        yield path, tensorstore.open({"driver": "zarr3", "kvstore": place}, read=True).result().read().result()


Reader = Callable[[Store], Iterator[tuple[str, NDArray[Any]]]]
READERS = [with_zarr, with_zarrs, with_tensorstore]


@pytest.mark.parametrize("reader", READERS)
def test_other_readers_open_every_array(written: tuple[Store, dict[str, Any]], reader: Reader) -> None:
    store, _ = written
    ours = our_arrays(store)
    assert sorted(ours) == array_paths(store.path)
    for path, values in reader(store):
        # Compared as digests of the bits: NaN is NaN, and the zeros have signs.
        assert digest(values) == digest(ours[path]), path


@pytest.mark.parametrize("reader", READERS)
def test_other_readers_give_the_values_that_were_written(written: tuple[Store, dict[str, Any]], reader: Reader) -> None:
    """Without our reader in between: from their row table to their activations."""
    store, bits = written
    arrays = dict(reader(store))
    sequence, position, token = (arrays[f"rows/{name}"] for name in ROW_ARRAYS)
    there = np.flatnonzero(sequence != ABSENT_ROW)
    assert len(there) == store.n_rows
    sequence, position, token = sequence[there], position[there], token[there]
    np.testing.assert_array_equal(arrays["tokens/ids"][sequence, position], token)
    for site in store.spec.sites:
        given = bits[site.name][sequence, position - store.spec.skip_first]
        found = arrays[f"{site_prefix(site.name)}/acts"][there]
        if site.codec != "int8":
            np.testing.assert_array_equal(found, given)
            continue
        scale = as_floats(arrays[f"{site_prefix(site.name)}/scale"][there], "bfloat16")
        exponents = site.feature_exponents or np.zeros(site.width)
        restored = found * scale[:, None] * np.exp2(exponents)
        # An export works on values, so that what was rounded once is rounded again.
        steps = 1.3 if "exported_from" in store.spec.text else 0.5000001
        allowed = scale[:, None] * np.exp2(exponents) * steps
        assert (np.abs(restored - as_floats(given, store.spec.dtype)) <= allowed).all()


def as_floats(stored: NDArray[Any], dtype: str) -> NDArray[np.float64]:
    if dtype == "bfloat16":
        stored = (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float64)


@contextmanager
def one_byte_flipped(store: Store, key: str, place: int) -> Iterator[None]:
    file = Path(store.path) / key
    whole = file.read_bytes()
    file.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
    try:
        yield
    finally:
        file.write_bytes(whole)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("codec", CODECS)
def test_other_readers_notice_a_flipped_byte(written: tuple[Store, dict[str, Any]], reader: Reader, codec: str) -> None:
    """The checksums are those of the Zarr codec, so that a reader that knows nothing of ours refuses as well.

    tensorstore decompresses while it reads, so that the compressor may be the first to stumble.
    """
    store, _ = written
    if reader is not with_zarr:
        pytest.importorskip(reader.__name__.removeprefix("with_"))
    site = store.spec.sites[CODECS.index(codec)]
    with (
        one_byte_flipped(store, sharded_key(site.name, "acts", 0), 30),
        pytest.raises(Exception, match=r"(?i)crc|checksum|digest|corrupt|blosc error"),
    ):
        dict(reader(store))


# --- the newest zarr, in an environment of its own ---------------------------------------------------------------


def working_python312() -> Path:
    """An interpreter of Python 3.12, which the newest zarr asks for; skips where there is none.

    The `python3.12` that pyenv puts on the PATH refuses unless that version was chosen; the real one lies below.
    """
    there = [shutil.which("python3.12"), *sorted(Path.home().glob(".pyenv/versions/3.12.*/bin/python3.12"))]
    for candidate in filter(None, there):
        asked = subprocess.run([candidate, "-c", "import ensurepip"], capture_output=True, check=False)
        if asked.returncode == 0:
            return Path(candidate)
    pytest.skip("needs python3.12 on the PATH, for the newest zarr in an environment of its own")


@pytest.fixture(scope="module")
def newest_zarr() -> Path:
    """The interpreter of an environment with the newest zarr: made once, and kept beside the main environment."""
    environment = Path(os.environ.get("ACTCACHE_ZARR_VENV", ROOT / ".venv-zarr-latest"))
    python, ready = environment / "bin" / "python", environment / ".ready"
    if ready.exists() and ready.read_text() == "\n".join(LATEST):
        return python
    shutil.rmtree(environment, ignore_errors=True)
    subprocess.run([working_python312(), "-m", "venv", str(environment)], check=True, capture_output=True)
    command = [python, "-m", "pip", "install", "--quiet", "--retries", "1", "--timeout", "20", *LATEST]
    installed = subprocess.run(command, capture_output=True, text=True, check=False)
    if installed.returncode:
        said = installed.stderr.strip().splitlines() or ["pip says nothing"]
        pytest.skip(f"needs {LATEST[0]}, which pip could not install: {said[-1]}")
    ready.write_text("\n".join(LATEST))
    return python


@pytest.mark.exhaustive
def test_the_newest_zarr_reads_the_same(newest_zarr: Path, written: tuple[Store, dict[str, Any]]) -> None:
    store, _ = written
    script = Path(__file__).with_name("zarr_digests.py")
    # `-I`: not this checkout, and nothing of the main environment.
    said = subprocess.run(
        [newest_zarr, "-I", script, store.path], capture_output=True, text=True, check=True, timeout=600
    )
    found = json.loads(said.stdout)
    assert tuple(int(part) for part in found["zarr"].split(".")[:2]) >= (3, 4)
    assert found["arrays"] == {path: digest(values) for path, values in our_arrays(store).items()}
    assert "Warning" not in said.stderr


def test_zarr_alone_opens_the_store_without_a_warning(written: tuple[Store, dict[str, Any]]) -> None:
    """Nothing lies in the folders that zarr does not know; it says so at every opening where something does."""
    store, _ = written
    code = (
        "import sys, warnings; warnings.simplefilter('error'); import zarr\n"
        "print(len(list(zarr.open_group(sys.argv[1], mode='r').members(max_depth=None))))"
    )
    said = subprocess.run([sys.executable, "-c", code, store.path], capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr
    groups = ["tokens", "rows", "sites", *(site_prefix(site.name) for site in store.spec.sites)]
    assert int(said.stdout) == len(array_paths(store.path)) + len(groups)


def test_a_copy_read_by_us_is_the_store(written: tuple[Store, dict[str, Any]], tmp_path: Path) -> None:
    """`open_store` goes by the objects alone: a store copied file by file is the same one."""
    store, _ = written
    shutil.copytree(store.path, tmp_path / "copy.zarr")
    copy = open_store(tmp_path / "copy.zarr")
    ours, theirs = our_arrays(store), our_arrays(copy)
    assert ours.keys() == theirs.keys()
    assert all(digest(ours[path]) == digest(theirs[path]) for path in ours)
