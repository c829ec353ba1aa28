"""Statistics and covariance are those of numpy in float64 and two passes, whatever the scale, and of every dtype."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from conftest import random_bits, random_blocks, spec_of, write_shards

from actcache.errors import ConfigError, SiteError, StoreError, StoreIncompleteError
from actcache.kernels import take_and_measure
from actcache.load import Loader
from actcache.spec import Site
from actcache.store import RowFilter, Store, export, open_store
from actcache.store.format.stats import LineBuilder, SiteStats, merge, stats_of

FIGURES = ("mean", "variance", "dimension_abs_max", "mean_norm", "rms_norm", "max_norm", "abs_max", "zero_fraction")


def as_stored(values: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Values as a store of that dtype has them, and what these are in float64."""
    if dtype == "bfloat16":
        bits = (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        return bits, (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    if dtype == "float16":  # which ends at 65,504
        values = np.where(np.isinf(values), values, np.clip(values / 64, -6e4, 6e4))
    narrow = values.astype(dtype)
    return narrow, narrow.astype(np.float64)


def adversarial(kind: str) -> np.ndarray:
    """`(4000, 6)` float64 values of scales that make sums of squares lose their digits."""
    values = np.random.default_rng(7).standard_normal((4000, 6))
    if kind == "offset":  # large beside the deviation, in every second dimension with the other sign
        values = 1e4 * (-1.0) ** np.arange(6) + 4 * values
    elif kind == "small deviation":
        values = 1e6 + 1e-3 * values
    elif kind == "a constant":
        values[:, ::2] = 1234.5
    elif kind == "scales":  # a factor of 1e10 between dimensions, and 1e4 between rows
        values = 10.0 ** np.linspace(-6, 4, 6) * values * np.exp(np.random.default_rng(1).normal(0, 2, (4000, 1)))
    elif kind == "outliers":  # the first rows are as those of a BOS token: enormous, and nothing like the rest
        values[:300] = 3e4 + values[:300]
        values[300:] *= 1e-3
    elif kind == "mostly zeros":
        values[np.random.default_rng(2).random(values.shape) < 0.9] = 0.0
        values[:50] = -0.0
    elif kind == "not finite":
        values[5, 2], values[700, :3], values[3000, 1], values[3001, 0] = np.nan, np.inf, -np.inf, np.nan
        values += 1e4
    return values


KINDS = ("plain", "offset", "small deviation", "a constant", "scales", "outliers", "mostly zeros", "not finite")


def two_pass(values: np.ndarray) -> dict[str, object]:
    """Every figure of the statistics, by numpy in float64."""
    finite = values[np.isfinite(values).all(1)]
    norms = np.sqrt((finite**2).sum(1))
    return {
        "count": len(finite),
        "mean": finite.mean(0),
        "variance": ((finite - finite.mean(0)) ** 2).mean(0),
        "dimension_abs_max": np.abs(finite).max(0),
        "mean_norm": norms.mean(),
        "rms_norm": np.sqrt((norms**2).mean()),
        "max_norm": norms.max(),
        "abs_max": np.abs(finite).max(),
        "zero_fraction": (finite == 0).mean(),
        "n_nan": int(np.isnan(values).sum()),
        "n_inf": int(np.isinf(values).sum()),
    }


WAYS = [("bfloat16", "compiled"), ("bfloat16", "numpy"), ("float16", "numpy"), ("float32", "numpy")]


@pytest.mark.parametrize(("dtype", "way"), WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_statistics_equal_those_of_two_passes_whatever_the_scale(kind, dtype, way):
    stored, exact = as_stored(adversarial(kind), dtype)
    lines = []
    for part in np.array_split(np.arange(len(stored)), [900, 1000, 1001, 2800]):
        builder = LineBuilder(6, dtype)
        builder.block_rows = 64
        builder._kernel = take_and_measure() if way == "compiled" else None
        assert (builder._kernel is not None) == (way == "compiled")
        builder.take(stored, part, np.empty((len(part), 6), stored.dtype))
        lines.append(builder.line)
    assert_equal(stats_of(merge(lines)), exact)


def assert_equal(stats: SiteStats, exact: np.ndarray) -> None:
    """Every figure is that of two passes over these values."""
    expected = two_pass(exact)
    for name in ("count", "n_nan", "n_inf"):
        assert getattr(stats, name) == expected[name]
    for name in FIGURES:
        close = ulp_of_mean(name, exact)
        np.testing.assert_allclose(getattr(stats, name), expected[name], rtol=1e-9, atol=close, err_msg=name)


def ulp_of_mean(name: str, exact: np.ndarray) -> float:
    """Where all values of a dimension are equal, two passes may find 0 and others a digit beyond the last."""
    finite = exact[np.isfinite(exact).all(1)]
    return 1e-14 * float(np.abs(finite).max()) ** 2 if name == "variance" else 0.0


def store_of(path, values: np.ndarray, dtype: str, codec: str = "lossless") -> tuple[Store, np.ndarray]:
    """A store whose one site has these `(N, D)` rows, and what it gives back, in float64 and in row order."""
    blocks = random_blocks(-(-len(values) // 25), 26)
    site = Site(name="x", shape=(values.shape[1],))
    spec = spec_of(blocks, codec, sites=(site,), sequences_per_shard=32, rows_per_chunk=20, dtype=dtype)
    stored, _ = as_stored(values, dtype)
    store = write_shards(path, spec, blocks, {"x": stored.reshape(blocks.n_sequences, 25, -1)})
    return store, store.read("x", slice(None)).double().numpy()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("kind", KINDS)
def test_statistics_of_some_rows_are_those_of_two_passes_over_them(kind, dtype, tmp_path):
    store, values = store_of(tmp_path / "s.zarr", adversarial(kind), dtype)
    late = store.row_table()["position"] >= 9
    loader = Loader(store, ["*"], batch_rows=10, rows=RowFilter(positions=slice(9, None)))
    assert loader.site_stats("x") is loader.site_stats("x")
    assert_equal(loader.site_stats("x"), values[late])
    assert_equal(store.stats("x", rows=np.flatnonzero(~late)), values[~late])
    assert Loader(store, ["*"], batch_rows=10).site_stats("x").count == store.stats("x").count


def test_statistics_are_of_shards_or_of_rows(small_store):
    site = small_store.sites[0]
    with pytest.raises(ConfigError, match="give shards or rows, not both"):
        small_store.stats(site, shards=[0], rows=[1])
    with pytest.raises(StoreError, match="has none of the rows asked for"):
        small_store.stats(site, rows=[])
    by_shard, by_rows = small_store.stats(site, shards=[1]), small_store.stats(site, rows=slice(96, 192))
    np.testing.assert_allclose(by_rows.mean, by_shard.mean, atol=1e-15)


def exact_covariance(values: np.ndarray) -> np.ndarray:
    """By numpy, in two passes."""
    finite = values[np.isfinite(values).all(1)]
    deviations = finite - finite.mean(0)
    return deviations.T @ deviations / len(finite)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("kind", KINDS)
def test_covariance_equals_that_of_two_passes_whatever_the_scale(kind, dtype, tmp_path):
    store, values = store_of(tmp_path / "s.zarr", adversarial(kind), dtype)
    expected, found = exact_covariance(values), store.covariance("x")
    spread = np.sqrt(np.outer(expected.diagonal(), expected.diagonal()))
    largest = np.nanmax(np.abs(np.where(np.isfinite(values), values, 0)), axis=0)
    # Neither can be nearer than the last digits of the mean are.
    np.testing.assert_array_less(np.abs(found - expected), 1e-11 * spread + 1e-30 + np.outer(largest, largest) * 1e-28)
    assert np.array_equal(found, found.T)
    np.testing.assert_allclose(found.diagonal(), store.stats("x").variance, rtol=1e-9, atol=1e-14 * largest.max() ** 2)


def test_covariance_of_some_of_the_rows(tmp_path):
    """Even of those that are far from the mean of all."""
    store, values = store_of(tmp_path / "s.zarr", adversarial("outliers"), "float32")
    far = np.flatnonzero(values[:, 0] > 1e4)
    position = store.row_table()["position"]
    chosen = [far, far[::-1].tolist(), slice(100, 3000, 7), values[:, 1] > 0, RowFilter(positions=range(3, 9))]
    means = [far, far, np.arange(100, 3000, 7), values[:, 1] > 0, (position >= 3) & (position < 9)]
    for rows, meant in zip(chosen, means, strict=True):
        expected = exact_covariance(values[meant])
        np.testing.assert_allclose(store.covariance("x", rows), expected, rtol=1e-10, atol=1e-12 * expected.max())


def test_covariance_of_what_is_stored_in_other_ways(tmp_path):
    values = np.random.default_rng(0).standard_normal((900, 6)) @ np.random.default_rng(1).standard_normal((6, 6))
    quantised, read = store_of(tmp_path / "int8.zarr", values, "bfloat16", "int8")
    np.testing.assert_allclose(quantised.covariance("x"), exact_covariance(read), rtol=1e-10, atol=1e-12)
    whole, read = store_of(tmp_path / "s.zarr", values, "float32")
    kept = np.random.default_rng(2).random(900) < 0.3
    kept[: whole.spec.rows_per_shard] = False
    holes = export(whole, tmp_path / "holes.zarr", rows=kept)
    expected = exact_covariance(holes.read("x", slice(None)).double().numpy())
    np.testing.assert_allclose(holes.covariance("x"), expected, rtol=1e-10, atol=1e-12)


def test_covariance_is_said_to_be_of_nothing_where_there_is_nothing(tmp_path):
    values = np.full((100, 3), np.nan)
    values[7] = 1.0
    values[99] = 3.0
    store, read = store_of(tmp_path / "s.zarr", values, "float32")
    finite = np.isfinite(read).all(1)
    for rows in (None, slice(None)):  # the first rows are none to begin with
        assert np.array_equal(store.covariance("x", rows), np.ones((3, 3)))
    assert np.array_equal(store.covariance("x", finite & (read == 3.0).all(1)), np.zeros((3, 3)))
    with pytest.raises(StoreError, match=r"none of the rows asked for of x in .* is finite"):
        store.covariance("x", ~finite)
    with pytest.raises(SiteError, match="no site matches"):
        store.covariance("y")
    with pytest.raises(IndexError, match="has 0 to 99"):
        store.covariance("x", [100])
    blocks = random_blocks(29, 13)
    spec = spec_of(blocks)
    open_one = write_shards(tmp_path / "open.zarr", spec, blocks, random_bits(spec), shards=[1, 2])
    part = open_one.read(open_one.sites[0], open_one.row_ids()).double().numpy()
    np.testing.assert_allclose(open_one.covariance(open_one.sites[0]), exact_covariance(part), rtol=1e-10, atol=1e-15)
    with pytest.raises(StoreIncompleteError, match="shard 0"):
        open_one.covariance(open_one.sites[0], slice(None))
    with pytest.raises(StoreIncompleteError, match="shard 3"):
        open_one.covariance(open_one.sites[0], [100, 300])


def test_a_covariance_that_nobody_has_room_for_is_refused(tmp_path):
    store, _ = store_of(tmp_path / "s.zarr", np.zeros((25, 33_000)), "bfloat16")
    with pytest.raises(ConfigError, match="x is 33,000 wide, its covariance matrix would take 8 GiB"):
        store.covariance("x")


def test_covariance_takes_memory_for_its_matrices_alone(tmp_path):
    """Seven times the rows, and no more memory."""
    peaks = []
    for n_rows in (3000, 20_000):
        values = np.random.default_rng(0).standard_normal((n_rows, 64))
        store, _ = store_of(tmp_path / f"{n_rows}.zarr", values, "float32")
        store = open_store(store.path)
        store.covariance("x")
        tracemalloc.start()
        store.covariance("x")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0] < 6e6
