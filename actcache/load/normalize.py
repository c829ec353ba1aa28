"""How rows are normalised.

In: the kind and a site's statistics. Out: what is subtracted from each row, and what it is multiplied by.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from actcache.errors import ConfigError

if TYPE_CHECKING:
    from actcache.store import SiteStats

NORMALIZATIONS = ("rms", "center", "center-rms")


@dataclass(frozen=True, kw_only=True, slots=True)
class Normalization:
    """What a loader does to the rows of a site, `(x - mean) * scale`, so that a consumer can fold it back."""

    mean: NDArray[np.float32] | None
    """`(D,)` what is subtracted from each row; None for nothing."""
    scale: float
    """What the difference is multiplied by: one number for all dimensions."""


def normalization_of(kind: str, stats: SiteStats) -> Normalization:
    """The normalization of a kind, from a site's statistics.

    `rms`: to a mean squared value of 1, so that the root mean square of the norms is `sqrt(D)`. `center`: to a mean of
    0 in every dimension. `center-rms`: both, with the mean squared value taken after centring.

    Raises:
        ConfigError: the kind is unknown, or the rows are all zero (or all equal, for `center-rms`).
    """
    if kind not in NORMALIZATIONS:
        raise ConfigError(f"loader: normalize must be one of {', '.join(NORMALIZATIONS)} or None, got {kind!r}")
    square = stats.variance.mean() if kind == "center-rms" else stats.rms_norm**2 / len(stats.mean)
    if kind != "center" and not (np.isfinite(square) and square > 0):
        alike = "equal" if kind == "center-rms" else "zero"
        raise ConfigError(f"loader: normalize={kind!r} needs rows that are not all {alike}; use normalize=None")
    mean = None if kind == "rms" else stats.mean.astype(np.float32)
    return Normalization(mean=mean, scale=1.0 if kind == "center" else float(np.float32(1 / np.sqrt(square))))
