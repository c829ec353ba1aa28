"""A loader's memory: two windows and a few batches, however large the store."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from conftest import random_blocks, spec_of, write_shards

from actcache.memory import Kept
from actcache.spec import Site
from actcache.store import Store

pytestmark = pytest.mark.exhaustive

SITES = tuple(Site(name=codec, shape=(256,), codec=codec) for codec in ("lossless", "int8", "raw"))

CHILD = """
import json, sys, warnings
from pathlib import Path
import torch
from actcache.load import Loader
from actcache.store import RowFilter, open_store

def held(field):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])

warnings.simplefilter("ignore")
store, settings, columns = open_store(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3])
sites, dtype = settings.pop("sites"), getattr(torch, settings.pop("dtype"))
if "rows" in settings:
    settings["rows"] = RowFilter(positions=range(*settings["rows"]))
with Loader(store, sites, batch_rows=16, memory=1 << 20, threads=2, dtype=dtype) as first:
    next(iter(first))  # libraries are loaded, loops compiled
Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
before, seen = held("VmRSS"), []
with Loader(store, sites, threads=2, dtype=dtype, **settings) as loader:
    for batch in loader:
        for column in columns:
            getattr(batch, column)
        seen.append(held("VmHWM") - before)
print(json.dumps({"peak": seen[-1], "n_batches": len(seen), "batch_bytes": sum(batch[site].nbytes for site in batch)}))
"""
OTHERS = 16 << 20
"""Bytes for all else: two chunks a thread, ids and order of the windows' rows, indexes, more of the libraries."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """336 MB of values, in 16 shards of 64 chunks."""
    blocks = random_blocks(2048, 129)
    spec = replace(spec_of(blocks, sites=SITES, sequences_per_shard=128, rows_per_chunk=256), sites=SITES)
    rng = np.random.default_rng(0)
    values = (rng.standard_normal((128, 128, 256), np.float32).view(np.uint32) >> 16).astype(np.uint16)
    bits = dict.fromkeys((site.name for site in SITES), np.tile(values, (16, 1, 1)))
    return write_shards(tmp_path_factory.mktemp("memory") / "s.zarr", spec, blocks, bits)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of a process from /proc")
@pytest.mark.parametrize(
    "settings",
    [
        {"sites": ["*"], "dtype": "float32", "memory": 32 << 20, "batch_rows": 2048, "read_ahead": 2},
        {"sites": ["int8"], "dtype": "bfloat16", "memory": 8 << 20, "batch_rows": 1024, "read_ahead": 0},
        {
            "sites": ["lossless"],
            "dtype": "float32",
            "memory": 8 << 20,
            "batch_rows": 1024,
            "read_ahead": 5,
            "lanes": 3,
            "rows": [20, 129],
        },
    ],
)
def test_memory_is_that_of_the_windows_and_some_batches_whatever_the_store(store, settings):
    """What the process holds at most (VmHWM, from which the kernel leaves out the page cache), beyond its libraries."""
    arguments = [store.path, json.dumps(settings), json.dumps(["tokens"])]
    done = subprocess.run([sys.executable, "-c", CHILD, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    bound = settings["memory"] + (settings["read_ahead"] + 3) * found["batch_bytes"] + OTHERS
    row_bytes = {"*": 256 * (2 + 1 + 2), "int8": 256, "lossless": 512}[settings["sites"][0]]
    assert found["n_batches"] * settings["batch_rows"] * row_bytes > 1.5 * bound
    assert settings["memory"] // 2 < found["peak"] <= bound
    assert bound <= settings["memory"] + 300_000_000


def test_what_is_kept_of_many_shards_is_bounded():
    kept, read = Kept[int, bytes](1000), []

    def value(number: int) -> bytes:
        return kept.get(number, lambda: (read.append(number), (bytes([number]), 100))[1])

    for number in (*range(30), *range(20, 30)):
        assert value(number) == bytes([number])
    assert read == list(range(30))
    assert value(3) == b"\3"
    assert read[-1] == 3
    large = Kept[int, bytes](10)
    assert [large.get(0, lambda: (b"a", 100)) for _ in range(2)] == [b"a", b"a"]
