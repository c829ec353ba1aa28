"""The on-disk format: compressed, checked, plain Zarr v3. The only room that knows zarr and numcodecs."""

from actcache.store.backends.objects import Objects, to_write
from actcache.store.codecs.presets import PRESETS
from actcache.store.format.places import refuse_inside_store
from actcache.store.format.stats import SiteStats
from actcache.store.locks.lock import unlock
from actcache.store.maintenance.delete import delete_sites
from actcache.store.maintenance.export import export
from actcache.store.maintenance.repair import repair
from actcache.store.maintenance.verify import Fault, verify
from actcache.store.reading.context import Context
from actcache.store.reading.rows import RowFilter, Rows, shard_masks
from actcache.store.store import Store, checked_store, open_store
from actcache.store.writing.buffers import ShardBuffers, Written
from actcache.store.writing.encode import ShardEncoder
from actcache.store.writing.seal import Check
from actcache.store.writing.writer import StoreWriter

__all__ = [
    "PRESETS",
    "Check",
    "Context",
    "Fault",
    "Objects",
    "RowFilter",
    "Rows",
    "ShardBuffers",
    "ShardEncoder",
    "SiteStats",
    "Store",
    "StoreWriter",
    "Written",
    "checked_store",
    "delete_sites",
    "export",
    "open_store",
    "refuse_inside_store",
    "repair",
    "shard_masks",
    "to_write",
    "unlock",
    "verify",
]
