"""Streams of work on a device: copies run beside computing, and events order them.

One class for each kind of device: CUDA has streams of its own, any other device does everything at once.
"""

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
        """Block the calling thread until the stream has reached this point."""


class Stream(Protocol):
    """Work of a device, done in the order in which threads ask for it; they do not wait for it."""

    def __init__(self, device: torch.device) -> None: ...

    @classmethod
    def current(cls, device: torch.device) -> Stream:
        """The stream of the calling thread."""

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Uninitialised memory of the device, for work of this stream."""

    def host_bytes(self, n_bytes: int) -> torch.Tensor:
        """`(n_bytes,)` uint8 on the CPU, in memory from which the device copies fastest."""

    def run(self, work: Callable[[], object]) -> None:
        """Enqueue what `work` does to tensors of the device."""

    def record(self) -> Event:
        """The point after all work so far."""

    def wait(self, event: Event) -> None:
        """Hold back all later work until another stream has reached that point."""

    def uses(self, memory: torch.Tensor) -> None:
        """Say that this stream uses memory of another one: when freed, it is reused only after this stream's work."""


class CudaStream:
    """A `Stream` of a GPU. Each method says what is special to CUDA."""

    def __init__(self, device: torch.device, stream: torch.cuda.Stream | None = None) -> None:
        import torch

        self._device = device
        self._stream = stream or torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch has no annotation

    @classmethod
    def current(cls, device: torch.device) -> CudaStream:
        """The stream that torch has set for the calling thread."""
        import torch

        return cls(device, torch.cuda.current_stream(device))

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Memory that torch's allocator gives to this stream only."""
        import torch

        with torch.cuda.stream(self._stream):
            return torch.empty(shape, dtype=dtype, device=self._device)

    def host_bytes(self, n_bytes: int) -> torch.Tensor:
        """Page-locked memory, from which the GPU copies while threads go on."""
        return pinned_bytes(n_bytes)

    def run(self, work: Callable[[], object]) -> None:
        """Launch the work on this stream."""
        import torch

        with torch.cuda.stream(self._stream):
            work()

    def record(self) -> torch.cuda.Event:
        """An event on which threads sleep while they wait: the cores are for decoding."""
        import torch

        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # torch has no annotation
        event.record(self._stream)
        return event

    def wait(self, event: Any) -> None:
        """The GPU waits, not the thread."""
        self._stream.wait_event(event)

    def uses(self, memory: torch.Tensor) -> None:
        """Register the stream with torch's allocator."""
        memory.record_stream(self._stream)


def pinned_bytes(n_bytes: int) -> torch.Tensor:
    """Page-locked memory; if there is none left, ordinary memory, whose copies block their thread."""
    import torch

    try:
        return torch.empty(n_bytes, dtype=torch.uint8, pin_memory=True)
    except RuntimeError:
        return torch.empty(n_bytes, dtype=torch.uint8)


class PlainStream:
    """The `Stream` of any other device: the calling thread does the work at once, so there is nothing to wait for."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    @classmethod
    def current(cls, device: torch.device) -> PlainStream:  # noqa: D102
        return cls(device)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:  # noqa: D102
        import torch

        return torch.empty(shape, dtype=dtype, device=self._device)

    def host_bytes(self, n_bytes: int) -> torch.Tensor:  # noqa: D102
        import torch

        return torch.empty(n_bytes, dtype=torch.uint8)

    def run(self, work: Callable[[], object]) -> None:  # noqa: D102
        work()

    def record(self) -> Event:  # noqa: D102
        return _Past()

    def wait(self, event: Event) -> None:  # noqa: D102
        pass

    def uses(self, memory: torch.Tensor) -> None:  # noqa: D102
        pass


class _Past:
    """A point that every stream has reached."""

    def synchronize(self) -> None:
        pass
