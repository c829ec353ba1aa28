"""Whether padding is harmless: tried at each length, not concluded from the kind of model.

A causal model may still treat a short sequence differently in a batch with a long one: long-rope variants choose their
frequencies by the longest sequence of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from actcache.lm.hooks import ResolvedSite, Spot
from actcache.lm.survey import equal

Values = Callable[[Tensor, Tensor | None, Sequence[ResolvedSite]], Mapping[str, Tensor]]
"""Values `(Q, T, D)` of `(Q, T)` ids of `(Q,)` lengths (None: all T) at sites; without sites, the output."""

_SHORT = 5
"""Tokens of the shortest sequence that is tried in a batch."""
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}
_TOLERANCE_16_BIT = 3e-2


class Padding:
    """Remembers at which lengths padding was harmless. Harmless at a length means harmless at shorter ones, and harmful
    means harmful at longer ones."""

    def __init__(self, values: Values, ids: Callable[[int], Tensor]) -> None:
        """`ids`: some token ids `(1, T)` of a length."""
        self._values, self._ids = values, ids
        self._harmless: dict[frozenset[Spot], int] = {}
        self._harmful: dict[frozenset[Spot], int] = {}

    def is_harmless(self, length: int, sites: Sequence[ResolvedSite]) -> bool:
        """Whether sequences have the same values alone and in a batch with one of that many tokens."""
        key = frozenset(site.spot for site in sites)
        if length <= self._harmless.get(key, 1):
            return True
        if key in self._harmful and length >= self._harmful[key]:
            return False
        found = self._try(length, sites)
        (self._harmless if found else self._harmful)[key] = length
        return found

    def _try(self, length: int, sites: Sequence[ResolvedSite]) -> bool:
        shorter = sorted({min(_SHORT, length - 1), max(1, length // 4)})
        ids = self._ids(length).expand(1 + len(shorter), length)
        batch = self._values(ids, torch.tensor([length, *shorter]), sites)
        patterns = {site.site.name: site.site.shape[0] for site in sites if site.is_pattern}
        for number, n_tokens in enumerate(shorter, 1):
            alone = self._values(ids[:1, :n_tokens], None, sites)
            for name, value in alone.items():
                padded = batch[name][number : number + 1, :n_tokens]
                if name in patterns:  # keys after the end of a sequence are not its own
                    padded = padded.view(1, n_tokens, patterns[name], length)[..., :n_tokens].flatten(2)
                if not equal(padded.nan_to_num(), value.nan_to_num(), _TOLERANCE.get(value.dtype, _TOLERANCE_16_BIT)):
                    return False
        return True
