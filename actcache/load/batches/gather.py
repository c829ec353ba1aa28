"""From windows to batches on the CPU: rows are gathered, widened, multiplied by their scales, and normalised.

In: a window, a site and places in it. Out: rows in the memory of a batch; `device/device_rows.py` does it on a GPU.

One thread gathers, in compiled loops or numpy. torch would use a team of threads for each copy, and two teams on the
same cores, this one and the trainer's, wait for each other more than they work.
"""

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
"""Bytes of rows gathered at a time: they stay in a core's cache until they are widened."""


class Gather:
    """Copies rows of a window to a stretch of a batch, converted and normalised as needed.

    It works on the calling thread, in one pass over memory if there are compiled loops: torch would split each copy
    over its own team of threads, and two teams on the same cores (that one and the trainer's) spend more time waiting
    for each other than working. Rows that are wider on the way than in the batch go block by block, in cache. Numpy
    does the same more slowly, without anything to load first.
    """

    def __init__(
        self, logical: torch.dtype, out: torch.dtype, normalization: Mapping[str, Normalization] | None = None
    ) -> None:
        import torch

        self.logical, self.out, self.normalization = logical, out, normalization or {}
        self._is_bfloat16 = logical == torch.bfloat16
        self._scratch, self._wide = Scratch(), Scratch()
        self.loops_loaded = False
        """Whether compiled loops are used, if there are any."""

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
        """Convert to float32 first, and from there to the dtype of the batch."""
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
        """Use compiled loops from now on. The first time in a process, loading them takes half a second."""
        import torch

        self.loops_loaded = True
        for site, stored in window.stored.items():
            if self._compiled(stored, site, "torch.float32"):
                self(window, site, np.zeros(1, np.int64), torch.empty((1, stored.width), dtype=self.out))

    def _compiled(
        self, stored: StoredRows, site: str, out: str
    ) -> Callable[[NDArray[np.int64], NDArray[Any]], None] | None:
        """The compiled loop that gathers rows as `out`; None if there is none."""
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
        """From float32 to the dtype of the batch, rounded once; float64 is wider."""
        import torch

        loop = round_to_bfloat16() if self.out == torch.bfloat16 else None
        if loop is None:
            target.copy_(torch.from_numpy(wide))
        else:
            loop(wide.view(np.uint32), tensor_bits(target))

    def _float32(self, memory: Scratch, shape: tuple[int, int]) -> NDArray[np.float32]:
        """Reused memory, valid until the next call."""
        return np.frombuffer(memory.take(4 * shape[0] * shape[1]), np.float32).reshape(shape)


def _shift(done: Normalization, width: int) -> NDArray[np.float32]:
    return np.zeros(width, np.float32) if done.mean is None else done.mean
