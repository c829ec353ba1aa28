"""The process that reads for others: one loader, its batches in shared memory, consumers on a socket.

In: a loader and a path. Out: batches for every consumer at that path. One thread does everything in turn: it takes a
batch from the loader, which makes batches in shared memory and reads ahead in its own threads; tells every consumer
where the batch is; and hears which batches consumers are done with, and which consumers come and go.
"""

from __future__ import annotations

import errno
import os
import selectors
import socket
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from actcache.errors import ConfigError
from actcache.files import path_of, shown
from actcache.load import Batch, Loader
from actcache.load.batches.batch_memory import BatchMemory
from actcache.load.state import State, check_settings, how_far, parse_place, parse_state
from actcache.share.messages import PROTOCOL, Lines, Message
from actcache.share.shared_memory import SharedMemory
from actcache.spec import Progress, check_callable, check_positive, expand_names
from actcache.status import Say, ignore
from actcache.store.codecs import quantiser_of

if TYPE_CHECKING:
    import torch

    from actcache.store import Store

_MOST_TOLD = 4
"""Batches that a consumer is told of at a time: the lines about them always fit in the buffer of its socket."""
_ROW_ID_BYTES = 8
_MOST_CONNECTIONS, _OF_OPEN_FILES = 1024, 4
"""Connections at a time; and which fraction of the files that the process may open, since stores need files too."""
_PATIENCE_S = 10.0
"""Seconds to wait for a greeting, and for the rest of a line that has begun."""
_PAUSE_S = 0.2
"""Seconds without accepting connections, after the process could open no more files."""
_NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_PLACE = ("first_epoch", "epoch", "batch")
"""The part of a loader's state that changes from batch to batch."""


def serve_batches(
    loader: Loader,
    path: str | Path,
    n_consumers: int,
    *,
    batches_ahead: int = 4,
    progress: Progress | None = None,
    say: Say | None = None,
) -> None:
    """Serve a loader's batches to other processes of this machine, which take them with `ServedBatches(path)`.

    The server waits for `n_consumers`, so that all of them get every batch; a consumer that joins later gets the
    batches from then on. A consumer that is `batches_ahead` batches ahead of the slowest one waits for it. A consumer
    that ends, however it ends, no longer holds up the others. The call returns when all have taken the last batch, or
    have left. Connections that are silent for ten seconds, do not speak the protocol, or are too many, are closed.

    Batches are made in shared memory, in the loader's dtype: `batches_ahead` of them, and those that the loader has
    read ahead. Consumers widen them: `Loader(dtype=torch.bfloat16)` halves that memory, and is exact for sites that are
    stored as bfloat16, neither quantised nor normalised.

    Args:
        loader: on the CPU. It begins at the earliest state of a consumer; consumers without a state begin where it is.
        path: of the socket, which only this user may connect to; the socket of a dead server is replaced.
        n_consumers: how many to wait for.
        batches_ahead: batches that are kept for slower consumers.
        progress: called with (batches done, of how many); a loader without an end counts the epochs begun.
        say: called with a sentence when a consumer joins or leaves.

    Raises:
        ConfigError: an argument is invalid, or the loader is not on the CPU. ServingError: a server is at that path, or
        something that is not a socket. Errors of reading are raised too, and the consumers are told.

    Examples:
        >>> import threading
        >>> loader = ac.Loader(store, [site_out], batch_rows=512, dtype=torch.bfloat16)
        >>> server = threading.Thread(target=ac.serve_batches, args=(loader, "sweep.sock", 2))
        >>> server.start()
        >>> first, second = (ac.ServedBatches("sweep.sock") for _ in range(2))  # usually in two other processes
        >>> torch.equal(next(first)[site_out], next(second)[site_out])
        True
        >>> first.close(), second.close(), server.join()
        (None, None, None)
    """
    check_positive("serve_batches", n_consumers=n_consumers, batches_ahead=batches_ahead)
    check_callable("serve_batches", progress=progress, say=say)
    if not isinstance(loader, Loader):
        raise ConfigError(f"serve_batches: loader must be a Loader, got {shown(loader)}")
    if n_consumers > _most_connections():
        raise ConfigError(
            f"serve_batches: n_consumers must be at most {_most_connections()}, a quarter of the files that this "
            f"process may open (ulimit -n), got {shown(n_consumers)}"
        )
    if loader.device.type != "cpu":
        raise ConfigError(
            f'batches of a loader on {loader.device} cannot be shared; make it with device="cpu", and '
            "ServedBatches(path, device=...)"
        )
    from actcache.share.listen import listening  # locks folders, as Unix can

    where = path_of(path, "serve_batches: path")
    with listening(where) as listener, _Server(loader, listener, batches_ahead, say or ignore) as server:
        server.serve(n_consumers, progress or ignore)


