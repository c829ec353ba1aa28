"""The tokens of a store: all of them, or those of a shard, for which only the chunks that hold them are read.

In: the objects of a store and its spec. Out: arrays of which every byte has been checked.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from actcache.errors import CorruptShardError
from actcache.spec import StoreSpec
from actcache.store.backends.objects import Objects
from actcache.store.format.keys import TOKEN_ARRAYS, token_key, token_sequences_per_chunk
from actcache.store.format.table_objects import UINT32, get_table


class TokenArrays:
    """`ids` and `document` of a store. The last chunk is kept, because the next shard usually lies in it."""

    def __init__(self, objects: Objects, spec: StoreSpec) -> None:
        self.objects, self.spec = objects, spec
        self._checksums: dict[str, list[int]] = {}
        self._last: dict[str, tuple[int, NDArray[np.uint32]]] = {}

    def whole(self, array: str) -> NDArray[np.uint32]:
        """The `(Q, T)` array; CorruptShardError when it is not what the store was begun with."""
        values, checksums = self._read(array)
        if self._checksums.get(array) != checksums:  # the digest is of both arrays
            digest, seen = hashlib.sha256(), {}
            for name in TOKEN_ARRAYS:
                part, seen[name] = (values, checksums) if name == array else self._read(name)
                digest.update(part.data)
            self._compare(digest.hexdigest())
            self._checksums = seen
        return values

    def check(self) -> None:
        """Compare all tokens with their digest, a chunk at a time; CorruptShardError when they do not match it."""
        digest, per_chunk = hashlib.sha256(), token_sequences_per_chunk(self.spec)
        for array in TOKEN_ARRAYS:
            for first in range(0, self.spec.n_sequences, per_chunk):
                values, _ = self._read_chunk(array, first // per_chunk)
                digest.update(values[: self.spec.n_sequences - first].data)
        self._compare(digest.hexdigest())

    def _compare(self, digest: str) -> None:
        if digest != self.spec.text.get("tokens", digest):
            raise CorruptShardError(f"the tokens of {self.objects} do not match their digest", store=self.objects)

    def of_shard(self, array: str, shard: int) -> NDArray[np.uint32]:
        """`(q, T)` of one shard's sequences, as a copy; only one chunk is read, and its own crc32c is checked.

        Raises:
            IndexError: no such shard. CorruptShardError: the chunk is missing or damaged.
        """
        if not 0 <= shard < self.spec.n_shards:
            raise IndexError(f"shard {shard} asked of {self.objects}, which has 0 to {self.spec.n_shards - 1}")
        sequences = self.spec.shard_sequences(shard)
        chunk, first = divmod(sequences.start, token_sequences_per_chunk(self.spec))
        last, values = self._last.get(array, (-1, None))
        if values is None or last != chunk:
            values, checksum = self._read_chunk(array, chunk)
            known = self._checksums.get(array)
            if known and known[chunk] != checksum:
                raise CorruptShardError(
                    f"{token_key(array, chunk)} of {self.objects} is not what it was when it was read earlier",
                    store=self.objects,
                )
            self._last[array] = chunk, values
        return values[first : first + len(sequences)].copy()

    def _read(self, array: str) -> tuple[NDArray[np.uint32], list[int]]:
        n_chunks = -(-self.spec.n_sequences // token_sequences_per_chunk(self.spec))
        # Memory is allocated for what has been read, never for what the spec claims: it may be hostile.
        parts = [self._read_chunk(array, chunk) for chunk in range(n_chunks)]
        return np.concatenate([part for part, _ in parts])[: self.spec.n_sequences], [crc for _, crc in parts]

    def _read_chunk(self, array: str, chunk: int) -> tuple[NDArray[np.uint32], int]:
        shape = token_sequences_per_chunk(self.spec), self.spec.sequence_length
        return get_table(self.objects, token_key(array, chunk), shape, UINT32)
