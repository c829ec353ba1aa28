"""What a site's commit record is bound to: the tokens and rows that its values belong to, and what made them.

A record lists the checksums of what lies on the disk, and nothing else: a shard of another store, data and record
together, would fit as well. The binding is a sha256 over all that must be equal for the shard to belong here. It lies
in the record's object, in bytes of its Blosc frame that belong to no block: every reader of Zarr passes over them, and
so do versions of this package that know nothing of it. Records of those versions have no binding.

In: a spec, the record of the row table, token ids. Out: 32 bytes, and the stored object that has them.

The binding lies in a gap of the record's Blosc frame, because every reader of format 1 works out the length of the
values from the spec, and one more object for each shard and site would have to be written, flushed and listed. The
frame's own lengths cover the gap, so zarr-python, zarrs and tensorstore read what they did.
"""

from __future__ import annotations

import hashlib
import json
import struct

import numpy as np
from numpy.typing import NDArray

from actcache.spec import StoreSpec

BINDING_BYTES = 32
_FORMAT, _ZSTD_FORMAT, _FLAGS = 2, 1, 4 << 5 | 1 << 4
"""A Blosc frame of one block that is not split, shuffled or compressed (c-blosc, README_CHUNK_FORMAT.rst)."""
_START = 20
"""Bytes of a frame before its first block: the header, and where the block begins."""
_NOT_OF_A_SHARD = ("sites", "n_sequences", "text")
"""What may change about a store without touching a shard that is there."""


def frame_of(data: bytes, binding: bytes) -> bytes:
    """The Blosc frame of one block that expands to `data`, with the binding behind the block."""
    n_bytes, n_stored = len(data), _START + 4 + len(data) + len(binding)
    head = struct.pack("<4B5I", _FORMAT, _ZSTD_FORMAT, _FLAGS, 1, n_bytes, n_bytes, n_stored, _START, n_bytes)
    return head + data + binding


def binding_in(frame: memoryview, n_bytes: int) -> bytes:
    """The binding in a frame that expands to `n_bytes`; empty if it has none.

    No other frame is that long: Blosc stores what it cannot compress in 16 bytes more than it is.
    """
    return bytes(frame[-BINDING_BYTES:]) if len(frame) == _START + 4 + n_bytes + BINDING_BYTES else b""


class Bindings:
    """The bindings of one store's shards."""

    def __init__(self, spec: StoreSpec) -> None:
        plain = spec.to_dict()
        common = {name: value for name, value in plain.items() if name not in _NOT_OF_A_SHARD}
        # A model's name does not change what it computes.
        common["model"] = {name: value for name, value in spec.to_dict()["model"].items() if name != "name"}
        self._made_by = {
            site["name"]: hashlib.sha256(json.dumps({**common, "site": site}, sort_keys=True).encode()).digest()
            for site in plain["sites"]
        }

    def of(self, site: str, shard: int, home: bytes) -> bytes:
        """What the record of a site's shard is bound to; `home` is that of the shard's rows."""
        return hashlib.sha256(self._made_by[site] + shard.to_bytes(8, "little") + home).digest()


def home_of(rows: bytes, ids: NDArray[np.uint32]) -> bytes:
    """What all sites of a shard are bound to: the record of its row table, and the `(q, T)` ids of its sequences."""
    return rows[:32] + hashlib.sha256(np.ascontiguousarray(ids, "<u4").data).digest()
