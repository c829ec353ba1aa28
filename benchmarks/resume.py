"""The first batch of a run that goes on: does it take longer on a larger store?

    python benchmarks/resume.py

Stores of random rows, chunks of 16 rows of 8 values, 256 chunks a shard: 1,000 chunks, and a million. A process of its
own opens one, gives its loader a state from the middle of the fourth epoch and takes a batch of 4,096 rows. Printed is
the time from opening the store until the batch is there, imports left out, and how much memory the process then holds
more than before; the median of several processes. Files are in the page cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from measure import machine
from memory import held_bytes
from numpy.typing import NDArray

from actcache.spec import Site, StoreSpec, TokenBlocks
from actcache.store import StoreWriter

LENGTH, SEQUENCES_PER_SHARD, ROWS_PER_CHUNK, WIDTH = 128, 32, 16, 8
CHUNKS_PER_SHARD = LENGTH * SEQUENCES_PER_SHARD // ROWS_PER_CHUNK
SITE = "blocks.0.hook_resid_post"
CHUNKS = (1_000, 1_000_000)


def make_store(path: Path, n_chunks: int) -> None:
    """A sealed store of at least so many chunks."""
    rng, n_sequences = np.random.default_rng(0), -(-n_chunks // CHUNKS_PER_SHARD) * SEQUENCES_PER_SHARD
    ids: NDArray[np.uint32] = rng.integers(0, 2048, (n_sequences, LENGTH), dtype=np.uint32)
    document = np.broadcast_to(np.arange(n_sequences, dtype=np.uint32)[:, None], ids.shape)
    blocks = TokenBlocks(ids=ids, document=document, description={"length": LENGTH})
    spec = StoreSpec(
        sites=(Site(name=SITE, shape=(WIDTH,), codec="raw"),),
        n_sequences=n_sequences,
        sequence_length=LENGTH,
        sequences_per_shard=SEQUENCES_PER_SHARD,
        rows_per_chunk=ROWS_PER_CHUNK,
        model={"name": "random"},
        text={**blocks.description, "tokens": blocks.digest()},
    )
    rows = (rng.standard_normal((spec.rows_per_shard, WIDTH)).astype(np.float32).view(np.uint32) >> 16).astype("<u2")
    with StoreWriter(path, spec, blocks) as writer:
        for shard in writer.pending():
            buffers, sequences = writer.acquire(shard), spec.shard_sequences(shard)
            buffers.rows[SITE][:] = rows
            writer.submit(buffers, ids[sequences.start : sequences.stop])
        writer.finish()


def first_batch(path: Path) -> dict[str, float]:
    """What this process needs for it."""
    from time import perf_counter

    import torch

    import actcache as ac

    torch.zeros(1).add_(1)  # its threads and its memory are no matter of the store
    held, began = held_bytes(), perf_counter()
    loader = ac.Loader(ac.open_store(path), [SITE], batch_rows=4096, epochs=None)
    made = perf_counter()
    loader.load_state_dict({**loader.state_dict(), "epoch": 3, "batch": len(loader) // 2})
    batches = iter(loader)
    next(batches)
    ready = perf_counter()
    found = {"open_s": made - began, "batch_s": ready - made, "held_bytes": held_bytes() - held}
    loader.close()
    return found


def main() -> None:
    """Make the stores, take the batches, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=7, help="for each store")
    parser.add_argument("--chunks", type=int, nargs="*", default=CHUNKS, help="of each store")
    parser.add_argument("--of", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.of:
        print(json.dumps(first_batch(options.of)))
        return
    print(f"Machine: {machine()}.\n")
    print("| chunks | opening it, s | then to the first batch, s | memory, MB |\n|---|---|---|---|", flush=True)
    for n_chunks in options.chunks:
        with tempfile.TemporaryDirectory(prefix="actcache-bench-") as folder:
            path = Path(folder) / "acts.zarr"
            make_store(path, n_chunks)
            command = [sys.executable, __file__, "--of", str(path)]
            runs = [subprocess.run(command, capture_output=True, check=True) for _ in range(options.processes + 1)][1:]
            found = [json.loads(run.stdout) for run in runs]
            opened, batch, held = (statistics.median(line[name] for line in found) for name in found[0])
            print(f"| {n_chunks:,} | {opened:.3f} | {batch:.3f} | {held / 1e6:.0f} |", flush=True)


if __name__ == "__main__":
    main()
