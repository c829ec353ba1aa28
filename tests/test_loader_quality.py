"""The shuffle, measured: figures that a good one meets and a deliberately bad one does not, and a warning before."""

from __future__ import annotations

import warnings
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from conftest import random_bits, random_blocks, spec_of, write_shards

from actcache.load import Loader, Plan
from actcache.load.plan.quality import ShuffleReport, batches_to_look_at, expected_sequences, shuffle_report
from actcache.load.plan.reading_order import rows_per_sequence
from actcache.load.plan.window_sizes import expected_ratio, with_windows
from actcache.order import permutation
from actcache.spec import Site, StoreSpec

PER_SEQUENCE, N_SEQUENCES = 255, 4096
N_ROWS = PER_SEQUENCE * N_SEQUENCES


def at_rest(per_shard: int) -> np.ndarray:
    """The sequence of each row of a store whose shards are shuffled when they are written."""
    rows = PER_SEQUENCE * per_shard
    return np.concatenate([s * per_shard + permutation(rows, 0, s) // PER_SEQUENCE for s in range(N_ROWS // rows)])


UNSHUFFLED = np.arange(N_ROWS) // PER_SEQUENCE


def report_of(plan: Plan, sequences: np.ndarray, epoch: int = 0) -> ShuffleReport:
    order = plan.epoch(epoch)
    runs = [[order.batch_row_ids(b) for b in run] for run in batches_to_look_at(plan.n_batches, 80)]
    counts = np.bincount(sequences)
    return shuffle_report(runs, lambda rows: sequences[rows], counts, N_ROWS, plan.rows_per_chunk)


def plan_of(rows_per_chunk: int, window_rows: int, lanes: int = 1, seed: int = 0) -> Plan:
    """Sizes of a real store: sequences of 255 rows, batches of 4,096."""
    return Plan(
        rows_per_chunk=rows_per_chunk,
        n_rows=N_ROWS,
        chunks_per_window=window_rows // rows_per_chunk,
        batch_rows=4096,
        seed=seed,
        lanes=lanes,
    )


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("lanes", [1, 4])
def test_a_good_shuffle_cannot_be_told_from_a_permutation_of_all_rows(seed, lanes):
    report = report_of(plan_of(510, 130_560, lanes, seed), at_rest(512), epoch=seed)
    assert report.good, report
    assert 0.97 < report.ratio < 1.01
    assert abs(report.serial_correlation) < 0.02
    assert report.n_batches == 80


def test_a_true_permutation_has_the_figures_that_it_is_measured_by():
    order = permutation(N_ROWS, 5)
    runs = [[order[4096 * b : 4096 * (b + 1)] for b in run] for run in batches_to_look_at(N_ROWS // 4096, 80)]
    report = shuffle_report(runs, lambda rows: UNSHUFFLED[rows], np.bincount(UNSHUFFLED), N_ROWS, 1)
    assert abs(report.ratio - 1) < 0.005
    assert abs(report.serial_correlation) < 0.01
    assert report.p_value > 0.01


def buffered(n_buffered: int) -> list[list[np.ndarray]]:
    """A mixing buffer of a few batches that goes through the rows in order."""
    rows = 4096 * n_buffered
    order = np.concatenate([start + permutation(rows, 1, start) for start in range(0, N_ROWS - rows + 1, rows)])
    return [[order[4096 * b : 4096 * (b + 1)] for b in run] for run in batches_to_look_at(len(order) // 4096, 80)]


@pytest.mark.parametrize("n_buffered", [1, 8])
def test_a_small_buffer_over_rows_in_order_fails_everything(n_buffered):
    report = shuffle_report(buffered(n_buffered), lambda rows: UNSHUFFLED[rows], np.bincount(UNSHUFFLED), N_ROWS, 510)
    assert not report.good
    assert report.ratio < 0.2
    assert report.serial_correlation > 0.5
    assert report.p_value < 1e-6
    assert "bad" in str(report)


def test_windows_of_one_chunk_fail():
    unshuffled = report_of(plan_of(510, 510), UNSHUFFLED)
    assert not unshuffled.good
    assert unshuffled.ratio < 0.1
    shuffled = report_of(plan_of(510, 510), at_rest(512))
    assert not shuffled.good
    assert shuffled.serial_correlation > 0.5


def test_rows_that_are_not_shuffled_at_rest_fail_in_small_windows():
    report = report_of(plan_of(510, 16 * 510), UNSHUFFLED)
    assert not report.good
    assert report.ratio < 0.1


def spec_with(per_shard: int, rows_per_chunk: int) -> StoreSpec:
    return StoreSpec(
        sites=(Site(name="x", shape=(8,)),),
        n_sequences=N_SEQUENCES,
        sequence_length=PER_SEQUENCE + 1,
        sequences_per_shard=per_shard,
        rows_per_chunk=rows_per_chunk,
    )


@pytest.mark.parametrize(
    ("per_shard", "rows_per_chunk", "window_rows"),
    [(512, 1020, 16_320), (512, 1020, 65_280), (512, 255, 130_560), (128, 1020, 65_280), (64, 510, 8_160)],
)
def test_what_is_expected_from_the_sizes_is_what_is_measured(per_shard, rows_per_chunk, window_rows):
    plan = plan_of(rows_per_chunk, window_rows)
    expected = expected_ratio(plan, spec_with(per_shard, rows_per_chunk))
    sequences = at_rest(per_shard)
    measured = np.mean([report_of(plan, sequences, epoch).ratio for epoch in range(3)])
    assert abs(expected - measured) < 0.012


def test_expected_sequences_are_those_of_samples():
    counts = np.array([1, 5, 0, 40, 40, 3])
    sequences, rng = np.repeat(np.arange(6), counts), np.random.default_rng(0)
    samples = [len(np.unique(rng.permutation(sequences)[:7])) for _ in range(20_000)]
    assert abs(np.mean(samples) - expected_sequences(counts, 7)) < 0.02
    assert expected_sequences(counts, 89) == pytest.approx(5)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """32 shards of 8 sequences of 16 rows, in chunks of 16."""
    blocks = random_blocks(256, 17)
    spec = spec_of(blocks, sequences_per_shard=8, rows_per_chunk=16)
    return write_shards(tmp_path_factory.mktemp("quality") / "s.zarr", spec, blocks, random_bits(spec))


def test_a_loader_reports_on_its_own_order(store):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        good = Loader(store, ["*"], batch_rows=32, seed=1).shuffle_report()
    settings = {"batch_rows": 32, "seed": 1}
    with pytest.warns(
        UserWarning, match=r"about 0\.[0-9]+ of .* 2 chunks of 16 rows; .* more than memory=2816, or fewer"
    ):
        poor = Loader(store, ["*"], memory=2 * 2 * 16 * 2 * 22, **settings)
    bad = poor.shuffle_report()
    assert good.ratio >= 0.97
    assert bad.ratio < good.ratio - 0.05
    assert not bad.good
    assert good.n_batches == 80


@pytest.mark.parametrize(
    ("batch_rows", "lanes", "share"), [(100, 1, 1), (200, 1, 1), (400, 1, 1), (100, 2, 1), (160, 1, 0.7)]
)
def test_windows_are_as_wide_as_a_good_shuffle_needs_where_the_memory_allows_it(store, batch_rows, lanes, share):
    """A quarter of the 256 chunks is enough for batches of 16 rows, and not for these."""
    chosen = np.flatnonzero(np.random.default_rng(0).random(store.n_rows) < share)
    settings = {"rows": chosen, "seed": 1, "lanes": lanes}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small = Loader(store, ["*"], batch_rows=16, **settings).plan
        loader = Loader(store, ["*"], batch_rows=batch_rows, **settings)
    plan = loader.plan
    assert small.chunks_per_window == -(-64 * 4096 // len(chosen)) < plan.chunks_per_window
    assert expected_ratio(plan, store.spec) >= 0.97
    assert np.mean([loader.shuffle_report(epoch=epoch).ratio for epoch in range(4)]) > 0.965
    narrower = with_windows(plan, store.spec, most_chunks=plan.chunks_per_window - 1)
    assert expected_ratio(narrower, store.spec) < 0.97
    memory = 2 * lanes * 44 * (plan.most_window_rows - 16)
    with pytest.warns(UserWarning, match=f"chunks of 16 rows; give the loader more than memory={memory}, or"):
        less = Loader(store, ["*"], batch_rows=batch_rows, memory=memory, **settings)
    assert 2 * lanes * 44 * less.plan.most_window_rows <= memory


def test_windows_of_many_small_chunks_have_no_more_than_a_shuffle_needs():
    """A million chunks: a quarter of them would take seconds to read before the first batch."""
    spec = spec_of(random_blocks(1, 129), n_sequences=125_000, sequences_per_shard=32)
    plan = Plan(n_rows=16_000_000, rows_per_chunk=16, chunks_per_window=1, batch_rows=1024, seed=1)
    for batch_rows, n_chunks in ((1024, 1024), (4096, 1950)):
        found = with_windows(replace(plan, batch_rows=batch_rows), spec, most_chunks=10**6)
        assert found.chunks_per_window == n_chunks
        assert expected_ratio(found, spec) >= 0.97


def test_lanes_too_short_to_shuffle_well_are_warned_of(store):
    with pytest.warns(UserWarning, match=r"about 0\.[0-9]+ of .*; give the loader fewer lanes, or fewer rows a batch"):
        loader = Loader(store, ["*"], batch_rows=256, lanes=8, memory="1GB")
    assert all(len(lane.starts) == 2 for lane in loader.plan.epoch(0).lanes)
    measured = loader.shuffle_report().ratio
    assert expected_ratio(loader.plan, store.spec) == pytest.approx(measured, abs=0.04)
    assert measured < 0.97
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Loader(store, ["*"], batch_rows=256, lanes=1, rank=3, world_size=8)


def test_reports_of_chosen_rows_expect_what_those_rows_can_give(store):
    table = store.row_table()
    chosen = np.flatnonzero((table["sequence"] % 3 == 0) & (table["position"] < 9))
    loader = Loader(store, ["*"], batch_rows=40, rows=chosen)
    expected = np.bincount(table["sequence"][chosen], minlength=256)
    assert np.array_equal(rows_per_sequence(store, loader.plan), expected)
    assert loader.shuffle_report().ratio == pytest.approx(1, abs=0.04)


def test_batches_that_are_looked_at_lie_over_the_whole_epoch():
    for n_batches in (1, 2, 7, 10, 11, 99, 5000):
        runs = batches_to_look_at(n_batches, 80)
        assert runs[-1].stop == n_batches
        assert runs[0].start == 0 or n_batches == 1
        assert all(a.stop <= b.start for a, b in pairwise(runs))
        assert sum(map(len, runs)) <= 80
