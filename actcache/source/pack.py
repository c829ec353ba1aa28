"""Token ids to sequences, in temporary files, in seeded random order."""

from __future__ import annotations

import os
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from hashlib import sha256
from typing import IO, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from actcache.errors import ConfigError, TextError
from actcache.order import permutation
from actcache.source.arguments import as_documents, as_tokenizer, whole_number
from actcache.source.bos import Bos, BosPolicy
from actcache.source.control import ControlTokens
from actcache.source.documents import Bad, Documents, OnBad, Tally
from actcache.source.kinds import Document, Kind
from actcache.source.temporary import raise_no_room, read_permuted, temporary_file
from actcache.source.tokenise import Tokeniser, Tokens
from actcache.spec import NO_DOCUMENT, Progress, TokenBlocks

Packing = Literal["packed", "documents"]


def token_blocks(
    texts: Iterable[Document],
    tokenizer: Any,
    *,
    length: int,
    count: int | None = None,
    seed: int = 0,
    packing: Packing = "packed",
    bos: BosPolicy = "auto",
    chat_template: str | os.PathLike[str] | None = None,
    on_bad: OnBad = "error",
    control_tokens: ControlTokens = "token",
    progress: Progress | None = None,
) -> TokenBlocks:
    """Make sequences of `length` tokens of documents, in seeded random order.

    A document is a text, a chat (a list of messages, turned into text by the tokenizer's chat template), or token ids
    that were made elsewhere (a list, array or tensor; an array of shape `(Q, T)` is Q documents, a flat one is one).
    `document` counts all of them, so that it indexes the source, but texts without a visible character give no tokens.

    `packing` says how documents become sequences:

    - `packed`: one after the other without padding; a sequence may hold the end of one and the beginning of the next.
      Tokens after the last full sequence are dropped. Documents of ids that are all `length` long stay as they are.
    - `documents`: one document, one sequence. Of longer ones the rest is cut off, which the description and a warning
      count; after the end of shorter ones, `document` is `NO_DOCUMENT` and `ids` are 0: such positions are not stored.

    `bos` says which tokens are added. It matters: models behave oddly without the tokens they were trained with.

    - `auto`: around a text, what the tokenizer itself puts there. Llama, Mistral and Gemma: BOS before it. BERT and
      other encoders: CLS before it, SEP after it, even if it is cut. T5: EOS after it. Where it puts nothing: its
      BOS before it, which is the end-of-text token for GPT-2 and Pythia and `<|im_start|>` for SmolLM2-Instruct; if
      it has no BOS its EOS, as for Qwen. Around chats and ids nothing: their template, or their maker, has added it.
    - `document`: before every document the token that `auto` puts before texts; chats and ids that begin with it get no
      second.
    - `sequence`: the same, and also at the beginning of a sequence that begins within a document, as SAELens'
      `prepend_bos`.
    - `none`: nothing.

    `control_tokens` says what becomes of a control token (a special token of the tokenizer) that a document spells,
    such as `<|endoftext|>` in a text about tokenizers:

    - `token`: it becomes that token, as tokenizers do by default; a warning counts them.
    - `text`: it is encoded as the characters that it is made of. A chat with such a message is not valid then, since
      its template's own control tokens are written the same way.

    Memory stays bounded however long the texts: tokens lie in anonymous temporary files (in `TMPDIR`, about twelve
    bytes a token at the peak), and the arrays returned are memory-mapped from them.

    Args:
        texts: Documents, for instance from `read_texts`, `read_tokens` or `read_chats`.
        tokenizer: A transformers tokenizer, or the name or folder of one; may be None for token ids.
        length: T, tokens of a sequence.
        count: Upper limit of sequences: reading stops as soon as there are that many, so the order is a shuffle of the
            sequences read. When the texts end before, a warning says how many there were.
        seed: Seed of the order of sequences.
        packing: How documents become sequences.
        bos: Which tokens are added.
        chat_template: A Jinja template, the name of one of the tokenizer's, or the Path of a file with one, in place of
            the tokenizer's own.
        on_bad: What happens to a document that is not valid (half a surrogate pair, ids that the tokenizer does not
            have, a chat that its template refuses): `error`, or `skip`, which leaves it out; a warning and the
            description count them, with those that a reader of `read_texts` and the like finds on the way. Documents
            that are left out here keep their numbers.
        control_tokens: What becomes of control tokens that a document spells.
        progress: Called with the sequences made so far and `count` (the same number twice when there is no limit).

    Raises:
        TextError: no text, less than one sequence of it, something that is not a document, or ids that the tokenizer
            does not have.
        ConfigError: a length or count below one, no tokenizer where it is needed, or one that can begin no document or
            render no chat.
        StorageFullError: no room for the temporary files.

    Examples:
        >>> texts = [f"One day {n} cats sat on a mat. They were happy. " * 8 for n in range(20)]
        >>> blocks = ac.token_blocks(texts, lm.tokenizer, length=32, count=10)
        >>> blocks.ids.shape, blocks.document.shape
        ((10, 32), (10, 32))
        >>> ac.token_blocks(texts, lm.tokenizer, length=256, packing="documents").ids.shape
        (20, 256)
    """
    length = whole_number("length", length, 1)
    count = None if count is None else whole_number("count", count, 1)
    seed = whole_number("seed", seed, -(1 << 63))
    if packing not in get_args(Packing):
        raise ConfigError(f"packing must be one of {', '.join(get_args(Packing))}, got {packing!r}")
    tokenizer = as_tokenizer(tokenizer)
    policy = Bos(bos, tokenizer)
    tokeniser = Tokeniser(tokenizer, policy, chat_template, control_tokens)
    documents = as_documents(texts)
    tally = Tally(on_bad)
    if isinstance(documents, Documents) and documents.bad.on_bad == "skip":
        tally.on_bad = "skip"
    with ExitStack() as files:
        ids_file, document_file = (files.enter_context(temporary_file()) for _ in range(2))
        kind = _Packed if packing == "packed" else _OneEach
        sequences: _Sequences = kind(ids_file, document_file, length, count, policy.sequence())
        for batch in tokeniser(documents):
            for document in batch:
                if sequences.n_full == count:
                    break
                sequences.take(document, tally)
            if progress is not None:
                progress(sequences.n_full, count or sequences.n_full)
            if sequences.n_full == count:
                break
        n_sequences = _full_sequences(sequences, tally)
        _say_what_was_special(sequences, tally, chat_template, control_tokens)
        order, digest = permutation(n_sequences, seed), sha256()
        ids = read_permuted(ids_file, order, length, digest.update)
        document_numbers = read_permuted(document_file, order, length, digest.update)
    description = {
        "length": length,
        "seed": seed,
        "n_documents": sequences.n_documents,
        "n_tokens": sequences.n_tokens_kept,
        **_tokenizer_entry(tokenizer, sequences.kinds, policy),
        "tokens": digest.hexdigest(),
        **sequences.description(),
        **_out_of_the_ordinary(sequences.kinds, policy, tokeniser),
        **({"control_tokens": "text"} if control_tokens == "text" else {}),
        **({"n_bad_documents": tally.n_bad} if tally.n_bad else {}),
    }
    return TokenBlocks(ids=ids, document=document_numbers, description=description)


