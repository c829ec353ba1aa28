"""SAELens 6: what its `SAETrainer` and `MultiSAETrainer` read from, and their scaling from the store's statistics.

In: an endless loader. Out: iterators of `(B, D)` tensors, or of dicts of them by hook name, with the loader's state; a
trainer whose normalisation is set, so that it does not draw 1,000 batches to estimate it (`activation_scaler.py` of
sae-lens 6.54). SAELens does not train transcoders: a training SAE has one tensor for input and target.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import numpy as np

from actcache.adapters import require
from actcache.adapters.resumable import Resumable
from actcache.errors import ConfigError, StateError
from actcache.files import read_json, write_whole

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from actcache.load import Batch, Loader

STATE_FILE = "actcache_loader.json"
"""The loader's state in a checkpoint folder of SAELens."""

_PEER = "SAELens"
_KEEPS_A_PRESET = (6, 52)
"""The first version whose `fit` leaves an existing scaling alone; earlier ones always estimate it."""
_WHITENING_EPSILON = 1e-3
"""Added to the eigenvalues of the covariance, as in `ActivationScaler.estimate_whitening`."""

T = TypeVar("T")


class TrainerConfig(Protocol):
    """The part of SAELens' `SAETrainerConfig` that the data must match."""

    train_batch_size_samples: int


class Provider(Resumable, Iterator[T], Generic[T]):
    """A loader as SAELens asks for data: `next(provider)`, without end. Made by `data_provider` or
    `multi_data_provider`.

    The state is the loader's, after the batch that was handed out last. Do not wrap it in SAELens'
    `PrefetchingIterator`, which draws batches before they are trained on: the loader already reads ahead.
    """

    def __init__(self, loader: Loader, sites: tuple[str, ...], take: Callable[[Batch], T]) -> None:
        super().__init__(loader)
        self.sites = sites
        self._take = take
        self._batches: Iterator[Batch] | None = None

    def __next__(self) -> T:
        if self._batches is None:
            self._batches = iter(self.loader)
        return self._take(next(self._batches))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the batch at which `state` was taken; raises as `Loader.load_state_dict` does."""
        self._batches = None
        super().load_state_dict(state)

    def save_checkpoint(self, checkpoint_path: Path | None) -> None:
        """Put the state into a checkpoint's folder; give this to a trainer as its `save_checkpoint_fn`."""
        if checkpoint_path is None:  # the trainer has no place for checkpoints
            return
        file = Path(checkpoint_path) / STATE_FILE
        write_whole(file, json.dumps(self.state_dict()))

    def load_checkpoint(self, checkpoint_path: str | Path) -> None:
        """Continue where the checkpoint in that folder was taken.

        Raises:
            StateError: the folder has no state of a loader, or that of another loader.
        """
        file = Path(checkpoint_path) / STATE_FILE
        if not file.exists():
            raise StateError(
                f"{checkpoint_path} has no {STATE_FILE}; it is there when the trainer that wrote the checkpoint was "
                "given save_checkpoint_fn=provider.save_checkpoint"
            )
        try:
            state = read_json(file)
        except ValueError as error:
            raise StateError(f"{file} {error}; take the checkpoint before") from error
        self.load_state_dict(state)

    def close(self) -> None:
        """Stop reading ahead."""
        self._batches = None
        super().close()


def data_provider(loader: Loader, cfg: TrainerConfig, site: str | None = None) -> Provider[torch.Tensor]:
    """The `data_provider` of an `SAETrainer`: `(B, D)` tensors of one site.

    Args:
        loader: with `epochs=None`.
        cfg: the trainer's `SAETrainerConfig`.
        site: which of the loader's sites; needed where it has several.

    Raises:
        ConfigError: the loader ends, its batches do not all have `cfg.train_batch_size_samples` rows, or it has several
        sites and none is named. SiteError: the loader has no such site.
    """
    name = require.one_site(loader, site)
    _check_batches(loader, cfg)
    return Provider(loader, (name,), lambda batch: batch[name])


def multi_data_provider(loader: Loader, cfg: TrainerConfig) -> Provider[dict[str, torch.Tensor]]:
    """The `data_provider` of a `MultiSAETrainer`: `{site: (B, D)}` with all sites of the loader, rows aligned.

    Args and errors as for `data_provider`; the values of the trainer's `hook_names` are sites.
    """
    _check_batches(loader, cfg)
    sites = tuple(loader.sites)
    return Provider(loader, sites, lambda batch: {site: batch[site] for site in sites})


