"""Sealed store to shuffled batches.

`plan/` decides which rows make which batch, `windows/` reads and decodes chunks, `batches/` gathers rows out of
windows, `device/` does both on a GPU, `production` puts these together, and `loader` is what users call.
"""

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
