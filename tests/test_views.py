"""Lazy views: the values of the store, read when they are asked for, and checked then like all others."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_bits, random_blocks, spec_of, write_shards

from actcache.errors import ConfigError, CorruptShardError, SiteError
from actcache.spec import Site
from actcache.store import Store, export, open_store
from actcache.store.format.keys import row_key, sharded_key, site_prefix

SITES = (
    Site(name="blocks.0.hook_mlp_out", shape=(12,)),
    Site(name="blocks.1.hook_mlp_out", shape=(12,), codec="int8"),
    Site(name="blocks.1.attn.hook_z", shape=(2, 5), codec="raw"),
)
FIRST = SITES[0].name


@pytest.fixture(params=["bfloat16", "float16", "float32"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """A sealed store of 21 sequences in 3 shards, the last one partial; tests may damage it."""
    blocks = random_blocks(21, 13)
    spec = replace(spec_of(blocks, dtype=request.param), sites=SITES)
    return write_shards(tmp_path / "s.zarr", spec, blocks, random_bits(spec))


@pytest.fixture
def holes(store: Store, tmp_path: Path) -> Store:
    """The same with rows left out, and with a shard that has none."""
    kept = np.random.default_rng(5).random(store.spec.n_rows) < 0.4
    kept[store.spec.rows_per_shard : 2 * store.spec.rows_per_shard] = False
    return export(store, tmp_path / "holes.zarr", rows=kept)


def expected(store: Store, site: str, rows: object = slice(None)) -> np.ndarray:
    values = store.read(site, rows)
    return values.float().numpy() if values.dtype == torch.bfloat16 else values.numpy()


def damage(store: Store, key: str) -> None:
    file = Path(store.path) / key
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 1
    file.write_bytes(data)


def test_a_dask_array_has_the_values_in_the_logical_dtype(store):
    for site in store.sites:
        array = store.as_dask(site)
        wanted = expected(store, site)
        assert array.dtype == wanted.dtype == np.dtype("<f2" if store.spec.dtype == "float16" else "<f4")
        np.testing.assert_array_equal(array.compute(), wanted)


def test_blocks_are_shards(store, holes):
    assert store.as_dask(FIRST).chunks == ((96, 96, 60), (12,))
    sizes = tuple(int(n) for n in holes.shard_n_rows if n)
    assert len(sizes) == 2
    assert holes.as_dask(FIRST).chunks == (sizes, (12,))


def test_rows_left_out_are_no_rows_of_the_view(holes):
    for site in holes.sites:
        np.testing.assert_array_equal(holes.as_dask(site).compute(), expected(holes, site))
    dataset, table = holes.as_xarray(), holes.row_table()
    for name, values in table.items():
        np.testing.assert_array_equal(dataset[name].values, values)


def test_slices_of_a_view_are_those_of_the_values(store, holes):
    for source in (store, holes):
        array, values = source.as_dask(FIRST), expected(source, FIRST)
        ids = [len(values) - 1, 0, 37, 37]
        for index in (slice(30, 90), slice(None, None, -7), slice(5, 5), 41, -1, ids, values[:, 0] > 0):
            np.testing.assert_array_equal(array[index].compute(), values[index])
            np.testing.assert_array_equal(array[index, ..., 3:9:2].compute(), values[index][..., 3:9:2])


def test_an_unfinished_store_shows_the_shards_that_are_there(store, tmp_path):
    blocks = store.token_blocks()
    part = write_shards(tmp_path / "part.zarr", store.spec, blocks, random_bits(store.spec), shards=[0, 2])
    assert not part.sealed
    wanted = expected(store, FIRST, np.r_[0:96, 192:252])
    np.testing.assert_array_equal(part.as_dask(FIRST).compute(), wanted)
    np.testing.assert_array_equal(part.as_xarray()["sequence"].values, part.row_table()["sequence"])
    nothing = write_shards(tmp_path / "nothing.zarr", store.spec, blocks, random_bits(store.spec), shards=[])
    assert nothing.as_dask(FIRST).compute().shape == (0, 12)
    assert nothing.as_xarray().compute().sizes["row"] == 0


def test_an_xarray_dataset_has_every_site_over_named_dimensions(store):
    dataset = store.as_xarray()
    assert list(dataset.data_vars) == store.sites
    assert dataset.sizes == {"row": 252, "feature_12": 12, "feature_10": 10}
    for site in store.spec.sites:
        variable = dataset[site.name]
        assert variable.dims == ("row", f"feature_{site.width}")
        assert variable.attrs["shape"] == list(site.shape)
        assert (variable.attrs["dtype"], variable.attrs["codec"]) == (store.spec.dtype, site.codec)
        np.testing.assert_array_equal(variable.values, expected(store, site.name))
    # Sites of one width go together value by value.
    difference = dataset[FIRST] - dataset[SITES[1].name]
    assert difference.shape == (252, 12)
    assert dataset.attrs["fingerprint"] == store.fingerprint


def test_coordinates_say_where_rows_come_from(store):
    dataset, table = store.as_xarray([FIRST]), store.row_table()
    assert list(dataset.data_vars) == [FIRST]
    assert set(dataset.coords) == {"sequence", "position", "token"}
    at_three = dataset[FIRST].isel(row=np.flatnonzero((dataset.position == 3).values))
    np.testing.assert_array_equal(at_three.values, expected(store, FIRST)[table["position"] == 3])
    ids = store.tokens()
    assert (ids[dataset.sequence.values, dataset.position.values] == dataset.token.values).all()
    by_position = dataset[FIRST].astype("f8").compute().groupby("position").mean("row")
    mean = [expected(store, FIRST)[table["position"] == p].astype("f8").mean(0) for p in range(1, 13)]
    np.testing.assert_allclose(by_position.values, mean)


def test_sites_are_asked_for_by_name_or_pattern(store):
    assert list(store.as_xarray("*mlp*").data_vars) == [SITES[0].name, SITES[1].name]
    with pytest.raises(SiteError, match="did you mean"):
        store.as_xarray(["blocks.0.hook_mlp_ouch"])
    with pytest.raises(SiteError, match="did you mean"):
        store.as_dask("blocks.0.hook_mlp_ouch")


def test_nothing_is_read_before_it_is_computed(store):
    """With all activations and the row table gone, views are made, sliced and calculated with; only asking fails."""
    for site in store.sites:
        shutil.rmtree(Path(store.path) / site_prefix(site) / "acts")
    shutil.rmtree(Path(store.path) / "rows")
    again = open_store(store.path)
    array, dataset = again.as_dask(FIRST), again.as_xarray()
    lazy = [
        array,
        array[5:70, 3],
        array.astype("f8").mean(axis=0),
        dataset[FIRST].isel(row=slice(3)).data,
        (dataset[FIRST] - 1).mean("row").data,
        dataset.position.data + 1,
    ]
    repr(dataset)
    for values in lazy:
        with pytest.raises(CorruptShardError):
            values.compute()


def test_only_the_asked_for_shards_are_read(store):
    wanted = expected(store, FIRST, slice(0, 96))
    damage(store, sharded_key(FIRST, "acts", 1))
    damage(store, row_key("position", 1))
    again = open_store(store.path)
    array, dataset = again.as_dask(FIRST), again.as_xarray()
    np.testing.assert_array_equal(array[:96].compute(), wanted)
    np.testing.assert_array_equal(dataset[FIRST].isel(row=slice(10, 20)).data.compute(), wanted[10:20])
    with pytest.raises(CorruptShardError, match=f"shard 1 of {FIRST} .* is damaged"):
        array.compute()
    with pytest.raises(CorruptShardError, match=f"shard 1 of {FIRST} .* is damaged"):
        dataset[FIRST].mean("row").compute()
    with pytest.raises(CorruptShardError, match=r"rows/position/c\.1 .* does not match its checksum"):
        dataset.position.compute()


def test_views_of_a_finished_store_share_their_tasks(store, tmp_path):
    first, second = store.as_dask(FIRST), open_store(store.path).as_dask(FIRST)
    assert first.name == second.name
    assert first.name != store.as_dask(SITES[1].name).name
    shutil.copytree(store.path, tmp_path / "copy.zarr")
    assert first.name != open_store(tmp_path / "copy.zarr").as_dask(FIRST).name


def test_views_are_computed_in_other_processes(small_store):
    site = small_store.sites[0]
    total = small_store.as_dask(site).sum(axis=0).compute(scheduler="processes", num_workers=2)
    np.testing.assert_allclose(total, expected(small_store, site).sum(axis=0), rtol=1e-4)


def test_without_xarray_it_says_how_to_get_it(small_store, monkeypatch):
    monkeypatch.setitem(sys.modules, "xarray", None)
    with pytest.raises(ConfigError, match="pip install xarray"):
        small_store.as_xarray()
