"""Texts to token blocks: read texts from wherever they lie, pack them into equal sequences, remember where each token came from.

In: files, folders or `datasets` names, and a tokenizer. Out: `TokenBlocks`, token ids and document numbers of shape
`(Q, T)` in seeded random order. The only room that knows the `datasets` library.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

from actcache.errors import TextError

_TEXT_COLUMNS = ("text", "story", "content")
_SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".parquet")


def read_texts(source: str, *, split: str = "train", column: str | None = None) -> Iterator[str]:
    """Stream the texts of a file, a folder of files, or a `datasets` dataset, one document at a time.

    `.txt` files hold one document each, or several separated by lines of `<|endoftext|>`; `.jsonl` (also `.jsonl.gz`)
    and `.parquet` one document a record, in `column` (by default the first of "text", "story", "content" that is
    there). Anything that is no path is taken as a `datasets` name (`owner/name` or `owner/name:config`) and streamed.

    Raises:
        TextError: nothing is there by that name, a file has no such column, or a line is not valid JSON.
    """
    path = Path(source)
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.name.endswith(_SUFFIXES))
        if not files:
            raise TextError(f"folder {source} holds no text: expected files ending in {', '.join(_SUFFIXES)}")
        for file in files:
            yield from _read_file(file, column)
    elif path.is_file():
        yield from _read_file(path, column)
    elif source.endswith(_SUFFIXES) or source.startswith((".", "/", "~")):
        raise TextError(f"no text at {source}: there is no such file or folder")
    else:
        yield from _read_dataset(source, split, column)


def _read_file(path: Path, column: str | None) -> Iterator[str]:
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    try:
                        record = json.loads(line)
                    except json.JSONDecodeError as error:
                        raise TextError(f"{path}, line {number}: not valid JSON ({error.msg})") from None
                    yield record if isinstance(record, str) else _text_of(record, column, f"{path}, line {number}")
    elif path.suffix == ".parquet":
        import pyarrow.parquet

        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024):
            for record in batch.to_pylist():
                yield _text_of(record, column, str(path))
    else:
        document: list[str] = []
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                if line.strip() == "<|endoftext|>":
                    yield "".join(document).strip()
                    document = []
                else:
                    document.append(line)
        yield "".join(document).strip()


def _text_of(record: dict[str, object], column: str | None, where: str) -> str:
    names = (column,) if column else _TEXT_COLUMNS
    for name in names:
        if isinstance(value := record.get(name), str):
            return value
    raise TextError(f"{where}: no text column {' or '.join(map(repr, names))}; it has {sorted(record)}; name one with --column")


def _read_dataset(name: str, split: str, column: str | None) -> Iterator[str]:
    import datasets

    path, _, config = name.partition(":")
    try:
        rows = datasets.load_dataset(path, config or None, split=split, streaming=True)
    except (FileNotFoundError, ConnectionError, ValueError, datasets.exceptions.DatasetNotFoundError) as error:
        raise TextError(f"no text at {name!r}: no such file or folder, and datasets says: {error}") from error
    for row in rows:
        yield _text_of(row, column, name)
