"""Extraction against the bare forward pass of the same batches.

    python benchmarks/extraction.py

Baseline: the plain torch module, fused attention, inference mode, stopped by one hook at the last site that extraction
needs; nothing is kept. Ours: `extract` to a new store on disk, compression, statistics and checksums included.
"""

from __future__ import annotations

import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from measure import HEADER, Figure, compare, embedded, rate

import actcache as ac
from actcache.lm import LanguageModel
from actcache.spec import TokenBlocks

BATCH_SEQUENCES = 32


class _StopForwardError(Exception):
    pass


def bare_forward(module: torch.nn.Module, last: torch.nn.Module, blocks: TokenBlocks) -> None:
    """Run every batch up to and including the module `last`."""

    def stop(*_: object) -> None:
        raise _StopForwardError

    handle = last.register_forward_hook(stop)
    try:
        with torch.inference_mode():
            for ids in blocks.batches(BATCH_SEQUENCES):
                with suppress(_StopForwardError):
                    module(torch.from_numpy(np.asarray(ids, np.int64)))
    finally:
        handle.remove()


def one(lm: LanguageModel, blocks: TokenBlocks, patterns: list[str], codec: str, name: str, pairs: int) -> Figure:
    """Extraction of some sites with a codec, against the forward pass up to the last of them."""
    last = lm.resolve(patterns)[-1].module
    n_tokens = blocks.ids.size
    folder = Path(tempfile.mkdtemp(prefix="actcache-bench-"))

    def ours() -> float:
        path = folder / "acts.zarr"
        shutil.rmtree(path, ignore_errors=True)
        return rate(
            n_tokens,
            lambda: ac.extract(
                lm, blocks, patterns, path, codec=codec, batch_sequences=BATCH_SEQUENCES, sequences_per_shard=256
            ),
        )

    try:
        return compare(
            name,
            ours,
            lambda: rate(n_tokens, lambda: bare_forward(lm.module, last, blocks)),
            unit="tokens/s",
            goal=0.9,
            pairs=pairs,
        )
    finally:
        shutil.rmtree(folder)


def figures(n_sequences: int = 2048, pairs: int = 3) -> list[Figure]:
    """All comparisons."""
    lm, blocks = embedded(n_sequences)
    two = ["blocks.2.mlp.hook_in", "blocks.2.hook_mlp_out"]
    eight = ["blocks.*.mlp.hook_in", "blocks.*.hook_mlp_out"]
    return [
        one(lm, blocks, sites, codec, f"extract, {len(lm.resolve(sites))} sites of `stories-4l`, `{codec}`", pairs)
        for sites in (two, eight)
        for codec in ("lossless", "raw")
    ]


if __name__ == "__main__":
    print(HEADER, *(figure.row() for figure in figures()), sep="\n")
