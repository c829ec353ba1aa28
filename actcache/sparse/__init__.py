"""Sparse MLPs: the model, its objective, training, checkpoints, evaluation, and runs over the sites of a store."""

from __future__ import annotations

from typing import TYPE_CHECKING

from actcache._lazy import import_when_used

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


# torch loads with the first of these names, so that reading the record of a run does without it.
__getattr__ = import_when_used(__name__, _FILES)
