"""A loader's rows on a GPU or another device: windows lie there, and batches are made of them there.

In: chunks as threads decode them, in the stored dtype. Out: batches, gathered, multiplied out, normalised and cast on
the device; what left the CPU never comes back to it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from actcache.errors import ConfigError
from actcache.store.codecs import STORED_DTYPE
from actcache.store.layout import arrays_of, exponents_of

if TYPE_CHECKING:
    import torch

    from actcache.load.gather import Normalization
    from actcache.spec import StoreSpec


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
        found = str(error).splitlines()[0]
        raise ConfigError(f"loader: device {str(device)!r} cannot be used here ({found}); try 'cpu'") from error
    return DeviceLink(device, CudaStream if device.type == "cuda" else PlainStream)


class DeviceGather:
    """Takes rows of windows on a device, multiplied out, normalised and cast: to the same bits as `Gather` on the CPU.

    Rows are gathered for each batch. The other way, to bring a window into its order once so that batches are slices,
    moves no fewer bytes: rows would be read and written as stored for it, then read again for the batch, which has to
    have memory of its own; and where nothing is done to the values, twice as many. It would take a third window, too.

    Each step rounds to float32, and the last one to the dtype of the batch, as on the CPU; torch's kernels for mixed
    dtypes widen what they read and narrow what they write in the same pass.
    """

    def __init__(
        self,
        link: DeviceLink,
        spec: StoreSpec,
        sites: list[str],
        out: torch.dtype,
        normalization: Mapping[str, Normalization],
    ) -> None:
        self.link, self.spec, self.sites, self._out = link, spec, sites, out
        self._steps = {site: self._steps_of(site, normalization.get(site)) for site in sites}

    def window(self, n_rows: int) -> DeviceWindow:
        """Room for a window of so many rows."""
        return DeviceWindow(self, n_rows)

    def take(
        self, values: torch.Tensor, scales: torch.Tensor | None, places: torch.Tensor, site: str, target: torch.Tensor
    ) -> None:
        """`target[i] = values[places[i]]`, `(B, D)`, with what is done to that site; `scales` are those of all rows."""
        import torch

        steps = self._steps[site]
        if scales is not None:
            steps = [(torch.mul, scales.index_select(0, places).float()[:, None]), *steps]
        elif not steps and values.dtype == self._out:
            torch.index_select(values, 0, places, out=target)
            return
        rows = values.index_select(0, places)
        for operation, operand in steps[:-1]:
            rows = operation(rows, operand)
        if steps:
            operation, operand = steps[-1]
            operation(rows, operand, out=target)
        else:
            target.copy_(rows)

    def _steps_of(self, site: str, done: Normalization | None) -> list[Step]:
        """What is done to the rows of a site, after the multiplication with their scales."""
        import torch

        steps, exponents = [], exponents_of(self.spec.site(site))
        if exponents is not None:
            steps.append((torch.mul, self._sent(np.ldexp(np.float32(1), exponents.astype(np.int32)))))
        if done is not None and done.mean is not None:
            steps.append((torch.sub, self._sent(done.mean)))
        if done is not None:
            steps.append((torch.mul, self._sent(np.array([done.scale], np.float32))))
        return steps

    def _sent(self, values: NDArray[np.float32]) -> torch.Tensor:
        import torch

        there = self.link.gathers.empty(values.shape, torch.float32)
        self.link.gathers.run(lambda: there.copy_(torch.from_numpy(values)))
        return there


class DeviceWindow:
    """A window's rows on a device: stored values, the scales of quantised sites, and the order in which they are taken.

    `rows[site, "acts"]` is `(n_rows, D)`, `rows[site, "scale"]` `(n_rows,)`.
    """

    def __init__(self, gather: DeviceGather, n_rows: int) -> None:
        import torch

        self._gather, self.link = gather, gather.link
        self._places = self.link.window_memory((n_rows,), torch.int64)
        self.rows: dict[tuple[str, str], torch.Tensor] = {}
        for site in map(gather.spec.site, gather.sites):
            quantised = "scale" in arrays_of(site)
            dtype: torch.dtype = torch.int8 if quantised else getattr(torch, gather.spec.dtype)
            self.rows[site.name, "acts"] = self.link.window_memory((n_rows, site.width), dtype)
            if quantised:
                self.rows[site.name, "scale"] = self.link.window_memory((n_rows,), torch.bfloat16)

    def send_order(self, order: NDArray[np.int64]) -> None:
        """Send the places of the window's rows in the order in which batches take them."""
        import torch

        self.link.send(torch.from_numpy(order), self._places[: len(order)])

    def take(self, first: int, targets: Mapping[str, torch.Tensor]) -> None:
        """Rows from place `first` of the order on, as many as each site's target `(B, D)` has."""

        def work() -> None:
            for site, target in targets.items():
                places = self._places[first : first + len(target)]
                self._gather.take(self.rows[site, "acts"], self.rows.get((site, "scale")), places, site, target)

        self.link.gathers.run(work)


def _stored_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    name = str(dtype).removeprefix("torch.")
    return STORED_DTYPE.get(name) or np.dtype(name)
