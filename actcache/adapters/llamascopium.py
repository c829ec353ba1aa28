"""Our loader as the activation stream of Llamascopium's `Trainer.fit(sae, activation_stream)`.

In: a `Loader`. Out: dicts `{hook point: (B, D), "tokens": (B,), "mask": (B,)}`, again from the same place each time
they are iterated: `Initializer` and `fit` take a first batch to look at, and then begin once more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from actcache.errors import ConfigError, SiteError

if TYPE_CHECKING:
    import torch

    from actcache.load import Loader


class ActivationStream:
    """The batches of a loader as Llamascopium wants them.

    Every iteration begins where the loader stood when the stream was made: a peek at the first batch costs no batch.
    "mask" is one everywhere, since a store has no rows for padding; leave others out with `Loader(rows=...)`.

    Args:
        loader: what makes the batches; `epochs=None` lets `total_training_tokens` alone decide when training ends.
        hook_points: the site that is meant by each hook point; None where they have the same names.

    Raises:
        SiteError: a site is not one of the loader's.
    """

    def __init__(self, loader: Loader, hook_points: Mapping[str, str] | None = None) -> None:
        self.loader = loader
        self.hook_points = dict(hook_points or {site: site for site in loader.sites})
        for hook_point, site in self.hook_points.items():
            if site not in loader.sites:
                raise SiteError(
                    f"no site {site!r} (for {hook_point!r}) in the loader; there are {', '.join(loader.sites)}"
                )
        self._start = loader.state_dict()

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        import torch

        self.loader.load_state_dict(self._start)
        for batch in self.loader:
            acts = {hook_point: batch[site] for hook_point, site in self.hook_points.items()}
            tokens = batch.tokens.to(self.loader.device)
            yield {**acts, "tokens": tokens, "mask": torch.ones_like(tokens, dtype=torch.bool)}

    def activation_norm(self) -> dict[str, float]:
        """Mean norm of the rows at each hook point, from the store's statistics.

        For `Initializer.initialize_sae_from_config(..., activation_norm=...)` with `norm_activation="dataset-wise"`,
        which otherwise estimates it from 8 batches.

        Raises:
            ConfigError: the loader centres the rows, and no statistics say what their norms are then.
        """
        return {hook_point: self._mean_norm(site) for hook_point, site in self.hook_points.items()}

    def _mean_norm(self, site: str) -> float:
        mean_norm, done = self.loader.site_stats(site).mean_norm, self.loader.normalization.get(site)
        if done is None:
            return mean_norm
        if done.mean is not None:
            raise ConfigError(
                f"the loader centres {site}, and the store knows the norms before that; leave activation_norm to "
                'Initializer, or centring to Llamascopium: normalize="rms"'
            )
        return mean_norm * done.scale

    def state_dict(self) -> dict[str, Any]:
        """Where the loader is, after the batch delivered last: see `Loader.state_dict`."""
        return self.loader.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Begin every iteration from now on after the batch at which `state` was taken."""
        self.loader.load_state_dict(state)
        self._start = self.loader.state_dict()
