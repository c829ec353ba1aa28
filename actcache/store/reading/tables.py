"""What a store holds beside its activations: its tokens, the origin of each row, and statistics.

In: what is committed. Out: tables, every byte of which has been checked.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from actcache.order import permutation
from actcache.spec import TokenBlocks
from actcache.store.format.keys import ROW_ARRAYS, ROWS, TOKEN_ARRAYS, row_key, stats_key
from actcache.store.format.records import stats_place
from actcache.store.format.stats import line_length
from actcache.store.format.table_objects import FLOAT64, UINT32, get_table
from actcache.store.reading.committed import Committed
from actcache.store.reading.tokens import TokenArrays


class Tables(Committed):
    """Tokens, row tables and statistics lines of a store."""

    @cached_property
    def _tokens(self) -> TokenArrays:
        return TokenArrays(self.objects, self.spec)

    def shard_row_table(self, shard: int, arrays: Collection[str] = ROW_ARRAYS) -> dict[str, NDArray[np.uint32]]:
        """`sequence`, `position` and `token` (or some of these arrays) of each row of a shard, in row order."""
        record, spec = self.record(ROWS, shard), self.spec
        shape, table = (spec.rows_per_shard,), {}
        for name, expected in zip(ROW_ARRAYS, record.checksums, strict=False):
            if name not in arrays:
                continue
            with self.explained():
                values, crc = get_table(self.objects, row_key(name, shard), shape, UINT32)
            if crc != expected:
                raise self.corrupt(ROWS, shard, f"is damaged: {name} is not the one that was committed")
            table[name] = values[: record.n_rows]
        possible = {"sequence": spec.shard_sequences(shard), "position": range(spec.skip_first, spec.sequence_length)}
        for name in possible.keys() & table.keys():
            if (
                record.n_rows
                and not possible[name].start <= table[name].min() <= table[name].max() < possible[name].stop
            ):
                raise self.corrupt(ROWS, shard, f"lists rows with a {name} that is impossible there")
        return table

    def check_rows(self, shard: int) -> None:
        """Compare a shard's row table with the tokens of its sequences, and its order with that of the spec's seed.

        Raises:
            CorruptShardError: it has other tokens or another order.
        """
        spec, table = self.spec, self.shard_row_table(shard)
        ids, within = self.shard_tokens(shard), table["sequence"].astype(np.int64) - spec.shard_sequences(shard).start
        place = within * spec.rows_per_sequence + table["position"] - spec.skip_first
        order = np.sort(place)[permutation(len(place), spec.seed, shard)]
        if not np.array_equal(ids[within, table["position"]], table["token"]) or not np.array_equal(order, place):
            raise self.corrupt(ROWS, shard, "lists other rows than the store's tokens and seed give")

    def kept_rows(self, shard: int) -> NDArray[np.bool_] | None:
        """`(q * rows_per_sequence,)` mask of the shard's rows that are stored, in reading order; None for all."""
        spec = self.spec
        capacity = len(spec.shard_rows(shard))
        if self.shard_n_rows[shard] == capacity:
            return None
        table, kept = self.shard_row_table(shard), np.zeros(capacity, bool)
        place = (table["sequence"].astype(np.int64) - spec.shard_sequences(shard).start) * spec.rows_per_sequence
        kept[place + table["position"] - spec.skip_first] = True
        return kept

    def row_table(self) -> dict[str, NDArray[np.uint32]]:
        """`sequence`, `position` and `token` of every committed row, in row order; 12 bytes a row."""
        tables = [self.shard_row_table(shard) for shard in self.committed]
        none = np.empty(0, UINT32)
        return {name: np.concatenate([none, *(table[name] for table in tables)]) for name in ROW_ARRAYS}

    def tokens(self, array: str = "ids") -> NDArray[np.uint32]:
        """The `(Q, T)` token `ids`, or the `document` of each token.

        Raises:
            CorruptShardError: they are not the ones that the store was begun with.
        """
        self.check()
        with self.explained():
            return self._tokens.whole(array)

    def check_tokens(self) -> None:
        """Compare all tokens with the digest in the spec, in little memory; raises like `tokens`."""
        self.check()
        with self.explained():
            self._tokens.check()

    def shard_tokens(self, shard: int) -> NDArray[np.uint32]:
        """`(q, T)` token ids of a shard's sequences; only that part of the tokens is read.

        The shard need not be committed. Going from shard to shard reads every chunk of the tokens once.

        Raises:
            IndexError: no such shard. CorruptShardError: the tokens are missing or damaged.
        """
        return self._tokens_of_shard("ids", shard)

    def shard_documents(self, shard: int) -> NDArray[np.uint32]:
        """`(q, T)` number of the text that each token of `shard_tokens` is from; raises like `shard_tokens`."""
        return self._tokens_of_shard("document", shard)

    def _tokens_of_shard(self, array: str, shard: int) -> NDArray[np.uint32]:
        self.check()
        with self.explained():
            return self._tokens.of_shard(array, shard)

    def token_blocks(self) -> TokenBlocks:
        """The store's tokens as they were given to `extract`."""
        ids, document = (self.tokens(name) for name in TOKEN_ARRAYS)
        return TokenBlocks(ids=ids, document=document, description=self.spec.text)

    def shard_line(self, site: str, shard: int) -> NDArray[np.float64]:
        """The statistics line of a shard."""
        shape = (1, line_length(self.spec.site(site).width))
        with self.explained():
            values, crc = get_table(self.objects, stats_key(site, shard), shape, FLOAT64)
        if crc != self.record(site, shard).checksums[stats_place(self.spec)]:
            raise self.corrupt(site, shard, "is damaged: its statistics are not the ones that were committed")
        line: NDArray[np.float64] = values[0]
        return line
