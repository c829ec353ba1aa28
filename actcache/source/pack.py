"""Token ids to sequences, in temporary files, in seeded random order."""

from __future__ import annotations

import errno
import tempfile
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from hashlib import sha256
from pathlib import Path
from typing import IO, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from actcache.errors import ConfigError, StorageFullError, TextError
from actcache.files import full_disk_explained
from actcache.order import permutation
from actcache.source.bos import Bos, BosPolicy
from actcache.source.kinds import Document, Kind
from actcache.source.tokenise import Tokeniser, Tokens, as_documents
from actcache.spec import NO_DOCUMENT, Progress, TokenBlocks, check_positive

Packing = Literal["packed", "documents"]

_BYTES_PER_COPY = 1 << 25


def token_blocks(
    texts: Iterable[Document],
    tokenizer: Any,
    *,
    length: int,
    count: int | None = None,
    seed: int = 0,
    packing: Packing = "packed",
    bos: BosPolicy = "auto",
    chat_template: str | None = None,
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
      count; behind shorter ones, `document` is `NO_DOCUMENT` and `ids` are 0: such positions are not stored.

    `bos` says which tokens are added, which matters, since models are trained with theirs and behave oddly without:

    - `auto`: around a text, what the tokenizer itself puts there. Llama, Mistral and Gemma: BOS before it. BERT and
      other encoders: CLS before it, SEP behind it, even if it is cut. T5: EOS behind it. Where it puts nothing: its
      BOS before it, which is the end-of-text token for GPT-2 and Pythia and `<|im_start|>` for SmolLM2-Instruct; if
      it has no BOS its EOS, as for Qwen. Around chats and ids nothing: their template, or who made them, has seen to
      it.
    - `document`: before every document the token that `auto` puts before texts; chats and ids that begin with it get no
      second.
    - `sequence`: the same, and also at the beginning of a sequence that begins within a document, as SAELens'
      `prepend_bos`.
    - `none`: nothing.

    Memory stays bounded however long the texts: tokens lie in anonymous temporary files (in `TMPDIR`, about twelve
    bytes a token at the peak), and the arrays returned are memory-mapped from them.

    Args:
        texts: Documents, for instance from `read_texts`, `read_tokens` or `read_chats`.
        tokenizer: A transformers tokenizer; may be None for token ids.
        length: T, tokens of a sequence.
        count: Upper limit of sequences: reading stops as soon as there are that many, so the order is a shuffle of the
            sequences read. When the texts end before, a warning says how many there were.
        seed: Seed of the order of sequences.
        packing: How documents become sequences.
        bos: Which tokens are added.
        chat_template: A Jinja template, or the name of one of the tokenizer's, in place of the tokenizer's own.
        progress: Called with the sequences made so far and `count` (the same number twice when there is no limit).

    Raises:
        TextError: no text, less than one sequence of it, something that is no document, or ids that the tokenizer does
            not have.
        ConfigError: a length or count below one, no tokenizer where it is needed, or one that can begin no document or
            render no chat.
    """
    check_positive("token_blocks", length=length, **({} if count is None else {"count": count}))
    if packing not in get_args(Packing):
        raise ConfigError(f"packing must be one of {', '.join(get_args(Packing))}, got {packing!r}")
    policy = Bos(bos, tokenizer)
    tokeniser = Tokeniser(tokenizer, policy, chat_template)
    with ExitStack() as files:
        files.enter_context(_room_for_tokens())
        ids_file, document_file = (files.enter_context(tempfile.TemporaryFile()) for _ in range(2))
        kind = _Packed if packing == "packed" else _OneEach
        sequences: _Sequences = kind(ids_file, document_file, length, count, policy.sequence())
        for batch in tokeniser(as_documents(texts)):
            for document in batch:
                sequences.append(document)
            if progress is not None:
                progress(sequences.n_full, count or sequences.n_full)
            if sequences.n_full == count:
                break
        n_sequences = _full_sequences(sequences)
        order, digest = permutation(n_sequences, seed), sha256()
        ids = _permuted(ids_file, order, length, digest.update)
        document_numbers = _permuted(document_file, order, length, digest.update)
    description = {
        "length": length,
        "seed": seed,
        "n_documents": sequences.n_documents,
        "n_tokens": sequences.n_tokens_kept,
        **_tokenizer_entry(tokenizer, sequences.kinds, policy),
        "tokens": digest.hexdigest(),
        **sequences.description(),
        **_out_of_the_ordinary(sequences.kinds, policy, tokeniser),
    }
    return TokenBlocks(ids=ids, document=document_numbers, description=description)


@contextmanager
def _room_for_tokens() -> Iterator[None]:
    """Say where there is no room for the tokens, and how to name another place."""
    try:
        folder = Path(tempfile.gettempdir())
    except FileNotFoundError as error:  # Python looks for a folder that it can write something to
        raise StorageFullError(
            errno.ENOSPC, f"no folder for temporary files has room: {error.strerror}; name one with TMPDIR"
        ) from error
    what = "for the tokens in the temporary folder (TMPDIR names another one): about 12 bytes a token"
    with full_disk_explained(f"in {folder} {what}", folder):
        yield


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
        self.kinds: Counter[Kind] = Counter()
        if len(begin) >= length:
            raise ConfigError(f"length must be more than {len(begin)}, the tokens that begin a sequence; got {length}")

    @property
    @abstractmethod
    def n_full(self) -> int:
        """Sequences that are done."""

    @property
    @abstractmethod
    def n_tokens_kept(self) -> int:
        """Tokens of those."""

    @abstractmethod
    def append(self, document: Tokens) -> None:
        """Add a document, as far as there is room for it."""

    def description(self) -> dict[str, Any]:
        """What is to be said of these sequences."""
        return {}

    def _counted(self, document: Tokens) -> None:
        self.n_documents += 1
        self.kinds[document.kind] += 1

    def _write(self, ids: NDArray[np.uint32], document: NDArray[np.uint32]) -> None:
        for file, values in zip(self._files, (ids, document), strict=True):
            file.write(values.astype("<u4", copy=False).tobytes())


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
        if self._room == 0:
            return
        self._counted(document)
        for piece in document.pieces():
            if self._room == 0:
                return
            if len(self.begin):
                self._put_by_sequences(piece, document.number)
            else:
                self._put(piece, document.number)

    def _put_by_sequences(self, ids: NDArray[np.uint32], number: int) -> None:
        """Put ids, and before those that begin a sequence what every sequence begins with."""
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
        if self.n_full == self.count:
            return
        if len(document.marks) >= self.length:
            raise ConfigError(
                f"length must be more than {len(document.marks)}, the tokens that are put around each document; "
                f"got {self.length}"
            )
        kept = document.head(self.length)
        ids, numbers = np.zeros(self.length, np.uint32), np.full(self.length, NO_DOCUMENT, np.uint32)
        ids[: len(kept)], numbers[: len(kept)] = kept, document.number
        self._write(ids, numbers)
        self._counted(document)
        self.n_tokens += len(kept)
        n_cut = len(document.ids) + len(document.marks) - len(kept)
        self.n_cut += n_cut
        self.n_documents_cut += n_cut > 0

    def description(self) -> dict[str, Any]:
        return {"packing": "documents", "n_tokens_cut": self.n_cut}


def _tokenizer_entry(tokenizer: Any | None, kinds: Counter[Kind], policy: Bos) -> dict[str, str]:
    """The tokenizer's digest, where it made any of the tokens."""
    from actcache.lm.identity import tokenizer_digest

    used = kinds["text"] or kinds["chat"] or policy.policy in ("document", "sequence")
    return {"tokenizer": tokenizer_digest(tokenizer)} if used else {}


def _out_of_the_ordinary(kinds: Counter[Kind], policy: Bos, tokeniser: Tokeniser) -> dict[str, Any]:
    """What decides the tokens, as far as it is not as ever: texts, each begun by one token.

    Blocks that could be made before there was anything else are described as they were, so that stores of them go on.
    """
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


def _full_sequences(sequences: _Sequences) -> int:
    """How many sequences there are: at least one; warnings say what is missing, and what was cut."""
    n_sequences, length, count = sequences.n_full, sequences.length, sequences.count
    found = f"{sequences.n_tokens:,} tokens in {sequences.n_documents:,} documents"
    if not sequences.n_documents:
        raise TextError("no text: there is not one document with a visible character or a token id")
    if not n_sequences:
        raise TextError(
            f"text too short: {found}, less than one sequence of {length:,}; give more text or a smaller length"
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


def _permuted(
    file: IO[bytes], order: NDArray[np.int64], length: int, digest: Callable[[bytes], object]
) -> NDArray[np.uint32]:
    """The file's sequences in the given order, memory-mapped from another file; their bytes go through `digest`."""
    file.flush()
    packed = np.memmap(file, dtype="<u4", mode="r", shape=(len(order), length))
    sequences_per_copy = max(1, _BYTES_PER_COPY // (4 * length))
    with tempfile.TemporaryFile() as target:
        for start in range(0, len(order), sequences_per_copy):
            block = packed[order[start : start + sequences_per_copy]].tobytes()
            target.write(block)
            digest(block)
        target.flush()
        # Copy-on-write: whoever writes into the array changes neither the file nor anyone else's view of it.
        return np.memmap(target, dtype="<u4", mode="c", shape=packed.shape)
