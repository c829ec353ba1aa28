"""Our loader as a data module of Lightning, whose checkpoints then hold where the loader is.

In: a `Loader`, or how to make one for a rank. Out: a `LightningDataModule` of `lightning` or `pytorch_lightning`,
whichever the calling program uses. Neither is imported before that.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from actcache.errors import ConfigError

if TYPE_CHECKING:
    from actcache.adapters.torch_data import TorchDataset
    from actcache.load import Loader

MakeLoader = Callable[[int, int], "Loader"]
"""`make(rank, world_size)`: the loader of one process of a run."""
_PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def data_module(
    train: Loader | MakeLoader,
    validation: Loader | MakeLoader | None = None,
    *,
    take: str | Sequence[str] | None = None,
) -> Any:
    """A `LightningDataModule` for `Trainer.fit(model, datamodule=...)`.

    A loader of one epoch makes an epoch of Lightning, and `Trainer(max_epochs=...)` says how many there are.
    Checkpoints hold the state of the training loader, and `Trainer.fit(..., ckpt_path=...)` goes on after the batch at
    which one was saved. Validation sees the same batches every time.

    Args:
        train: the loader. For several processes, a function `(rank, world_size)` that makes each its own.
        validation: another, with rows that training does not see.
        take: what a batch is, see `TorchDataset`.

    Raises:
        ImportError: neither `lightning` nor `pytorch_lightning` is installed.
    """
    hooks = (_Validation, _Training) if validation is not None else (_Training,)
    kind = type("LoaderDataModule", (*hooks, _lightning().LightningDataModule), {})
    module = kind()
    module.train, module.validation, module.take = train, validation, take
    return module


class _Training:
    """What Lightning calls to train."""

    trainer: Any
    train: Loader | MakeLoader
    take: str | Sequence[str] | None
    _batches: _Resumable | None = None
    _restored: Mapping[str, Any] | None = None

    def train_dataloader(self) -> _Resumable:
        """The batches of the training loader, from the restored state on."""
        self._batches = _Resumable(self.dataset(self.train, restart=False))
        if self._restored is not None:
            self._batches.load_state_dict(self._restored)
            self._restored = None
        return self._batches

    def state_dict(self) -> dict[str, Any]:
        """What goes into a checkpoint."""
        return {} if self._batches is None else {"train": self._batches.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """What comes from a checkpoint, before there is a loader."""
        self._restored = state_dict.get("train")

    def dataset(self, source: Loader | MakeLoader, *, restart: bool) -> TorchDataset:
        """The batches of the loader that is meant for this process."""
        from actcache.adapters.torch_data import TorchDataset

        rank, world_size = self.trainer.global_rank, self.trainer.world_size
        loader = source(rank, world_size) if callable(source) else source
        if (loader.rank, loader.world_size) != (rank, world_size):
            raise ConfigError(
                f"this is process {rank} of {world_size}, and its loader is for rank {loader.rank} of "
                f"{loader.world_size}; give data_module a function (rank, world_size) that makes the loader"
            )
        if loader.epochs is None:
            raise ConfigError(
                "Lightning fetches ahead of a loader without an end, and what a checkpoint holds would be behind that; "
                "use Loader(epochs=1) and Trainer(max_epochs=...)"
            )
        return TorchDataset(loader, self.take, restart=restart)


class _Validation(_Training):
    """What it calls to validate, where there is something to validate with."""

    validation: Loader | MakeLoader

    def val_dataloader(self) -> _Batches:
        """The batches of the validation loader, the same each time."""
        return _Batches(self.dataset(self.validation, restart=True))


class _Batches:
    """What Lightning iterates: it has a length, and is nothing that wants workers."""

    def __init__(self, batches: TorchDataset) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class _Resumable(_Batches):
    """Resumable for Lightning itself, too: it keeps this state while it trains, and that of the data module always."""

    def state_dict(self) -> dict[str, Any]:
        return self.batches.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.batches.load_state_dict(state)
        # Lightning counts batches by itself: where an epoch is over it asks for the next, not for an empty rest.
        self.batches.begin_after_the_end()


def _lightning() -> Any:
    """The package that the program uses: one that is imported already, before one that could be."""
    for name in sorted(_PACKAGES, key=lambda name: name not in sys.modules):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name not in (name, name.partition(".")[0]):  # it is there, and lacks something itself
                raise
    raise ImportError("a data module needs Lightning: pip install lightning")
