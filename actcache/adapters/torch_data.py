"""Our loader as a torch dataset, for `DataLoader`, torchdata's `StatefulDataLoader` and whatever is built on them.

In: a `Loader`. Out: an `IterableDataset` of whole batches. The loader reads and decodes in threads of its own, so
worker processes are neither needed nor allowed: each would deliver every batch once more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from torch.utils.data import IterableDataset, get_worker_info

from actcache.errors import ConfigError, SiteError

if TYPE_CHECKING:
    import torch

    from actcache.load import Batch, Loader

_COLUMNS = ("rows", "tokens", "sequences", "positions", "documents")
"""What a batch has beside its sites, `(B,)` each."""


class TorchDataset(IterableDataset[Any]):
    """The batches of a loader, for `DataLoader(dataset, batch_size=None)`.

    Iterating goes on where the loader stands, as iterating the loader does: once over the dataset is `epochs` of its
    epochs, and after a loop that was broken off the rest of them. `state_dict` and `load_state_dict` are the loader's,
    so that torchdata's `StatefulDataLoader` resumes after any batch without making the batches before it again.

    Args:
        loader: what makes the batches; its batch_rows, device, dtype, rank, read_ahead and threads hold.
        take: what a batch is. None: a dict of all sites and "rows". One name: that `(B, D)` tensor. Several names: a
            tuple of tensors in that order. Beside sites, "rows", "tokens", "sequences", "positions" and "documents".
        restart: begin every iteration where the loader stands now: for validation, which is to see the same each time.

    Raises:
        SiteError: a name is neither a site of the loader nor one of those.
    """

    def __init__(self, loader: Loader, take: str | Sequence[str] | None = None, *, restart: bool = False) -> None:
        super().__init__()
        self.loader = loader
        self._start = loader.state_dict() if restart else None
        self._passes_over_the_end = False
        self.take = take if take is None or isinstance(take, str) else tuple(take)
        for name in (self.take,) if isinstance(self.take, str) else self.take or ():
            if name not in loader.sites and name not in _COLUMNS:
                raise SiteError(
                    f"no {name!r} in the loader's batches; there are {', '.join([*loader.sites, *_COLUMNS])}"
                )

    def __iter__(self) -> Iterator[Any]:
        # Asked here and not in the first `next`, so that a worker process reports it before it takes anything.
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
        # A loop that counts may have taken the last batch and never asked whether there is another. The epochs are over
        # all the same, and the next loop is for the next ones.
        if nothing_left and self._passes_over_the_end:
            yield from map(self._taken, self.loader)

    def __len__(self) -> int:
        """Batches of all epochs; TypeError of a loader that goes on for ever, as of any iterable without an end."""
        if self.loader.epochs is None:
            raise TypeError("a loader with epochs=None goes on for ever and has no length")
        return len(self.loader) * self.loader.epochs

    def __reduce__(self) -> NoReturn:
        # Where workers are spawned and not forked, the dataset would be pickled for them.
        raise _no_workers("a dataset of a loader was to be sent to another process")

    def state_dict(self) -> dict[str, Any]:
        """Where the loader is, after the batch delivered last: see `Loader.state_dict`."""
        return self.loader.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the batch at which `state` was taken: see `Loader.load_state_dict`.

        After the last batch of the epochs, what is left of them is nothing, and the iteration that follows is empty.
        """
        self.loader.load_state_dict(state)
        self._passes_over_the_end = False

    def begin_after_the_end(self) -> None:
        """From a state after the last batch of the epochs, begin the next ones instead of an empty rest."""
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
        f"{asked}, and every worker process would deliver all batches once more, out of order; use num_workers=0: the "
        "loader reads in threads of its own, as many as Loader(threads=...) says"
    )
