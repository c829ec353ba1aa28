"""Extraction against the bare forward pass of the same batches.

    python benchmarks/extraction.py

Baseline: the plain torch module, fused attention, inference mode, stopped by one hook at the last site that extraction
needs; nothing is kept. Ours: `extract` to a new store on disk, compression, statistics and checksums included. The
model, the encoding and the disk share the same cores. `stories-4l` is so small that its 8 sites give about 120 MB of
activations a second; to shuffle, measure and compress these takes about an eighth of two cores. For a model of ordinary
size, such as SmolLM2, it takes a tenth of that.
"""

from __future__ import annotations

import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

import activations
import numpy as np
import torch
from measure import HEADER, Figure, compare, embedded, rate

import actcache as ac
from actcache.lm import LanguageModel
from actcache.spec import TokenBlocks

GOALS = {"lossless": 0.95, "raw": 0.98}


class _StopForwardError(Exception):
    pass


def bare_forward(module: torch.nn.Module, last: torch.nn.Module, blocks: TokenBlocks, batch: int) -> None:
    """Run every batch up to and including the module `last`."""

    def stop(*_: object) -> None:
        raise _StopForwardError

    handle = last.register_forward_hook(stop)
    try:
        with torch.inference_mode():
            for ids in blocks.batches(batch):
                with suppress(_StopForwardError):
                    module(torch.from_numpy(np.asarray(ids, np.int64)))
    finally:
        handle.remove()


def one(lm: LanguageModel, blocks: TokenBlocks, patterns: list[str], codec: str, pairs: int, batch: int) -> Figure:
    """Extraction of some sites with a codec, against the forward pass up to the last of them."""
    sites = lm.resolve(patterns)
    last, n_tokens = sites[-1].module, blocks.ids.size
    n_shards = 8 if blocks.n_sequences >= 256 else 3
    folder = Path(tempfile.mkdtemp(prefix="actcache-bench-"))
    path = folder / "acts.zarr"

    def ours() -> float:
        shutil.rmtree(path, ignore_errors=True)
        return rate(
            n_tokens,
            lambda: ac.extract(
                lm,
                blocks,
                patterns,
                path,
                codec=codec,
                batch_sequences=batch,
                sequences_per_shard=blocks.n_sequences // n_shards,
            ),
        )

    try:
        return compare(
            f"extract, {len(sites)} sites of `{lm.name}`, `{codec}`",
            ours,
            lambda: rate(n_tokens, lambda: bare_forward(lm.module, last, blocks, batch)),
            unit="tokens/s",
            goal=GOALS[codec],
            pairs=pairs,
        )
    finally:
        shutil.rmtree(folder)


def figures(n_sequences: int = 1536, pairs: int = 3) -> list[Figure]:
    """All comparisons; those of models that are not here are left out."""
    small, blocks = embedded(n_sequences)
    everywhere, in_layer_2 = (
        ["blocks.*.mlp.hook_in", "blocks.*.hook_mlp_out"],
        ["blocks.2.mlp.hook_in", "blocks.2.hook_mlp_out"],
    )
    work: list[tuple[LanguageModel, TokenBlocks, list[str], int]] = [
        (small, blocks, in_layer_2, 32),
        (small, blocks, everywhere, 32),
    ]
    try:
        large = ac.load_lm(str(activations.smollm2_file()))
        few = ac.token_blocks(
            ac.read_texts("stories-corpus"), large.tokenizer, length=256, count=max(12, n_sequences // 40), seed=0
        )
        four_layers = [f"blocks.{layer}.{name}" for layer in (3, 7, 11, 15) for name in ("mlp.hook_in", "hook_mlp_out")]
        work.append((large, few, four_layers, 8))
    except activations.MissingModelError as error:
        print(error)
    return [one(lm, texts, sites, codec, pairs, batch) for lm, texts, sites, batch in work for codec in GOALS]


if __name__ == "__main__":
    print(HEADER, *(figure.row() for figure in figures()), sep="\n")
