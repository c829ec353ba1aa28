"""The memory of an extraction does not depend on how much text there is."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

_RUN = """
import json, sys, tempfile
import numpy as np
import torch
import actcache as ac
from actcache.spec import TokenBlocks
from actcache.stories import StoriesConfig, StoriesLM

n_sequences, length, path = int(sys.argv[1]), 128, sys.argv[2]
torch.set_num_threads(1)
torch.manual_seed(0)
lm = ac.load_lm(StoriesLM(StoriesConfig(d_model=128, d_mlp=16, n_layers=1, n_heads=2, n_ctx=length, d_vocab=64)))
# Tokens as `token_blocks` has them: in files.
arrays = []
for _ in range(2):
    file = tempfile.TemporaryFile()
    rng = np.random.default_rng(0)
    for _ in range(n_sequences // 64):
        file.write(rng.integers(0, 64, (64, length), dtype=np.uint32).tobytes())
    file.flush()
    arrays.append(np.memmap(file, "<u4", mode="r", shape=(n_sequences, length)))
blocks = TokenBlocks(ids=arrays[0], document=arrays[1], description={})
held = []

def watch(status):
    lines = open("/proc/self/status").read().splitlines()
    held.append(next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon")))

sites = ["blocks.0.mlp.hook_in", "blocks.0.hook_mlp_out"]
store = ac.extract(lm, blocks, sites, path, sequences_per_shard=64, watch=watch)
assert store.sealed
print(json.dumps({"held": held, "raw": store.info()["raw_bytes"]}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_number_of_tokens(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", _RUN, "8192", str(tmp_path / "s.zarr")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    quarter = len(found["held"]) // 4
    early, late = max(found["held"][:quarter]), max(found["held"][-quarter:])
    stored = found["raw"] * 3 // 4
    assert stored > 380 << 20
    # The allocator takes another 20 MB now and then, and keeps them.
    assert late - early < stored // 5, f"{late - early:,} bytes more held after {stored:,} more were stored"
