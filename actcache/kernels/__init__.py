"""Compiled inner loops, for what several passes of numpy are too slow for: one pass over memory, without the GIL.

Each function here gives a loop of `loops.py`, or None where numba is missing: then the caller's numpy code does the
same. The loops are compiled when they are first used and kept on disk, which takes some seconds once.

The first batch is made with numpy, and compiled loops are loaded behind it by a thread of their own: importing numba
takes half a second, as much as all else that a first batch needs on a store of a million chunks, and an interrupt would
leave modules half imported for the rest of the process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Kernel = Callable[..., Any]

_WIDENED = {
    (False, False): "take_widened",
    (True, False): "take_widened_normalised",
    (True, True): "take_widened_normalised_rounded",
}
_INT8 = {
    (False, False): "take_dequantised",
    (False, True): "take_dequantised_rounded",
    (True, False): "take_dequantised_normalised",
    (True, True): "take_dequantised_normalised_rounded",
}
"""Loops that gather rows, by (normalised, rounded)."""


def take_and_measure() -> Kernel | None:
    """Rows of bfloat16 bits gathered and measured."""
    return _loop("take_and_measure")


def split_planes() -> Kernel | None:
    """Values of 16 bits split into their lower and their upper bytes."""
    return _loop("split_planes")


def take_widened(*, normalised: bool = False, rounded: bool = False) -> Kernel | None:
    """Rows of bfloat16 bits gathered as float32; a mean subtracted, multiplied; rounded to bfloat16 again.

    Rows that are only rounded would be what they were, so there is no loop for them: gather them as they are.
    """
    return _loop(_WIDENED[normalised, rounded])


def take_int8(*, normalised: bool, rounded: bool) -> Kernel | None:
    """Rows of int8 with a scale each gathered as float32; a mean subtracted, multiplied; rounded to bfloat16."""
    return _loop(_INT8[normalised, rounded])


def round_to_bfloat16() -> Kernel | None:
    """float32 bits rounded to bfloat16 bits."""
    return _loop("round_to_bfloat16")


def _loop(name: str) -> Kernel | None:
    try:
        from actcache.kernels import loops
    except ImportError:
        return None
    found: Kernel = getattr(loops, name)
    return found
