"""Which column of a record holds the document, and whether its values are valid.

In: records of files and datasets. Out: texts, chats, or arrays of token ids.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from actcache.errors import TextError
from actcache.source.documents import Bad, Place
from actcache.source.kinds import NAMES, Document, Ids, Kind, check_text, id_array, kind_of

if TYPE_CHECKING:
    import pyarrow

_COLUMNS: dict[Kind, tuple[str, ...]] = {
    "text": ("text", "story", "content"),
    "chat": ("messages", "conversations"),
    "tokens": ("tokens", "input_ids"),
}
_READERS: dict[Kind, str] = {"text": "read_texts", "chat": "read_chats", "tokens": "read_tokens"}
_MASKS = {"input_ids": "attention_mask"}
"""Columns of ids, and the columns whose zeros mark padding in them, as transformers names both."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to be read from every record."""

    kinds: tuple[Kind, ...]
    """Kinds of documents that are wanted; columns are looked for in this order."""
    column: str | None
    """Column of the documents; None for the first with one of the usual names."""

    def column_of(self, names: Collection[str]) -> str:
        """The column to read, among the given ones."""
        usual = [name for kind in self.kinds for name in _COLUMNS[kind]]
        wanted = [self.column] if self.column else usual
        for name in wanted:
            if name in names:
                return name
        others = (kind for kind, usual in _COLUMNS.items() if kind not in self.kinds and set(usual) & set(names))
        hint = "".join(f"; {_READERS[kind]} reads its {NAMES[kind]} column" for kind in others)
        kinds = ", ".join(NAMES[kind] for kind in self.kinds)
        raise TextError(
            f"no {kinds} column {' or '.join(map(repr, wanted))} among {_few(names)}; "
            f"name one with --column{'' if self.column else hint}"
        )

    def of_record(self, record: Any) -> Document:
        """The document of a record; where lines of JSON are bare strings or lists, these are the documents."""
        if isinstance(record, Mapping):
            name = self.column_of(record)
            return self.of_value(record[name], record.get(_MASKS.get(name, "")), name)
        if self.column is not None:
            raise TextError(f"expected an object with a column {self.column!r}, found {type(record).__name__}")
        if kind_of(record) in self.kinds:
            return self.of_value(record, None, "")
        kinds = " or ".join(NAMES[kind] for kind in self.kinds)
        raise TextError(f"expected an object with a {kinds} column, found {type(record).__name__}")

    def of_value(self, value: Any, mask: Any, name: str) -> Document:
        """A column's value, checked; ids whose `mask` is zero are left out."""
        column = f"column {name!r}" if name else "the record"
        empty = isinstance(value, list | tuple) and not value and self.kinds != ("text",)
        kind = kind_of(value)
        if kind not in self.kinds and not empty:
            expected = " or ".join({"text": "text", "chat": "a chat", "tokens": "token ids"}[k] for k in self.kinds)
            raise TextError(f"{column} holds {type(value).__name__}, not {expected}")
        if kind == "text":
            check_text(value)
        if kind != "tokens" or kind not in self.kinds:
            return value  # type: ignore[no-any-return]  # a str or a list of mappings
        ids = id_array(value, column)
        return ids if mask is None else _without_padding(ids, np.asarray(mask))

    def of_table(self, table: pyarrow.Table, place: Place) -> Iterator[Document | Bad]:
        """The documents of a table that has the columns `columns_of` named; `place.number` counts its rows."""
        name = self.column_of(table.column_names)
        mask = _MASKS.get(name, "")
        values = _values(table.column(name))
        masks = _values(table.column(mask)) if mask in table.column_names else None
        for value in values:
            place.number += 1
            ones = None if masks is None else next(masks)
            try:
                if isinstance(value, UnicodeDecodeError):
                    raise TextError(f"column {name!r} is not UTF-8 text ({value.reason})") from value
                document: Document | Bad = self.of_value(value, ones, name)
            except TextError as error:
                document = place.bad(error, error)
            yield document

    def columns_of(self, names: Collection[str]) -> list[str]:
        """The columns to read from a table: that of the documents, and the mask of its padding."""
        name = self.column_of(names)
        return [name, *(mask for mask in [_MASKS.get(name, "")] if mask in names)]


def _few(names: Collection[str]) -> str:
    """The first names of columns, for a message."""
    shown = list(map(str, names))
    return f"{shown}" if len(shown) <= 12 else f"{shown[:12]} and {len(shown) - 12} more"


def _without_padding(ids: Ids, mask: NDArray[Any]) -> Ids:
    if mask.shape != ids.shape:
        raise TextError(f"{ids.size} ids, but an attention mask of {mask.size}")
    if mask.dtype.kind not in "biu":
        raise TextError(f"the attention mask must be of zeros and ones, found {mask.dtype}")
    return ids if mask.all() else ids[mask.astype(bool)]


def _values(column: pyarrow.ChunkedArray) -> Iterator[Any]:
    """The values of a column; lists of integers as arrays, without a Python object for each.

    A text that is not UTF-8 is replaced by the error.
    """
    import pyarrow

    types = pyarrow.types
    kind = column.type
    is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    for chunk in column.chunks:
        flat = chunk.flatten() if is_list and types.is_integer(kind.value_type) and not chunk.null_count else None
        if flat is None or flat.null_count:
            yield from _python_values(chunk)
        else:
            yield from np.split(flat.to_numpy(zero_copy_only=False), np.cumsum(_lengths(chunk))[:-1])


def _python_values(chunk: pyarrow.Array) -> list[Any]:
    try:
        return chunk.to_pylist()  # type: ignore[no-any-return]  # untyped library
    except UnicodeDecodeError:
        return [_value_or_error(value) for value in chunk]


def _value_or_error(value: pyarrow.Scalar) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        return error


def _lengths(chunk: pyarrow.Array) -> Any:
    import pyarrow.compute

    return pyarrow.compute.list_value_length(chunk).to_numpy(zero_copy_only=False)
