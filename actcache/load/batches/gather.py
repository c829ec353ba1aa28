"""From windows to batches on the CPU: rows are gathered, widened, multiplied by their scales, and normalised.

In: a window, a site and places in it. Out: rows in the memory of a batch. `device/rows.py` does the same on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from actcache.kernels import round_to_bfloat16, take_rows
from actcache.kernels.bits import tensor_bits
from actcache.load.normalize import Normalization
from actcache.load.windows.window import Window
from actcache.memory import Scratch
from actcache.store.codecs import dequantise_rows

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
        if site not in window.scales and self.out == self.logical and site not in self.normalization:
            np.take(window.values[site], places, axis=0, out=tensor_bits(target), mode="clip")
        elif (loop := self._compiled(window, site, str(self.out))) is not None:
            loop(places, tensor_bits(target))
        else:
            self._block_by_block(window, site, places, target)

    def _block_by_block(self, window: Window, site: str, places: NDArray[np.int64], target: torch.Tensor) -> None:
        """Convert to float32 first, and from there to the dtype of the batch."""
        import torch

        in_place, width = self.out == torch.float32, target.shape[1]
        widen = self._compiled(window, site, "torch.float32") or partial(self._as_float32, window, site)
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
        for site, values in window.values.items():
            if self._compiled(window, site, "torch.float32"):
                self(window, site, np.zeros(1, np.int64), torch.empty((1, values.shape[1]), dtype=self.out))

    def _compiled(
        self, window: Window, site: str, out: str
    ) -> Callable[[NDArray[np.int64], NDArray[Any]], None] | None:
        """The compiled loop that gathers rows as `out`; None if there is none."""
        values, scales, done = window.values[site], window.scales.get(site), self.normalization.get(site)
        if (
            not self.loops_loaded
            or out not in ("torch.float32", "torch.bfloat16")
            or not (scales is not None or self._is_bfloat16)
        ):
            return None
        rounded = out == "torch.bfloat16"
        loop = take_rows(quantised=scales is not None, normalised=done is not None, rounded=rounded)
        if loop is None:
            return None
        after = () if done is None else (_shift(done, values.shape[1]), np.float32(done.scale))

        def gather(places: NDArray[np.int64], out: NDArray[Any]) -> None:
            if scales is not None:
                row_scales = (scales[places].astype(np.uint32) << 16).view(np.float32)
                loop(values, row_scales, window.weights[site], places, out, *after)
            else:
                loop(values, places, out if after else out.view(np.uint32), *after)

        return gather

    def _as_float32(self, window: Window, site: str, places: NDArray[np.int64], wide: NDArray[np.float32]) -> None:
        """What the compiled loops do, with numpy."""
        values, scales, done = window.values[site], window.scales.get(site), self.normalization.get(site)
        rows = np.frombuffer(self._scratch.take(wide.size * values.itemsize), values.dtype).reshape(wide.shape)
        np.take(values, places, axis=0, out=rows, mode="clip")
        if scales is not None:
            dequantise_rows(rows, scales[places], wide, window.exponents[site])
        elif self._is_bfloat16:
            # bfloat16 bits are the upper half of the float32.
            np.left_shift(rows, 16, out=wide.view(np.uint32), dtype=np.uint32)
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