def _check_batches(loader: Loader, cfg: TrainerConfig) -> None:
    require.endless(loader, _PEER)
    require.even_batches(loader, _PEER)
    if loader.batch_rows != cfg.train_batch_size_samples:
        raise ConfigError(
            f"SAETrainerConfig has train_batch_size_samples={cfg.train_batch_size_samples}, by which SAELens counts, "
            f"and the loader batch_rows={loader.batch_rows}; make them the same"
        )


def preset_scaling(trainer: Any) -> dict[str, float | None]:
    """Give a trainer the normalisation that it would estimate, from the store's statistics; before `trainer.fit()`.

    For `normalize_activations="expected_average_only_in"`: `sqrt(D) / mean norm`, which the store has. For
    `"covariance_whitening"`: mean and covariance, which takes one pass over the rows. What a trainer already has from a
    checkpoint is left alone, and so are SAEs without normalisation.

    Args:
        trainer: an `SAETrainer` or `MultiSAETrainer` whose `data_provider` was made here.

    Returns:
        The scaling factor by site; None for a site without one.

    Raises:
        ConfigError: the trainer reads from something else, SAELens is older than 6.52, an SAE's `d_in` is not the width
        of its site, or the loader centres the activations, so that their mean norm is not known. SiteError: the loader
        does not have a hook of the trainer.
    """
    provider = trainer.data_provider
    if not isinstance(provider, Provider):
        raise ConfigError(
            f"the trainer's data_provider is a {type(provider).__name__}; make it with actcache.adapters.saelens"
        )
    _check_version()
    if hasattr(trainer, "trainers"):
        parts = [(trainer.hook_names[name], part) for name, part in trainer.trainers.items()]
    else:
        parts = [(provider.sites[0], trainer)]
    for site, part in parts:
        _check_width(provider.loader, require.one_site(provider.loader, site), part.sae.cfg.d_in)
    return {site: _preset(provider.loader, site, part) for site, part in parts}


def _check_version() -> None:
    import sae_lens

    if tuple(int(part) for part in sae_lens.__version__.split(".")[:2]) < _KEEPS_A_PRESET:
        raise ConfigError(
            f"SAELens {sae_lens.__version__} always estimates its scaling; preset_scaling is for 6.52 and later: "
            "install a newer sae-lens, or do without preset_scaling"
        )


def _check_width(loader: Loader, site: str, d_in: int) -> None:
    width = loader.store.spec.site(site).width
    if d_in != width:
        raise ConfigError(f"the SAE has d_in={d_in}, {site} is {width} wide; make it with d_in={width}")


def _preset(loader: Loader, site: str, trainer: Any) -> float | None:
    """Set what a single-site trainer lacks; its scaling factor."""
    scaler, kind = trainer.activation_scaler, trainer.sae.cfg.normalize_activations
    if kind == "expected_average_only_in" and scaler.scaling_factor is None:
        scaler.scaling_factor = math.sqrt(trainer.sae.cfg.d_in) / _mean_norm(loader, site)
    if kind == "covariance_whitening" and scaler.whitening is None:
        scaler.whitening = _whitening(loader, site)
    factor: float | None = scaler.scaling_factor
    return factor


def _mean_norm(loader: Loader, site: str) -> float:
    """Mean norm of the rows as they are delivered."""
    shift, scale = _normalization(loader, site)
    if shift is not None:
        raise ConfigError(
            f"the loader centres {site}, and the statistics do not have the mean norm of centred rows; make it with "
            'normalize=None or "rms", or let SAELens estimate it: do without preset_scaling'
        )
    return loader.site_stats(site).mean_norm * scale


def _normalization(loader: Loader, site: str) -> tuple[NDArray[np.float32] | None, float]:
    """What the loader subtracts from the rows, `(D,)` or None, and what it multiplies them by."""
    done = loader.normalization.get(site)
    return (None, 1.0) if done is None else (done.mean, done.scale)


def _whitening(loader: Loader, site: str) -> Any:
    """SAELens' whitening of a site; the formula is that of `ActivationScaler.estimate_whitening`."""
    import torch
    from sae_lens.training.activation_scaler import ActivationWhitening

    shift, scale = _normalization(loader, site)
    stats = loader.site_stats(site)
    centred = stats.mean if shift is None else stats.mean - shift
    unbiased = stats.count / max(1, stats.count - 1)
    covariance = torch.from_numpy(loader.store.covariance(site, loader.row_ids()))
    eigenvalues, eigenvectors = torch.linalg.eigh(covariance * (unbiased * scale**2))
    eigenvalues = eigenvalues.clamp(min=0) + _WHITENING_EPSILON
    return ActivationWhitening(
        mean=torch.from_numpy(centred * scale),
        matrix=(eigenvectors * eigenvalues.rsqrt()).contiguous(),
        inverse_matrix=(eigenvalues.sqrt().unsqueeze(1) * eigenvectors.T).contiguous(),
    )
