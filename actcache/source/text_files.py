"""A file to a stream of documents: which reader it needs, and those of plain text, CSV, tables and arrays."""

from __future__ import annotations

import csv
import io
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from actcache.errors import ActcacheError, ConfigError, TextError
from actcache.source import unpack
from actcache.source.columns import Wanted
from actcache.source.documents import Bad, Place
from actcache.source.jsons import lines_of, read_json, starts_with_record
from actcache.source.kinds import Document, Ids
from actcache.source.unpack import PACKED_SUFFIXES, Opened, open_file

TEXT_SUFFIXES = (".txt",)
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
CSV_SUFFIXES = (".csv", ".tsv")
TABLE_SUFFIXES = (*JSON_SUFFIXES, *CSV_SUFFIXES, ".parquet", ".arrow", ".feather")
ARRAY_SUFFIXES = (".npy",)
SUFFIXES = (*TEXT_SUFFIXES, *TABLE_SUFFIXES, *ARRAY_SUFFIXES)

_BINARY = {".parquet": "Parquet", ".arrow": "Arrow", ".feather": "Arrow", ".npy": "NumPy"}
"""Suffixes of files that begin with a mark."""
_SEPARATOR = "<|endoftext|>"
_ROWS_PER_TABLE = 1024
_DELIMITERS = {".csv": ",;\t", ".tsv": "\t"}

D = TypeVar("D")


def suffix_of(path: Path) -> str:
    """The suffix of a file's name, in lower case and without that of its compression."""
    names = [suffix.lower() for suffix in path.suffixes[-2:]]
    while names and names[-1] in PACKED_SUFFIXES:
        names.pop()
    return names[-1] if names else ""


def read_file(path: Path, wanted: Wanted, place: Place) -> Iterator[Document | Bad]:
    """The documents of a file, which is opened when the first of them is asked for."""
    place.where, place.unit, place.number = str(path), "", 0
    return told(_read(path, wanted, place), place)


def told(documents: Iterator[D], place: Place) -> Iterator[D]:
    """The documents; any error while they are read is reported with their place."""
    end: Any = object()
    while True:
        try:
            document = next(documents, end)
        except (ActcacheError, MemoryError):
            raise
        except Exception as error:  # readers of other libraries may raise anything
            raise TextError(f"cannot read {place.where}: {reason_of(error)}") from error
        if document is end:
            return
        # Outside the try: in a generator closed at interpreter exit, the names of those errors are gone.
        yield document


