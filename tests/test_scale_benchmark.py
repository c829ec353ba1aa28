"""The benchmark of scale runs, at a size at which nothing is measured, so that it cannot rot."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import scale
from measure import embedded

from actcache.store import open_store, verify

pytestmark = pytest.mark.exhaustive


def test_workers_and_late_stores_give_a_row_each() -> None:
    lm, blocks = embedded(24)
    figures = [*scale.workers(lm, blocks, [1], pairs=1), *scale.late(lm, blocks, pairs=1)]
    assert [figure.row().count("|") for figure in figures] == [7] * 4
    assert all(figure.ours > 0 for figure in figures)


def test_late_store_is_the_same_store(tmp_path: Path) -> None:
    import actcache as ac

    lm, blocks = embedded(24)
    far = ac.extract(lm, blocks, scale.TWO, scale.far_store(tmp_path / "far.zarr"), **scale.SETTINGS)
    here = ac.extract(lm, blocks, scale.TWO, tmp_path / "here.zarr", **scale.SETTINGS)
    assert far.root.fingerprint == here.root.fingerprint
    assert verify(tmp_path / "far.zarr") == []
    assert open_store(tmp_path / "far.zarr").sealed


def test_large_extractions_are_planned_from_a_small_one() -> None:
    lm, blocks = embedded(64)
    measured = scale.planned(lm, blocks, scale.TWO, seconds=1)
    rows = scale.large_rows(measured)
    assert len(rows) == 2 + 2 * len(scale.TOKENS)
    assert {row.count("|") for row in rows} == {10}
    # A hundred times the tokens are a hundred times the bytes, and 10 T of two sites of 128 about half a petabyte.
    small, large = (measured.scaled(n_tokens=n).presets["lossless"].bytes for n in (10**9, 10**11))
    assert large == pytest.approx(100 * small, rel=0.01)
    assert rows[6].startswith("| 10 T | `lossless` | ")
    assert " PB |" in rows[6]
    assert "tokens/s a worker" in scale.large_words(measured)


@pytest.mark.parametrize(("n_bytes", "said"), [(1.5e9, "1.5 GB"), (2.34e12, "2.34 TB"), (4.2e18, "4,200 PB")])
def test_sizes_are_said_in_three_digits(n_bytes: float, said: str) -> None:
    assert scale._size(n_bytes) == said
