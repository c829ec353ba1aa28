"""The benchmarks run, at a size at which nothing is measured, so that they cannot rot."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))


import loader_annbatch
import loader_cold

pytestmark = pytest.mark.exhaustive

SIZES = {"n_sequences": 24, "pairs": 1}
OTHERS = {"loader": {"install": False}, "training": {"n_steps": 3}}


@pytest.mark.parametrize("name", ["durability", "extraction", "latency", "loader", "loader_cold", "training"])
def test_benchmark_gives_a_row(name):
    module = __import__(name)
    rows = [figure.row() for figure in module.figures(**SIZES, **OTHERS.get(name, {}))]
    assert rows
    assert all(row.count("|") == 7 for row in rows)


@pytest.mark.parametrize("way", ["COMPRESSED", "UNCOMPRESSED", "DEFAULTS"])
def test_annbatch_delivers_every_row_once(way, tmp_path):
    """In an environment of its own, which is made the first time."""
    try:
        python = loader_annbatch.environment()
    except loader_annbatch.MissingPeerError as missing:
        pytest.skip(str(missing))
    values = np.random.default_rng(0).standard_normal((5000, 16), np.float32)
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    bits.tofile(tmp_path / "bits")
    settings = {"bits": str(tmp_path / "bits"), "width": 16, "folder": str(tmp_path / "theirs.zarr")}
    settings |= {"batch_size": 512, "epochs": 2, **getattr(loader_annbatch, way)}
    with loader_annbatch.Peer(python, **settings) as peer:
        assert peer.sum_of_bits == int(bits.sum(dtype=np.uint64))
        assert peer.epochs() > 0


def test_sequential_baseline_reads_every_byte(tmp_path):
    sizes = (0, 1, loader_cold._READ_BYTES, 2 * loader_cold._READ_BYTES + 3)
    files = [tmp_path / str(size) for size in sizes]
    for file, size in zip(files, sizes, strict=True):
        file.write_bytes(bytes(size))
    assert [loader_cold.read_in_order(files, threads) for threads in (1, 2)] == 2 * [sum(sizes)]


def test_a_run_out_of_the_page_cache_is_told(tmp_path, monkeypatch):
    file = tmp_path / "cached"
    file.write_bytes(bytes(1 << 20))
    monkeypatch.setattr(loader_cold, "forget", lambda files: None)
    with pytest.warns(UserWarning, match="of 1,048,576 bytes came from a disk"):
        loader_cold.cold([file], 1 << 20, file.read_bytes)
