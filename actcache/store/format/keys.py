"""Keys of the objects of a store.

Commit records lie beside what they commit (`sites/HOOK/commit`), so that adding or deleting a site moves nothing of the
others. Keys have dots (`c.17.0`) instead of slashes: a folder of ten thousand shards is listed at once, and no folder
is made for each shard. The row table has one chunk a shard, so that it is committed with the shard.
"""

from __future__ import annotations

from functools import lru_cache
from urllib.parse import quote

import numpy as np

from actcache.spec import StoreSpec

ROWS = "rows"


ROW_ARRAYS = ("sequence", "position", "token")


TOKEN_ARRAYS = ("ids", "document")


LEDGER_KEY = "ledger/c.0.0.0"


ABSENT_ROW = np.iinfo(np.uint32).max
"""What the row table says for row ids that a shard leaves out."""


@lru_cache(maxsize=4096)  # asked for with every chunk
def site_prefix(site: str) -> str:
    """Where a site's arrays lie. A hook name may hold anything: all that could make a path of it is percent-encoded."""
    name = quote(site, safe=":@+,=()[] ")
    # Dots alone lead elsewhere, and zarr.json is the group's own metadata.
    return "sites/" + (name.replace(".", "%2E") if not name.strip(".") or name == "zarr.json" else name)


def column_prefix(column: str) -> str:
    """Where a column's arrays lie."""
    return ROWS if column == ROWS else site_prefix(column)


def sharded_key(site: str, array: str, shard: int, row_axes: int = 1) -> str:
    """The sharded object of a shard of one of a site's arrays, whose rows have so many axes."""
    return f"{site_prefix(site)}/{array}/c.{shard}" + ".0" * row_axes


def stats_key(site: str, shard: int) -> str:
    """The statistics line of a site's shard."""
    return f"{site_prefix(site)}/stats/c.{shard}.0"


def total_key(site: str) -> str:
    """The merged statistics of a site."""
    return f"{site_prefix(site)}/total/c.0"


def row_key(array: str, shard: int) -> str:
    """One array of the row table, for a shard."""
    return f"{ROWS}/{array}/c.{shard}"


def token_key(array: str, chunk: int) -> str:
    """One chunk of a token array."""
    return f"tokens/{array}/c.{chunk}.0"


def commit_key(column: str, shard: int) -> str:
    """The record whose presence makes a shard's column count."""
    return f"{column_prefix(column)}/commit/c.{shard}.0"


def columns_of(spec: StoreSpec) -> list[str]:
    """Names of the columns: what a shard is committed by."""
    return [ROWS, *(site.name for site in spec.sites)]


def token_sequences_per_chunk(spec: StoreSpec) -> int:
    """Sequences in a chunk of the token arrays of this store."""
    return token_chunk_sequences(spec.sequences_per_shard, spec.sequence_length)


def token_chunk_sequences(sequences_per_shard: int, sequence_length: int) -> int:
    """Sequences in a chunk of the token arrays: whole shards, about a megabyte."""
    return sequences_per_shard * max(1, (1 << 18) // (sequences_per_shard * sequence_length))
