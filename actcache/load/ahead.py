"""A thread that makes items in advance, a bounded number of them."""

from __future__ import annotations

import atexit
import os
import queue
import threading
from collections.abc import Generator, Iterator
from time import perf_counter
from typing import Generic, TypeVar

from actcache.errors import ConfigError
from actcache.load.speed import Clock

Item = TypeVar("Item")


class ReadAhead(Generic[Item]):
    """Runs a generator in a thread; iterating gives its items, and raises what it raised.

    With `n_ahead=0` there is no thread: each item is made when it is asked for.

    Only `SimpleQueue` is used, whose operations are one step of the interpreter: an interrupt within another kind of
    queue would leave it locked, with both threads waiting.
    """

    def __init__(self, production: Generator[Item], n_ahead: int, clock: Clock) -> None:
        self._items: queue.SimpleQueue[Item | BaseException | None] = queue.SimpleQueue()
        self._room: queue.SimpleQueue[None] = queue.SimpleQueue()
        """One entry for each further item that may be made."""
        self._production = production
        self._making = threading.Lock()
        self._stopping = threading.Event()
        self._clock = clock
        self._process = os.getpid()
        self._thread: threading.Thread | None = None
        if n_ahead:
            for _ in range(n_ahead):
                self._room.put(None)
            self._thread = threading.Thread(target=self._run, name="actcache-read-ahead", daemon=True)
            self._thread.start()
        # A daemon thread that is still running when the process ends is killed; inside torch, that aborts the process.
        atexit.register(self.stop)

    def _run(self) -> None:
        last: BaseException | None = None
        try:
            for item in self._production:
                if not self._put(item):
                    return
        except BaseException as error:
            last = error
        finally:
            self._production.close()
        self._put(last)

    def _put(self, item: Item | BaseException | None) -> bool:
        """Queue an item as soon as there is room; False if the consumer has stopped."""
        self._room.get()
        if not self._stopping.is_set():
            self._items.put(item)
        return not self._stopping.is_set()

    def _take(self) -> Item | BaseException | None:
        """The next item, as soon as there is one; None at the end."""
        if self._thread is not None:
            item = self._items.get()
            self._room.put(None)
            return item
        with self._making:
            return next(self._production, None)

    def __iter__(self) -> Iterator[Item]:
        while True:
            check_process(self._process)
            began = perf_counter()
            item = self._take()
            if item is not None:  # the end is no batch; without this, waits could exceed the time to the last batch
                self._clock.add("wait", perf_counter() - began)
            if self._stopping.is_set():
                raise ConfigError(
                    "this iteration is over: the loader was closed, moved to a state, or iterated again meanwhile; "
                    "make a separate loader for each use"
                )
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item

    def stop(self) -> None:
        """End the thread and drop what it prefetched."""
        atexit.unregister(self.stop)
        if os.getpid() != self._process:
            return  # the thread belongs to another process, and may hold a lock that is never released here
        self._stopping.set()
        if self._thread is None:
            with self._making:
                self._production.close()
            return
        self._room.put(None)  # wakes the thread if it waits
        self._thread.join()
        while not self._items.empty():
            self._items.get_nowait()
        self._items.put(StopIteration())  # wakes a consumer that still waits for an item


def check_process(made_in: int) -> None:
    """Raise `ConfigError` in a fork of the process in which a loader was made."""
    if os.getpid() != made_in:
        raise ConfigError(
            "a loader belongs to the process that made it: its threads were not copied when this process was forked; "
            "make the loader here, where it is used"
        )
