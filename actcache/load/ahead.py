"""A thread that makes batches a bounded number ahead of whoever takes them."""

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
    """Runs a production in a thread of its own; iterating gives its items, and raises what it raised.

    With `n_ahead` 0 there is no such thread: each item is made when it is asked for.

    Of queues only those that are one step of the interpreter are used: an interrupt in the midst of others leaves them
    locked, and both threads waiting.
    """

    def __init__(self, production: Generator[Item], n_ahead: int, clock: Clock) -> None:
        self._items: queue.SimpleQueue[Item | BaseException | None] = queue.SimpleQueue()
        self._room: queue.SimpleQueue[None] = queue.SimpleQueue()
        """As many as there may be more items."""
        self._stopping, self._clock = threading.Event(), clock
        self._production, self._process, self._making = production, os.getpid(), threading.Lock()
        self._thread: threading.Thread | None = None
        if n_ahead:
            for _ in range(n_ahead):
                self._room.put(None)
            self._thread = threading.Thread(target=self._run, name="actcache-read-ahead", daemon=True)
            self._thread.start()
        # Daemon threads that are left when a process ends are killed where they are; within torch, that aborts it.
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
        """Queue an item, when there is room; False when the consumer has gone."""
        self._room.get()
        if not self._stopping.is_set():
            self._items.put(item)
        return not self._stopping.is_set()

    def _take(self) -> Item | BaseException | None:
        """The next item, when there is one."""
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
                    "make a loader of its own for each use"
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
            return  # the thread is another process's, and a lock may be held by it for ever
        self._stopping.set()
        if self._thread is None:
            with self._making:
                self._production.close()
            return
        self._room.put(None)  # it wakes up if it waits
        self._thread.join()
        while not self._items.empty():
            self._items.get_nowait()
        self._items.put(StopIteration())  # whoever still waits for a batch wakes up


def check_process(made_in: int) -> None:
    """Raise `ConfigError` in a process that is a fork of the one in which a loader was made."""
    if os.getpid() != made_in:
        raise ConfigError(
            "a loader belongs to the process that made it: its threads did not follow when this one was forked; "
            "make the loader here, where it is used"
        )
