"""The store: what is read is what was written, for every dtype and codec, by us and by any Zarr reader."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from conftest import random_bits, random_blocks, spec_of, write_shards
from hypothesis import given, settings
from hypothesis import strategies as st

from actcache.errors import (
    ConfigError,
    NotAStoreError,
    SiteError,
    StoreIncompleteError,
    StoreMismatchError,
    StoreNotFoundError,
    StoreVersionError,
)
from actcache.spec import Site, StoreSpec
from actcache.store import PRESETS, Store, open_store
from actcache.store.codecs.chain import STORED_DTYPE
from actcache.store.format.keys import sharded_key
from actcache.store.format.stats import LineBuilder, merge, stats_of

LOSSLESS = sorted(name for name, preset in PRESETS.items() if preset.lossless)


@settings(max_examples=25, deadline=None)
@given(
    dtype=st.sampled_from(["bfloat16", "float16", "float32"]),
    codec=st.sampled_from(LOSSLESS),
    sizes=st.tuples(st.integers(1, 9), st.integers(2, 7), st.integers(1, 4), st.integers(1, 9)),
    skip_first=st.integers(0, 1),
    seed=st.integers(0, 2**31),
)
def test_read_returns_the_written_bits(dtype, codec, sizes, skip_first, seed):
    n_sequences, length, sequences_per_shard, width = sizes
    blocks = random_blocks(n_sequences, length)
    rows_per_sequence = length - skip_first
    spec = spec_of(
        blocks,
        sites=(Site(name="x", shape=(width,)),),
        sequences_per_shard=sequences_per_shard,
        rows_per_chunk=rows_per_sequence,
        skip_first=skip_first,
        dtype=dtype,
        codec=codec,
    )
    stored = STORED_DTYPE[dtype]
    # Any bits at all: NaN payloads, infinities, subnormals, both zeros.
    shape = (n_sequences, rows_per_sequence, width)
    bits = np.frombuffer(np.random.default_rng(seed).bytes(int(np.prod(shape)) * stored.itemsize), stored).reshape(
        shape
    )
    with tempfile.TemporaryDirectory() as folder:
        store = write_shards(Path(folder) / "s.zarr", spec, blocks, {"x": bits})
        table = store.row_table()
        expected = bits[table["sequence"], table["position"] - skip_first]
        got = store.read("x", slice(None))
        assert got.dtype == getattr(torch, dtype)
        assert got.view(torch.uint8).numpy().tobytes() == expected.tobytes()
        assert (table["token"] == blocks.ids[table["sequence"], table["position"]]).all()
        assert len({*zip(table["sequence"].tolist(), table["position"].tolist(), strict=True)}) == spec.n_rows
        assert (store.tokens() == blocks.ids).all()
        assert (store.tokens("document") == blocks.document).all()


def test_rows_are_shuffled_within_their_shard(small_store):
    sequence = small_store.row_table()["sequence"]
    for shard in range(small_store.spec.n_shards):
        rows = small_store.spec.shard_rows(shard)
        part = sequence[rows.start : rows.stop]
        assert set(part.tolist()) == set(small_store.spec.shard_sequences(shard))
        assert not (np.diff(part.astype(np.int64)) >= 0).all()


@pytest.mark.parametrize("codec", LOSSLESS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_zarr_python_reads_and_would_have_written_the_same(tmp_path, codec, dtype):
    blocks = random_blocks(29, 13)
    spec = spec_of(blocks, codec=codec, dtype=dtype)
    store = write_shards(tmp_path / "s.zarr", spec, blocks, random_bits(spec))
    group = zarr.open_group(tmp_path / "s.zarr", mode="r")
    for site in spec.sites:
        array = group[f"sites/{site.name}/acts"]
        ours = store.read(site.name, slice(None))
        ours = ours.view(torch.uint16) if dtype == "bfloat16" else ours
        np.testing.assert_array_equal(array[:], ours.numpy())
        if codec == "lossless":  # its frames are put together by us; what zarr's would be differs
            continue
        # The same values written by zarr-python itself give the same object, byte for byte.
        shutil.copytree(tmp_path / "s.zarr", tmp_path / "theirs.zarr", dirs_exist_ok=True)
        theirs = zarr.open_array(tmp_path / "theirs.zarr" / f"sites/{site.name}/acts", mode="r+")
        last = spec.n_shards - 1
        for shard in (0, last):
            rows = spec.shard_rows(shard)
            theirs[rows.start : rows.stop] = array[rows.start : rows.stop]
            ours_bytes = (tmp_path / "s.zarr" / sharded_key(site.name, "acts", shard)).read_bytes()
            theirs_bytes = (tmp_path / "theirs.zarr" / sharded_key(site.name, "acts", shard)).read_bytes()
            assert ours_bytes == theirs_bytes
    np.testing.assert_array_equal(group["tokens/ids"][:], blocks.ids)
    for name in ("sequence", "position", "token"):
        np.testing.assert_array_equal(group[f"rows/{name}"][:], store.row_table()[name])


def test_read_takes_slices_and_any_order_of_rows(small_store):
    everything = small_store.read("blocks.0.hook_mlp_out", slice(None))
    picked = [300, 0, 17, 17, small_store.n_rows - 1]
    assert torch.equal(small_store.read("blocks.0.hook_mlp_out", picked), everything[picked])
    assert torch.equal(small_store.read("blocks.0.hook_mlp_out", slice(5, 200, 7)), everything[5:200:7])
    assert small_store.read("blocks.0.hook_mlp_out", []).shape == (0, 12)
    mask = np.zeros(small_store.n_rows, bool)
    mask[[3, 200]] = True
    assert torch.equal(small_store.read("blocks.0.hook_mlp_out", mask), everything[[3, 200]])
    with pytest.raises(IndexError, match="a mask of 348 booleans, not by float64"):
        small_store.read("blocks.0.hook_mlp_out", [1.5])
    with pytest.raises(IndexError, match="not by bool of shape"):
        small_store.read("blocks.0.hook_mlp_out", [True, False])
    with pytest.raises(IndexError, match="0 to 347"):
        small_store.read("blocks.0.hook_mlp_out", [348])


def test_dask_array_is_the_same_values_with_one_block_a_shard(small_store):
    for site in small_store.sites:
        array = small_store.as_dask(site)
        assert array.numblocks[0] == small_store.spec.n_shards
        np.testing.assert_array_equal(array.compute(scheduler="threads"), small_store.read(site, slice(None)).float())


def test_statistics_equal_a_two_pass_computation(small_store):
    for site in small_store.sites:
        values = small_store.read(site, slice(None)).double().numpy()
        stats = small_store.stats(site)
        np.testing.assert_allclose(stats.mean, values.mean(0), rtol=0, atol=1e-14)
        np.testing.assert_allclose(stats.variance, values.var(0), rtol=1e-12)
        assert stats.count == len(values)
        assert stats.abs_max == np.abs(values).max()
        norms = np.linalg.norm(values, axis=1)
        assert stats.mean_norm == pytest.approx(norms.mean(), rel=1e-12)
        assert stats.rms_norm == pytest.approx(np.sqrt((norms**2).mean()), rel=1e-12)
        assert stats.max_norm == pytest.approx(norms.max(), rel=1e-12)


@pytest.mark.parametrize("offset", [0.0, 1e4, 1e6])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e12])
def test_statistics_keep_their_digits_under_offset_and_scale(offset, scale):
    rng = np.random.default_rng(0)
    values = ((rng.standard_normal((5000, 3)) + offset) * scale).astype(np.float32)
    lines = []
    for part in np.array_split(values, 7):
        builder = LineBuilder(3, "float32")
        builder.add(part)
        lines.append(builder.line)
    stats = stats_of(merge(lines))
    exact = values.astype(np.float64)
    np.testing.assert_allclose(stats.mean, exact.mean(0), rtol=1e-13)
    np.testing.assert_allclose(stats.variance, exact.var(0), rtol=1e-9)


def test_nan_and_infinity_are_counted_and_spoil_no_statistic(tmp_path):
    blocks = random_blocks(4, 9)
    spec = spec_of(
        blocks, sites=(Site(name="x", shape=(6,)),), sequences_per_shard=2, rows_per_chunk=8, dtype="float32"
    )
    bits = random_bits(spec)
    bits["x"][1, 3, 2] = np.nan
    bits["x"][2, 0, :2] = np.inf
    bits["x"][3, 1, 0] = 0.0
    store = write_shards(tmp_path / "s.zarr", spec, blocks, bits)
    stats = store.stats("x")
    finite = np.isfinite(bits["x"]).all(-1)
    assert (stats.n_nan, stats.n_inf, stats.count) == (1, 2, int(finite.sum()))
    np.testing.assert_allclose(stats.mean, bits["x"][finite].astype(np.float64).mean(0), rtol=1e-12)
    assert stats.zero_fraction == pytest.approx(1 / (finite.sum() * 6))
    assert store.info()["sites"]["x"]["n_nan"] == 1


@pytest.mark.parametrize("width", [1, 7, 128])
def test_the_compiled_statistics_are_those_of_numpy(width):
    """One pass in machine code against several of numpy, over any bits: NaN, infinities, zeros of both signs."""
    rng = np.random.default_rng(width)
    rows = (rng.standard_normal((300, width)).astype(np.float32) * 1e3).view(np.uint32) >> 16
    rows = rows.astype(np.uint16)
    strange = rng.integers(0, rows.size, 5)
    rows.reshape(-1)[strange] = [0x7F80, 0xFF80, 0x7FC1, 0x8000, 0x0001]
    wanted = rng.permutation(300)
    lines = []
    for compiled in (True, False):
        builder = LineBuilder(width, "bfloat16")
        assert builder._kernel is not None
        if not compiled:
            builder._kernel = None
        out = np.zeros_like(rows)
        for start in range(0, 300, 64):
            builder.take(rows, wanted[start : start + 64], out[start : start + 64])
        assert np.array_equal(out, rows[wanted])
        lines.append(builder.line)
    np.testing.assert_allclose(lines[0], lines[1], rtol=1e-12)
    assert np.array_equal(lines[0][-3:], lines[1][-3:])  # zeros, NaN and infinities are counted, not measured


def test_info_is_json_and_counts_what_is_on_disk(small_store):
    info = json.loads(json.dumps(small_store.info()))
    objects = [p for p in Path(small_store.path).rglob("*") if p.is_file()]
    of_shards = [p for p in objects if "/acts/c." in str(p) or "/stats/c." in str(p) or "/rows/" in str(p)]
    of_shards = [p for p in of_shards if p.name != "zarr.json" and p.parent.name != "commit"]
    assert info["bytes"] == sum(p.stat().st_size for p in of_shards)
    assert info["n_rows"] == info["n_rows_expected"] == 29 * 12
    assert info["state"] == "sealed"


def test_equal_specs_and_values_give_equal_fingerprints(tmp_path, small_store):
    blocks = random_blocks(29, 13)
    spec = spec_of(blocks)
    assert write_shards(tmp_path / "a.zarr", spec, blocks, random_bits(spec)).fingerprint == small_store.fingerprint
    other = write_shards(tmp_path / "b.zarr", spec, blocks, random_bits(spec, seed=2))
    assert other.fingerprint != small_store.fingerprint


def test_an_unfinished_store_shows_what_is_committed(tmp_path):
    blocks = random_blocks(29, 13)
    spec = spec_of(blocks)
    bits = random_bits(spec)
    write_shards(tmp_path / "s.zarr", spec, blocks, bits, shards=[2])
    store = open_store(tmp_path / "s.zarr")
    assert not store.sealed
    assert store.committed == [2]
    assert store.n_rows == 8 * 12
    assert store.stats("blocks.0.hook_mlp_out").count == store.n_rows
    assert store.read("blocks.0.hook_mlp_out", slice(192, 288)).shape == (96, 12)
    assert store.info()["n_shards"] == 1
    with pytest.raises(StoreIncompleteError, match=r"shard 0 .* not written yet"):
        store.read("blocks.0.hook_mlp_out", [0])
    finished = write_shards(tmp_path / "s.zarr", spec, blocks, bits)
    assert finished.sealed


def test_a_store_begun_with_another_spec_is_refused_and_says_what_differs(tmp_path):
    blocks = random_blocks(29, 13)
    spec = spec_of(blocks)
    write_shards(tmp_path / "s.zarr", spec, blocks, random_bits(spec), shards=[0])
    other = spec_of(blocks, codec="raw", model={"name": "other"})
    with pytest.raises(StoreMismatchError) as error:
        write_shards(tmp_path / "s.zarr", other, blocks, random_bits(other))
    assert "sites.blocks.0.hook_mlp_out.codec: the store has 'lossless', asked for 'raw'" in str(error.value)
    assert "model.name: the store has 'random', asked for 'other'" in str(error.value)
    assert open_store(tmp_path / "s.zarr").committed == [0]


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("three years of work")
    blocks = random_blocks(29, 13)
    spec = spec_of(blocks)
    with pytest.raises(NotAStoreError, match="holds something that is not an activation store"):
        write_shards(tmp_path, spec, blocks, random_bits(spec))
    with pytest.raises(NotAStoreError, match="holds something that is not an activation store"):
        open_store(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
    zarr.open_group(tmp_path / "foreign.zarr", mode="w")
    with pytest.raises(NotAStoreError, match="no 'actcache' attributes"):
        open_store(tmp_path / "foreign.zarr")


def test_no_store_and_unknown_site_say_what_to_do(tmp_path, small_store):
    with pytest.raises(StoreNotFoundError, match="actcache extract"):
        open_store(tmp_path / "nowhere.zarr")
    with pytest.raises(ConfigError, match="nobody here knows"):
        open_store("gopher://acts.zarr")
    with pytest.raises(SiteError, match=r"did you mean blocks\.0\.hook_mlp_out"):
        small_store.stats("blocks.0.hook_mlp_oot")


def test_a_store_of_a_newer_format_is_refused_by_name(tmp_path, small_store):
    shutil.copytree(small_store.path, tmp_path / "s.zarr")
    root = tmp_path / "s.zarr" / "zarr.json"
    metadata = json.loads(root.read_text())
    metadata["attributes"]["actcache"]["format_version"] = 2
    root.write_text(json.dumps(metadata))
    with pytest.raises(StoreVersionError, match=r"format version 2.*upgrade actcache"):
        open_store(tmp_path / "s.zarr")


def test_spec_refuses_sizes_that_do_not_fit_and_survives_json():
    blocks = random_blocks(4, 9)
    with pytest.raises(ConfigError, match=r"rows_per_chunk .7. must divide rows_per_shard .64"):
        spec_of(blocks, rows_per_chunk=7)
    with pytest.raises(ConfigError, match="dtype"):
        spec_of(blocks, dtype="float8")
    with pytest.raises(ConfigError, match="skip_first"):
        spec_of(blocks, skip_first=9)
    spec = spec_of(blocks)
    assert StoreSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_a_hook_name_cannot_leave_the_store(tmp_path):
    blocks = random_blocks(4, 9)
    spec = spec_of(blocks, sites=(Site(name="../../evil/x", shape=(3,)),), sequences_per_shard=2, rows_per_chunk=8)
    store = write_shards(tmp_path / "deep" / "s.zarr", spec, blocks, random_bits(spec))
    assert isinstance(store, Store)
    assert [p.name for p in tmp_path.iterdir()] == ["deep"]
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["s.zarr"]
    assert store.read("../../evil/x", slice(None)).shape == (32, 3)
