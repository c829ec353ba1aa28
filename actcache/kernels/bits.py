"""Floating-point values as bits: numpy has no bfloat16, which is the upper half of a float32.

In: bits of bfloat16 as uint16, float32, tensors. Out: the same values the other way. Without their sign, bits are
ordered as the absolute values are, infinity above all finite numbers and NaN above infinity; `PATTERNS` says where.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

NAN = 0x7FC0
"""Bits of a bfloat16 that is NaN."""


@dataclass(frozen=True, slots=True)
class Pattern:
    """How a dtype's bits are read as integers."""

    unsigned: np.dtype[Any]
    magnitude: int
    """Mask of all bits but the sign."""
    infinity: int
    """The smallest bits, sign left out, that are not a finite number."""


PATTERNS = {
    "bfloat16": Pattern(np.dtype("<u2"), 0x7FFF, 0x7F80),
    "float16": Pattern(np.dtype("<u2"), 0x7FFF, 0x7C00),
    "float32": Pattern(np.dtype("<u4"), 0x7FFF_FFFF, 0x7F80_0000),
}
"""By logical dtype."""


def widen_bits(bits: NDArray[np.uint16], out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
    """bfloat16 bits as float32, exactly; in `out`, or in memory of their own."""
    if out is None:
        wide: NDArray[np.float32] = np.left_shift(bits, 16, dtype=np.uint32).view(np.float32)
        return wide
    np.left_shift(bits, 16, out=out.view(np.uint32), dtype=np.uint32)
    return out


def widen(stored: NDArray[Any], logical: str) -> NDArray[Any]:
    """Stored values of a logical dtype as numbers: bfloat16 bits as float32, all others as they are."""
    return widen_bits(stored) if logical == "bfloat16" else stored


def round_bits(values: NDArray[np.float32], out: NDArray[np.uint16]) -> None:
    """float32 as the nearest bfloat16 bits, ties to even, in `out`; overwrites `values`. NaN must be `NAN`, widened."""
    words = values.view(np.uint32)
    words += ((words >> 16) & 1) + 0x7FFF
    words >>= 16
    np.copyto(out, words, casting="unsafe")


def round_bits_up(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Positive float32 as the bits of the smallest bfloat16 that is not below."""
    bits: NDArray[np.uint16] = ((values.view(np.uint32) + np.uint32(0xFFFF)) >> 16).astype(np.uint16)
    return bits


def tensor_bits(tensor: torch.Tensor) -> NDArray[Any]:
    """The tensor's memory as numpy sees it: bfloat16 as uint16."""
    import torch

    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def bits_tensor(stored: NDArray[Any], logical: str) -> torch.Tensor:
    """Stored values of a logical dtype as a tensor on the same memory."""
    import torch

    tensor = torch.from_numpy(stored)
    return tensor.view(torch.bfloat16) if logical == "bfloat16" else tensor
