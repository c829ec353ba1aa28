"""From windows to batches: rows gathered, widened, multiplied out and normalised, on the way into reused memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from actcache.kernels import round_to_bfloat16, take_widened
from actcache.kernels.bits import tensor_bits, widen_bits
from actcache.load.normalize import Normalization
from actcache.load.windows.window import StoredRows, Window
from actcache.memory import Scratch

if TYPE_CHECKING:
    import torch

_GATHER_BYTES = 1 << 19
"""Rows gathered at a time: they stay in a core's cache until they are widened."""


class Gather:
    """Copies rows of a window to a stretch of a batch, in another dtype and normalised if need be.

    Done on the calling thread, in one pass over memory where there are compiled loops: torch would split each copy over
    a thread team of its own, and two teams on the same cores (this one and the trainer's) wait for each other more than
    they work. What is wider on the way than in the end goes block by block, in cache. Numpy does the same, more slowly,
    and has nothing to load first.
    """

    def __init__(
        self, logical: torch.dtype, out: torch.dtype, normalization: Mapping[str, Normalization] | None = None
    ) -> None:
        import torch

        self.logical, self.out, self.normalization = logical, out, normalization or {}
        self._is_bfloat16 = logical == torch.bfloat16
        self._scratch, self._wide = Scratch(), Scratch()
        self.loops_loaded = False
        """Whether compiled loops are used, where there are any."""

    def __call__(self, window: Window, site: str, places: NDArray[np.int64], target: torch.Tensor) -> None:
        """`target[i] = window row places[i]`."""
        stored = window.stored[site]
        if stored.quantiser is None and self.out == self.logical and site not in self.normalization:
            np.take(stored.parts[0], places, axis=0, out=tensor_bits(target), mode="clip")
        elif (loop := self._compiled(stored, site, str(self.out))) is not None:
            loop(places, tensor_bits(target))
        else:
            self._block_by_block(stored, site, places, target)

    def _block_by_block(self, stored: StoredRows, site: str, places: NDArray[np.int64], target: torch.Tensor) -> None:
        """As float32 first, and from there to what is asked for."""
        import torch

        in_place, width = self.out == torch.float32, target.shape[1]
        widen = self._compiled(stored, site, "torch.float32") or partial(self._as_float32, stored, site)
        block_rows = max(1, _GATHER_BYTES // (4 * width))
        for start in range(0, len(places), block_rows):
            part = places[start : start + block_rows]
            here = target[start : start + len(part)]
            wide = tensor_bits(here) if in_place else self._float32(self._wide, (len(part), width))
            widen(part, wide)
            if not in_place:
                self._narrow(wide, here)

    def load_loops(self, window: Window) -> None:
        """Use compiled loops from now on. In a process that has none yet, loading them takes half a second."""
        import torch

        self.loops_loaded = True
        for site, stored in window.stored.items():
            if self._compiled(stored, site, "torch.float32"):
                self(window, site, np.zeros(1, np.int64), torch.empty((1, stored.width), dtype=self.out))

    def _compiled(
        self, stored: StoredRows, site: str, out: str
    ) -> Callable[[NDArray[np.int64], NDArray[Any]], None] | None:
        """The compiled loop that gathers rows as `out`; None where there is none."""
        if not self.loops_loaded or out not in ("torch.float32", "torch.bfloat16"):
            return None
        done, rounded = self.normalization.get(site), out == "torch.bfloat16"
        if stored.quantiser is not None:
            loop = stored.quantiser.loop(stored.parts, stored.powers, normalised=done is not None, rounded=rounded)
        elif self._is_bfloat16:
            kernel = take_widened(normalised=done is not None, rounded=rounded)
            loop = None if kernel is None else partial(kernel, stored.parts[0])
        else:
            loop = None
        if loop is None:
            return None
        if done is not None:
            after = _shift(done, stored.width), np.float32(done.scale)
            return lambda places, target: loop(places, target, *after)
        # Without a normalisation, rows of bfloat16 are only moved, as the bits of float32.
        return loop if stored.quantiser is not None else lambda places, target: loop(places, target.view(np.uint32))

    def _as_float32(self, stored: StoredRows, site: str, places: NDArray[np.int64], wide: NDArray[np.float32]) -> None:
        """What the compiled loops do, with numpy."""
        done, (first, *others) = self.normalization.get(site), stored.parts
        shape = len(places), *first.shape[1:]
        rows = np.frombuffer(self._scratch.take(math.prod(shape) * first.itemsize), first.dtype).reshape(shape)
        np.take(first, places, axis=0, out=rows, mode="clip")
        if stored.quantiser is not None:
            stored.quantiser.decode([rows, *(part[places] for part in others)], stored.powers, wide)
        elif self._is_bfloat16:
            widen_bits(rows, wide)
        else:
            np.copyto(wide, rows, casting="same_kind")
        if done is not None:
            if done.mean is not None:
                np.subtract(wide, done.mean, out=wide)
            np.multiply(wide, np.float32(done.scale), out=wide)

    def _narrow(self, wide: NDArray[np.float32], target: torch.Tensor) -> None:
        """Round once, at the end; or widen further."""
        import torch

        loop = round_to_bfloat16() if self.out == torch.bfloat16 else None
        if loop is None:
            target.copy_(torch.from_numpy(wide))
        else:
            loop(wide.view(np.uint32), tensor_bits(target))

    def _float32(self, memory: Scratch, shape: tuple[int, int]) -> NDArray[np.float32]:
        """Reused memory, valid until it is asked for again."""
        return np.frombuffer(memory.take(4 * shape[0] * shape[1]), np.float32).reshape(shape)


def _shift(done: Normalization, width: int) -> NDArray[np.float32]:
    return np.zeros(width, np.float32) if done.mean is None else done.mean
