"""Keys of the objects and files that locks are."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from actcache.store.backends.objects import Objects

LEASE = "tokens/ids/writer"
"""The key of the store's lock: below an array, where zarr does not look for groups and arrays."""
SHARED = f"{LEASE}.shared."
"""Prefix of the keys of writers that share a store; a token follows."""
CLAIM = f"{LEASE}.shard."
"""Prefix of the keys of claimed shards; the shard's number follows."""


def claim_key(shard: int) -> str:
    """The key of a shard's lock, among writers that share a store."""
    return f"{CLAIM}{shard}"


def lock_keys(objects: Objects) -> list[str]:
    """Keys of everything that locks have put into a store."""
    folder = LEASE.rpartition("/")[0]
    return [
        key for name in objects.names(folder) if (key := f"{folder}/{name}") == LEASE or key.startswith(f"{LEASE}.")
    ]
