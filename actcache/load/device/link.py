"""The way of decoded chunks from host memory to a device."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from actcache.errors import ConfigError, first_line
from actcache.store.codecs.chain import STORED_DTYPE

if TYPE_CHECKING:
    import torch

from actcache.load.device.streams import CudaStream, Event, PlainStream, Stream


class DeviceLink:
    """The way of a loader's rows to a device, and the order of what is done there.

    Chunks are copied into windows on one stream, batches are gathered from windows on another, and the consumer works
    on its own. The device itself waits for what one needs of another:

    - `before_filling` a window: copies wait for the gathers from what it held before;
    - `after_filling`: gathers wait for its copies;
    - `hand_over` of a batch: its consumer waits for its gathers.

    Threads wait in one place only: before they decode into memory from which an earlier chunk is still being copied.
    Windows and batches are memory of the gathering stream, and the other one that uses them is registered with it.
    """

    def __init__(self, device: torch.device, streams: type[Stream]) -> None:
        self.device, self._streams = device, streams
        self.copies, self.gathers = streams(device), streams(device)
        self._of_thread = threading.local()

    def window_memory(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Memory for rows of a window."""
        memory = self.gathers.empty(shape, dtype)
        self.copies.uses(memory)
        return memory

    def before_filling(self) -> None:
        """Copies that are asked for from now on may write over what was gathered from until now."""
        self.copies.wait(self.gathers.record())

    def after_filling(self) -> None:
        """Gathers that are asked for from now on may read what was copied until now."""
        self.gathers.wait(self.copies.record())

    def hand_over(self, tensors: Iterable[torch.Tensor]) -> Callable[[], None]:
        """A call that makes these tensors of the gathering stream, as now asked for, the calling thread's own."""
        ready, batch = self.gathers.record(), list(tensors)

        def call() -> None:
            consumer = self._streams.current(self.device)
            consumer.wait(ready)
            for tensor in batch:
                consumer.uses(tensor)

        return call

    @contextmanager
    def sending(self, target: torch.Tensor) -> Iterator[NDArray[Any]]:
        """Host memory of the calling thread for a contiguous target on the device, to which it is copied at the end.

        It has the target's shape and the dtype of stored values. A thread has memory for two chunks: one is decoded
        while the other is copied. Windows have no memory on the CPU: page-locked memory is taken from everybody else,
        torch rounds it up to a power of two (https://github.com/pytorch/pytorch/pull/171662), and a chunk that has just
        been decoded is sent from the core's cache.
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
        """Copy to the device; where the source is pinned it has to stay as it is until then."""
        self.copies.run(lambda: target.copy_(source, non_blocking=source.is_pinned()))


class _Sent:
    """Host memory that a device copies from, and when it has done so."""

    def __init__(self) -> None:
        import torch

        self.memory = torch.empty(0, dtype=torch.uint8)
        self.copied: Event | None = None


def link_to(device: torch.device) -> DeviceLink | None:
    """The link to a device; None to the CPU, where batches are made of windows in its own memory.

    Raises:
        ConfigError: the device cannot be used.
    """
    import torch

    if device.type == "cpu":
        return None
    try:
        # With its number: "cuda" means the calling thread's GPU, and other threads may be set to another one.
        device = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"loader: device {str(device)!r} cannot be used here ({first_line(error)}); try 'cpu'"
        ) from error
    return DeviceLink(device, CudaStream if device.type == "cuda" else PlainStream)


def _stored_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    name = str(dtype).removeprefix("torch.")
    return STORED_DTYPE.get(name) or np.dtype(name)
