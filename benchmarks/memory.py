"""The memory of an extraction while it goes on: does it grow with the number of tokens?

    python benchmarks/memory.py --tokens 50000000

A model of one layer runs over random tokens that lie in files, as those of `token_blocks` do. Each line is JSON: tokens
done, and bytes of memory that the process holds by itself (`RssAnon` of /proc/self/status; pages of the tokens' files,
which the system takes back when it needs them, do not count). The last line says how much was stored.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

import actcache as ac
from actcache.lm.stories import StoriesConfig, StoriesLM
from actcache.spec import TokenBlocks
from actcache.status import Status

LENGTH = 128
SITES = ["blocks.0.mlp.hook_in", "blocks.0.hook_mlp_out"]
_SEQUENCES_PER_WRITE = 64


def held_bytes() -> int:
    """Memory of this process that no file stands behind."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def tokens_in_files(n_sequences: int) -> TokenBlocks:
    """Random token ids, and as many document numbers, memory-mapped."""
    arrays = []
    for seed in range(2):
        rng = np.random.default_rng(seed)
        with tempfile.TemporaryFile() as file:
            for _ in range(n_sequences // _SEQUENCES_PER_WRITE):
                part: NDArray[np.uint32] = rng.integers(0, 64, (_SEQUENCES_PER_WRITE, LENGTH), dtype=np.uint32)
                file.write(part.tobytes())
            file.flush()
            arrays.append(np.memmap(file, "<u4", mode="r", shape=(n_sequences, LENGTH)))
    return TokenBlocks(ids=arrays[0], document=arrays[1], description={})


def main() -> None:
    """Extract, and say now and then what is held."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=50_000_000)
    parser.add_argument("--width", type=int, default=32, help="of the model, and of its two sites")
    parser.add_argument("--sequences-per-shard", type=int, default=512)
    parser.add_argument("--lines", type=int, default=10, help="how often memory is looked at")
    options = parser.parse_args()
    torch.manual_seed(0)
    config = StoriesConfig(d_model=options.width, d_mlp=16, n_layers=1, n_heads=2, n_ctx=LENGTH, d_vocab=64)
    n_sequences = options.tokens // LENGTH // _SEQUENCES_PER_WRITE * _SEQUENCES_PER_WRITE
    blocks, every = tokens_in_files(n_sequences), n_sequences * LENGTH // options.lines
    next_line = every

    def watch(status: Status) -> None:
        nonlocal next_line
        if status.n_tokens >= next_line:
            next_line += every
            print(json.dumps({"n_tokens": status.n_tokens, "held_bytes": held_bytes()}), flush=True)

    with tempfile.TemporaryDirectory(prefix="actcache-bench-") as folder:
        path, per_shard = Path(folder) / "acts.zarr", options.sequences_per_shard
        lm = ac.load_lm(StoriesLM(config))
        store = ac.extract(lm, blocks, SITES, path, sequences_per_shard=per_shard, watch=watch)
        print(json.dumps({"stored_bytes": store.info()["raw_bytes"]}))


if __name__ == "__main__":
    main()
