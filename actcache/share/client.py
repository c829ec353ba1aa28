"""A consumer in another process: it takes a server's batches, copied out of shared memory.

In: the path of the server's socket. Out: batches, as of a `Loader`.
"""

from __future__ import annotations

import json
import os
import socket
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from actcache.errors import ActcacheError, ConfigError, ServingError, StateError
from actcache.files import path_of, shown
from actcache.load import Batch
from actcache.load.arguments import device_of, dtype_of
from actcache.load.batches.origin import ShardTables, look_up
from actcache.load.state import State
from actcache.share.copies import Copies
from actcache.share.messages import PROTOCOL, Lines, Message
from actcache.share.shared_memory import MappedMemory
from actcache.spec import expand_names

if TYPE_CHECKING:
    import torch

_TRY_EVERY_S = 0.05


class ServedBatches(Iterator[Batch]):
    """The batches of a server's loader; each is this consumer's own copy.

    It ends where the server's loader ends. The server waits for every consumer: close this one when it is done, or use
    it as a context manager. The end of the process, however it comes, closes it too. `batch.tokens` and the other
    columns are read from the store by this process.

    Args:
        path: of the server's socket (`serve_batches`, `actcache serve`).
        sites: hook names or glob patterns of the sites that this consumer wants; other sites cost it nothing.
        dtype: of the batches' tensors; float32 by default, as for a `Loader`.
        device: of the batches' tensors.
        state: a `state_dict()` of this class, or of a loader with the same settings; continues after that batch.
        wait_s: how many seconds to wait for the server to start.

    Raises:
        ServingError: there is no server, or it refuses this consumer, for instance because of its state; while
        iterating: the server has died, or its loader has failed. SiteError: a pattern matches no site. StateError:
        `state` is not the state of a loader.

    Examples:
        >>> import threading
        >>> loader = ac.Loader(store, [site_out], batch_rows=512)
        >>> server = threading.Thread(target=ac.serve_batches, args=(loader, "trainers.sock", 1))
        >>> server.start()
        >>> with ac.ServedBatches("trainers.sock", dtype=torch.float32) as batches:
        ...     print([tuple(batch[site_out].shape) for batch in batches])
        [(512, 128), (512, 128), (512, 128), (512, 128), (512, 128), (512, 128), (512, 128)]
        >>> server.join()
    """

    def __init__(
        self,
        path: str | Path,
        *,
        sites: Sequence[str] = ("*",),
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        state: State | None = None,
        wait_s: float = 60.0,
    ) -> None:
        who = "served batches"
        if not isinstance(wait_s, int | float) or isinstance(wait_s, bool) or not wait_s >= 0:
            raise ConfigError(f"{who}: wait_s must be a number of seconds from 0 on, got {shown(wait_s)}")
        self._copies = Copies(dtype_of(who, dtype), device_of(who, device))
        self._path = path_of(path, f"{who}: path")
        self._messages = deque[Message]()
        self._ended = False
        introduction = _introduction(state)
        self._lines = Lines(_connect(self._path, wait_s))
        try:
            greeting, descriptor = self._introduce(introduction)
            self._take(greeting, descriptor)
            self.sites = expand_names(sites, list(self._widths))
        except ActcacheError:
            self.close()
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise self._unexpected(error) from error

    def _take(self, greeting: Message, descriptor: int) -> None:
        """Keep what the server says about itself."""
        import torch

        self._memory = MappedMemory(descriptor, greeting["region_bytes"])
        self.batch_rows: int = greeting["batch_rows"]
        self.epochs: int | None = greeting["epochs"]
        self._n_batches: int = greeting["n_batches"]
        self._state: State = greeting["state"]
        self._rows_per_shard: int = greeting["rows_per_shard"]
        self._tables = cache(partial(_tables_of, greeting["store"]))
        self._widths, self._served_as = greeting["sites"], getattr(torch, greeting["dtype"])

    def __len__(self) -> int:
        """Batches of an epoch."""
        return self._n_batches

    def __next__(self) -> Batch:
        import torch

        message: Message = {"end": True} if self._ended else self._hear()
        if "end" in message:
            self.close()
            raise StopIteration
        n_rows = message["n_rows"]
        try:
            rows = self._memory.tensor(message["rows"], (n_rows,), torch.int64).clone()
            own = {
                site: self._copies(self._memory.tensor(offset, (n_rows, width), self._served_as))
                for (site, width), offset in zip(self._widths.items(), message["sites"], strict=True)
                if site in self.sites
            }
        except (OSError, ValueError) as error:
            raise self._unexpected(error) from error
        finally:
            self._give_back(message["batch"])
        self._state = {**self._state, **message["place"]}
        return Batch(own, rows, [(_Origin(self._tables, self._rows_per_shard, rows.numpy().copy()), np.arange(n_rows))])

    def state_dict(self) -> dict[str, Any]:
        """The state of the server's loader after this consumer's last batch, as from `Loader.state_dict`."""
        return dict(self._state)

    def close(self) -> None:
        """Take no more batches; other consumers continue."""
        self._ended = True
        self._lines.close()

    def __enter__(self) -> ServedBatches:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _introduce(self, introduction: Message) -> tuple[Message, int]:
        """Greet the server; its greeting, and the descriptor of its memory."""
        try:
            self._lines.send(introduction)
            messages, descriptors = self._lines.receive_descriptor()
        except OSError as error:
            raise self._gone() from error
        self._messages.extend(messages)
        greeting = self._hear()
        if not descriptors:
            raise self._gone()
        return greeting, descriptors[0]

    def _hear(self) -> Message:
        """The next message of the server, unless that is an error."""
        try:
            while not self._messages:
                self._messages.extend(self._lines.receive())
        except ValueError as error:
            raise self._unexpected(error) from error
        except OSError as error:
            raise self._gone() from error
        message = self._messages.popleft()
        if "error" in message:
            self.close()
            raise ServingError(f"the server at {self._path} says: {message['error']}")
        return message

    def _give_back(self, number: int) -> None:
        with suppress(OSError):  # this batch is complete; if the server has died, the next one says so
            self._lines.send({"done": number})

    def _unexpected(self, error: Exception) -> ServingError:
        self.close()
        return ServingError(
            f"what listens at {self._path} is no server of this actcache ({error}); use the same actcache there"
        )

    def _gone(self) -> ServingError:
        self.close()
        return ServingError(
            f"the server at {self._path} is gone, without a message; start it again, and continue with "
            "ServedBatches(path, state=...), where the state is this consumer's state_dict()"
        )


