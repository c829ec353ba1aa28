"""From windows to batches: rows gathered, widened, multiplied out and normalised, on the way into reused memory."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from actcache.errors import ConfigError
from actcache.kernels import (
    Kernel,
    take_dequantised,
    take_dequantised_normalised,
    take_widened,
    take_widened_normalised,
)
from actcache.load.fetch import Window
from actcache.store.codecs import Scratch, dequantise_rows

if TYPE_CHECKING:
    import torch

    from actcache.store import SiteStats

NORMALIZATIONS = ("rms", "center", "center-rms")


_ALIGNMENT = 64
"""Bytes: a cache line, and what JAX asks of memory that it takes over without a copy."""


def _aligned(shape: tuple[int, int], dtype: np.dtype[Any]) -> NDArray[Any]:
    n_bytes = shape[0] * shape[1] * dtype.itemsize
    memory = np.empty(n_bytes + _ALIGNMENT, np.uint8)
    first = -memory.ctypes.data % _ALIGNMENT
    return memory[first : first + n_bytes].view(dtype).reshape(shape)


@dataclass(frozen=True, kw_only=True, slots=True)
class Normalization:
    """What a loader does to the rows of a site, `(x - mean) * scale`, so that a consumer can fold it back."""

    mean: NDArray[np.float32] | None
    """`(D,)` what is taken from each row; None for nothing."""
    scale: float
    """What is multiplied with then: one number for all dimensions."""


def normalization_of(kind: str, stats: SiteStats) -> Normalization:
    """The normalization of a kind, from a site's statistics.

    `rms`: to a mean squared value of 1 (norms of `sqrt(D)`, in the mean square). `center`: to a mean of 0 in every
    dimension. `center-rms`: both, the mean squared value taken after centring.

    Raises:
        ConfigError: there is no such kind, or the rows have nothing to divide by.
    """
    if kind not in NORMALIZATIONS:
        raise ConfigError(f"loader: normalize must be one of {', '.join(NORMALIZATIONS)} or None, got {kind!r}")
    square = stats.variance.mean() if kind == "center-rms" else stats.rms_norm**2 / len(stats.mean)
    if kind != "center" and not (np.isfinite(square) and square > 0):
        raise ConfigError(f"loader: normalize={kind!r} needs rows that differ from nothing; use normalize=None")
    mean = None if kind == "rms" else stats.mean.astype(np.float32)
    return Normalization(mean=mean, scale=1.0 if kind == "center" else float(np.float32(1 / np.sqrt(square))))


_GATHER_BYTES = 1 << 17
"""Rows gathered at a time: they stay in a core's cache until they are widened."""


_STORED = {
    "torch.bfloat16": "<u2",
    "torch.float16": "<f2",
    "torch.float32": "<f4",
    "torch.float64": "<f8",
    "torch.int8": "|i1",
}


