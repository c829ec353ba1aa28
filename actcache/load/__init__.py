"""Sealed store to shuffled batches: `chosen` and `plan` say which rows, `fetch` reads them, `loader` hands them out."""

from actcache.load.loader import Batch, Loader
from actcache.load.plan import Plan

__all__ = ["Batch", "Loader", "Plan"]