def _introduction(state: State | None) -> Message:
    """A consumer's first message."""
    message: Message = {"actcache": PROTOCOL, "process": os.getpid(), "state": state}
    try:
        if state is not None and not isinstance(state, Mapping):
            raise TypeError("it must be a mapping")
        json.dumps(message)
    except (TypeError, ValueError, RecursionError) as error:
        reason = f"this is no state of a loader: {shown(state)} ({error}); give one that state_dict() returned"
        raise StateError(reason) from error
    return message


@dataclass(frozen=True, slots=True)
class _Origin:
    """Where the rows of a batch come from; it needs the store, but not the connection."""

    tables: Callable[[], ShardTables]
    rows_per_shard: int
    rows: NDArray[np.int64]

    def column(self, name: str) -> NDArray[np.int64]:
        return look_up(self.tables(), self.rows_per_shard, self.rows, name)


def _tables_of(path: str) -> ShardTables:
    from actcache.store import open_store

    return ShardTables(open_store(path))


def _connect(path: Path, wait_s: float) -> socket.socket:
    """A connection to the server at a path; waits for one that is starting."""
    last = monotonic() + wait_s
    connection = socket.socket(socket.AF_UNIX)
    while True:
        try:
            connection.settimeout(_TRY_EVERY_S)  # a server may be too busy to accept: try again
            connection.connect(str(path))
            connection.settimeout(None)
            return connection
        except (FileNotFoundError, ConnectionRefusedError, BlockingIOError, TimeoutError) as error:
            wrong: OSError = error
        except OSError as error:
            last, wrong = 0.0, error
        if monotonic() >= last:
            connection.close()
            raise ServingError(
                f"no server at {path} ({wrong}); start one with 'actcache serve --socket {path}'"
            ) from wrong
        sleep(_TRY_EVERY_S)