class _Sequences(ABC):
    """The sequences so far, in two files of little-endian 32-bit integers."""

    def __init__(
        self, ids: IO[bytes], document: IO[bytes], length: int, count: int | None, begin: tuple[int, ...]
    ) -> None:
        self._files = (ids, document)
        self.length, self.count = length, count
        self.begin = np.array(begin, dtype=np.uint32)
        self.n_tokens = 0
        self.n_documents = 0
        self.n_control = 0
        self._n_written = 0
        self.kinds: Counter[Kind] = Counter()
        if len(begin) >= length:
            raise ConfigError(f"length must be more than {len(begin)}, the tokens that begin a sequence; got {length}")

    @property
    @abstractmethod
    def n_full(self) -> int:
        """Complete sequences."""

    @property
    @abstractmethod
    def n_tokens_kept(self) -> int:
        """Tokens in the complete sequences."""

    @abstractmethod
    def append(self, document: Tokens) -> None:
        """Add a document, as far as there is room for it.

        Raises:
            TextError: it has invalid ids; a part of it may have been added.
        """

    def take(self, document: Tokens | Bad, tally: Tally) -> None:
        """Add a document and count it; an invalid one is removed again, and the tally counts it."""
        if isinstance(document, Bad):
            tally.add(document.error)
            return
        n_tokens, n_written = self.n_tokens, self._n_written
        try:
            self.append(document)
        except TextError as error:
            tally.add(error)
            self._take_back(n_written)
            self.n_tokens = n_tokens
            return
        self.n_documents += 1
        self.n_control += document.n_control
        self.kinds[document.item.kind] += 1

    def description(self) -> dict[str, Any]:
        """Entries of the description that depend on the packing."""
        return {}

    def _write(self, ids: NDArray[np.uint32], document: NDArray[np.uint32]) -> None:
        try:
            for file, values in zip(self._files, (ids, document), strict=True):
                file.write(values.astype("<u4", copy=False).tobytes())
            self._n_written += len(ids)
        except OSError as error:
            raise_no_room(error)

    def _take_back(self, n_written: int) -> None:
        """Remove what was written after so many tokens."""
        for file in self._files:
            file.seek(4 * n_written)
            file.truncate()
        self._n_written = n_written


class _Packed(_Sequences):
    """Documents one after the other."""

    @property
    def n_full(self) -> int:
        return self.n_tokens // self.length

    @property
    def n_tokens_kept(self) -> int:
        return self.n_full * self.length

    @property
    def _room(self) -> int | None:
        return None if self.count is None else self.count * self.length - self.n_tokens

    def append(self, document: Tokens) -> None:
        for piece in document.pieces():
            if self._room == 0:
                return
            if len(self.begin):
                self._put_by_sequences(piece, document.item.number)
            else:
                self._put(piece, document.item.number)

    def _put_by_sequences(self, ids: NDArray[np.uint32], number: int) -> None:
        """Write ids, and at the beginning of each sequence the tokens that begin it."""
        while len(ids) and self._room != 0:
            at = self.n_tokens % self.length
            if at == 0 and not np.array_equal(ids[: len(self.begin)], self.begin):
                self._put(self.begin, number)
                at = len(self.begin)
            self._put(ids[: self.length - at], number)
            ids = ids[self.length - at :]

    def _put(self, ids: NDArray[np.uint32], number: int) -> None:
        ids = ids[: self._room]
        self._write(ids, np.full(len(ids), number, dtype="<u4"))
        self.n_tokens += len(ids)


