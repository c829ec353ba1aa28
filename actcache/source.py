"""Texts to token blocks: read texts from wherever they lie, pack them into equal sequences, keep each token's origin.

In: files, folders or `datasets` names, and a tokenizer. Out: `TokenBlocks`, token ids and document numbers of shape
`(Q, T)` in seeded random order. The only room that knows the `datasets` library.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from actcache.errors import ConfigError, TextError
from actcache.order import permutation
from actcache.spec import Progress, TokenBlocks, check_positive

EMBEDDED_CORPUS = "stories-corpus"
"""Name of the corpus that ships with the package; `read_texts` takes it in place of a path."""

_CORPUS_FILE = "stories-corpus.jsonl.bz2"
_TEXT_COLUMNS = ("text", "story", "content")
_OPENERS: dict[str, Callable[..., Any]] = {".jsonl": open, ".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_JSON_LINES = (".jsonl", ".jsonl.gz", ".jsonl.bz2", ".jsonl.xz")
_SUFFIXES = (".txt", *_JSON_LINES, ".parquet")
_SEPARATOR = "<|endoftext|>"

_TEXTS_PER_CALL = 512
_CHARACTERS_PER_CALL = 1 << 20
_BYTES_PER_COPY = 1 << 25


def read_texts(source: str, *, split: str = "train", column: str | None = None) -> Iterator[str]:
    """Stream the texts of a file, a folder of files, or a `datasets` dataset, one document at a time.

    `.txt` files (and any other plain file) hold one document each, or several separated by lines of `<|endoftext|>`;
    `.jsonl` (plain, or compressed as `.gz`, `.bz2`, `.xz`) and `.parquet` one document a record, in `column` (by
    default the first of "text", "story", "content" that is there). `stories-corpus` is the corpus that ships with the
    package. Anything else that is no path is taken as a `datasets` name (`owner/name` or `owner/name:config`), of which
    `split` is streamed.

    Raises:
        TextError: nothing is there by that name, a file cannot be read as what it is called, or has no such column.
    """
    if source == EMBEDDED_CORPUS:
        return _read_file(_embedded_corpus(), column)
    path = Path(source).expanduser()
    if path.is_dir():
        return _read_folder(path, column)
    if path.exists():
        return _read_file(path, column)
    if source.endswith(_SUFFIXES) or source.startswith((".", "/", "~")):
        raise TextError(f"no text at {source}: there is no such file or folder")
    return _read_dataset(source, split, column)


def _embedded_corpus() -> Path:
    path = Path(str(files("actcache") / "assets" / _CORPUS_FILE))
    if not path.is_file():
        raise TextError(f"the embedded corpus is not in this installation ({path}); pipelines/make_corpus.py writes it")
    return path


def _read_folder(folder: Path, column: str | None) -> Iterator[str]:
    found = sorted(file for file in folder.rglob("*") if file.name.endswith(_SUFFIXES))
    if not found:
        raise TextError(f"folder {folder} holds no text: expected files ending in {', '.join(_SUFFIXES)}")
    return (text for file in found for text in _read_file(file, column))


def _read_file(path: Path, column: str | None) -> Iterator[str]:
    """The texts of one file; whatever goes wrong while reading it is reported with its name."""
    reader = _read_json_lines if path.name.endswith(_JSON_LINES) else _read_plain
    reader = _read_parquet if path.suffix == ".parquet" else reader
    texts = reader(path, column)
    while True:
        try:
            text = next(texts, None)
        except TextError:
            raise
        except UnicodeDecodeError as error:
            raise TextError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from error
        except (OSError, EOFError, lzma.LZMAError, ValueError) as error:
            raise TextError(f"cannot read {path}: {error}") from error
        if text is None:
            return
        # Outside the try: closed when the interpreter ends, a generator finds the names of those errors gone.
        yield text


def _read_json_lines(path: Path, column: str | None) -> Iterator[str]:
    with _OPENERS[path.suffix](path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise TextError(f"{path}, line {number}: not valid JSON ({error.msg})") from None
            yield record if isinstance(record, str) else _text_of(record, column, f"{path}, line {number}")


def _read_parquet(path: Path, column: str | None) -> Iterator[str]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as table:
        name = _text_column(table.schema_arrow.names, column, str(path))
        for batch in table.iter_batches(batch_size=1024, columns=[name]):
            for record in batch.to_pylist():
                yield _text_of(record, name, str(path))


def _read_plain(path: Path, column: str | None) -> Iterator[str]:
    if column:
        raise TextError(f"{path} is plain text and has no column {column!r}")
    document: list[str] = []
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if line.strip() == _SEPARATOR:
                yield "".join(document).strip()
                document = []
            else:
                document.append(line)
    yield "".join(document).strip()


def _read_dataset(name: str, split: str, column: str | None) -> Iterator[str]:
    import datasets

    path, _, config = name.partition(":")
    try:
        rows = datasets.load_dataset(path, config or None, split=split, streaming=True)
    except (OSError, ValueError, datasets.exceptions.DatasetNotFoundError) as error:
        raise TextError(f"no text at {name!r}: no such file or folder, and datasets says: {error}") from error
    return (_text_of(row, column, name) for row in rows)


def _text_column(names: Iterable[str], column: str | None, where: str) -> str:
    there, wanted = list(names), (column,) if column else _TEXT_COLUMNS
    for name in wanted:
        if name in there:
            return name
    raise TextError(f"{where}: no text column {' or '.join(map(repr, wanted))} among {there}; name one with --column")


def _text_of(record: Any, column: str | None, where: str) -> str:
    if not isinstance(record, dict):
        raise TextError(f"{where}: expected an object with a text column, found {type(record).__name__}")
    name = _text_column(record, column, where)
    if not isinstance(text := record[name], str):
        raise TextError(f"{where}: column {name!r} holds {type(text).__name__}, not text")
    return text


def token_blocks(
    texts: Iterable[str],
    tokenizer: Any,
    *,
    length: int,
    count: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> TokenBlocks:
    """Pack texts into sequences of `length` tokens without padding, in seeded random order.

    Every document begins with the tokenizer's BOS token (its EOS token if it has no BOS); a sequence may hold the end
    of one document and the beginning of the next. `document` counts all texts, so that it indexes the source, but
    texts without a visible character give no tokens. Tokens after the last full sequence are dropped.

    Memory stays bounded however long the texts: tokens lie in anonymous temporary files (in `TMPDIR`, about twelve
    bytes a token at the peak), and the arrays returned are memory-mapped from them.

    Args:
        texts: Documents, for instance from `read_texts`.
        tokenizer: A transformers tokenizer.
        length: T, tokens of a sequence.
        count: Upper limit of sequences: reading stops as soon as there are that many, so the order is a shuffle of the
            sequences read. When the texts end before, a warning says how many there were.
        seed: Seed of the order of sequences.
        progress: Called with the sequences packed so far and `count` (the same number twice when there is no limit).

    Raises:
        TextError: no text, less than one sequence of it, or a text that is not a string.
        ConfigError: a length or count below one, no tokenizer, or one that can begin no document.
    """
    from actcache.lm.identity import tokenizer_digest

    check_positive("token_blocks", length=length, **({} if count is None else {"count": count}))
    if isinstance(texts, str):
        raise TextError("texts is a single string; pass a list of texts, or read_texts(path) for a file")
    if tokenizer is None:
        raise ConfigError(
            "token_blocks needs a tokenizer, got None; a model that was given to load_lm as a module brings none: "
            "pass a transformers tokenizer, for instance AutoTokenizer.from_pretrained(name)"
        )
    with tempfile.TemporaryFile() as ids_file, tempfile.TemporaryFile() as document_file:
        stream = _Stream(ids=ids_file, document=document_file)
        n_tokens_wanted = None if count is None else count * length
        for batch in _documents(texts, tokenizer):
            stream.append(batch, n_tokens_wanted)
            done = stream.n_tokens // length
            if progress is not None:
                progress(done, count or done)
            if done == count:
                break
        n_sequences = _full_sequences(stream, length, count)
        order, digest = permutation(n_sequences, seed), sha256()
        ids = _permuted(ids_file, order, length, digest.update)
        document = _permuted(document_file, order, length, digest.update)
    description = {
        "length": length,
        "seed": seed,
        "n_documents": stream.n_documents,
        "n_tokens": n_sequences * length,
        "tokenizer": tokenizer_digest(tokenizer),
        "tokens": digest.hexdigest(),
    }
    return TokenBlocks(ids=ids, document=document, description=description)


@dataclass(frozen=True, slots=True)
class _Document:
    """The token ids of one text, begun by BOS, and the text's number."""

    number: int
    ids: NDArray[np.uint32]


