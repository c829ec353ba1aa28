"""JSON files: an object a line, one array of them, or objects over several lines. All are streamed."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Mapping
from io import BufferedReader
from typing import Any, Literal

from actcache.errors import TextError
from actcache.source import unpack
from actcache.source.columns import Wanted
from actcache.source.documents import Bad, Place
from actcache.source.kinds import Document, is_message
from actcache.source.sniff import HEAD_BYTES

BOM = b"\xef\xbb\xbf"

Layout = Literal["lines", "array", "objects"]

_AT_THE_END = 16
"""An error so few characters from the end may only mean that the rest has not been read yet."""


def read_json(stream: BufferedReader, wanted: Wanted, place: Place, *, named_lines: bool) -> Iterator[Document | Bad]:
    """The documents of a JSON file. `named_lines`: its name says that each line is a record."""
    layout = _layout(stream.peek(HEAD_BYTES).removeprefix(BOM).decode(errors="replace"), named_lines)
    if layout == "lines":
        return _of_lines(stream, wanted, place)
    return _of_array(stream, wanted, place) if layout == "array" else _of_objects(stream, wanted, place)


def starts_with_record(head: bytes) -> bool:
    """Whether the first line is a JSON object, as in files of records."""
    line = head.removeprefix(BOM).lstrip().partition(b"\n")[0]
    if not line.startswith(b'{"'):
        return False
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _layout(head: str, named_lines: bool) -> Layout:
    head = head.lstrip()
    line, newline, rest = head.partition("\n")
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        pass
    else:
        return "array" if _are_records(value) and not rest.strip() else "lines"
    if head.startswith("["):
        return "array" if newline or _begins_with_record(head[1:].lstrip()) else "lines"
    if head.startswith("{") and newline and not named_lines and not rest.lstrip().startswith(("{", "[")):
        return "objects"
    return "lines"


def _are_records(value: Any) -> bool:
    """Whether a list holds records, and is not itself a document (token ids, or the messages of a chat)."""
    return isinstance(value, list) and bool(value) and _is_record(value[0])


def _is_record(element: Any) -> bool:
    return isinstance(element, str | list) or (isinstance(element, Mapping) and not is_message(element))


def _begins_with_record(inner: str) -> bool:
    """Whether the elements of an array are records, by the beginning of the first."""
    try:
        return _is_record(json.JSONDecoder().raw_decode(inner)[0])
    except (ValueError, RecursionError):
        return inner[:1] in ('"', "[", "{")


def _of_lines(stream: BufferedReader, wanted: Wanted, place: Place) -> Iterator[Document | Bad]:
    place.unit, place.number = "line", 0
    for line in lines_of(stream, place):
        if not line.strip():
            continue
        try:
            text = line.decode("utf-8-sig" if place.number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            yield place.bad(f"not UTF-8 text (byte {error.start + 1} of the line: {error.reason})", error)
            continue
        yield _document(text, wanted, place)


def lines_of(stream: BufferedReader, place: Place) -> Iterator[bytes]:
    """The lines of a file, their ends included; `place.number` counts them.

    Raises:
        TextError: one is larger than any document may be.
    """
    while line := stream.readline(unpack.MOST_BYTES):
        place.number += 1
        if len(line) >= unpack.MOST_BYTES:
            raise TextError(f"{place} is longer than {unpack.MOST_BYTES:,} bytes: too much for one document")
        yield line


def _document(text: str, wanted: Wanted, place: Place) -> Document | Bad:
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        return place.bad(f"not valid JSON ({error.msg})", error)
    except (ValueError, RecursionError) as error:
        return place.bad(f"not JSON that can be read ({error})", error)
    return _of_record(record, wanted, place)


def _of_record(record: Any, wanted: Wanted, place: Place) -> Document | Bad:
    try:
        return wanted.of_record(record)
    except TextError as error:
        inner = [key for key, value in record.items() if _are_records(value)] if isinstance(record, dict) else []
        hint = f"; {inner[0]!r} is a list of records: write that list to a file of its own" if inner else ""
        return place.bad(f"{error}{hint}", error)


def _of_array(stream: BufferedReader, wanted: Wanted, place: Place) -> Iterator[Document | Bad]:
    """The elements of an array; an array of token ids, or of messages, is one document."""
    place.unit, place.number = "element", 0
    elements = _Values(stream, place).elements()
    for element in elements:
        if place.number == 1 and not _is_record(element):
            whole = [element, *elements]
            place.number = 1
            yield _of_record(whole, wanted, place)
            return
        yield _of_record(element, wanted, place)


def _of_objects(stream: BufferedReader, wanted: Wanted, place: Place) -> Iterator[Document | Bad]:
    """Objects that take several lines each, one after the other."""
    place.unit, place.number = "object", 0
    for value in _Values(stream, place).values():
        yield _of_record(value, wanted, place)


class _Values:
    """Reads JSON values from a stream, with only as much of it in memory as the current value needs."""

    def __init__(self, stream: BufferedReader, place: Place) -> None:
        self._stream, self._place = stream, place
        self._decode_bytes = codecs.getincrementaldecoder("utf-8-sig")()
        self._decoder = json.JSONDecoder()
        self._text, self._at = "", 0
        self._is_read = False
        self._n_bytes = 0

    def elements(self) -> Iterator[Any]:
        """The elements of one array."""
        self._take("[")
        separator = self._next()
        while separator != "]":
            yield self._value()
            separator = self._next()
            if separator != "]":
                self._take(",")
        self._take("]")
        if self._next():
            raise TextError(
                f"{self._place.where} goes on after the end of its array: it is neither one array nor lines"
            )

    def values(self) -> Iterator[Any]:
        """Values one after the other."""
        while self._next():
            yield self._value()

    def _value(self) -> Any:
        self._place.number += 1
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                may_go_on = error.msg.startswith("Unterminated") or error.pos > len(self._text) - _AT_THE_END
                if self._is_read or not may_go_on:
                    raise TextError(f"{self._place}: not valid JSON ({error.msg})") from error
            except (ValueError, RecursionError) as error:
                raise TextError(f"{self._place}: not JSON that can be read ({error})") from error
            else:
                if end < len(self._text) or self._is_read:  # a number may continue
                    self._at = end
                    return value
            self._read_on()

    def _next(self) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            text = self._text
            while self._at < len(text) and text[self._at] in " \t\r\n":
                self._at += 1
            if self._at < len(text) or self._is_read:
                return text[self._at : self._at + 1]
            self._read_on()

    def _take(self, wanted: str) -> None:
        if (found := self._next()) != wanted:
            said = f"{found!r} where {wanted!r} should be" if found else "it ends in the middle of its array"
            raise TextError(f"{self._place}: not valid JSON ({said})")
        self._at += 1
        self._next()

    def _read_on(self) -> None:
        """Double what is in memory of the current value, so that a long one is not parsed too often."""
        self._text, self._at = self._text[self._at :], 0
        if len(self._text) >= unpack.MOST_BYTES:
            raise TextError(f"{self._place} is longer than {unpack.MOST_BYTES:,} characters: too much for one document")
        data = self._stream.read(max(HEAD_BYTES, len(self._text)))
        self._is_read = not data
        begin = self._n_bytes - len(self._decode_bytes.getstate()[0])
        self._n_bytes += len(data)
        try:
            self._text += self._decode_bytes.decode(data, self._is_read)
        except UnicodeDecodeError as error:
            where = f"{self._place.where}: not UTF-8 text (byte {begin + error.start + 1}: {error.reason})"
            raise TextError(where) from error
