"""Our loader as the activation stream of Llamascopium's `Trainer.fit(sae, activation_stream)`.

In: a `Loader`. Out: dicts `{hook point: (B, D), "tokens": (B,), "mask": (B,)}`, from the same place each time they are
iterated: `Initializer` and `fit` look at a first batch, and then begin again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from actcache.adapters.resumable import Repeatable
from actcache.errors import ConfigError, SiteError

if TYPE_CHECKING:
    import torch

    from actcache.load import Loader


class ActivationStream(Repeatable):
    """The batches of a loader as Llamascopium expects them.

    Every iteration begins where the loader was when the stream was made, or at the state loaded last, so a look at the
    first batch does not use it up. "mask" is true everywhere, since a store has no rows for padding; leave out other
    rows with `Loader(rows=...)`.

    Args:
        loader: makes the batches; with `epochs=None`, `total_training_tokens` alone decides when training ends.
        hook_points: the site for each hook point; None if they have the same names.

    Raises:
        SiteError: a site is not one of the loader's.
    """

    def __init__(self, loader: Loader, hook_points: Mapping[str, str] | None = None) -> None:
        super().__init__(loader)
        self.hook_points = dict(hook_points or {site: site for site in loader.sites})
        for hook_point, site in self.hook_points.items():
            if site not in loader.sites:
                raise SiteError(
                    f"no site {site!r} (for {hook_point!r}) in the loader; there are {', '.join(loader.sites)}"
                )

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        import torch

        for batch in self._pass():
            acts = {hook_point: batch[site] for hook_point, site in self.hook_points.items()}
            tokens = batch.tokens.to(self.loader.device)
            yield {**acts, "tokens": tokens, "mask": torch.ones_like(tokens, dtype=torch.bool)}

    def activation_norm(self) -> dict[str, float]:
        """Mean norm of the rows at each hook point, from the store's statistics.

        For `Initializer.initialize_sae_from_config(..., activation_norm=...)` with `norm_activation="dataset-wise"`,
        which otherwise estimates it from 8 batches.

        Raises:
            ConfigError: the loader centres the rows, and the statistics do not have the norms of centred rows.
        """
        return {hook_point: self._mean_norm(site) for hook_point, site in self.hook_points.items()}

    def _mean_norm(self, site: str) -> float:
        mean_norm, done = self.loader.site_stats(site).mean_norm, self.loader.normalization.get(site)
        if done is None:
            return mean_norm
        if done.mean is not None:
            raise ConfigError(
                f"the loader centres {site}, and the store only knows the norms before that; leave activation_norm to "
                'Initializer, or centring to Llamascopium: normalize="rms"'
            )
        return mean_norm * done.scale
