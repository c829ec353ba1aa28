"""How decoded chunks get from host memory to a device.

In: a device. Out: its two streams, host memory to decode into, and the points at which one stream waits for another.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from actcache.errors import ConfigError, first_line
from actcache.load.device.streams import CudaStream, Event, PlainStream, Stream
from actcache.store.codecs.chain import STORED_DTYPE

if TYPE_CHECKING:
    import torch


class DeviceLink:
    """Brings a loader's rows to a device, and keeps the work there in order.

    Chunks are copied into windows on one stream, batches are gathered from windows on another, and the consumer works
    on a third. The device, not a thread, waits where one stream needs what another does:

    - `before_filling` a window: copies wait for the gathers from its previous content;
    - `after_filling`: gathers wait for its copies;
    - `hand_over` of a batch: its consumer waits for its gathers.

    Threads wait in one place only: before they decode into memory from which an earlier chunk is still being copied.
    Windows and batches are memory of the gathering stream; the other streams that use them are registered with it.
    """

    def __init__(self, device: torch.device, streams: type[Stream]) -> None:
        self.device, self._streams = device, streams
        self.copies, self.gathers = streams(device), streams(device)
        self._of_thread = threading.local()

    def window_memory(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Memory on the device for rows of a window."""
        memory = self.gathers.empty(shape, dtype)
        self.copies.uses(memory)
        return memory

    def before_filling(self) -> None:
        """Let later copies wait for the gathers so far: they may overwrite what was gathered from."""
        self.copies.wait(self.gathers.record())

    def after_filling(self) -> None:
        """Let later gathers wait for the copies so far."""
        self.gathers.wait(self.copies.record())

    def hand_over(self, tensors: Iterable[torch.Tensor]) -> Callable[[], None]:
        """A call by which a thread takes over tensors of the gathering stream, with all work on them so far."""
        ready, batch = self.gathers.record(), list(tensors)

        def call() -> None:
            consumer = self._streams.current(self.device)
            consumer.wait(ready)
            for tensor in batch:
                consumer.uses(tensor)

        return call

    @contextmanager
    def sending(self, target: torch.Tensor) -> Iterator[NDArray[Any]]:
        """Host memory of the calling thread, which is copied to a contiguous target on the device in the end.

        It has the target's shape and the dtype of stored values. A thread has memory for two chunks, so that one is
        decoded while the other is copied. Windows have no memory on the CPU: page-locked memory is lost to everybody
        else, torch rounds it up to a power of two (https://github.com/pytorch/pytorch/pull/171662), and a chunk that
        has just been decoded is sent from the core's cache.
        """
        sent = self._next_sent()
        if sent.copied is not None:
            sent.copied.synchronize()
        if len(sent.memory) < target.nbytes:
            sent.memory = self.copies.host_bytes(target.nbytes)
        source = sent.memory[: target.nbytes]
        yield source.numpy().view(_stored_dtype(target.dtype)).reshape(target.shape)
        self.send(source.view(target.dtype).view(target.shape), target)
        sent.copied = self.copies.record()

    def _next_sent(self) -> _Sent:
        kept: dict[str, deque[_Sent]] = self._of_thread.__dict__
        if not kept:
            kept["turns"] = deque([_Sent(), _Sent()])
        kept["turns"].rotate()
        return kept["turns"][0]

    def send(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy to the device. A pinned source must not change until the copy is done."""
        self.copies.run(lambda: target.copy_(source, non_blocking=source.is_pinned()))


class _Sent:
    """Host memory that a device copies from, and the end of the last copy."""

    def __init__(self) -> None:
        import torch

        self.memory = torch.empty(0, dtype=torch.uint8)
        self.copied: Event | None = None


def link_to(device: torch.device) -> DeviceLink | None:
    """The link to a device; None for the CPU, where windows and batches are ordinary memory.

    Raises:
        ConfigError: the device cannot be used.
    """
    import torch

    if device.type == "cpu":
        return None
    try:
        # With its number: "cuda" means the GPU of the calling thread, and other threads may use another one.
        device = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"loader: device {str(device)!r} cannot be used here ({first_line(error)}); try 'cpu'"
        ) from error
    return DeviceLink(device, CudaStream if device.type == "cuda" else PlainStream)


def _stored_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    name = str(dtype).removeprefix("torch.")
    return STORED_DTYPE.get(name) or np.dtype(name)
