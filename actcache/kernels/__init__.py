"""Compiled inner loops, for what several passes of numpy are too slow for: one pass over memory, without the GIL.

Each function here gives a loop of `loops.py`, or None where numba is missing: then the caller's numpy code does the
same. The loops are compiled when they are first used and kept on disk, which takes some seconds once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Kernel = Callable[..., Any]


def take_and_measure() -> Kernel | None:
    """Rows of bfloat16 bits gathered and measured."""
    return _loop("take_and_measure")


def split_planes() -> Kernel | None:
    """Values of 16 bits split into their lower and their upper bytes."""
    return _loop("split_planes")


def take_rows(*, quantised: bool, normalised: bool, rounded: bool) -> Kernel | None:
    """Rows gathered as float32, of bfloat16 bits or of int8; a mean taken from them, multiplied; rounded to bfloat16.

    There is none for bfloat16 that are nothing but rounded: they are gathered as they are.
    """
    name = "take_dequantised" if quantised else "take_widened"
    return _loop(name + "_normalised" * normalised + "_rounded" * rounded)


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