@dataclass(kw_only=True, slots=True)
class _Stream:
    """The packed tokens so far, in two files of little-endian 32-bit integers."""

    ids: IO[bytes]
    document: IO[bytes]
    n_tokens: int = 0
    n_documents: int = 0

    def append(self, batch: list[_Document], limit: int | None) -> None:
        """Write documents, up to `limit` tokens in all."""
        for document in batch:
            ids = document.ids if limit is None else document.ids[: limit - self.n_tokens]
            if not len(ids):
                return
            self.ids.write(ids.astype("<u4").tobytes())
            self.document.write(np.full(len(ids), document.number, dtype="<u4").tobytes())
            self.n_tokens += len(ids)
            self.n_documents += 1


def _documents(texts: Iterable[str], tokenizer: Any) -> Iterator[list[_Document]]:
    """Tokenise in batches: one call of the tokenizer for many texts uses its threads and saves its overhead."""
    begin = np.array([_first_token(tokenizer)], dtype=np.uint32)
    for batch in _text_batches(texts):
        encoded = tokenizer(
            [text for _, text in batch], add_special_tokens=False, return_attention_mask=False, verbose=False
        )["input_ids"]
        yield [
            _Document(number, np.concatenate([begin, np.asarray(ids, dtype=np.uint32)]))
            for (number, _), ids in zip(batch, encoded, strict=True)
            if len(ids)
        ]


