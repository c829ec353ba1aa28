"""How good a sparse MLP is: reconstruction of activations, and the loss of the base model with the MLP spliced in.

In: a trained `SparseMLP` (raw units) and a loader, or a language model and token blocks. Out: small frozen results.

Shapes: Q sequences, T positions, B rows of a batch, D width of a site, F latents, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from actcache.errors import ConfigError
from actcache.files import shown
from actcache.source import as_token_blocks
from actcache.sparse.model import SparseMLP
from actcache.sparse.training import choose_sites
from actcache.spec import Progress, TokenBlocks, check_callable, check_positive

if TYPE_CHECKING:
    from actcache.lm import LanguageModel
    from actcache.load import Loader


@dataclass(frozen=True, kw_only=True, slots=True)
class Reconstruction:
    """How well predictions match the targets, over all evaluated rows together."""

    fvu: float
    """Fraction of variance unexplained: squared error over squared deviation from the per-dimension mean of the
    targets, both summed over all rows and dimensions; 0 is perfect, 1 is the best constant."""
    l0: float
    """Mean number of latents that fire for a row."""
    dead_fraction: float
    """Fraction of the latents that did not fire for any row."""
    density: NDArray[np.float64]
    """`(F,)` fraction of the rows for which each latent fired."""
    n_rows: int
    """Rows evaluated."""


@torch.inference_mode()
def reconstruction(
    mlp: SparseMLP,
    loader: Loader,
    *,
    site_in: str | None = None,
    site_out: str | None = None,
    n_batches: int | None = None,
) -> Reconstruction:
    """Evaluate on the loader's next `n_batches` (by default as many as an epoch has), and leave the loader where it
    was.

    Sites default to the loader's first and last. Sums are float64.

    Raises:
        ConfigError: the loader gave no batch, or the targets do not vary.

    Examples:
        >>> mlp = ac.SparseMLP(d_in=128, d_out=128, n_latents=256)
        >>> with ac.Loader(store, [site_in, site_out], batch_rows=256) as loader:
        ...     found = ac.reconstruction(mlp, loader, n_batches=4)
        >>> found.n_rows, found.density.shape, found.fvu > 0
        (1024, (256,), True)
    """
    site_in, site_out = choose_sites(loader, mlp, site_in, site_out)
    if n_batches is not None:
        check_positive("reconstruction", n_batches=n_batches)
    position = loader.state_dict()
    sums = _Sums(mlp)
    for batch in islice(iter(loader), len(loader) if n_batches is None else n_batches):
        sums.add(batch[site_in], batch[site_out])
    loader.load_state_dict(position)
    return sums.result()


class _Sums:
    """Running float64 sums over rows, from which the figures of `Reconstruction` follow."""

    def __init__(self, mlp: SparseMLP) -> None:
        self.mlp = mlp
        self.n_rows = 0
        zero = torch.zeros((), dtype=torch.float64, device=mlp.encoder.weight.device)
        self.error, self.fired_F = zero.clone(), zero.repeat(mlp.n_latents)
        self.y_D, self.y_squared_D = zero.repeat(mlp.d_out), zero.repeat(mlp.d_out)
        # Deviations are summed about the first row: the difference of two sums stays exact for a site far from zero.
        self.origin_D: Tensor | None = None

    def add(self, x_BD: Tensor, y_BD: Tensor) -> None:
        weight = self.mlp.encoder.weight
        a_BF = self.mlp.encode(x_BD.to(weight))
        y_BD = y_BD.to(weight.device, torch.float64)
        if self.origin_D is None:
            self.origin_D = y_BD[0].clone()
        deviation_BD = y_BD - self.origin_D
        self.y_D += deviation_BD.sum(0)
        self.y_squared_D += deviation_BD.square().sum(0)
        self.error += (self.mlp.decode(a_BF).double() - y_BD).square().sum()
        self.fired_F += (a_BF > 0).sum(0)
        self.n_rows += len(y_BD)

    def result(self) -> Reconstruction:
        if not self.n_rows:
            raise ConfigError(
                "evaluation needs at least one batch, and the loader gave none; make a new one, or use epochs=None"
            )
        variance = (self.y_squared_D - self.y_D.square() / self.n_rows).sum().item()
        if variance <= 0:
            raise ConfigError(f"the targets do not vary over the {self.n_rows} rows evaluated: FVU has no meaning")
        density = self.fired_F.cpu().numpy() / self.n_rows
        return Reconstruction(
            fvu=self.error.item() / variance,
            l0=float(density.sum()),
            dead_fraction=float((density == 0).mean()),
            density=density,
            n_rows=self.n_rows,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class SplicedLoss:
    """Next-token cross-entropy of the base model, nats per token, under four treatments of one site."""

    clean: float
    """The model as it is."""
    zero_ablated: float
    """The site's value replaced by zeros."""
    mean_ablated: float | None
    """The site's value replaced by its mean; None when no mean was given."""
    spliced: float
    """The site's value replaced by the sparse MLP's prediction."""
    n_tokens: int
    """Tokens predicted."""

    @property
    def loss_recovered(self) -> float:
        """`1 - (spliced - clean) / (zero_ablated - clean)`; NaN for a site whose ablation changes nothing."""
        damage = self.zero_ablated - self.clean
        return 1 - (self.spliced - self.clean) / damage if damage else math.nan


