"""How long sequences may be: tried by running one, because configs are wrong in both directions.

RoBERTa says 514 and takes 512, XLNet says -1, a model with rotary positions runs far beyond what it says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from actcache.memory import is_out_of_memory

TOO_LONG = (IndexError, RuntimeError, ValueError, AssertionError)
"""What models raise for a position beyond their context."""

_SHORT = 8
"""Tokens that every model takes."""
_MOST_UNASKED = 1 << 13
_MOST_UNASKED_PRODUCTS = 1 << 38
"""Positions, and parameters x positions, up to which a config's claim is tried unasked."""


class Context:
    """The lengths that a model takes.

    Args:
        claimed: positions according to its config; None if that says nothing sensible.
        run: one forward pass of `(1, T)` token ids.
        ids: `(1, T)` token ids of any length, none of them special: padding has no position in some models.
        n_parameters: how large the model is.
    """

    def __init__(
        self,
        claimed: int | None,
        run: Callable[[Tensor], Any],
        ids: Callable[[int], Tensor],
        n_parameters: Callable[[], int],
    ) -> None:
        self.claimed = claimed if claimed is not None and claimed > 0 else None
        self._run = run
        self._ids = ids
        self._n_parameters = n_parameters
        self._works = 0
        self._fails: int | None = None
        self._why: BaseException | None = None

    @property
    def known(self) -> int | None:
        """The longest length as far as it is known without running anything; None for any."""
        return self.claimed if self._fails is None else self._works

    @property
    def longest(self) -> int | None:
        """The longest length up to the claimed one that works; the claim itself where trying it is expensive."""
        claimed = self.claimed
        affordable = claimed is not None and claimed <= _MOST_UNASKED
        if claimed is not None and affordable and claimed * self._n_parameters() <= _MOST_UNASKED_PRODUCTS:
            self.limit_below(claimed)
        return self.known

    def limit_below(self, length: int) -> int | None:
        """None if the model takes sequences of so many tokens, otherwise the longest length that it takes.

        Raises:
            MemoryError, RuntimeError: there is no memory to try it.
        """
        if not self.takes(length):
            self._find_limit()
        return self.limit_known_below(length)

    def limit_known_below(self, length: int) -> int | None:
        """As `limit_below`, as far as it is known without running anything."""
        return None if self._fails is None or length < self._fails else self._works

    def takes(self, length: int) -> bool:
        """Whether a sequence of so many tokens runs; tried once."""
        if length <= self._works:
            return True
        if self._fails is not None and length >= self._fails:
            return False
        ids = self._ids(length)
        try:
            with torch.no_grad(), _BoundsChecked():  # type: ignore[no-untyped-call]
                self._run(ids)
        except TOO_LONG as error:
            if is_out_of_memory(error):
                raise
            self._fails, self._why = length, error
            return False
        self._works = length
        return True

    @property
    def why(self) -> BaseException | None:
        """What the model raised at the shortest length that was tried and did not work."""
        return self._why

    def _find_limit(self) -> None:
        """Narrow down where it ends: in steps that double, from the length that failed, then by halves.

        If the model does not run at any length, the length is not the reason, and nothing is known.
        """
        if not self.takes(min(_SHORT, max(1, (self._fails or 1) - 1))):
            self._fails = None
            return
        step = 1
        while self._fails is not None and self._fails - self._works > 1:
            try_at = max(self._fails - step, (self._works + self._fails) // 2)
            step *= 2
            self.takes(try_at)


class _BoundsChecked(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Looks at indices before a device does: an index out of bounds ends a CUDA context for good."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        match getattr(func, "overloadpacket", None):
            case aten.embedding:
                _check(args[1], args[0].shape[0])
            case aten.gather | aten.index_select:
                _check(args[2], args[0].shape[args[1]])
            case aten.index:
                for dim, index in enumerate(args[1]):
                    if index is not None and not index.is_floating_point() and index.dtype != torch.bool:
                        _check(index, args[0].shape[dim])
        return func(*args, **(kwargs or {}))


def _check(index: Tensor, size: int) -> None:
    if index.numel() and not index.is_meta and int(index.max()) >= size:
        raise IndexError(f"index {int(index.max())} is out of bounds for {size} rows")
