"""What a quantiser is: it keeps a site's values as other, smaller arrays, for a known error.

Another one (fp8, int4, scales for groups of features) is a file with a class of this protocol, and an entry in
`presets.py`. All that asks which arrays a site has, how chunks become those arrays and come back, and how far off they
are then, asks the object: nothing outside of such a file knows what its arrays mean.

In: values of a logical dtype as stored. Out: arrays of fewer bytes, and float32 again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from actcache.kernels.bits import round_bits
from actcache.store.codecs.chain import RAW, STORED_DTYPE, Chain

if TYPE_CHECKING:
    import torch

ACTS = "acts"
"""The first array of every site, whose metadata says what the site is."""
BLOCK_VALUES = 1 << 15
"""Values worked on at a time, so that they stay in a core's cache."""

Powers: TypeAlias = NDArray[np.float32]
"""`(D,)` powers of two: a site's features are divided by them before they are quantised, and multiplied after."""
Loop: TypeAlias = Callable[..., None]
"""`loop(places, out)`, or with a normalisation `loop(places, out, mean, scale)`."""
Steps: TypeAlias = "list[tuple[Callable[..., torch.Tensor], torch.Tensor]]"
"""Operations of torch with two operands, the first of which is what the one before it gave."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredArray:
    """One of the arrays in which a site's values are kept."""

    name: str
    element: str
    """What its elements are, as torch calls the dtype: `int8`, `uint8`, `bfloat16`, ..."""
    row_shape: tuple[int, ...]
    """Shape of a row: `(D,)`, or `()` for one element a row."""
    chain: Chain = RAW

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype on disk."""
        return STORED_DTYPE.get(self.element) or np.dtype(self.element)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row before the chain compresses it."""
        return math.prod(self.row_shape) * self.dtype.itemsize


class Quantiser(Protocol):
    """Values to arrays and back. `powers` are None where no feature is divided by anything.

    A row of finite values comes back finite; in a row that has a NaN or an infinity, at least one value is not finite
    when it comes back.
    """

    def arrays(self, width: int) -> tuple[StoredArray, ...]:
        """The arrays of a site of this width; the first is called `ACTS`."""

    def fit(self, values: NDArray[Any], logical: str) -> NDArray[np.int8]:
        """`(D,)` exponents of the powers of two that suit values `(R, D)`; zeros if it uses none."""

    def encode(self, values: NDArray[Any], logical: str, powers: Powers | None, out: Sequence[NDArray[Any]]) -> None:
        """Split values `(R, D)` of a logical dtype, as stored, into arrays of R rows."""

    def decode(self, parts: Sequence[NDArray[Any]], powers: Powers | None, out: NDArray[np.float32]) -> None:
        """Join R rows of all arrays to values `(R, D)`."""

    def largest_error(self, values: NDArray[np.float64], powers: Powers | None) -> NDArray[np.float64]:
        """`(R, D)` the most by which each of some finite values `(R, D)` may come back changed."""

    def loop(
        self, parts: Sequence[NDArray[Any]], powers: Powers | None, *, normalised: bool, rounded: bool
    ) -> Loop | None:
        """A compiled loop that gathers rows and joins them in one pass, or None: then they are gathered and decoded.

        It fills `out` with rows `places` of the arrays as float32; `normalised`: minus a mean, times a scale;
        `rounded`: to bits of bfloat16. To the same bits as `decode` and numpy.
        """

    def device_steps(self, parts: Sequence[torch.Tensor], width: int) -> tuple[torch.Tensor, Steps]:
        """What joins gathered rows to values `(R, width)` on a device: a tensor, and steps from there.

        The multiplication by the powers of two is added by the caller. To the same bits as `decode`.
        """


def decode_rows(quantiser: Quantiser, parts: Sequence[NDArray[Any]], powers: Powers | None, out: NDArray[Any]) -> None:
    """Values `(R, D)` of the arrays' rows, block by block, into `out`: float32, float16, or the bits of bfloat16."""
    n_rows, width = out.shape
    step = max(1, BLOCK_VALUES // max(1, width))
    work = np.empty((min(step, n_rows), width), np.float32) if out.dtype != np.float32 else None
    for start in range(0, n_rows, step):
        here = out[start : start + step]
        floats = here if work is None else work[: len(here)]
        quantiser.decode([part[start : start + step] for part in parts], powers, floats)
        if here.dtype == np.uint16:
            round_bits(floats, here)
        elif work is not None:
            np.copyto(here, floats, casting="same_kind")
