"""Documents to token ids, many in one call of the tokenizer."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, cast, get_args

import numpy as np
from numpy.typing import NDArray

from actcache.errors import ConfigError, TextError
from actcache.source.bos import Bos, Marks
from actcache.source.chat import chat_text, message_strings, template_of
from actcache.source.control import Control, ControlTokens
from actcache.source.documents import Bad, Documents, Place
from actcache.source.kinds import MOST_ID, Document, Ids, Kind, check_text, id_array, kind_of, uint32_ids
from actcache.source.text_files import reason_of

DOCUMENTS_PER_CALL = 512
SIZE_PER_CALL = 1 << 20
"""Characters or ids."""
IDS_PER_PIECE = 1 << 22

_NAMES: dict[Kind, str] = {"text": "text", "chat": "chat", "tokens": "document"}


class Item(NamedTuple):
    """A document, and where it comes from."""

    number: int
    """Among all documents, from 0 on."""
    kind: Kind
    document: Any
    place: Place | None
    """Where it lies, if its reader has said so."""

    def error(self, reason: object) -> TextError:
        """The error that this document is invalid for a reason."""
        lies = "" if self.place is None else f" ({self.place})"
        return TextError(f"{_NAMES[self.kind]} number {self.number}{lies}: {reason}")

    def bad(self, cause: BaseException, what: str = "") -> Bad:
        """The `Bad` that takes its place."""
        error = self.error(what + reason_of(cause))
        error.__cause__ = cause
        return Bad(error)


@dataclass(frozen=True, slots=True)
class Tokens:
    """The token ids of one document, and the marks around them."""

    item: Item
    ids: Ids
    """Of any integer type, maybe memory-mapped and long: to be copied in pieces."""
    marks: Marks
    most: int
    """Largest id that is allowed."""
    n_control: int = 0
    """Control tokens that the document spells."""

    def head(self, length: int) -> NDArray[np.uint32]:
        """As many ids as fit between the marks in `length` tokens; the tokenizer's own truncation gives the same."""
        return self._frame(self._piece(0, length - len(self.marks)), first=True, last=True)

    def pieces(self) -> Iterator[NDArray[np.uint32]]:
        """All ids, marks included, in pieces of bounded size.

        Raises:
            TextError: an id is outside the vocabulary, which shows when its piece is reached.
        """
        last = max(0, len(self.ids) - 1) // IDS_PER_PIECE
        for i in range(last + 1):
            piece = self._piece(i * IDS_PER_PIECE, (i + 1) * IDS_PER_PIECE)
            yield self._frame(piece, first=i == 0, last=i == last)

    def _piece(self, start: int, stop: int) -> NDArray[np.uint32]:
        try:
            return uint32_ids(self.ids[start:stop], self.most)
        except TextError as error:
            raise self.item.error(error) from error

    def _frame(self, ids: NDArray[np.uint32], *, first: bool, last: bool) -> NDArray[np.uint32]:
        begin, end = (self.marks.begin if first else ()), (self.marks.end if last else ())
        if not begin and not end:
            return ids
        return np.concatenate([np.array(begin, np.uint32), ids, np.array(end, np.uint32)])


