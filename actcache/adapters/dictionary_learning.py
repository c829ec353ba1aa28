"""dictionary_learning: the data that its `trainSAE(data=...)` iterates.

In: an endless loader. Out: an object that begins at the same batch each time it is iterated, since `trainSAE` iterates
its data twice if it normalises, and a `config` for the `config.json` that it writes. Written for version 0.1.0.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from actcache.adapters import require
from actcache.adapters.resumable import Repeatable
from actcache.errors import ConfigError
from actcache.spec import check_positive

if TYPE_CHECKING:
    import torch

    from actcache.load import Batch, Loader

_PEER = "dictionary_learning"


class ActivationData(Repeatable):
    """A loader's batches of one site, `(B, D)`, or of a pair, `(B, 2, D)`; the `data` of `trainSAE`.

    Each pass begins where the loader was when this was made, or at the state loaded last, so the batches that
    `get_norm_factor` reads (`normalize_activations=True`) are also trained on. `trainSAE` may divide the tensors in
    place.

    Args:
        loader: with `epochs=None`.
        site: which of the loader's sites; needed where it has several.
        pair: instead of `site`, the sites of input and target of a transcoder, equally wide: `acts[:, 0]` and
            `acts[:, 1]`, as in the buffer of dictionary_learning with `io="in_and_out"`.
        steps: batches of a pass; None for no end. `trainSAE(steps=N)` draws one batch more than it trains on; with the
            same number here it does not, and the state is that after the last batch trained on.

    Raises:
        ConfigError: the loader ends, it has several sites and none is named, or a pair differs in width.
        SiteError: the loader has no such site.
    """

    def __init__(
        self,
        loader: Loader,
        site: str | None = None,
        *,
        pair: tuple[str, str] | None = None,
        steps: int | None = None,
    ) -> None:
        require.endless(loader, _PEER)
        if steps is not None:
            check_positive("ActivationData", steps=steps)
        if pair is not None and site is not None:
            raise ConfigError("ActivationData takes a site or a pair of sites, not both")
        self.sites = (require.one_site(loader, site),) if pair is None else _checked_pair(loader, pair)
        super().__init__(loader)
        self.steps = steps

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Begin again at the first batch."""
        for batch in islice(self._pass(), self.steps):
            yield self._acts(batch)

    def _acts(self, batch: Batch) -> torch.Tensor:
        if len(self.sites) == 1:
            return batch[self.sites[0]]
        import torch

        return torch.stack([batch[site] for site in self.sites], dim=1)

    @property
    def config(self) -> dict[str, Any]:
        """For `config.json` beside the dictionary: keys of the peer's buffers, and where the rows come from."""
        store = self.loader.store
        return {
            "d_submodule": store.spec.site(self.sites[0]).width,
            "io": "out" if len(self.sites) == 1 else "in_and_out",
            "ctx_len": store.spec.sequence_length,
            "out_batch_size": self.loader.batch_rows,
            "device": str(self.loader.device),
            "actcache": {
                "store": str(store.path),
                "fingerprint": store.fingerprint,
                "sites": list(self.sites),
                "seed": self.loader.seed,
                "model": store.spec.model,
            },
        }


def _checked_pair(loader: Loader, pair: tuple[str, str]) -> tuple[str, str]:
    site_in, site_out = (require.one_site(loader, site) for site in pair)
    width_in, width_out = (loader.store.spec.site(site).width for site in (site_in, site_out))
    if width_in != width_out:
        raise ConfigError(
            f"{_PEER} has a pair in one tensor, and {site_in} is {width_in} wide, {site_out} {width_out}; "
            "choose sites of one width"
        )
    return site_in, site_out
