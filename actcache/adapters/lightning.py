"""Our loader as a data module of Lightning, whose checkpoints include the loader's state.

In: a `Loader`, or a function that makes one for a rank. Out: a `LightningDataModule` of `lightning` or
`pytorch_lightning`, whichever the calling program uses. Neither is imported before that.
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

    A loader of one epoch makes one epoch of Lightning; `Trainer(max_epochs=...)` says how many there are. Checkpoints
    hold the state of the training loader, and `Trainer.fit(..., ckpt_path=...)` continues after the batch at which one
    was saved. Validation sees the same batches every time.

    Args:
        train: the loader. For several processes, a function `(rank, world_size)` that makes the loader of each.
        validation: another loader, with rows that training does not see.
        take: what a batch is; see `TorchDataset`.

    Raises:
        ImportError: neither `lightning` nor `pytorch_lightning` is installed.
    """
    hooks = (_Validation, _Training) if validation is not None else (_Training,)
    kind = type("LoaderDataModule", (*hooks, _lightning().LightningDataModule), {})
    module = kind()
    module.train, module.validation, module.take = train, validation, take
    return module


class _Training:
    """The hooks that Lightning calls to train."""

    trainer: Any
    train: Loader | MakeLoader
    take: str | Sequence[str] | None
    _batches: _TrainingBatches | None = None
    _restored: Mapping[str, Any] | None = None

    def train_dataloader(self) -> _TrainingBatches:
        """The batches of the training loader, from the restored state on."""
        self._batches = _TrainingBatches(self.dataset(self.train, restart=False))
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
        """The batches of this process's loader."""
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
                "Lightning fetches ahead of an endless loader, so a checkpoint's state would be ahead of the training; "
                "use Loader(epochs=1) and Trainer(max_epochs=...)"
            )
        return TorchDataset(loader, self.take, restart=restart)


class _Validation(_Training):
    """The hook that it calls to validate, if there is a validation loader."""

    validation: Loader | MakeLoader

    def val_dataloader(self) -> _Batches:
        """The batches of the validation loader, the same each time."""
        return _Batches(self.dataset(self.validation, restart=True))


class _Batches:
    """What Lightning iterates: it has a length, and is not a `DataLoader`, for which Lightning suggests workers."""

    def __init__(self, batches: TorchDataset) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class _TrainingBatches(_Batches):
    """Batches whose state Lightning keeps while it trains; that of the data module it keeps always."""

    def state_dict(self) -> dict[str, Any]:
        return self.batches.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.batches.load_state_dict(state)
        # Lightning counts batches itself: after the end of an epoch it asks for the next one, not for an empty rest.
        self.batches.begin_after_the_end()


def _lightning() -> Any:
    """The package that the program uses: an imported one if there is one, otherwise an installed one."""
    for name in sorted(_PACKAGES, key=lambda name: name not in sys.modules):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name not in (name, name.partition(".")[0]):  # installed, but one of its own imports is missing
                raise
    raise ImportError("a data module needs Lightning: pip install lightning")
