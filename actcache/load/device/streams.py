"""Streams of work on a device: copies that run beside computing, and the events that order them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

if TYPE_CHECKING:
    import torch


Step: TypeAlias = "tuple[Callable[..., torch.Tensor], torch.Tensor]"
"""A calculation in float32, and its second operand on the device."""


class Event(Protocol):
    """A point in the work of a stream."""

    def synchronize(self) -> None:
        """Let the calling thread wait until the stream is there."""


class Stream(Protocol):
    """Work of a device that is done in the order in which threads ask for it, without their waiting for it."""

    def __init__(self, device: torch.device) -> None: ...

    @classmethod
    def current(cls, device: torch.device) -> Stream:
        """The one that the calling thread works on."""

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Uninitialised memory of the device, for work of this stream."""

    def host_bytes(self, n_bytes: int) -> torch.Tensor:
        """`(n_bytes,)` uint8 on the CPU, from which the device copies best."""

    def run(self, work: Callable[[], object]) -> None:
        """Ask for what `work` does to tensors of the device."""

    def record(self) -> Event:
        """The point after all that was asked for so far."""

    def wait(self, event: Event) -> None:
        """Do nothing that is asked for from now on before another stream is at that point."""

    def uses(self, memory: torch.Tensor) -> None:
        """When this memory of another stream is freed, give it to nobody before what this stream then has is done."""


class CudaStream:
    """A `Stream` of a GPU."""

    def __init__(self, device: torch.device, stream: torch.cuda.Stream | None = None) -> None:
        import torch

        self._device = device
        self._stream = stream or torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch has no annotation

    @classmethod
    def current(cls, device: torch.device) -> CudaStream:
        """The one that the calling thread works on."""
        import torch

        return cls(device, torch.cuda.current_stream(device))

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Memory that torch's allocator gives to this stream alone."""
        import torch

        with torch.cuda.stream(self._stream):
            return torch.empty(shape, dtype=dtype, device=self._device)

    def host_bytes(self, n_bytes: int) -> torch.Tensor:
        """Memory from which it copies while threads go on."""
        return pinned_bytes(n_bytes)

    def run(self, work: Callable[[], object]) -> None:
        """Launch it on this stream."""
        import torch

        with torch.cuda.stream(self._stream):
            work()

    def record(self) -> torch.cuda.Event:
        """An event whose waiters sleep: the cores are for decoding."""
        import torch

        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # torch has no annotation
        event.record(self._stream)
        return event

    def wait(self, event: Any) -> None:
        """The GPU waits, not the thread."""
        self._stream.wait_event(event)

    def uses(self, memory: torch.Tensor) -> None:
        """Tell torch's allocator."""
        memory.record_stream(self._stream)


def pinned_bytes(n_bytes: int) -> torch.Tensor:
    """Page-locked memory; where none can be had, ordinary memory, from which copies keep their thread waiting."""
    import torch

    try:
        return torch.empty(n_bytes, dtype=torch.uint8, pin_memory=True)
    except RuntimeError:
        return torch.empty(n_bytes, dtype=torch.uint8)


class PlainStream:
    """A `Stream` of devices of which no other is known here: what is asked for is done at once, by the thread."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    @classmethod
    def current(cls, device: torch.device) -> PlainStream:
        """There is no difference."""
        return cls(device)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """The device's memory."""
        import torch

        return torch.empty(shape, dtype=dtype, device=self._device)

    def host_bytes(self, n_bytes: int) -> torch.Tensor:
        """Ordinary memory."""
        import torch

        return torch.empty(n_bytes, dtype=torch.uint8)

    def run(self, work: Callable[[], object]) -> None:
        """Do it."""
        work()

    def record(self) -> Event:
        """A point that lies behind."""
        return _Past()

    def wait(self, event: Event) -> None:
        """No need."""

    def uses(self, memory: torch.Tensor) -> None:
        """No need."""


class _Past:
    def synchronize(self) -> None:
        """It is there."""