class BatchMemory:
    """Batch buffers, handed out as tensors and taken back when the last tensor or view on one is gone.

    `torch.from_numpy` keeps the array alive for as long as any tensor shares its memory; each tensor gets an array
    object of its own (a view of a kept buffer), whose end of life returns the buffer. So a consumer may keep or modify
    whatever it got.
    """

    def __init__(self) -> None:
        self._free: dict[tuple[int, int, str], deque[NDArray[Any]]] = {}

    def take(self, n_rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised `(n_rows, width)` tensor."""
        import torch

        stored = _STORED[str(dtype)]
        free = self._free.setdefault((n_rows, width, stored), deque())
        try:
            kept = free.popleft()
        except IndexError:
            kept = _aligned((n_rows, width), np.dtype(stored))
        handed_out = kept[:]
        weakref.finalize(handed_out, free.append, kept).atexit = False
        tensor = torch.from_numpy(handed_out)
        return tensor.view(torch.bfloat16) if dtype == torch.bfloat16 else tensor


class Gather:
    """Copies rows of a window to a stretch of a batch, in another dtype and normalised if need be.

    Done with numpy on the calling thread, block by block in cache: torch would split each copy over a thread team of
    its own, and two teams on the same cores (this one and the trainer's) wait for each other more than they work.
    """

    def __init__(
        self, logical: torch.dtype, out: torch.dtype, normalization: Mapping[str, Normalization] | None = None
    ) -> None:
        self.logical, self.out, self.normalization = logical, out, normalization or {}
        self._scratch, self._wide = Scratch(), Scratch()

    def __call__(self, window: Window, site: str, places: NDArray[np.int64], target: torch.Tensor) -> None:
        """`target[i] = window row places[i]`."""
        values, scales = window.values[site], window.scales.get(site)
        if scales is None and self.out == self.logical and site not in self.normalization:
            np.take(values, places, axis=0, out=_bits(target), mode="clip")
        elif not self._in_one_pass(window, site, places, target):
            self._in_blocks(window, site, places, target)

    def _in_one_pass(self, window: Window, site: str, places: NDArray[np.int64], target: torch.Tensor) -> bool:
        """The compiled loops, for what is asked for most; False where there is none."""
        import torch

        values, scales, done = window.values[site], window.scales.get(site), self.normalization.get(site)
        kernel = _kernel(scales is not None, done is not None)
        if kernel is None or self.out != torch.float32 or (scales is None and self.logical != torch.bfloat16):
            return False
        after = () if done is None else (_shift(done, values.shape[1]), np.float32(done.scale))
        if scales is None:
            out = _bits(target) if after else _bits(target).view(np.uint32)
            kernel(values, places, out, *after)
        else:
            wide = (scales[places].astype(np.uint32) << 16).view(np.float32)
            kernel(values, wide, window.weights[site], places, _bits(target), *after)
        return True

    def _in_blocks(self, window: Window, site: str, places: NDArray[np.int64], target: torch.Tensor) -> None:
        values, scales = window.values[site], window.scales.get(site)
        block_rows = max(1, _GATHER_BYTES // (values.shape[1] * values.itemsize))
        for start in range(0, len(places), block_rows):
            part = places[start : start + block_rows]
            rows = self._take(values, part)
            wide = target[start : start + len(part)]
            if (done := self.normalization.get(site)) is not None:
                self._normalise(rows, None if scales is None else scales[part], window.exponents.get(site), done, wide)
            elif scales is None:
                self._widen(rows, wide)
            else:
                self._dequantise(rows, scales[part], window.exponents[site], wide)

    def _take(self, values: NDArray[Any], places: NDArray[np.int64]) -> NDArray[Any]:
        """Gathered rows in reused memory."""
        width = values.shape[1]
        rows = np.frombuffer(self._scratch.take(len(places) * width * values.itemsize), values.dtype)
        return np.take(values, places, axis=0, out=rows.reshape(-1, width), mode="clip")

    def _widen(self, rows: NDArray[Any], target: torch.Tensor) -> None:
        import torch

        if self.logical == torch.bfloat16 and self.out == torch.float32:
            # bfloat16 bits are the upper half of the float32.
            np.left_shift(rows, 16, out=target.view(torch.int32).numpy().view(np.uint32), dtype=np.uint32)
        else:
            narrow = torch.from_numpy(rows)
            target.copy_(narrow.view(torch.bfloat16) if self.logical == torch.bfloat16 else narrow)

    def _dequantise(
        self,
        rows: NDArray[np.int8],
        scales: NDArray[np.uint16],
        exponents: NDArray[np.int8] | None,
        target: torch.Tensor,
    ) -> None:
        import torch

        if self.out in (torch.float32, torch.bfloat16):
            dequantise_rows(rows, scales, _bits(target), exponents)
            return
        wide = np.frombuffer(self._wide.take(4 * rows.size), np.float32).reshape(rows.shape)
        dequantise_rows(rows, scales, wide, exponents)
        target.copy_(torch.from_numpy(wide))

    def _normalise(
        self,
        rows: NDArray[Any],
        scales: NDArray[np.uint16] | None,
        exponents: NDArray[np.int8] | None,
        done: Normalization,
        target: torch.Tensor,
    ) -> None:
        """In float32, rounded once at the end."""
        import torch

        wide = np.frombuffer(self._wide.take(4 * rows.size), np.float32).reshape(rows.shape)
        if scales is not None:
            dequantise_rows(rows, scales, wide, exponents)
        elif self.logical == torch.bfloat16:
            np.left_shift(rows, 16, out=wide.view(np.uint32), dtype=np.uint32)
        else:
            np.copyto(wide, rows, casting="same_kind")
        if done.mean is not None:
            np.subtract(wide, done.mean, out=wide)
        np.multiply(wide, np.float32(done.scale), out=wide)
        target.copy_(torch.from_numpy(wide))


def _kernel(quantised: bool, normalised: bool) -> Kernel | None:
    if quantised:
        return take_dequantised_normalised() if normalised else take_dequantised()
    return take_widened_normalised() if normalised else take_widened()


def _shift(done: Normalization, width: int) -> NDArray[np.float32]:
    return np.zeros(width, np.float32) if done.mean is None else done.mean


def _bits(target: torch.Tensor) -> NDArray[Any]:
    """The tensor's memory as numpy sees it: bfloat16 as uint16."""
    import torch

    return (target.view(torch.uint16) if target.dtype == torch.bfloat16 else target).numpy()


def normalise_on(values: torch.Tensor, done: Normalization, out: torch.dtype) -> torch.Tensor:
    """Rows `(B, D)` normalised in float32 on the device on which they are."""
    import torch

    wide = values.to(torch.float32)
    if done.mean is not None:
        wide = wide - torch.from_numpy(done.mean).to(wide.device)
    return (wide * done.scale).to(out)


def dequantise_on(
    device: torch.device,
    q: torch.Tensor,
    scales: torch.Tensor,
    exponents: NDArray[np.int8] | None,
    out: torch.dtype,
) -> torch.Tensor:
    """Quantised rows `(B, D)` int8 and their `(B,)` bfloat16 scales, sent to a device and multiplied out there."""
    import torch

    wide = q.to(device).to(torch.float32)
    wide.mul_(scales.to(device).to(torch.float32)[:, None])
    if exponents is not None:
        wide.mul_(torch.exp2(torch.from_numpy(exponents).to(device, torch.float32)))
    return wide.to(out)
