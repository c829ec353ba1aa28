"""bfloat16 as bits: it is the upper half of a float32, and numpy has no dtype for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch


def tensor_bits(target: torch.Tensor) -> NDArray[Any]:
    """The tensor's memory as numpy sees it: bfloat16 as uint16."""
    import torch

    return (target.view(torch.uint16) if target.dtype == torch.bfloat16 else target).numpy()
