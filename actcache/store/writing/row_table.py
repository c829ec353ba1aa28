"""The row table of a shard: of which sequence, position and token each of its rows is.

In: a filled shard and its tokens. Out: the table's objects and its record; an error if another table is committed.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from actcache.errors import StoreMismatchError
from actcache.store.backends.objects import Objects
from actcache.store.format.keys import ABSENT_ROW, ROW_ARRAYS, ROWS, row_key
from actcache.store.format.records import Record, read_record
from actcache.store.format.table_objects import UINT32, encode_table
from actcache.store.writing.buffers import ShardBuffers


def put_row_table(objects: Objects, buffers: ShardBuffers, ids: NDArray[np.uint32], *, is_committed: bool) -> Record:
    """Put a shard's row table, and return its record.

    Args:
        objects: the objects of the store.
        buffers: the shard.
        ids: `(q, T)` tokens of its sequences.
        is_committed: nothing is put, and the table is held against the committed one: sites that are added later have
            to be of the same rows.

    Raises:
        StoreMismatchError: the committed table is another one.
    """
    spec, shard = buffers.spec, buffers.shard
    sequence, position = np.divmod(buffers.kept[buffers.order], spec.rows_per_sequence)
    position += spec.skip_first
    table = {
        "sequence": sequence + spec.shard_sequences(shard).start,
        "position": position,
        "token": ids[sequence, position],
    }
    checksums, encoded = [], []
    for name in ROW_ARRAYS:
        padded = np.full(spec.rows_per_shard, ABSENT_ROW, UINT32)
        padded[: len(sequence)] = table[name]
        crc, data = encode_table(padded)
        checksums.append(crc)
        encoded.append((row_key(name, shard), data))
    n_bytes = sum(len(data) for _, data in encoded)
    record = Record(n_rows=len(sequence), n_bytes=n_bytes, checksums=tuple(checksums))
    if not is_committed:
        objects.put_all(encoded)
    elif record != read_record(objects, spec, ROWS, shard):
        raise StoreMismatchError(
            f"the rows of shard {shard} are not those that {objects} has (another text, or other rows left out), so "
            "nothing is added to it"
        )
    return record
