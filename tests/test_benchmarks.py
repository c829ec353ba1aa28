"""The benchmarks run, at a size at which nothing is measured, so that they cannot rot."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))


@pytest.mark.parametrize("name", ["extraction", "latency", "loader", "training"])
def test_benchmark_gives_a_row(name):
    module = __import__(name)
    sizes = {"n_sequences": 24, "pairs": 1} | ({"n_steps": 3} if name == "training" else {})
    rows = [figure.row() for figure in module.figures(**sizes)]
    assert rows
    assert all(row.count("|") == 7 for row in rows)