@torch.inference_mode()
def spliced_loss(
    lm: LanguageModel,
    mlp: SparseMLP,
    blocks: TokenBlocks,
    *,
    site_in: str,
    site_out: str,
    mean: Any = None,
    skip_first: int = 0,
    batch_sequences: int = 32,
    progress: Progress | None = None,
) -> SplicedLoss:
    """Loss over all next-token predictions of the blocks, with the value at `site_out` replaced; padding does not
    count.

    `mean` is the `(D_out,)` mean of the site (`store.stats(site_out).mean`). The first `skip_first` positions of every
    sequence keep the model's own value: pass the store's `skip_first`, since the MLP has never seen those positions.
    The logits of `batch_sequences` sequences are in memory at once.

    Examples:
        >>> mlp = ac.SparseMLP(d_in=128, d_out=128, n_latents=256)  # untrained: it recovers little
        >>> loss = ac.spliced_loss(lm, mlp, blocks, site_in=site_in, site_out=site_out, skip_first=1)
        >>> loss.n_tokens, loss.clean < loss.zero_ablated
        (4032, True)
    """
    check_positive("spliced loss", batch_sequences=batch_sequences)
    check_callable("spliced loss", progress=progress)
    if not isinstance(mlp, SparseMLP):
        raise ConfigError(f"spliced loss: mlp must be a SparseMLP, got {shown(mlp)}")
    if type(skip_first) is not int:
        raise ConfigError(f"spliced loss: skip_first must be an integer, got {shown(skip_first)}")
    blocks = as_token_blocks(blocks)
    if not 0 <= skip_first < blocks.sequence_length or blocks.sequence_length < 2:
        limits = f"skip_first must be between 0 and {blocks.sequence_length - 1}, and sequences at least 2 tokens long"
        raise ConfigError(f"spliced loss: {limits}; got {skip_first} and {blocks.sequence_length}")
    treatments = _treatments(mlp, mean)
    totals, done = dict.fromkeys(["clean", *treatments], 0.0), 0
    kept = lm.resolve([site_out]) if skip_first else []
    n_tokens = 0
    for batch in blocks.batches(batch_sequences):
        for ids, lengths_Q in _together(lm, batch, blocks.lengths(range(done, done + len(batch)))):
            ids_QT = torch.from_numpy(ids.astype(np.int64)).to(lm.device)
            n_tokens += int(np.maximum(lengths_Q - 1, 0).sum())
            totals["clean"] += next_token_loss(lm.logits(ids_QT), ids_QT, lengths_Q)
            own_QKD = lm.capture(ids_QT, kept)[site_out][:, :skip_first] if kept else None
            for name, treatment in treatments.items():
                with lm.splice(site_in, site_out, _keeping(own_QKD, treatment)):
                    totals[name] += next_token_loss(lm.logits(ids_QT), ids_QT, lengths_Q)
        done += len(batch)
        if progress is not None:
            progress(done, blocks.n_sequences)
    losses = {name: total / max(1, n_tokens) for name, total in totals.items()}
    return SplicedLoss(
        clean=losses["clean"],
        zero_ablated=losses["zero_ablated"],
        mean_ablated=losses.get("mean_ablated"),
        spliced=losses["spliced"],
        n_tokens=n_tokens,
    )


def _together(
    lm: LanguageModel, ids: NDArray[np.uint32], lengths: NDArray[np.int64]
) -> Iterator[tuple[NDArray[np.uint32], NDArray[np.int64]]]:
    """The batch as it is if padding is harmless, otherwise its sequences of equal length, without padding."""
    if (lengths == ids.shape[1]).all() or lm.takes_padding_to(ids.shape[1]):
        yield ids, lengths
        return
    for length in np.unique(lengths[lengths > 1]):
        equal = lengths == length
        yield ids[equal, :length], lengths[equal]


def next_token_loss(logits_QTV: Tensor, ids_QT: Tensor, lengths_Q: NDArray[np.int64] | None = None) -> float:
    """Summed cross-entropy of each position's prediction of the next token, within the sequences' lengths."""
    ends = [ids_QT.shape[1]] * len(ids_QT) if lengths_Q is None else np.maximum(lengths_Q, 1).tolist()
    # Sequence by sequence: the softmax needs a copy of its logits, which is small for one sequence.
    pairs = zip(logits_QTV, ids_QT, ends, strict=True)
    losses = [
        F.cross_entropy(logits_TV[: end - 1].float(), ids_T[1:end], reduction="sum") for logits_TV, ids_T, end in pairs
    ]
    return float(torch.stack(losses).double().sum())


def _treatments(mlp: SparseMLP, mean: Any) -> dict[str, Callable[[Tensor], Tensor]]:
    """What replaces the site's value, each a function of the value at the MLP's input `(Q, T, D_in)`."""
    weight = mlp.encoder.weight

    def spliced(x_QTD: Tensor) -> Tensor:
        y_QTD: Tensor = mlp(x_QTD.to(weight))
        return y_QTD.to(x_QTD)

    def constant(value_D: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda x_QTD: value_D.to(x_QTD).repeat(*x_QTD.shape[:2], 1)

    treatments = {"zero_ablated": constant(torch.zeros(mlp.d_out)), "spliced": spliced}
    if mean is not None:
        treatments["mean_ablated"] = constant(torch.as_tensor(mean))
    return treatments


def _keeping(own_QKD: Tensor | None, treatment: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The treatment, with the model's own values put back at the first K positions."""

    def treat(x_QTD: Tensor) -> Tensor:
        y_QTD = treatment(x_QTD)
        if own_QKD is not None:
            y_QTD[:, : own_QKD.shape[1]] = own_QKD
        return y_QTD

    return treat
