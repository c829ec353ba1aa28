"""Un-commit damaged shards, so that they can be made again."""

from __future__ import annotations

from pathlib import Path

from actcache.errors import CorruptShardError
from actcache.store.backends.objects import Objects, to_write
from actcache.store.format import metadata
from actcache.store.format.keys import commit_key
from actcache.store.format.root import Root, read_root, write_root
from actcache.store.format.sealed import check_open
from actcache.store.locks.lock import WriterLock
from actcache.store.maintenance.verify import Fault
from actcache.store.store import open_store
from actcache.store.writing.seal import seal


def repair(path: str | Path | Objects, faults: list[Fault]) -> list[int]:
    """Un-commit what the faults name and open the store for writing again; returns the shards to make again.

    A damaged ledger is rebuilt from the commit records at once if no shard is at fault. So is the metadata of arrays,
    which only other readers of Zarr use.

    Raises:
        CorruptShardError: tokens or root attributes are damaged, which extracting shards again cannot repair.

    Examples:
        >>> from pathlib import Path
        >>> hurt = ac.extract(lm, blocks, [site_out], "hurt.zarr", sequences_per_shard=16)
        >>> shard = Path("hurt.zarr/sites", site_out, "acts/c.2.0")
        >>> data = bytearray(shard.read_bytes())
        >>> data[100] ^= 1
        >>> _ = shard.write_bytes(data)
        >>> ac.repair("hurt.zarr", ac.verify("hurt.zarr"))
        [2]
        >>> _ = ac.extract(lm, blocks, [site_out], "hurt.zarr", sequences_per_shard=16)
        >>> ac.verify("hurt.zarr")
        []
    """
    objects = to_write(path)
    beyond = [fault for fault in faults if fault.column in ("tokens", "attributes")]
    if beyond:
        raise CorruptShardError(f"{objects} cannot be repaired: {beyond[0].reason}; extract it again to another place")
    bad = sorted({(fault.shard, fault.column) for fault in faults if fault.shard >= 0})
    bad_ledger = any(fault.column == "ledger" for fault in faults)
    with WriterLock(objects):
        store = open_store(objects)
        root = store.root
        if not bad_ledger:
            store.check()
        elif bad:
            check_open(objects, root.spec)  # without a ledger the fingerprint proves nothing
        objects.remove_partial_writes()
        if bad_ledger and not bad:
            seal(objects, expected=(root.fingerprint or "none") if root.state == "sealed" else None)
        elif root.state == "sealed" and bad:
            write_root(objects, Root(state="open", spec=root.spec, provenance=root.provenance))
        for shard, column in bad:
            objects.delete(commit_key(column, shard))
        if any(fault.column == "metadata" for fault in faults):
            metadata.mend_metadata(objects, read_root(objects))
        objects.flush()
    return sorted({shard for shard, _ in bad})
