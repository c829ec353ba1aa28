"""Files, folders and datasets, to a stream of documents."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from importlib.resources import files
from itertools import chain
from pathlib import Path
from typing import Any, cast

from actcache.errors import ConfigError, TextError
from actcache.source.columns import Wanted
from actcache.source.dataset_folders import ALL, check_file_split, files_of
from actcache.source.documents import Bad, Documents, OnBad, Place
from actcache.source.kinds import Chat, Document, Ids, is_array, plain_array
from actcache.source.text_files import SUFFIXES, of_tables, read_file, reason_of, suffix_of, told

EMBEDDED_CORPUS = "stories-corpus"
"""Name of the corpus that ships with the package; `read_texts` takes it in place of a path."""

_CORPUS_FILE = "stories-corpus.jsonl.bz2"
_RECORDS_PER_TABLE = 1024
_SourcePath = str | os.PathLike[str]


def read_texts(
    source: _SourcePath, *, split: str | None = None, column: str | None = None, on_bad: OnBad = "error"
) -> Documents[str]:
    """Stream the texts of a file, a folder of files, or a `datasets` dataset, one document at a time.

    The first bytes of a file say what it is. Text is read by its name: `.txt` (and any other name) as one document, or
    several separated by lines of `<|endoftext|>`; `.jsonl`, `.ndjson` and `.json` (lines, or one array), `.csv` and
    `.tsv` with a header, `.parquet`, `.arrow` and `.feather` as one document a record, in `column` (by default the
    first of "text", "story", "content" that is there). Text may be compressed: gzip, bzip2, xz, zstd. A folder that
    `Dataset.save_to_disk` wrote is read from where it lies. Of other folders every such file is read, in the order of
    their names, but for those whose names begin with a dot; patterns (`data/*.jsonl`) choose some. `stories-corpus` is
    the corpus that ships with the package. Any other name that is not a path is a `datasets` name (`owner/name` or
    `owner/name:config`), which is streamed; code that comes with a dataset is never run.

    Args:
        source: Path or name.
        split: Split of a dataset that has several; by default "train". Those of a folder are told by its README.md or
            the names of its files, and "all" takes all.
        column: Column of the texts.
        on_bad: What happens to a document that is not valid: `error`, or `skip`, which leaves it out; a warning at the
            end says how many there were. A file that cannot be read at all is an error either way.

    Raises:
        TextError: nothing is there by that name, a file cannot be read as what it is called, or has no such column.
        ConfigError: a split or a column is named, but the source has none.

    Examples:
        >>> from pathlib import Path
        >>> _ = Path("two.json").write_text('[{"text": "One day"}, {"text": "Two days"}]')
        >>> list(ac.read_texts("two.json"))
        ['One day', 'Two days']
    """
    return cast("Documents[str]", _read(source, split, Wanted(("text",), column), on_bad))


def read_tokens(
    source: _SourcePath | Any, *, split: str | None = None, column: str | None = None, on_bad: OnBad = "error"
) -> Documents[Ids]:
    """Stream the token ids of a dataset that was tokenised before: 1-D arrays of integers, one a document.

    The sources are those of `read_texts`, with the ids in `column` (by default the first of "tokens", "input_ids" that
    is there, as SAELens and sparsify write them), and `.npy` files: an array of shape `(Q, T)` is Q documents, a flat
    one is one document; they are memory-mapped. Ids at which a column `attention_mask` beside `input_ids` is 0 are
    padding, and left out. Arrays and tensors of either shape, and lists of lists, are taken too.

    Raises:
        TextError: as `read_texts`, or a value that is not a flat list of integers.

    Examples:
        >>> np.save("ids.npy", np.arange(12).reshape(3, 4))
        >>> [ids.tolist() for ids in ac.read_tokens("ids.npy")]
        [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    """
    wanted = Wanted(("tokens",), column)
    if is_array(source) or isinstance(source, list | tuple):
        if split is not None or column is not None:
            raise ConfigError("read_tokens was given ids, which have neither split nor column: leave these out")
        return cast("Documents[Ids]", _of_values(source, wanted, on_bad))
    return cast("Documents[Ids]", _read(source, split, wanted, on_bad))


def read_chats(
    source: _SourcePath, *, split: str | None = None, column: str | None = None, on_bad: OnBad = "error"
) -> Documents[Chat]:
    """Stream chats: lists of messages, from `column` (by default the first of "messages", "conversations").

    Sources, arguments and errors are those of `read_texts`.

    Examples:
        >>> from pathlib import Path
        >>> said = '{"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]}'
        >>> _ = Path("chats.jsonl").write_text(said)
        >>> [message["role"] for message in next(iter(ac.read_chats("chats.jsonl")))]
        ['user', 'assistant']
    """
    return cast("Documents[Chat]", _read(source, split, Wanted(("chat",), column), on_bad))


def read_documents(
    source: _SourcePath, *, split: str | None = None, column: str | None = None, on_bad: OnBad = "error"
) -> Documents[Document]:
    """Stream the documents of any kind: texts, or else chats, or else token ids; for instance for `token_blocks`.

    Without `column`, the first column counts that `read_texts`, `read_chats` or `read_tokens` would take, in this
    order; with it, what it holds decides. Arguments and errors are those of `read_texts`.

    Examples:
        >>> from pathlib import Path
        >>> _ = Path("ids.jsonl").write_text('{"input_ids": [5, 6, 7]}')
        >>> [ids.tolist() for ids in ac.read_documents("ids.jsonl")]
        [[5, 6, 7]]
    """
    return _read(source, split, Wanted(("text", "chat", "tokens"), column), on_bad)


def is_streamed(source: str) -> bool:
    """Whether it is the name of a dataset. A missing file is not a dataset; reading it says so."""
    return source != EMBEDDED_CORPUS and not _looks_like_path(source) and not _exists(source)


def _read(source: Any, split: str | None, wanted: Wanted, on_bad: OnBad) -> Documents[Document]:
    source = _checked_source(source)
    for name, value in (("split", split), ("column", wanted.column)):
        if value is not None and (not isinstance(value, str) or not value):
            raise ConfigError(f"{name} must be a name, got {value!r}")
    place = Place(source)
    return Documents(_stream(source, split, wanted, place), place, on_bad)


def _stream(source: str, split: str | None, wanted: Wanted, place: Place) -> Iterator[Document | Bad]:
    if source == EMBEDDED_CORPUS:
        if split not in (None, ALL):
            raise ConfigError(f"{source} has no splits: leave split (--split) out")
        return read_file(_embedded_corpus(), wanted, place)
    if "://" in source:
        raise TextError(
            f"{source} is a URL, and texts are read from this machine or by their `datasets` name: download it"
        )
    path = Path(source).expanduser()
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _read_saved_dataset(path, split, wanted, place)
    if path.is_dir():
        return _read_files(files_of(path, wanted, split), wanted, place)
    if path.exists():
        check_file_split(path, split)
        return read_file(path, wanted, place)
    folder, colon, config = source.rpartition(":")
    if colon and Path(folder).expanduser().is_dir():
        return _read_files(files_of(Path(folder).expanduser(), wanted, split, config), wanted, place)
    if any(c in source for c in "*?["):
        return _read_pattern(path, split, wanted, place)
    if _looks_like_path(source):
        raise TextError(f"no text at {source}: there is no such file or folder")
    return _read_dataset(source, split or "train", wanted, place)


def _checked_source(source: Any) -> str:
    """A source as a string; an error names anything else, with what to do instead."""
    if isinstance(source, str | os.PathLike):
        text = os.fspath(source)
        if isinstance(text, str) and text.strip() and "\0" not in text:
            return text
        raise TextError(f"the source of a text is a path or the name of a dataset, got {text!r}")
    found = type(source).__name__
    hint = "; what is in memory already is given to token_blocks" if hasattr(source, "__iter__") else ""
    raise TextError(f"the source of a text is a path or the name of a dataset, got {found}{hint}")


def _looks_like_path(source: str) -> bool:
    return source.startswith((".", "/", "~")) or suffix_of(Path(source)) in SUFFIXES or "\\" in source


def _exists(source: str) -> bool:
    path = Path(source).expanduser()
    return path.exists() or any(c in source for c in "*?[") or Path(source.rpartition(":")[0] or "/no").is_dir()


def _embedded_corpus() -> Path:
    path = Path(str(files("actcache") / "assets" / _CORPUS_FILE))
    if not path.is_file():
        raise TextError(f"the embedded corpus is not in this installation ({path}); pipelines/make_corpus.py writes it")
    return path


def _of_values(values: Any, wanted: Wanted, on_bad: OnBad) -> Documents[Document]:
    """Token ids in memory: rows of an array or a list, or one flat document."""
    rows = plain_array(values) if is_array(values) else values
    is_flat = rows.ndim == 1 if is_array(rows) else len(rows) > 0 and not hasattr(rows[0], "__len__")
    place = Place("token ids", "row")

    def documents() -> Iterator[Document | Bad]:
        for row in [rows] if is_flat else rows:
            place.number += 1
            try:
                document: Document | Bad = wanted.of_value(row, None, "")
            except TextError as error:
                document = place.bad(error, error)
            yield document

    return Documents(documents(), place, on_bad)


def _read_files(paths: Sequence[Path], wanted: Wanted, place: Place) -> Iterator[Document | Bad]:
    return chain.from_iterable(read_file(path, wanted, place) for path in paths)


def _read_pattern(pattern: Path, split: str | None, wanted: Wanted, place: Place) -> Iterator[Document | Bad]:
    import glob

    if split not in (None, ALL):
        raise ConfigError(f"{pattern} names its files itself: leave split (--split) out")
    paths = [Path(name) for name in sorted(glob.glob(str(pattern), recursive=True)) if Path(name).is_file()]
    if not paths:
        raise TextError(f"no text at {pattern}: no file matches")
    return _read_files(paths, wanted, place)


def _read_saved_dataset(folder: Path, split: str | None, wanted: Wanted, place: Place) -> Iterator[Document | Bad]:
    """The rows of a folder of `save_to_disk`, memory-mapped and read by tables."""
    import datasets

    place.where = str(folder)
    try:
        saved: Any = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise TextError(
            f"cannot read {folder}, which looks like a folder of save_to_disk: {reason_of(error)}"
        ) from error
    if isinstance(saved, datasets.DatasetDict):
        split = split or ("train" if "train" in saved or len(saved) != 1 else next(iter(saved)))
        if split not in saved:
            raise TextError(f"{folder} has the splits {', '.join(saved)}, not {split!r}; choose one with --split")
        saved = saved[split]
    elif split not in (None, ALL, str(saved.split)):
        raise ConfigError(f"{folder} is a single dataset and has no split {split!r}: leave split (--split) out")
    try:
        columns = wanted.columns_of(saved.column_names)
    except TextError as error:
        raise TextError(f"{folder}: {error}") from error
    tables = saved.select_columns(columns).with_format("arrow").iter(batch_size=_RECORDS_PER_TABLE)
    return told(of_tables(tables, wanted, place), place)


def _read_dataset(name: str, split: str, wanted: Wanted, place: Place) -> Iterator[Document | Bad]:
    import datasets

    path, _, config = name.partition(":")
    try:
        rows = datasets.load_dataset(path, config or None, split=split, streaming=True)
    except Exception as error:
        script = "scripts are no longer supported" in str(error)
        reason = "it is made by a script, and code of a dataset is never run" if script else reason_of(error)
        said = f"no such file or folder, and datasets says: {reason}"
        raise TextError(f"no text at {name!r}: {said}") from error
    return told(_of_rows(rows, wanted, place), place)


def _of_rows(rows: Any, wanted: Wanted, place: Place) -> Iterator[Document | Bad]:
    place.unit, place.number = "row", 0
    for row in rows:
        place.number += 1
        try:
            document: Document | Bad = wanted.of_record(row)
        except TextError as error:
            document = place.bad(error, error)
        yield document
