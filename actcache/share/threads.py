"""One loader for several threads of a process.

In: a loader. Out: an iterator for each thread, which gives every batch.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from actcache.errors import ConfigError, StateError
from actcache.files import shown
from actcache.load import Batch, Loader, MixedLoader
from actcache.load.arguments import check_switch, dtype_of
from actcache.load.state import State, how_far
from actcache.share.copies import Copies
from actcache.spec import check_positive, expand_names

if TYPE_CHECKING:
    import torch

_LOOK_EVERY_S = 0.5
"""How often a full queue checks that the threads it waits for are alive."""


def share_batches(
    loader: Loader | MixedLoader,
    n_consumers: int,
    *,
    batches_ahead: int = 4,
    sites: Sequence[Sequence[str]] | None = None,
    dtype: torch.dtype | None = None,
    copy: bool = True,
    states: Sequence[State | None] | None = None,
) -> list[SharedBatches]:
    """A loader's batches for several threads: each consumer gets all of them, in the same order.

    A consumer that is `batches_ahead` batches ahead of the slowest one waits for it, so take from each consumer in its
    own thread, or from all in turn. A consumer that is closed or garbage collected, or whose thread has ended, no
    longer holds up the others. An error of the loader reaches every consumer. Reading begins at once; when all
    consumers are gone, the loader is closed.

    Args:
        loader: reads the batches; use it only through the consumers from now on.
        n_consumers: how many.
        batches_ahead: batches that are kept for slower consumers.
        sites: for each consumer the names or patterns of the sites that it gets; None for all.
        dtype: of the consumers' tensors; None for the loader's. The cost of a consumer is its copy of each batch: from
            bfloat16 to float32 is cheaper than from float32.
        copy: give each consumer its own tensors. False: all get the same tensors, which they must not modify.
        states: for each consumer the state after which to continue; None for where the loader is. Reading begins at
            the earliest state, and each consumer gets its first batch when its turn comes.

    Raises:
        ConfigError: an argument is invalid. SiteError: a pattern matches no site. StateError: a state does not belong
        to this loader.

    Examples:
        >>> first, second = ac.share_batches(ac.Loader(store, [site_out], batch_rows=512), 2)
        >>> pairs = zip(first, second, strict=True)  # usually each in a thread of its own
        >>> [torch.equal(one[site_out], other[site_out]) for one, other in pairs]
        [True, True, True, True, True, True, True]
    """
    check_positive("share_batches", n_consumers=n_consumers, batches_ahead=batches_ahead)
    if not isinstance(loader, Loader | MixedLoader):
        raise ConfigError(f"share_batches: loader must be a Loader or a MixedLoader, got {shown(loader)}")
    dtype, copy = dtype and dtype_of("share_batches", dtype), check_switch("share_batches", "copy", copy)
    for name, given in {"sites": sites, "states": states}.items():
        if given is not None and (isinstance(given, str) or not isinstance(given, Sequence)):
            raise ConfigError(f"share_batches: {name} must be a list with one for each consumer, got {shown(given)}")
        if given is not None and len(given) != n_consumers:
            raise ConfigError(f"share_batches: {n_consumers} consumers and {len(given)} {name}; give one for each")
    if not copy and dtype is not None:
        raise ConfigError("share_batches: without copy the tensors are the loader's; make the loader with that dtype")
    names = [expand_names(wanted, loader.sites) for wanted in sites or [["*"]] * n_consumers]
    begun = _move_to_earliest(loader, states or [None] * n_consumers)
    queue = _Queue(loader, n_consumers, batches_ahead)
    return [
        SharedBatches(queue, number, wanted, state, Copies(dtype) if copy else None)
        for number, (wanted, state) in enumerate(zip(names, begun, strict=True))
    ]


def _move_to_earliest(loader: Loader | MixedLoader, states: Sequence[State | None]) -> list[State]:
    """Move the loader to the earliest state; the state of each consumer before its first batch."""
    here = loader.state_dict()
    try:
        for state in states:
            if state is not None:
                loader.load_state_dict(state)
    except StateError:
        loader.load_state_dict(here)
        raise
    begun = [here if state is None else state for state in states]
    loader.load_state_dict(min(begun, key=how_far))
    return begun


class SharedBatches(Iterator[Batch]):
    """One consumer's batches of a shared loader; made by `share_batches`.

    It ends where the loader's epochs end. It is also a context manager that closes it.
    """

    def __init__(self, queue: _Queue, number: int, sites: list[str], state: State, copies: Copies | None) -> None:
        self.sites = sites
        """The sites of each batch."""
        self._queue = queue
        self._number = number
        self._state = state
        self._copies = copies
        self._leave = weakref.finalize(self, queue.leave, number)
        self._leave.atexit = False

    def __next__(self) -> Batch:
        batch, state = self._queue.take(self._number)
        while how_far(state) <= how_far(self._state):
            batch, state = self._queue.take(self._number)
        copies = self._copies or (lambda tensor: tensor)
        rows = batch.rows.clone() if self._copies else batch.rows
        own = batch.with_tensors({site: copies(batch[site]) for site in self.sites}, rows)
        self._state = state
        return own

    def state_dict(self) -> dict[str, Any]:
        """The loader's state after this consumer's last batch, as from `Loader.state_dict`."""
        return dict(self._state)

    def close(self) -> None:
        """Take no more batches; other consumers continue."""
        self._leave()

    def __enter__(self) -> SharedBatches:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _Queue:
    """Batches, each kept until every consumer has taken it; a thread fills the queue."""

    def __init__(self, loader: Loader | MixedLoader, n_consumers: int, most: int) -> None:
        self._loader, self._most = loader, most
        self._changed = threading.Condition()
        self._kept: deque[tuple[Batch, State]] = deque()
        self._n_dropped = 0
        self._taken = dict.fromkeys(range(n_consumers), 0)
        """How many batches each present consumer has taken."""
        self._takers: dict[int, threading.Thread] = {}
        self._ended = False
        self._error: BaseException | None = None
        threading.Thread(target=self._fill, name="actcache-share", daemon=True).start()

    def take(self, consumer: int) -> tuple[Batch, State]:
        """The next batch of a consumer, as soon as there is one, and the state after it."""
        with self._changed:
            self._takers[consumer] = threading.current_thread()
            self._changed.wait_for(lambda: self._ended or self._n_kept(consumer) != 0)
            n_kept = self._n_kept(consumer)
            if n_kept is None:
                raise ConfigError(
                    "these batches were closed, or the thread that took from them had ended; each consumer needs one "
                    "thread for as long as it takes batches"
                )
            if not n_kept:
                raise StopIteration if self._error is None else self._error
            self._taken[consumer] += 1
            self._changed.notify_all()
            return self._kept[-n_kept]

    def leave(self, consumer: int) -> None:
        """Forget a consumer. May be called while the lock is held: garbage collection can come at any moment."""
        with self._changed:
            self._taken.pop(consumer, None)
            self._changed.notify_all()

    def _n_kept(self, consumer: int) -> int | None:
        """How many batches are ready for a consumer; None for one that has left."""
        taken = self._taken.get(consumer)
        return None if taken is None else self._n_dropped + len(self._kept) - taken

    def _fill(self) -> None:
        try:
            for batch in self._loader:
                if not self._put(batch, self._loader.state_dict()):
                    break
        except BaseException as error:
            self._error = error
        finally:
            self._loader.close()
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _put(self, batch: Batch, state: State) -> bool:
        """Keep a batch, as soon as there is room; False if no consumer is left."""
        with self._changed:
            while not self._has_room():
                self._changed.wait(_LOOK_EVERY_S)
                for consumer in [c for c, thread in list(self._takers.items()) if not thread.is_alive()]:
                    self.leave(consumer)
            self._kept.append((batch, state))
            self._changed.notify_all()
            return bool(self._taken)

    def _has_room(self) -> bool:
        """Drop what every consumer has taken; whether there is room for another batch."""
        slowest = min(list(self._taken.values()), default=None)
        while self._kept and (slowest is None or self._n_dropped < slowest):
            self._kept.popleft()
            self._n_dropped += 1
        return len(self._kept) < self._most