def exact_dtype(store: Store, sites: Sequence[str], normalize: str | None = None) -> torch.dtype:
    """The narrowest dtype of batches that keeps a store's values exactly: its own, or float32."""
    import torch

    of_sites = [store.spec.site(name) for name in expand_names(sites, store.sites)]
    computed = normalize is not None or any(quantiser_of(site.codec) for site in of_sites)
    stored: torch.dtype = getattr(torch, store.spec.dtype)
    return torch.float32 if computed else stored


def _most_connections() -> int:
    import resource  # on Unix only, like sockets with a path

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST_CONNECTIONS if soft == resource.RLIM_INFINITY else min(_MOST_CONNECTIONS, soft // _OF_OPEN_FILES)


@dataclass(eq=False)
class _Consumer:
    lines: Lines
    process: int = 0
    state: State | None = None
    """After which batch it continues; None until it has greeted."""
    coming: deque[Message] = field(default_factory=deque)
    n_told: int = 0
    waited_for: float | None = None
    """Deadline for what it owes: a greeting, or the rest of a line."""


@dataclass
class _Offered:
    """A batch that consumers still read; dropping it frees its memory for another batch."""

    batch: Batch
    rows: torch.Tensor
    readers: set[_Consumer]


class _Server:
    def __init__(self, loader: Loader, listener: socket.socket, n_held: int, say: Say) -> None:
        self._loader = loader
        self._listener = listener
        self._n_held = n_held
        self._say = say
        self._widths = {site: loader.store.spec.site(site).width for site in loader.sites}
        row_bytes = [width * loader.dtype.itemsize for width in self._widths.values()]
        self._shared = SharedMemory([loader.batch_rows * n_bytes for n_bytes in (*row_bytes, _ROW_ID_BYTES)])
        self._memory = BatchMemory(self._shared.allocate)
        self._consumers: list[_Consumer] = []
        self._offered: dict[int, _Offered] = {}
        self._n_batches = 0
        self._begun = False
        self._paused_until: float | None = None
        self._state: State = loader.state_dict()
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)

    def __enter__(self) -> _Server:
        self._loader.make_batches_in(self._memory)
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        last = {"end": True} if error is None else {"error": str(error) or "it was interrupted"}
        for consumer in list(self._consumers):
            self._tell(consumer, last)
            consumer.lines.close()
        self._selector.close()
        self._shared.close()
        self._loader.close()
        self._loader.make_batches_in(BatchMemory())

    def serve(self, n_consumers: int, progress: Progress) -> None:
        """Give every batch to every consumer, once `n_consumers` are there."""
        while len(self._there()) < n_consumers:
            self._listen()
        self._loader.load_state_dict(min((c.state for c in self._there() if c.state), key=how_far))
        self._state, self._begun = self._loader.state_dict(), True
        for batch in self._loader:
            self._offer(batch, self._loader.state_dict())
            progress(*self._amounts())
            if not self._there():
                return
        while self._offered:
            self._listen()

    def _there(self) -> list[_Consumer]:
        return [consumer for consumer in self._consumers if consumer.state is not None]

    def _amounts(self) -> tuple[int, int]:
        """Batches so far, and of how many; for a loader without an end, those of the epochs begun."""
        epoch = self._state["epoch"] - self._state["first_epoch"]
        done = epoch * len(self._loader) + self._state["batch"]
        return done, (self._loader.epochs or -(-done // len(self._loader))) * len(self._loader)

    def _offer(self, batch: Batch, state: State) -> None:
        """Tell the consumers of a batch, as soon as there is room for another one."""
        self._listen(wait=False)
        while len(self._offered) >= self._n_held:
            self._listen()
        self._n_batches, self._state = self._n_batches + 1, state
        readers = {c for c in self._consumers if c.state and how_far(c.state) < how_far(state)}
        if not readers:
            return
        rows = self._memory.take(len(batch.rows), 1, batch.rows.dtype)
        rows[:, 0] = batch.rows
        self._offered[self._n_batches] = _Offered(batch, rows, readers)
        message = {
            "batch": self._n_batches,
            "n_rows": len(rows),
            "place": {name: state[name] for name in _PLACE},
            "rows": self._shared.offset_of(rows),
            "sites": [self._shared.offset_of(tensor) for tensor in batch.values()],
        }
        for consumer in list(readers):
            consumer.coming.append(message)
            self._tell_coming(consumer)

    def _listen(self, *, wait: bool = True) -> None:
        """Handle everything that has arrived; with `wait`, block until something arrives or a deadline passes."""
        dues = [c.waited_for for c in self._consumers if c.waited_for is not None]
        if self._paused_until is not None:
            dues.append(self._paused_until)
        timeout = None if not dues else max(0.0, min(dues) - monotonic())
        for key, _ in self._selector.select(timeout if wait else 0):
            if key.fileobj is self._listener:
                self._let_in()
            elif key.data in self._consumers:
                self._hear(key.data)
        now = monotonic()
        for consumer in [c for c in self._consumers if c.waited_for is not None and c.waited_for <= now]:
            self._tell(consumer, {"error": f"nothing was heard for {_PATIENCE_S:g} s"})
            self._forget(consumer)
        if self._paused_until is not None and self._paused_until <= now:
            self._paused_until = None
            self._selector.register(self._listener, selectors.EVENT_READ)

    def _let_in(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError as error:  # the other side may be gone already
            if error.errno in _NO_ROOM:
                self._make_room()
            return
        connection.setblocking(False)
        consumer = _Consumer(Lines(connection), waited_for=monotonic() + _PATIENCE_S)
        self._consumers.append(consumer)
        self._selector.register(connection, selectors.EVENT_READ, consumer)
        if len(self._consumers) > _most_connections():
            self._hang_up(f"there are {_most_connections()} connections, and no more are taken")

    def _hang_up(self, why: str) -> None:
        """Close the connection that has been silent for longest: a consumer greets as soon as it is there."""
        silent = next((consumer for consumer in self._consumers if consumer.state is None), None)
        if silent is not None:
            self._tell(silent, {"error": why})
            self._forget(silent)

    def _make_room(self) -> None:
        """Close a silent connection, and accept none for a moment."""
        self._hang_up("the server can open no more files")
        self._selector.unregister(self._listener)
        self._paused_until = monotonic() + _PAUSE_S

    def _hear(self, consumer: _Consumer) -> None:
        try:
            for message in consumer.lines.receive():
                if consumer.state is None:
                    self._greet(consumer, message)
                else:
                    self._take_back(consumer, message)
            if consumer.state is not None:
                begun = consumer.waited_for or monotonic() + _PATIENCE_S
                consumer.waited_for = begun if consumer.lines.in_midst else None
        except ValueError as error:
            self._tell(consumer, {"error": str(error)})
            self._forget(consumer)
        except OSError:
            self._forget(consumer)

    def _greet(self, consumer: _Consumer, message: Message) -> None:
        if message.get("actcache") != PROTOCOL or type(message.get("process")) is not int:
            raise ValueError(f"this server speaks version {PROTOCOL} of actcache's protocol; use the same actcache")
        consumer.state = self._state if message.get("state") is None else self._parse(message["state"])
        consumer.process, consumer.waited_for = message["process"], None
        loader = self._loader
        address = str(loader.store.objects.location)  # in full, since consumers open the store themselves
        greeting = {
            "actcache": PROTOCOL,
            "store": address if "://" in address else os.path.abspath(address),
            "rows_per_shard": loader.store.spec.rows_per_shard,
            "sites": self._widths,
            "region_bytes": self._shared.region_bytes,
            "dtype": str(loader.dtype).removeprefix("torch."),
            "batch_rows": loader.batch_rows,
            "n_batches": len(loader),
            "epochs": loader.epochs,
            "state": consumer.state,
        }
        self._tell(consumer, greeting, self._shared.descriptor)
        self._say(f"process {consumer.process} has joined; consumers: {len(self._there())}")

    def _parse(self, state: Any) -> State:
        """The state that a consumer brings, which must be one that is still to be served."""
        found = parse_state(state, self._state["fingerprint"], self._loader.store.path)
        check_settings(found["settings"], self._state["settings"])
        parse_place(found, self._loader.plan.n_batches)
        if self._begun and how_far(found) < how_far(self._state):
            raise ValueError(
                f"the state is that of epoch {found['epoch']}, batch {found['batch']}, and the others are past it; "
                "start the server and all consumers again, each with its state, or join without one"
            )
        return {**found, "version": self._state["version"]}

    def _take_back(self, consumer: _Consumer, message: Message) -> None:
        number = message.get("done")
        offered = self._offered.get(number) if type(number) is int else None
        if offered is None or consumer not in offered.readers:
            raise ValueError(f"{shown(number)} is not a batch that this consumer has")
        offered.readers.remove(consumer)
        self._drop_read()
        consumer.n_told -= 1
        self._tell_coming(consumer)

    def _drop_read(self) -> None:
        """Drop batches without readers, which frees their memory for others."""
        self._offered = {number: offered for number, offered in self._offered.items() if offered.readers}

    def _tell_coming(self, consumer: _Consumer) -> None:
        while consumer.coming and consumer.n_told < _MOST_TOLD:
            consumer.n_told += 1
            self._tell(consumer, consumer.coming.popleft())

    def _tell(self, consumer: _Consumer, message: Message, *descriptors: int) -> None:
        try:
            consumer.lines.send(message, *descriptors)
        except OSError:
            self._forget(consumer)

    def _forget(self, consumer: _Consumer) -> None:
        """Close a consumer's connection and stop waiting for it."""
        if consumer not in self._consumers:
            return
        self._consumers.remove(consumer)
        self._selector.unregister(consumer.lines)
        consumer.lines.close()
        for offered in self._offered.values():
            offered.readers.discard(consumer)
        self._drop_read()
        if consumer.state is not None:
            self._say(f"process {consumer.process} has left; consumers: {len(self._there())}")
