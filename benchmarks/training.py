"""The trainer against a bare torch loop of the same step.

    python benchmarks/training.py

Baseline: forward, backward, clip and fused Adam of the same sparse MLP in the same precision on batches that already
lie in memory as float32, in shuffled order. Ours: `Trainer.fit` on a loader, reading and decoding included. The start
of the loader is included, so short runs look slower: 150 steps gave 0.61 to 0.69.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable
from itertools import cycle, islice
from pathlib import Path

import torch
from measure import HEADER, Figure, compare, embedded, rate

import actcache as ac
from actcache.memory import keep_freed_memory
from actcache.sparse.objective import sparse_loss
from actcache.sparse.training import resolve_precision
from actcache.store import Store

BATCH_ROWS = 2048
SITES = ["blocks.2.mlp.hook_in", "blocks.2.hook_mlp_out"]


def bare_loop(mlp: ac.SparseMLP, batches: Iterable[tuple[torch.Tensor, torch.Tensor]], n_steps: int) -> None:
    """The step and nothing else, on the first of the batches."""
    parameters = list(mlp.parameters())
    optimizer = torch.optim.Adam(parameters, lr=3e-3, fused=True)
    precision = resolve_precision("auto", parameters[0].device)
    keep_freed_memory()
    for x_BD, y_BD in islice(batches, n_steps):
        loss, _, _ = sparse_loss(mlp, x_BD, y_BD, 64.0, precision)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch has no annotation there
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()


def in_memory(store: Store) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The store's rows as shuffled float32 batches, scaled as the trainer scales them."""
    sites = [store.read(site, slice(None)).float() for site in SITES]
    scaled = [values / values.std() for values in sites]
    order = torch.randperm(store.n_rows, generator=torch.Generator().manual_seed(0))
    parts = order[: store.n_rows // BATCH_ROWS * BATCH_ROWS].view(-1, BATCH_ROWS)
    return [(scaled[0][rows], scaled[1][rows]) for rows in parts]


def figures(n_sequences: int = 1024, n_steps: int = 400, pairs: int = 3) -> list[Figure]:
    """The comparison."""
    lm, blocks = embedded(n_sequences)
    folder = Path(tempfile.mkdtemp(prefix="actcache-bench-"))
    try:
        store = ac.extract(lm, blocks, SITES, folder / "acts.zarr")
        batches = in_memory(store)

        def ours() -> float:
            with ac.Loader(store, SITES, batch_rows=BATCH_ROWS, epochs=None) as loader:
                trainer = ac.Trainer(
                    ac.SparseMLP(d_in=128, d_out=128, n_latents=1024),
                    loader,
                    ac.TrainConfig(n_steps=n_steps, warmup_steps=0),
                )
                return rate(n_steps * BATCH_ROWS, trainer.fit)

        def baseline() -> float:
            mlp = ac.SparseMLP(d_in=128, d_out=128, n_latents=1024)
            return rate(n_steps * BATCH_ROWS, lambda: bare_loop(mlp, cycle(batches), n_steps))

        name = "train, 128 to 1,024 to 128, from the store"
        return [compare(name, ours, baseline, unit="rows/s", goal=0.9, pairs=pairs)]
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    print(HEADER, *(figure.row() for figure in figures()), sep="\n")
