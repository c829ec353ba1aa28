"""A stream of documents that knows where each one lies, and what happens to a bad one.

Readers put a `Bad` into their stream where a document would be, so that one bad line does not end a run: the consumer
decides whether it is an error, or is counted and skipped.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar, cast, get_args

from actcache.errors import ConfigError, TextError

OnBad = Literal["error", "skip"]

D = TypeVar("D")


@dataclass(frozen=True, slots=True)
class Bad:
    """Stands in a stream where a document would be."""

    error: TextError
    """What is wrong with it, and where it lies."""


@dataclass(slots=True)
class Place:
    """Where the last document lies; updated by readers."""

    where: str = ""
    """File, folder or name of a dataset."""
    unit: str = ""
    """What is counted there: line, row, element."""
    number: int = 0
    """From 1 on."""

    def __str__(self) -> str:
        return f"{self.where}, {self.unit} {self.number}" if self.unit else self.where

    def now(self) -> Place:
        """A copy, which stays."""
        return Place(self.where, self.unit, self.number)

    def bad(self, reason: object, cause: Exception | None = None) -> Bad:
        """The `Bad` that replaces the document at this place."""
        error = TextError(f"{self}: {reason}")
        error.__cause__ = cause
        return Bad(error)


class Tally:
    """The bad documents of a run: the first one ends it, or they are counted."""

    def __init__(self, on_bad: OnBad) -> None:
        if on_bad not in get_args(OnBad):
            raise ConfigError(f"on_bad must be one of {', '.join(get_args(OnBad))}, got {on_bad!r}")
        self.on_bad = on_bad
        self.n_bad = 0
        self.first = ""

    def add(self, error: TextError) -> None:
        """Raise the error, or count it."""
        if self.on_bad == "error":
            raise error
        self.first = self.first or str(error)
        self.n_bad += 1

    def __str__(self) -> str:
        return f"{self.n_bad:,} bad documents were left out; the first: {self.first}"

    def warn(self, stacklevel: int) -> None:
        """Say how many there were, if there were any."""
        if self.n_bad:
            warnings.warn(str(self), stacklevel=stacklevel + 1)


class Documents(Iterator[D], Generic[D]):
    """The documents of a source, read as they are asked for.

    With `on_bad="skip"`, bad ones are left out, and a warning at the end says how many there were.
    """

    def __init__(self, stream: Iterator[D | Bad], place: Place, on_bad: OnBad) -> None:
        self._stream = stream
        self.place = place
        """Where the last document lies."""
        self.bad = Tally(on_bad)
        """Documents that were left out."""

    def __next__(self) -> D:
        for document in self._stream:
            if type(document) is not Bad:
                return cast(D, document)
            self.bad.add(document.error)
        self.bad.warn(stacklevel=2)
        raise StopIteration

    def with_bad(self) -> Iterator[D | Bad]:
        """The rest, with `Bad` in place of bad documents, for callers that count them."""
        return self._stream

    def skip(self, n_documents: int) -> Documents[D]:
        """This stream without its next `n_documents`.

        Raises:
            TextError: there are fewer.
        """
        for n_skipped in range(n_documents):
            if next(self, _END) is _END:
                raise TextError(
                    f"{n_documents:,} documents were to be left out at the beginning, but there are only {n_skipped:,}"
                )
        return self


_END: Any = object()
