"""A thread that makes batches a bounded number ahead of whoever takes them."""

from __future__ import annotations

import atexit
import os
import queue
import threading
import weakref
from collections.abc import Generator, Iterator
from time import perf_counter
from typing import Any, Generic, TypeVar

from actcache.errors import ConfigError
from actcache.load.speed import Clock

Item = TypeVar("Item")
_running: weakref.WeakSet[ReadAhead[Any]] = weakref.WeakSet()


os.register_at_fork(after_in_child=_running.clear)  # their threads stay behind in the parent


@atexit.register
def _stop_all() -> None:
    """Before the interpreter goes: a thread that it ends within torch's code takes the whole process down."""
    for running in list(_running):
        running.stop()


class ReadAhead(Generic[Item]):
    """Runs a production in a thread of its own; iterating gives its items, and raises what it raised."""

    def __init__(self, production: Generator[Item], n_ahead: int, clock: Clock) -> None:
        self._queue: queue.Queue[Item | BaseException | None] = queue.Queue(n_ahead)
        self._stopping, self._clock = threading.Event(), clock
        self._production = production
        self._thread = threading.Thread(target=self._run, name="actcache-read-ahead", daemon=True)
        _running.add(self)
        self._thread.start()

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
        """Queue an item; False when the consumer has gone."""
        while not self._stopping.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self) -> Iterator[Item]:
        while True:
            began = perf_counter()
            item = self._queue.get()
            self._clock.add("wait", perf_counter() - began)
            if item is None:
                return
            if self._stopping.is_set():
                raise ConfigError(
                    "this iteration is over: the loader was closed, moved to a state, or iterated again meanwhile; "
                    "make a loader of its own for each use"
                )
            if isinstance(item, BaseException):
                raise item
            yield item

    def stop(self) -> None:
        """End the thread and drop what it prefetched."""
        self._stopping.set()
        self._thread.join()
        while not self._queue.empty():
            self._queue.get_nowait()
        self._queue.put_nowait(StopIteration())  # whoever still waits for a batch wakes up
