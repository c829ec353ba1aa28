"""The store's benchmark runs, at a size at which nothing is measured, so that it cannot rot."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import store
import store_bounds
import store_data

from actcache.store import open_store
from actcache.store.maintenance.verify import verify

pytestmark = pytest.mark.exhaustive


@pytest.fixture(scope="module")
def data():
    return store_data.recorded(9)


def test_comparisons_give_a_row_each(data, tmp_path):
    rows = [figure.row() for figure in store.figures(data, pairs=2, where=tmp_path)]
    assert len(rows) == 4 * len(store.PRESETS) + 2
    assert all(row.count("|") == 7 for row in rows)
    assert not list(tmp_path.iterdir())


def test_both_ways_of_writing_hold_the_same_bits(data, tmp_path):
    spec = data.spec("lossless")
    ours = store.write_store(data, spec, tmp_path / "ours.zarr")
    assert verify(tmp_path / "ours.zarr") == []
    table = ours.row_table()
    place = table["sequence"].astype(int) * spec.rows_per_sequence + table["position"] - spec.skip_first
    store.write_zarr(data, spec, tmp_path / "theirs.zarr")
    theirs = store.zarr.open_group(tmp_path / "theirs.zarr", mode="r")
    for name, rows in data.rows.items():
        assert (ours.read_stored(name, slice(None)) == rows[place]).all()
        assert (theirs[name][:] == rows).all()


def test_parts_and_bounds_give_a_row_each(data, tmp_path):
    rows = store_bounds.part_rows(data, store.PRESETS)
    assert all(row.count("|") == len(store.PRESETS) + 2 for row in rows[2:])
    rows = [bound.row() for bound in store_bounds.bounds(5, 2, (2, 3), 2, where=tmp_path)]
    assert len(rows) == 6
    assert all(row.count("|") == 5 for row in rows)


@pytest.mark.parametrize("sealed", [True, False])
def test_store_of_many_shards_opens_as_a_real_one_does(sealed, tmp_path):
    spec = store_bounds.wide_spec(5, 2)
    store_bounds.make_many_shards(tmp_path / "many.zarr", spec, sealed=sealed)
    found = open_store(tmp_path / "many.zarr")
    info = found.info()
    assert (found.sealed, found.n_rows, info["n_shards"]) == (sealed, spec.n_rows, 5)
