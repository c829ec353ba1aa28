"""What a loader hands out: aligned rows of several sites, which know where they come from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch


class Origin(Protocol):
    """Where some rows come from."""

    def column(self, name: str) -> NDArray[np.int64]:
        """One of `tokens`, `sequences`, `positions`, `documents`, for all of these rows."""


class Batch(Mapping[str, "torch.Tensor"]):
    """Rows of several sites, aligned: `batch[site][i]` belongs to global row `batch.rows[i]` for every site.

    The tensors are the caller's own: they may be kept, and modified in place. `tokens`, `sequences`, `positions` and
    `documents` are read from the store when they are first asked for.
    """

    def __init__(
        self,
        activations: dict[str, torch.Tensor],
        rows: torch.Tensor,
        origins: Sequence[tuple[Origin, NDArray[np.int64]]] = (),
        source: int = 0,
    ) -> None:
        self.activations = activations
        """`(B, D)` by site."""
        self.rows = rows
        """`(B,)` int64 global row ids, on the CPU."""
        self.source = source
        """The number of the loader in a `MixedLoader` that made it."""
        self._origins = origins
        self._columns: dict[str, torch.Tensor] = {}

    def with_tensors(self, activations: dict[str, torch.Tensor], rows: torch.Tensor) -> Batch:
        """The same rows in other tensors, with the same knowledge of where they come from."""
        return Batch(activations, rows, self._origins, self.source)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{site}: {tuple(acts.shape)}" for site, acts in self.activations.items())
        return f"Batch({shapes})"

    def __getitem__(self, site: str) -> torch.Tensor:
        return self.activations[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self.activations)

    def __len__(self) -> int:
        return len(self.activations)

    @property
    def tokens(self) -> torch.Tensor:
        """`(B,)` int64 token id of each row, on the CPU."""
        return self._column("tokens")

    @property
    def sequences(self) -> torch.Tensor:
        """`(B,)` int64 number of the sequence of each row, on the CPU."""
        return self._column("sequences")

    @property
    def positions(self) -> torch.Tensor:
        """`(B,)` int64 position of each row in its sequence, on the CPU."""
        return self._column("positions")

    @property
    def documents(self) -> torch.Tensor:
        """`(B,)` int64 number of the document of each row, on the CPU."""
        return self._column("documents")

    def _column(self, name: str) -> torch.Tensor:
        import torch

        if name not in self._columns:
            parts = [origin.column(name)[places] for origin, places in self._origins]
            self._columns[name] = torch.from_numpy(np.concatenate([np.empty(0, np.int64), *parts]))
        return self._columns[name]
