"""Sealed store to shuffled batches: `chosen` and `plan` say which rows, `fetch` reads them, `loader` hands them out."""

from actcache.load.batches.batch import Batch
from actcache.load.loader import Loader
from actcache.load.mix import MixedLoader
from actcache.load.normalize import Normalization
from actcache.load.plan.epochs import Plan
from actcache.load.plan.quality import ShuffleReport
from actcache.load.speed import LoaderStats
from actcache.load.split import split_sequences

__all__ = [
    "Batch",
    "Loader",
    "LoaderStats",
    "MixedLoader",
    "Normalization",
    "Plan",
    "ShuffleReport",
    "split_sequences",
]
