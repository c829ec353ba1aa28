"""What adapters of a loader have in common: their state is the loader's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from actcache.load import Batch, Loader


class Resumable:
    """An adapter whose state is that of its loader, after the batch that was handed out last."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def state_dict(self) -> dict[str, Any]:
        """Where the loader is, JSON-able: see `Loader.state_dict`."""
        return self.loader.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the batch at which `state` was taken; raises as `Loader.load_state_dict` does."""
        self.loader.load_state_dict(state)

    def close(self) -> None:
        """Stop reading ahead."""
        self.loader.close()


class Repeatable(Resumable):
    """An adapter whose passes all begin at the same place: where the loader was, or at the state loaded last."""

    def __init__(self, loader: Loader) -> None:
        super().__init__(loader)
        self._start = loader.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Begin every pass after the batch at which `state` was taken; raises as `Loader.load_state_dict` does."""
        super().load_state_dict(state)
        self._start = self.loader.state_dict()

    def _pass(self) -> Iterator[Batch]:
        """The batches from the start on; the loader's state is that of the batches drawn, and of no more."""
        self.loader.load_state_dict(self._start)
        return iter(self.loader)
