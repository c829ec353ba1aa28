"""Documents to token ids, many in one call of the tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.errors import ConfigError, TextError
from actcache.source.bos import Bos, Marks
from actcache.source.chat import chat_text, template_of
from actcache.source.kinds import MOST_ID, Document, Ids, Kind, id_array, is_array, kind_of, plain_array, uint32_ids

DOCUMENTS_PER_CALL = 512
SIZE_PER_CALL = 1 << 20
"""Characters or ids."""
IDS_PER_PIECE = 1 << 22

_NAMES: dict[Kind, str] = {"text": "text", "chat": "chat", "tokens": "document"}


@dataclass(frozen=True, slots=True)
class Tokens:
    """The token ids of one document, and what goes around them."""

    number: int
    kind: Kind
    ids: Ids
    """Of any integer type, maybe memory-mapped and long: to be copied in pieces."""
    marks: Marks
    most: int
    """Largest id that is allowed."""

    def head(self, length: int) -> NDArray[np.uint32]:
        """As many ids as fit between the marks in `length` tokens; the tokenizer's own truncation gives the same."""
        return self._framed(self._piece(0, length - len(self.marks)), first=True, last=True)

    def pieces(self) -> Iterator[NDArray[np.uint32]]:
        """All ids, marks included, in pieces of bounded size."""
        last = max(0, len(self.ids) - 1) // IDS_PER_PIECE
        for i in range(last + 1):
            piece = self._piece(i * IDS_PER_PIECE, (i + 1) * IDS_PER_PIECE)
            yield self._framed(piece, first=i == 0, last=i == last)

    def _piece(self, start: int, stop: int) -> NDArray[np.uint32]:
        return uint32_ids(self.ids[start:stop], self.most, f"{_NAMES[self.kind]} number {self.number}")

    def _framed(self, ids: NDArray[np.uint32], *, first: bool, last: bool) -> NDArray[np.uint32]:
        begin, end = (self.marks.begin if first else ()), (self.marks.end if last else ())
        if not begin and not end:
            return ids
        return np.concatenate([np.array(begin, np.uint32), ids, np.array(end, np.uint32)])


class Tokeniser:
    """Documents of all kinds to token ids."""

    def __init__(self, tokenizer: Any | None, bos: Bos, chat_template: str | None) -> None:
        self._tokenizer = tokenizer
        self._bos = bos
        self._chat_template = chat_template

    def __call__(self, documents: Iterable[Document]) -> Iterator[list[Tokens]]:
        """Those that have any tokens, in order, in batches of bounded size; their numbers count all of them.

        Raises:
            TextError: a document that is none. ConfigError: no tokenizer, BOS token or chat template, and it is needed.
        """
        for batch in _batches(documents):
            texts = {number: self._as_text(number, kind, document) for number, kind, document in batch}
            ids = self._encoded({number: text for number, text in texts.items() if text is not None})
            ids |= {n: id_array(d, f"document number {n}") for n, kind, d in batch if kind == "tokens"}
            yield [self._tokens(number, kind, ids[number]) for number, kind, _ in batch if len(ids[number])]

    @cached_property
    def template(self) -> str:
        """The chat template in use."""
        return template_of(self._tokenizer, self._chat_template)

    @cached_property
    def _most(self) -> int:
        """Largest id that documents which come as ids may have."""
        return MOST_ID if self._tokenizer is None else max(self._tokenizer.get_vocab().values())

    def _as_text(self, number: int, kind: Kind, document: Any) -> str | None:
        if kind == "tokens":
            return None
        if self._tokenizer is None:
            raise ConfigError(
                "token_blocks needs a tokenizer, got None; a model that was given to load_lm as a module brings none: "
                "pass a transformers tokenizer, for instance AutoTokenizer.from_pretrained(name), or token ids"
            )
        if kind == "text":
            return str(document)
        return chat_text(self._tokenizer, document, self.template, f"chat number {number}")

    def _encoded(self, texts: Mapping[int, str]) -> dict[int, Ids]:
        """One call for many texts uses the tokenizer's threads and saves its overhead."""
        if self._tokenizer is None or not texts:
            return {}
        options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        encoded = self._tokenizer(list(texts.values()), **options)["input_ids"]
        return {number: np.asarray(ids, np.uint32) for number, ids in zip(texts, encoded, strict=True)}

    def _tokens(self, number: int, kind: Kind, ids: Ids) -> Tokens:
        marks, most = self._bos.marks(kind), MOST_ID
        if kind != "text":
            begun = tuple(map(int, ids[: len(marks.begin)])) == marks.begin
            marks, most = (Marks() if begun else marks), self._most
        return Tokens(number, kind, ids, marks, most)


def as_documents(documents: Any) -> Iterable[Document]:
    """What was given to `token_blocks`, as an iterable of documents: flat token ids are one document.

    Raises:
        TextError: a single text, or an array that is neither flat nor of shape (Q, T).
    """
    if isinstance(documents, str):
        raise TextError("texts is a single string; pass a list of texts, or read_texts(path) for a file")
    if is_array(documents):
        array = plain_array(documents)
        if array.dtype.kind in "iu" and array.ndim > 2:
            raise TextError(f"token ids must be a (Q, T) or a flat array, got shape {array.shape}")
        return [array] if array.dtype.kind in "iu" and array.ndim == 1 else array
    if isinstance(documents, Sequence) and documents and isinstance(documents[0], int | np.integer):
        return [documents]
    return documents  # type: ignore[no-any-return]  # what is in it is looked at as it comes


def _batches(documents: Iterable[Document]) -> Iterator[list[tuple[int, Kind, Document]]]:
    """Numbered documents that are not blank, in batches of bounded size."""
    batch: list[tuple[int, Kind, Document]] = []
    size = 0
    for number, document in enumerate(documents):
        kind = kind_of(document)
        if kind is None:
            raise TextError(_no_document(number, document))
        if kind == "text" and (not document or str(document).isspace()):
            continue
        batch.append((number, kind, document))
        size += sum(len(str(message)) for message in document) if kind == "chat" else len(document)
        if len(batch) == DOCUMENTS_PER_CALL or size >= SIZE_PER_CALL:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _no_document(number: int, found: Any) -> str:
    what = f"text number {number} is {type(found).__name__}, not a string, a list of token ids or a chat: {found!r:.80}"
    if not isinstance(found, Mapping):
        return what
    if {"role", "from"} & set(found):
        return f"{what}; a chat is a list of messages: pass a list of chats"
    return f"{what}; of records, pass one column, such as (record['text'] for record in dataset)"