def reason_of(error: BaseException) -> str:
    """The first line of another library's error, or its class if it has no text."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _read(path: Path, wanted: Wanted, place: Place) -> Iterator[Document | Bad]:
    with open_file(path) as file:
        yield from _reader(file)(file, wanted, place)


def _reader(file: Opened) -> Callable[[Opened, Wanted, Place], Iterator[Document | Bad]]:
    """The reader of a file: chosen by its first bytes, and for text by its name."""
    if file.kind in _READERS:
        return _READERS[file.kind]
    suffix = suffix_of(file.path)
    if suffix in _BINARY:
        found = "is empty" if file.kind == "empty" else "begins with text"
        raise TextError(
            f"cannot read {file.path}: it is called {suffix}, but it {found}, and is no {_BINARY[suffix]} file"
        )
    if suffix in JSON_SUFFIXES:
        return partial(_read_json, named_lines=suffix != ".json")
    if suffix in CSV_SUFFIXES:
        return _read_csv
    if suffix in TEXT_SUFFIXES or not starts_with_record(file.head()):
        return _read_plain
    return partial(_read_json, named_lines=True)


def _read_json(file: Opened, wanted: Wanted, place: Place, *, named_lines: bool) -> Iterator[Document | Bad]:
    return read_json(file.stream, wanted, place, named_lines=named_lines)


def _read_plain(file: Opened, wanted: Wanted, place: Place) -> Iterator[str | Bad]:
    if "text" not in wanted.kinds:
        raise TextError(
            f"{file.path} is plain text and has no columns; expected a file ending in {', '.join(TABLE_SUFFIXES)}"
        )
    if wanted.column:
        raise TextError(f"{file.path} is plain text and has no column {wanted.column!r}")
    if starts_with_record(file.head()):
        warnings.warn(
            f"{file.path} looks like JSON lines, but is read as one plain text, as its name says; call it .jsonl to "
            "have its records read",
            stacklevel=2,
        )
    # Invalid bytes become surrogates, which valid UTF-8 never has, and are found below.
    with io.TextIOWrapper(file.stream, encoding="utf-8-sig", errors="surrogateescape") as lines:
        yield from _plain_documents(iter(partial(lines.readline, unpack.MOST_BYTES), ""), place)


def _plain_documents(lines: Iterator[str], place: Place) -> Iterator[str | Bad]:
    """The documents of plain text: the parts between lines of the separator."""
    place.unit, place.number = "line", 1
    document: list[str] = []
    n_lines = n_characters = 0
    for line in lines:
        n_lines += 1
        if line.strip() == _SEPARATOR:
            yield _plain_text(document, place)
            document, n_characters = [], 0
            place.number = n_lines + 1
            continue
        document.append(line)
        n_characters += len(line)
        if n_characters >= unpack.MOST_BYTES:
            raise TextError(
                f"{place}: one document of more than {unpack.MOST_BYTES:,} characters; put a line {_SEPARATOR} between "
                "documents"
            )
    yield _plain_text(document, place)


def _plain_text(lines: list[str], place: Place) -> str | Bad:
    text = "".join(lines)
    return _not_utf8(text, place) or text.strip()


def _not_utf8(text: str, place: Place) -> Bad | None:
    """The `Bad` for a text in which invalid bytes became surrogates; None if it has none."""
    if text.isascii():
        return None
    try:
        text.encode()
    except UnicodeEncodeError as error:
        at = place.now()
        at.number += text.count("\n", 0, error.start)
        return at.bad(f"not UTF-8 text (byte 0x{ord(text[error.start]) & 0xFF:02x})", error)
    return None


def _read_csv(file: Opened, wanted: Wanted, place: Place) -> Iterator[Document | Bad]:
    """Rows of text under a header; a row that is not quoted as in RFC 4180 is bad, and is not guessed at."""
    # The limit belongs to the whole process, so it is only ever raised.
    csv.field_size_limit(max(csv.field_size_limit(), unpack.MOST_BYTES))
    place.unit = "line"
    lines = (line.decode("utf-8", "surrogateescape") for line in lines_of(file.stream, place))
    header = next(lines, "").removeprefix("\ufeff")
    delimiters = _DELIMITERS.get(suffix_of(file.path), ",")
    names, delimiter = _header(header, delimiters, wanted, file.path)
    column = names.index(wanted.column_of(names))
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        row_begin = place.number + 1
        try:
            row = next(rows, None)
        except csv.Error as error:
            yield Place(place.where, "line", row_begin).bad(f"not valid CSV ({error})", error)
            continue
        if row is None:
            return
        if row:
            yield _csv_document(row, names, column, wanted, Place(place.where, "line", row_begin))


def _csv_document(row: list[str], names: list[str], column: int, wanted: Wanted, place: Place) -> Document | Bad:
    if len(row) != len(names):
        return place.bad(f"{len(row)} fields, but the header has {len(names)}")
    if (bad := _not_utf8(row[column], place)) is not None:
        return bad
    try:
        return wanted.of_value(row[column], None, names[column])
    except TextError as error:
        return place.bad(error, error)


def _header(line: str, delimiters: str, wanted: Wanted, path: Path) -> tuple[list[str], str]:
    """The names of the columns, and what separates them: the first of `delimiters` with which the column is there."""
    problem: TextError | None = None
    for delimiter in delimiters:
        names = next(csv.reader([line], delimiter=delimiter), [])
        try:
            name = wanted.column_of(names)
        except TextError as error:
            problem = problem or error
            continue
        if names.count(name) > 1:
            raise TextError(f"{path} has the column {name!r} more than once")
        return names, delimiter
    raise TextError(f"{path}: {problem} (its first line is its header)") from problem


def _read_array(file: Opened, wanted: Wanted, place: Place) -> Iterator[Ids]:
    if "tokens" not in wanted.kinds:
        raise TextError(f"{file.path} holds an array, not text; read_tokens reads it as token ids")
    if wanted.column:
        raise ConfigError(f"{file.path} is an array and has no column {wanted.column!r}")
    array = np.load(file.path, mmap_mode="r", allow_pickle=False)
    if array.ndim not in (1, 2) or array.dtype.kind not in "iu":
        raise TextError(
            f"{file.path}: expected token ids, integers of shape (Q, T) or flat, "
            f"found {array.dtype} of shape {array.shape}"
        )
    place.unit, place.number = "row", 0
    for row in array[None] if array.ndim == 1 else array:
        place.number += 1
        yield row


def _read_parquet(file: Opened, wanted: Wanted, place: Place) -> Iterator[Document | Bad]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file.path) as table:
        columns = _columns_of(table.schema_arrow.names, wanted, file.path)
        yield from of_tables(table.iter_batches(batch_size=_ROWS_PER_TABLE, columns=columns), wanted, place)


def _read_arrow(file: Opened, wanted: Wanted, place: Place) -> Iterator[Document | Bad]:
    """Arrow's file format (also Feather's) and its stream format, which the cache of `datasets` uses."""
    import pyarrow

    with pyarrow.memory_map(str(file.path)) as source:
        if file.kind == "arrow file":
            reader = pyarrow.ipc.open_file(source)
            batches: Iterator[Any] = (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            reader = pyarrow.ipc.open_stream(source)
            batches = iter(reader)
        columns = _columns_of(reader.schema.names, wanted, file.path)
        yield from of_tables(_check_parts(batches, columns), wanted, place)


def _check_parts(batches: Iterator[Any], columns: list[str]) -> Iterator[Any]:
    """Parts of bounded size of some columns, checked: where offsets are wrong, Arrow reads past the end of a buffer."""
    import pyarrow

    for whole in batches:
        batch = whole.select(columns)
        try:
            batch.validate(full=True)
        except pyarrow.ArrowInvalid as error:
            if "UTF8" not in str(error):  # which is found row by row
                raise
        for start in range(0, batch.num_rows, _ROWS_PER_TABLE):
            yield batch.slice(start, _ROWS_PER_TABLE)


def _columns_of(names: list[str], wanted: Wanted, path: Path) -> list[str]:
    try:
        columns = wanted.columns_of(names)
    except TextError as error:
        raise TextError(f"{path}: {error}") from error
    if names.count(columns[0]) > 1:
        raise TextError(f"{path} has the column {columns[0]!r} more than once")
    return columns


def of_tables(batches: Iterator[Any], wanted: Wanted, place: Place) -> Iterator[Document | Bad]:
    """The documents of a table's parts, one after the other."""
    import pyarrow

    place.unit, place.number = "row", 0
    for batch in batches:
        table = batch if isinstance(batch, pyarrow.Table) else pyarrow.Table.from_batches([batch])
        yield from wanted.of_table(table, place)


_READERS: dict[str, Callable[[Opened, Wanted, Place], Iterator[Any]]] = {
    "parquet": _read_parquet,
    "arrow file": _read_arrow,
    "arrow stream": _read_arrow,
    "npy": _read_array,
}
