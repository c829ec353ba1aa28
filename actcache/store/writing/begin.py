"""Look for a store, or create one: what is there, whether it is what was asked for, and its arrays and tokens.

A store begins in the state `creating` and becomes `open` when its metadata and tokens are all there: a crash between
the two leaves nothing that looks like a store and cannot be continued.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from actcache.errors import NotAStoreError, StorageFullError, StoreNotFoundError
from actcache.spec import StoreSpec, TokenBlocks
from actcache.store import codecs
from actcache.store.backends.objects import Objects
from actcache.store.format import metadata
from actcache.store.format.keys import ROWS, TOKEN_ARRAYS, token_key, token_sequences_per_chunk
from actcache.store.format.places import refuse_inside_store
from actcache.store.format.root import Root, read_root, write_root
from actcache.store.format.table_objects import UINT32, put_table
from actcache.store.store import Store
from actcache.store.writing.agenda import Agenda
from actcache.store.writing.growth import check_growth, check_same_spec


def look(objects: Objects, spec: StoreSpec, blocks: TokenBlocks | None, *, may_grow: bool) -> Root | None:
    """The root of the store that is there, None where one has to be created.

    Raises:
        NotAStoreError: something else is there. StoreMismatchError: another store is there. StoreNotFoundError: nothing
        is there, and without tokens nothing can be created. ConfigError: the place lies in a store. CorruptShardError:
        the root is not the one that the store was created with.
    """
    root = _find_root(objects)
    if root is None:
        if blocks is None:
            raise StoreNotFoundError(f"no activation store at {objects}; make one with 'actcache extract'")
        if isinstance(place := objects.root or objects.location, str | Path):
            refuse_inside_store(place, itself=False)
        return None
    if root.state == "creating":  # a crash before the first shard: starting again loses nothing
        return None
    Store(objects, root).check()
    if root.spec != spec:
        if may_grow and blocks is not None:
            check_growth(objects, root.spec, spec, blocks)
        else:
            check_same_spec(objects, root.spec, spec)
    return root


def _find_root(objects: Objects) -> Root | None:
    """The root that lies there, None where there is nothing at all."""
    try:
        return read_root(objects)
    except StoreNotFoundError:
        return None
    except NotAStoreError:
        if objects.size("zarr.json") < 0:
            raise
        return read_root(objects)  # another process may have created the store at this moment


def create(objects: Objects, spec: StoreSpec, blocks: TokenBlocks, provenance: Mapping[str, Any]) -> Root:
    """Create a store without shards, and return its root. Call only while holding it alone."""
    write_root(objects, Root(state="creating", spec=spec, provenance=provenance))
    objects.delete_all("sites")  # what a killed process has left of other sites and settings
    put_arrays(objects, spec, blocks, 0)
    root = Root(state="open", spec=spec, provenance=provenance)
    write_root(objects, root)
    return root


def put_arrays(objects: Objects, spec: StoreSpec, blocks: TokenBlocks, n_present: int) -> None:
    """Put the metadata of all arrays, and the tokens from sequence `n_present` on."""
    with objects.full_disk_explained("the arrays' metadata: a few kilobytes"):
        metadata.write_metadata(objects, spec)
    if n_present == spec.n_sequences:
        return
    per_chunk = token_sequences_per_chunk(spec)
    for name in TOKEN_ARRAYS:
        values = getattr(blocks, name)
        for chunk in range(n_present // per_chunk, -(-spec.n_sequences // per_chunk)):
            part = np.zeros((per_chunk, spec.sequence_length), UINT32)
            taken = values[chunk * per_chunk : (chunk + 1) * per_chunk]
            part[: len(taken)] = taken
            put_table(objects, token_key(name, chunk), part)


def check_room(objects: Objects, spec: StoreSpec, agenda: Agenda) -> None:
    """Raise `StorageFullError` unless there is room for what is missing, as far as its size can be foreseen."""
    row_bytes = {site.name: codecs.expected_row_bytes(site.codec, spec.dtype, site.width) for site in spec.sites}
    row_bytes[ROWS] = 4.0
    expected = (
        len(spec.shard_rows(shard)) * sum(row_bytes[name] for name in agenda.missing(shard))
        for shard in agenda.pending()
    )
    needed, free = int(sum(expected)), objects.free_bytes()
    if free is not None and needed > free:
        raise StorageFullError(
            errno.ENOSPC,
            f"no room for {objects}: about {needed:,} bytes needed, {free:,} free; "
            "make room and give the same command again",
        )