class _OneEach(_Sequences):
    """Each document a sequence of its own, cut or padded at its end."""

    n_cut = 0
    n_documents_cut = 0

    @property
    def n_full(self) -> int:
        return self.n_documents

    @property
    def n_tokens_kept(self) -> int:
        return self.n_tokens

    def append(self, document: Tokens) -> None:
        if len(document.marks) >= self.length:
            raise ConfigError(
                f"length must be more than {len(document.marks)}, the tokens that are put around each document; "
                f"got {self.length}"
            )
        kept = document.head(self.length)
        ids, numbers = np.zeros(self.length, np.uint32), np.full(self.length, NO_DOCUMENT, np.uint32)
        ids[: len(kept)], numbers[: len(kept)] = kept, document.item.number
        self._write(ids, numbers)
        self.n_tokens += len(kept)
        n_cut = len(document.ids) + len(document.marks) - len(kept)
        self.n_cut += n_cut
        self.n_documents_cut += n_cut > 0

    def description(self) -> dict[str, Any]:
        return {"packing": "documents", "n_tokens_cut": self.n_cut}


def _tokenizer_entry(tokenizer: Any | None, kinds: Counter[Kind], policy: Bos) -> dict[str, str]:
    """The tokenizer's digest, if it made any of the tokens."""
    from actcache.lm.identity import tokenizer_digest

    used = kinds["text"] or kinds["chat"] or policy.policy in ("document", "sequence")
    return {"tokenizer": tokenizer_digest(tokenizer)} if used else {}


def _out_of_the_ordinary(kinds: Counter[Kind], policy: Bos, tokeniser: Tokeniser) -> dict[str, Any]:
    """The settings that differ from the defaults (texts, one BOS each); others are not in the description."""
    said: dict[str, Any] = {} if policy.policy == "auto" else {"bos": policy.policy}
    marks = {kind: policy.marks(kind) for kind in sorted(kinds)}
    usual = {kind: policy.as_ever() if kind == "text" else not len(marks[kind]) for kind in marks}
    if not all(usual.values()):
        said["marks"] = {kind: str(marks[kind]) for kind in marks if not usual[kind]}
    if set(kinds) != {"text"}:
        said["kinds"] = {kind: kinds[kind] for kind in marks}
    if kinds["chat"]:
        said["chat_template"] = sha256(tokeniser.template.encode()).hexdigest()
    return said


def _full_sequences(sequences: _Sequences, tally: Tally) -> int:
    """How many sequences there are: at least one; warnings say what is missing, and what was cut."""
    n_sequences, length, count = sequences.n_full, sequences.length, sequences.count
    found = f"{sequences.n_tokens:,} tokens in {sequences.n_documents:,} documents"
    bad = f"; {tally}" if tally.n_bad else ""
    if not sequences.n_documents:
        raise TextError(f"no text: there is not one document with a visible character or a token id{bad}")
    if not n_sequences:
        raise TextError(
            f"text too short: {found}, less than one sequence of {length:,}; give more text or a smaller length{bad}"
        )
    if count is not None and n_sequences < count:
        warnings.warn(
            f"asked for {count:,} sequences of {length:,} tokens, but the text ends after {n_sequences:,} ({found})",
            stacklevel=3,
        )
    if isinstance(sequences, _OneEach) and sequences.n_cut:
        warnings.warn(
            f"{sequences.n_documents_cut:,} of {sequences.n_documents:,} documents are longer than {length:,} tokens: "
            f"{sequences.n_cut:,} tokens were cut off, {sequences.n_tokens:,} kept",
            stacklevel=3,
        )
    return n_sequences


def _say_what_was_special(
    sequences: _Sequences, tally: Tally, chat_template: Any, control_tokens: ControlTokens
) -> None:
    """Warn of bad documents, of control tokens, and of options that had no effect."""
    tally.warn(stacklevel=3)
    if chat_template is not None and not sequences.kinds["chat"]:
        warnings.warn(
            "chat_template was given, but there is no chat among the documents: it was not used", stacklevel=3
        )
    if sequences.n_control:
        n_times = f"{sequences.n_control:,} times" if sequences.n_control > 1 else "once"
        became = (
            "the tokenizer makes control tokens of them in spite of control_tokens='text'"
            if control_tokens == "text"
            else "these became control tokens; control_tokens='text' (--control-tokens text) encodes them as plain text"
        )
        warnings.warn(f"documents spell control tokens of the tokenizer {n_times}: {became}", stacklevel=3)
    if control_tokens == "text" and set(sequences.kinds) == {"tokens"}:
        warnings.warn("control_tokens='text' was given, but there are only token ids: it was not used", stacklevel=3)
