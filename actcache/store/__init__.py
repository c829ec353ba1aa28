"""The on-disk format: compressed, checked, plain Zarr v3. The only room that knows zarr and numcodecs."""

from typing import TYPE_CHECKING

from actcache._lazy import import_when_used

if TYPE_CHECKING:
    from actcache.store.backends.objects import Objects as Objects
    from actcache.store.backends.objects import to_write as to_write
    from actcache.store.codecs.presets import PRESETS as PRESETS
    from actcache.store.format.places import refuse_inside_store as refuse_inside_store
    from actcache.store.format.stats import SiteStats as SiteStats
    from actcache.store.locks.lock import unlock as unlock
    from actcache.store.maintenance.delete import delete_sites as delete_sites
    from actcache.store.maintenance.export import export as export
    from actcache.store.maintenance.repair import repair as repair
    from actcache.store.maintenance.verify import Fault as Fault
    from actcache.store.maintenance.verify import verify as verify
    from actcache.store.reading.context import Context as Context
    from actcache.store.reading.rows import RowFilter as RowFilter
    from actcache.store.reading.rows import Rows as Rows
    from actcache.store.reading.rows import shard_masks as shard_masks
    from actcache.store.reading.views import begun_shards as begun_shards
    from actcache.store.store import Store as Store
    from actcache.store.store import checked_store as checked_store
    from actcache.store.store import open_store as open_store
    from actcache.store.writing.buffers import ShardBuffers as ShardBuffers
    from actcache.store.writing.buffers import Written as Written
    from actcache.store.writing.encode import ShardEncoder as ShardEncoder
    from actcache.store.writing.seal import Check as Check
    from actcache.store.writing.writer import StoreWriter as StoreWriter

_FILES = {
    "Check": "writing.seal",
    "Context": "reading.context",
    "Fault": "maintenance.verify",
    "Objects": "backends.objects",
    "PRESETS": "codecs.presets",
    "RowFilter": "reading.rows",
    "Rows": "reading.rows",
    "ShardBuffers": "writing.buffers",
    "ShardEncoder": "writing.encode",
    "SiteStats": "format.stats",
    "Store": "store",
    "StoreWriter": "writing.writer",
    "Written": "writing.buffers",
    "begun_shards": "reading.views",
    "checked_store": "store",
    "delete_sites": "maintenance.delete",
    "export": "maintenance.export",
    "open_store": "store",
    "refuse_inside_store": "format.places",
    "repair": "maintenance.repair",
    "shard_masks": "reading.rows",
    "to_write": "backends.objects",
    "unlock": "locks.lock",
    "verify": "maintenance.verify",
}
__all__ = sorted(_FILES)

# A list of the presets, as in the help of the command line, needs neither zarr nor the writer.
__getattr__ = import_when_used(__name__, _FILES)
