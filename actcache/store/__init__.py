"""The on-disk format: compressed, checked, plain Zarr v3. The only room that knows zarr and numcodecs."""

from actcache.store.codecs import PRESETS
from actcache.store.reader import Store, open_store
from actcache.store.stats import SiteStats
from actcache.store.verify import Fault, repair, verify
from actcache.store.writer import ShardBuffers, StoreWriter

__all__ = [
    "PRESETS",
    "Fault",
    "ShardBuffers",
    "SiteStats",
    "Store",
    "StoreWriter",
    "open_store",
    "repair",
    "verify",
]
