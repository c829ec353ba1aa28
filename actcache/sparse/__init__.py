"""Sparse MLPs: the model, its objective, training, checkpoints, evaluation, and runs over the sites of a store."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from actcache.sparse.evaluation import reconstruction as reconstruction
    from actcache.sparse.evaluation import spliced_loss as spliced_loss
    from actcache.sparse.model import SparseMLP as SparseMLP
    from actcache.sparse.training import TrainConfig as TrainConfig
    from actcache.sparse.training import Trainer as Trainer

_FILES = {
    "SparseMLP": "model",
    "TrainConfig": "training",
    "Trainer": "training",
    "reconstruction": "evaluation",
    "spliced_loss": "evaluation",
}
__all__ = ["SparseMLP", "TrainConfig", "Trainer", "reconstruction", "spliced_loss"]


def __getattr__(name: str) -> Any:
    # torch loads with the first of these names, so that reading the record of a run does without it.
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_FILES[name]}"), name)
