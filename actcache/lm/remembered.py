"""State that a forward pass leaves in a model, and how it is undone.

Some models are not the same after a long sequence: rotary frequencies that were stretched for it ("dynamic NTK") stay
stretched until a short enough sequence comes. A value must not depend on what was run before.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_MOST_VALUES = 1 << 20
"""Larger tensors (masks, caches of angles) are not kept."""


class Remembered:
    """Watches the buffers of a model, and puts them back before a sequence of another length."""

    def __init__(self, module: nn.Module) -> None:
        """Remember the model as it is now: before anything was run, or after a single token."""
        self._module = module
        self._before = {(m, name): _copy(value) for m, name, value in _state_of(module)}
        self._changing: list[nn.Module] = []
        self._last, self._longest, self._looked_at = 0, 0, 0

    def prepare(self, n_positions: int) -> None:
        """Undo what earlier passes left in the model, before a pass over this many positions."""
        if n_positions < self._longest and self._looked_at < self._longest:
            self._looked_at = self._longest
            self._changing = list(dict.fromkeys(m for m, _, value in self._changed() if isinstance(value, Tensor)))
        if self._changing and n_positions != self._last:
            for m, name, value in list(self._changed()):
                if m in self._changing:
                    setattr(m, name, _copy(value))
        self._last, self._longest = n_positions, max(self._longest, n_positions)

    def _changed(self) -> Iterator[tuple[nn.Module, str, Any]]:
        """What has changed, with its earlier value."""
        for (m, name), before in self._before.items():
            now = getattr(m, name, None)
            if not _same(before, now):
                yield (
                    m,
                    name,
                    before.to(now.device) if isinstance(now, Tensor) and isinstance(before, Tensor) else before,
                )


def _state_of(module: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    """Buffers, other tensors and numbers that modules hold, but not parameters."""
    for m in module.modules():
        for name, value in (*m._buffers.items(), *vars(m).items()):
            if isinstance(value, Tensor):
                if value.numel() <= _MOST_VALUES and not value.is_meta:
                    yield m, name, value
            elif type(value) in (int, float):
                yield m, name, value


def _copy(value: Any) -> Any:
    with torch.inference_mode(False):  # whatever the caller runs in: the model may be used outside of it
        return value.clone() if isinstance(value, Tensor) else value


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.dtype != b.dtype:  # the model was converted
            return True
        return a.shape == b.shape and torch.equal(a.to(b.device).nan_to_num(), b.nan_to_num())
    return type(a) is type(b) and bool(a == b)
