"""Our loader as a torch dataset, for `DataLoader`, torchdata's `StatefulDataLoader` and what is built on them.

In: a `Loader`. Out: an `IterableDataset` of whole batches. The loader has its own threads to read and decode, so worker
processes are not needed. They are not allowed either: each would deliver all batches again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from torch.utils.data import IterableDataset, get_worker_info

from actcache.adapters.resumable import Resumable
from actcache.errors import ConfigError, SiteError

if TYPE_CHECKING:
    import torch

    from actcache.load import Batch, Loader

_COLUMNS = ("rows", "tokens", "sequences", "positions", "documents")
"""What a batch has besides its sites, `(B,)` each."""


class TorchDataset(Resumable, IterableDataset[Any]):
    """The batches of a loader, for `DataLoader(dataset, batch_size=None)`.

    Iterating continues where the loader is, as iterating the loader does: one loop over the dataset is `epochs` of its
    epochs, and after a loop that was left early, the rest of them. `state_dict` and `load_state_dict` are the loader's,
    so torchdata's `StatefulDataLoader` resumes after any batch without making the batches before it again.

    Args:
        loader: makes the batches; its batch_rows, device, dtype, rank, read_ahead and threads apply.
        take: what a batch is. None: a dict of all sites and "rows". One name: that `(B, D)` tensor. Several names: a
            tuple of tensors in that order. Besides sites, names are "rows", "tokens", "sequences", "positions" and
            "documents".
        restart: begin every iteration where the loader is now: for validation, which should see the same each time.

    Raises:
        SiteError: a name is neither a site of the loader nor one of those.
    """

    def __init__(self, loader: Loader, take: str | Sequence[str] | None = None, *, restart: bool = False) -> None:
        super().__init__(loader)
        self._start = loader.state_dict() if restart else None
        self._passes_over_the_end = False
        self.take = take if take is None or isinstance(take, str) else tuple(take)
        for name in (self.take,) if isinstance(self.take, str) else self.take or ():
            if name not in loader.sites and name not in _COLUMNS:
                raise SiteError(
                    f"no {name!r} in the loader's batches; there are {', '.join([*loader.sites, *_COLUMNS])}"
                )

    def __iter__(self) -> Iterator[Any]:
        # Checked here and not in the first `next`, so that a worker process reports it before it takes a batch.
        worker = get_worker_info()
        if worker is not None:
            raise _no_workers(f"num_workers={worker.num_workers} was asked for")
        return self._batches()

    def _batches(self) -> Iterator[Any]:
        if self._start is not None:
            self.loader.load_state_dict(self._start)
        nothing_left = True
        for batch in self.loader:
            nothing_left, self._passes_over_the_end = False, True
            yield self._taken(batch)
        # A loop that counts batches may have taken the last one without asking for another. The epochs are over all the
        # same, and the next loop is for the next ones.
        if nothing_left and self._passes_over_the_end:
            yield from map(self._taken, self.loader)

    def __len__(self) -> int:
        """Batches of all epochs. A loader without an end has no length: TypeError, as for other endless iterables."""
        if self.loader.epochs is None:
            raise TypeError("a loader with epochs=None has no end and no length")
        return len(self.loader) * self.loader.epochs

    def __reduce__(self) -> NoReturn:
        # The dataset would be pickled for workers that are spawned, not forked.
        raise _no_workers("a dataset of a loader was about to be sent to another process")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the batch at which `state` was taken: see `Loader.load_state_dict`.

        After the last batch of the epochs nothing is left of them, so the next iteration is empty.
        """
        super().load_state_dict(state)
        self._passes_over_the_end = False

    def begin_after_the_end(self) -> None:
        """After a state at the end of the epochs, begin the next ones instead of an empty iteration."""
        self._passes_over_the_end = True

    def _taken(self, batch: Batch) -> Any:
        if self.take is None:
            return {**batch, "rows": batch.rows}
        if isinstance(self.take, str):
            return _part(batch, self.take)
        return tuple(_part(batch, name) for name in self.take)


def _part(batch: Batch, name: str) -> torch.Tensor:
    part: torch.Tensor = batch[name] if name in batch else getattr(batch, name)
    return part


def _no_workers(asked: str) -> ConfigError:
    return ConfigError(
        f"{asked}, and every worker process would deliver all batches again, out of order; use num_workers=0: the "
        "loader reads in its own threads, as many as Loader(threads=...) says"
    )
