"""From a row back to its text: the tokens around the one that a row's activations were computed for.

In: an open store and a row id. Out: a `Context`; one shard's row table and one chunk of the tokens are read for it.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from actcache.errors import ConfigError, CorruptShardError
from actcache.spec import NO_DOCUMENT
from actcache.store.reading.rows import checked_rows
from actcache.store.reading.tables import Tables

_MOST_PIECES = 4
"""The most tokens that one character can consist of: UTF-8 has up to four bytes."""
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Context:
    """A row's token, and the tokens before and after it in its sequence.

    Examples:
        >>> context = store.context(100, before=3, after=3)
        >>> context.row, len(context.before), len(context.after)
        (100, 3, 3)
        >>> context.text(lm.tokenizer)
        ' and someone like« beautiful» nower from'
    """

    row: int
    """The row id."""
    sequence: int
    """The sequence that it is in."""
    position: int
    """Its place in the sequence, counted from the first token."""
    document: int
    """Number of the text that it is from."""
    before: tuple[int, ...]
    """Ids of the tokens before it, in order."""
    token: int
    """Id of its own token."""
    after: tuple[int, ...]
    """Ids of the tokens after it, in order."""

    def text(self, tokenizer: Any, *, marks: tuple[str, str] = ("«", "»")) -> str:
        """The text, with the row's token between two marks: `the cat «sat» on the mat`.

        Where several tokens make one character (byte by byte), the marks enclose the whole character.

        Args:
            tokenizer: the model's; anything with `decode(ids, skip_special_tokens=False)`.
            marks: what to put before and behind the token.
        """
        whole = self._decode(tokenizer, (*self.before, self.token, *self.after))
        # The text is decoded once and cut: parts decoded separately would lose spaces and halves of characters.
        shorter = (self.before[: len(self.before) - k] for k in range(len(self.before) + 1))
        longer = ((*self.before, self.token, *self.after[:k]) for k in range(len(self.after) + 1))
        begin = self._cut(tokenizer, whole, shorter, otherwise=0)
        end = self._cut(tokenizer, whole, longer, otherwise=len(whole))
        return f"{whole[:begin]}{marks[0]}{whole[begin:end]}{marks[1]}{whole[end:]}"

    def _cut(self, tokenizer: Any, whole: str, starts: Any, *, otherwise: int) -> int:
        """The length of the first of some prefixes of the tokens whose text is a prefix of the whole text."""
        for ids in islice(starts, _MOST_PIECES):
            text = self._decode(tokenizer, ids)
            if whole.startswith(text) and not text.endswith(_INCOMPLETE):
                return len(text)
        return otherwise

    def _decode(self, tokenizer: Any, ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=False)) if ids else ""


def context(store: Tables, row: int, before: int, after: int, across_documents: bool) -> Context:
    """The tokens around a row; see `Store.context`."""
    if before < 0 or after < 0:
        raise ConfigError(f"context: before and after must not be negative, got {before} and {after}")
    row = operator.index(row)
    checked_rows(store, [row])
    shard, within = divmod(row, store.spec.rows_per_shard)
    sequence, position, token = (int(values[within]) for values in store.shard_row_table(shard).values())
    here = sequence - store.spec.shard_sequences(shard).start
    ids, documents = store.shard_tokens(shard)[here], store.shard_documents(shard)[here]
    if ids[position] != token:
        raise CorruptShardError(
            f"row {row} of {store.path} belongs to token {token}, but the tokens have {ids[position]} at its place",
            store=store.path,
        )
    inside = documents != NO_DOCUMENT if across_documents else documents == documents[position]
    outside = np.flatnonzero(~inside)
    first = max(position - before, 0, *(outside[outside < position][-1:] + 1).tolist())
    last = min([position + after, len(ids) - 1, *(outside[outside > position][:1] - 1).tolist()])
    return Context(
        row=row,
        sequence=sequence,
        position=position,
        document=int(documents[position]),
        before=tuple(ids[first:position].tolist()),
        token=token,
        after=tuple(ids[position + 1 : last + 1].tolist()),
    )