def _text_batches(texts: Iterable[str]) -> Iterator[list[tuple[int, str]]]:
    """Numbered texts that are not blank, in batches of bounded size."""
    batch: list[tuple[int, str]] = []
    n_characters = 0
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise TextError(f"text number {number} is {type(text).__name__}, not a string: {text!r:.80}")
        if not text or text.isspace():
            continue
        batch.append((number, text))
        n_characters += len(text)
        if len(batch) == _TEXTS_PER_CALL or n_characters >= _CHARACTERS_PER_CALL:
            yield batch
            batch, n_characters = [], 0
    if batch:
        yield batch


def _first_token(tokenizer: Any) -> int:
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise ConfigError(
        f"{type(tokenizer).__name__} has neither a BOS nor an EOS token to begin documents with; set bos_token"
    )


def _full_sequences(stream: _Stream, length: int, count: int | None) -> int:
    """How many sequences the stream gives: at least one, and a warning when fewer than asked."""
    n_sequences = stream.n_tokens // length
    found = f"{stream.n_tokens:,} tokens in {stream.n_documents:,} documents"
    if not stream.n_documents:
        raise TextError("no text: there is not one document with a visible character")
    if not n_sequences:
        raise TextError(
            f"text too short: {found}, less than one sequence of {length:,}; give more text or a smaller length"
        )
    if count is not None and n_sequences < count:
        warnings.warn(
            f"asked for {count:,} sequences of {length:,} tokens, but the text ends after {n_sequences:,} ({found})",
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
