"""Files, folders and datasets, to a stream of documents."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np

from actcache.errors import TextError
from actcache.source.columns import Wanted
from actcache.source.kinds import Chat, Document, Ids

EMBEDDED_CORPUS = "stories-corpus"
"""Name of the corpus that ships with the package; `read_texts` takes it in place of a path."""

_CORPUS_FILE = "stories-corpus.jsonl.bz2"
_OPENERS: dict[str, Callable[..., Any]] = {".jsonl": open, ".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_JSON_LINES = (".jsonl", ".jsonl.gz", ".jsonl.bz2", ".jsonl.xz")
_TABLES = (*_JSON_LINES, ".parquet")
_SUFFIXES = (".txt", *_TABLES, ".npy")
_SEPARATOR = "<|endoftext|>"
_RECORDS_PER_TABLE = 1024

D = TypeVar("D")


def read_texts(source: str | Path, *, split: str = "train", column: str | None = None) -> Iterator[str]:
    """Stream the texts of a file, a folder of files, or a `datasets` dataset, one document at a time.

    `.txt` files (and any other plain file) hold one document each, or several separated by lines of `<|endoftext|>`;
    `.jsonl` (plain, or compressed as `.gz`, `.bz2`, `.xz`) and `.parquet` one document a record, in `column` (by
    default the first of "text", "story", "content" that is there). A folder that `Dataset.save_to_disk` wrote is read
    from where it lies. `stories-corpus` is the corpus that ships with the package. Anything else that is no path is
    taken as a `datasets` name (`owner/name` or `owner/name:config`), which is streamed.

    Args:
        source: Path or name.
        split: Split of a dataset that has several.
        column: Column of the texts.

    Raises:
        TextError: nothing is there by that name, a file cannot be read as what it is called, or has no such column.
    """
    return cast(Iterator[str], _read(str(source), split, Wanted(("text",), column)))


def read_tokens(source: str | Path, *, split: str = "train", column: str | None = None) -> Iterator[Ids]:
    """Stream the token ids of a dataset that was tokenised before: 1-D arrays of integers, one a document.

    The sources are those of `read_texts`, with the ids in `column` (by default the first of "tokens", "input_ids" that
    is there, as SAELens and sparsify write them), and `.npy` files: an array of shape `(Q, T)` is Q documents, a flat
    one is one document; they are memory-mapped. Ids at which a column `attention_mask` beside `input_ids` is 0 are
    padding, and left out.

    Raises:
        TextError: as `read_texts`, or a value that is not a flat list of integers.
    """
    return cast(Iterator[Ids], _read(str(source), split, Wanted(("tokens",), column)))


def read_chats(source: str | Path, *, split: str = "train", column: str | None = None) -> Iterator[Chat]:
    """Stream chats: lists of messages, from `column` (by default the first of "messages", "conversations").

    Sources and errors are those of `read_texts`.
    """
    return cast(Iterator[Chat], _read(str(source), split, Wanted(("chat",), column)))


def read_documents(source: str | Path, *, split: str = "train", column: str | None = None) -> Iterator[Document]:
    """Stream whatever documents are there: texts, else chats, else token ids; for instance for `token_blocks`.

    Without `column`, the first column counts that `read_texts`, `read_chats` or `read_tokens` would take, in this
    order; with it, what it holds decides. Errors are those of `read_texts`.
    """
    return _read(str(source), split, Wanted(("text", "chat", "tokens"), column))


def _read(source: str, split: str, wanted: Wanted) -> Iterator[Document]:
    if source == EMBEDDED_CORPUS:
        return _read_file(_embedded_corpus(), wanted)
    path = Path(source).expanduser()
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _read_saved_dataset(path, split, wanted)
    if path.is_dir():
        return _read_folder(path, wanted)
    if path.exists():
        return _read_file(path, wanted)
    if source.endswith(_SUFFIXES) or source.startswith((".", "/", "~")):
        raise TextError(f"no text at {source}: there is no such file or folder")
    return _read_dataset(source, split, wanted)


def _embedded_corpus() -> Path:
    path = Path(str(files("actcache") / "assets" / _CORPUS_FILE))
    if not path.is_file():
        raise TextError(f"the embedded corpus is not in this installation ({path}); pipelines/make_corpus.py writes it")
    return path


def _read_folder(folder: Path, wanted: Wanted) -> Iterator[Document]:
    suffixes = (".txt", *_TABLES) if "text" in wanted.kinds else _TABLES
    arrays = (".npy",) if "tokens" in wanted.kinds else ()
    there = sorted(file for file in folder.rglob("*") if file.name.endswith(suffixes + arrays))
    # Where both texts and arrays are wanted, arrays beside texts are something else: masks, labels, embeddings.
    texts = [file for file in there if file.name.endswith(suffixes)] if "text" in wanted.kinds else []
    found = texts or there
    if not found:
        raise TextError(f"folder {folder} holds no text: expected files ending in {', '.join(suffixes + arrays)}")
    return (document for file in found for document in _read_file(file, wanted))


def _read_file(path: Path, wanted: Wanted) -> Iterator[Document]:
    reader = _read_json_lines if path.name.endswith(_JSON_LINES) else _read_plain
    reader = {".parquet": _read_parquet, ".npy": _read_array}.get(path.suffix, reader)
    return _told(reader(path, wanted), str(path), (OSError, EOFError, lzma.LZMAError, ValueError))


def _told(documents: Iterator[D], where: str, errors: tuple[type[Exception], ...]) -> Iterator[D]:
    """The documents; whatever goes wrong while they are read is reported with the name of where they lie."""
    end = object()
    while True:
        try:
            document = next(documents, end)
        except TextError:
            raise
        except UnicodeDecodeError as error:
            raise TextError(f"{where} is not UTF-8 text ({error.reason} at byte {error.start})") from error
        except errors as error:
            raise TextError(f"cannot read {where}: {error}") from error
        if document is end:
            return
        # Outside the try: closed when the interpreter ends, a generator finds the names of those errors gone.
        yield cast(D, document)


def _read_json_lines(path: Path, wanted: Wanted) -> Iterator[Document]:
    with _OPENERS[path.suffix](path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise TextError(f"{path}, line {number}: not valid JSON ({error.msg})") from None
            yield wanted.of_record(record, f"{path}, line {number}")


def _read_parquet(path: Path, wanted: Wanted) -> Iterator[Document]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as table:
        columns = wanted.columns_of(table.schema_arrow.names, str(path))
        for batch in table.iter_batches(batch_size=_RECORDS_PER_TABLE, columns=columns):
            yield from wanted.of_table(pyarrow.Table.from_batches([batch]), str(path))


def _read_plain(path: Path, wanted: Wanted) -> Iterator[str]:
    if "text" not in wanted.kinds:
        raise TextError(f"{path} is plain text and has no columns; expected a file ending in {', '.join(_TABLES)}")
    if wanted.column:
        raise TextError(f"{path} is plain text and has no column {wanted.column!r}")
    document: list[str] = []
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if line.strip() == _SEPARATOR:
                yield "".join(document).strip()
                document = []
            else:
                document.append(line)
    yield "".join(document).strip()


def _read_array(path: Path, wanted: Wanted) -> Iterator[Ids]:
    if "tokens" not in wanted.kinds:
        raise TextError(f"{path} holds an array, not text; read_tokens reads it as token ids")
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    if array.ndim not in (1, 2) or array.dtype.kind not in "iu":
        raise TextError(
            f"{path}: expected token ids, integers of shape (Q, T) or flat, found {array.dtype} of shape {array.shape}"
        )
    yield from array[None] if array.ndim == 1 else array


def _read_saved_dataset(folder: Path, split: str, wanted: Wanted) -> Iterator[Document]:
    """The rows of a folder of `save_to_disk`, memory-mapped and read by tables."""
    import datasets

    try:
        saved: Any = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise TextError(f"cannot read {folder}, which looks like a folder of save_to_disk: {error}") from error
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise TextError(f"{folder} has the splits {', '.join(saved)}, not {split!r}; choose one with --split")
        saved = saved[split]
    columns = wanted.columns_of(saved.column_names, str(folder))
    tables = saved.select_columns(columns).with_format("arrow").iter(batch_size=_RECORDS_PER_TABLE)
    rows = (document for table in tables for document in wanted.of_table(table, str(folder)))
    return _told(rows, str(folder), (OSError, ValueError))


def _read_dataset(name: str, split: str, wanted: Wanted) -> Iterator[Document]:
    import datasets

    path, _, config = name.partition(":")
    errors = (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError)
    try:
        rows = datasets.load_dataset(path, config or None, split=split, streaming=True)
    except errors as error:
        raise TextError(f"no text at {name!r}: no such file or folder, and datasets says: {error}") from error
    return _told((wanted.of_record(row, name) for row in rows), name, errors)