class Tokeniser:
    """Documents of all kinds to token ids."""

    def __init__(
        self,
        tokenizer: Any | None,
        bos: Bos,
        chat_template: str | os.PathLike[str] | None,
        control_tokens: ControlTokens,
    ) -> None:
        if control_tokens not in get_args(ControlTokens):
            raise ConfigError(
                f"control_tokens must be one of {', '.join(get_args(ControlTokens))}, got {control_tokens!r}"
            )
        self._tokenizer = tokenizer
        self._bos = bos
        self._chat_template = chat_template
        self._spells_text = control_tokens == "text"

    def __call__(self, documents: Iterable[Document]) -> Iterator[list[Tokens | Bad]]:
        """The documents that have tokens, in order, in batches of bounded size; their numbers count all documents.

        An invalid document is replaced by `Bad`.

        Raises:
            ConfigError: a tokenizer, BOS token or chat template is needed and missing.
        """
        for batch in _batches(documents):
            made: list[Any] = [item if isinstance(item, Bad) else self._prepare(item) for item in batch]
            texts = {i: text for i, text in enumerate(made) if isinstance(text, str)}
            encoded = self._encode_all([(cast(Item, batch[i]), text) for i, text in texts.items()])
            made = list({**dict(enumerate(made)), **dict(zip(texts, encoded, strict=True))}.values())
            whole = [i for i in texts if not isinstance(made[i], Bad)]
            n_control = dict(zip(whole, self._control.counts([made[i] for i in whole]), strict=True))
            yield [
                ids if isinstance(ids, Bad) else self._tokens(cast(Item, item), ids, n_control.get(i, 0))
                for i, (item, ids) in enumerate(zip(batch, made, strict=True))
                if isinstance(ids, Bad) or len(ids)
            ]

    @cached_property
    def template(self) -> str:
        """The chat template in use."""
        return template_of(self._tokenizer, self._chat_template)

    @cached_property
    def _most(self) -> int:
        """Largest id allowed in documents that are given as ids."""
        return MOST_ID if self._tokenizer is None else max(self._tokenizer.get_vocab().values())

    @cached_property
    def _control(self) -> Control:
        return Control(self._tokenizer)

    def _prepare(self, item: Item) -> str | Ids | Bad:
        """The text to encode, or ids that are there already."""
        try:
            if item.kind == "tokens":
                return id_array(item.document)
            self._check_tokenizer()
            text = str(item.document) if item.kind == "text" else self._chat_text(item.document)
            check_text(text)
        except TextError as error:
            return item.bad(error)
        return text

    def _check_tokenizer(self) -> None:
        if self._tokenizer is None:
            raise ConfigError(
                "token_blocks needs a tokenizer, got None; a model that was given to load_lm as a module brings none: "
                "pass a transformers tokenizer, for instance AutoTokenizer.from_pretrained(name), or token ids"
            )

    def _chat_text(self, chat: Any) -> str:
        if self._spells_text and (spelled := self._control.spelled_in(message_strings(chat))):
            raise TextError(
                f"a message spells {spelled[0]!r}, which cannot be told from the control tokens of the template; "
                "only control_tokens='token' takes it"
            )
        return chat_text(self._tokenizer, chat, self.template)

    def _encode_all(self, texts: list[tuple[Item, str]]) -> list[Ids | Bad]:
        """Encode many texts in one call, which uses the tokenizer's threads and saves overhead."""
        if not texts:
            return []
        try:
            return list(self._encode([text for _, text in texts], [item.kind for item, _ in texts]))
        except BaseException as error:
            if not _is_of_tokenizer(error):
                raise
            if len(texts) == 1:
                return [texts[0][0].bad(error, "the tokenizer fails: ")]
        return [ids for one in texts for ids in self._encode_all([one])]

    def _encode(self, texts: list[str], kinds: list[Kind]) -> list[Ids]:
        options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        if not self._spells_text:
            return [np.asarray(ids, np.uint32) for ids in self._tokenizer(texts, **options)["input_ids"]]  # type: ignore[misc]
        ids: dict[int, Ids] = {}
        for kind in set(kinds):  # the control tokens that a template has written are meant
            chosen = [i for i, other in enumerate(kinds) if other == kind]
            with _as_it_was(self._tokenizer):
                found = self._tokenizer([texts[i] for i in chosen], split_special_tokens=kind == "text", **options)  # type: ignore[misc]
            ids |= {i: np.asarray(one, np.uint32) for i, one in zip(chosen, found["input_ids"], strict=True)}
        return [ids[i] for i in range(len(texts))]

    def _tokens(self, item: Item, ids: Ids, n_control: int) -> Tokens:
        marks, most = self._bos.marks(item.kind), MOST_ID
        if item.kind != "text":
            begun = tuple(map(int, ids[: len(marks.begin)])) == marks.begin
            marks, most = (Marks() if begun else marks), self._most
        if item.kind == "chat":
            n_control = len(self._control.spelled_in(message_strings(item.document)))
        return Tokens(item, ids, marks, most, n_control)


def _is_of_tokenizer(error: BaseException) -> bool:
    """Whether the tokenizer itself failed; panics of Rust are not an `Exception`."""
    if isinstance(error, MemoryError):
        return False
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


@contextmanager
def _as_it_was(tokenizer: Any) -> Iterator[None]:
    """Restore the setting for special tokens, which fast tokenizers keep from the last call."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    before = getattr(backend, "encode_special_tokens", None)
    try:
        yield
    finally:
        if before is not None:
            backend.encode_special_tokens = before  # type: ignore[union-attr]


def _batches(documents: Iterable[Document]) -> Iterator[list[Item | Bad]]:
    """Numbered documents that are not blank, in batches of bounded size.

    A document that its reader found bad has no number, because iterating over the reader skips it as well.
    """
    reader = documents if isinstance(documents, Documents) else None
    batch: list[Item | Bad] = []
    size = number = 0
    stream: Iterable[Any] = documents if reader is None else reader.with_bad()
    for document in stream:
        if type(document) is Bad:
            batch.append(document)
            continue
        kind = kind_of(document)
        item = Item(number, kind or "text", document, None if reader is None else reader.place.now())
        number += 1
        if kind is None:
            batch.append(Bad(TextError(_no_document(item))))
        elif kind != "text" or (document and not str(document).isspace()):
            batch.append(item)
            size += sum(len(str(message)) for message in document) if kind == "chat" else len(document)
        if len(batch) >= DOCUMENTS_PER_CALL or size >= SIZE_PER_CALL:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _no_document(item: Item) -> str:
    found = item.document
    what = f"text number {item.number} is {type(found).__name__}, not a string, a list of token ids or a chat"
    what += f": {found!r:.80}"
    if not isinstance(found, Mapping):
        return what
    if {"role", "from"} & set(found):
        return f"{what}; a chat is a list of messages: pass a list of chats"
    return f"{what}; of records, pass one column, such as (record['text'] for record in dataset)"
