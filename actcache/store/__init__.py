"""The on-disk format: compressed, checked, plain Zarr v3. The only room that knows zarr and numcodecs."""

from actcache.store.buffers import ShardBuffers, Written
from actcache.store.codecs import PRESETS
from actcache.store.context import Context
from actcache.store.export import export
from actcache.store.grow import delete_sites
from actcache.store.objects import Objects, to_write, unlock
from actcache.store.places import refuse_inside_store
from actcache.store.reader import Store, open_store
from actcache.store.rows import RowFilter
from actcache.store.seal import Check
from actcache.store.stats import SiteStats
from actcache.store.verify import Fault, repair, verify
from actcache.store.writer import StoreWriter

__all__ = [
    "PRESETS",
    "Check",
    "Context",
    "Fault",
    "Objects",
    "RowFilter",
    "ShardBuffers",
    "SiteStats",
    "Store",
    "StoreWriter",
    "Written",
    "delete_sites",
    "export",
    "open_store",
    "refuse_inside_store",
    "repair",
    "to_write",
    "unlock",
    "verify",
]
