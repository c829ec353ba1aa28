"""From shared memory to a consumer's own: copied, widened on the way, sent to its device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from actcache.kernels import take_widened
from actcache.kernels.bits import tensor_bits
from actcache.load.batches.batch_memory import BatchMemory

if TYPE_CHECKING:
    import torch


class Copies:
    """Copies tensors `(B, D)`, in a dtype, to a device; on the CPU into reused memory. For use by one thread."""

    def __init__(self, dtype: torch.dtype | None = None, device: torch.device | None = None) -> None:
        self._dtype, self._device, self._memory = dtype, device, BatchMemory()
        self._widen, self._places = take_widened(), np.empty(0, np.int64)

    def __call__(self, source: torch.Tensor) -> torch.Tensor:
        """The same values in the caller's own memory. When this returns, nothing reads `source` any longer."""
        dtype, device = self._dtype or source.dtype, self._device or source.device
        if device.type != "cpu" or source.device.type != "cpu":
            # Widened on the target device, so that half as much is sent.
            sent = source.to(device)
            return sent.to(dtype, copy=sent is source)
        n_rows, width = source.shape
        target = self._memory.take(n_rows, width, dtype)
        self._copy(source, target)
        return target

    def _copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy on the calling thread: torch would use a team of threads, and the trainer needs the cores."""
        import torch

        if source.dtype == target.dtype:
            np.copyto(tensor_bits(target), tensor_bits(source))
        elif self._widen and (source.dtype, target.dtype) == (torch.bfloat16, torch.float32):
            if len(self._places) != source.shape[0]:
                self._places = np.arange(source.shape[0])
            self._widen(tensor_bits(source), self._places, tensor_bits(target).view(np.uint32))
        else:
            target.copy_(source)
