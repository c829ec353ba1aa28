"""Text is read as what it is: by a file's first bytes, then by its name; what is not text is refused by what it is."""

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import sqlite3
import tarfile
import threading
import warnings
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest
import safetensors.numpy
import torch
import zstandard
from tokenizers_at_hand import STORY, byte_level

from actcache.errors import ConfigError, TextError
from actcache.source import read_chats, read_documents, read_texts, read_tokens, token_blocks, unpack
from actcache.source.sniff import kind_of_bytes

TEXTS = ["Ünder the sea.\nA fish.", 'second, with "quotes"\tand a tab', "third"]
RECORDS = [{"id": n, "text": text} for n, text in enumerate(TEXTS)]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
ARRAY = json.dumps(RECORDS).encode()
PACKERS = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "lzma": lambda data: lzma.compress(data, format=lzma.FORMAT_ALONE),
    "zstd": lambda data: b"\x50\x2a\x4d\x18\x04\x00\x00\x00size" + zstandard.compress(data),
    "zst": lambda data: zstandard.compress(data[:30]) + zstandard.compress(data[30:]),
}


def csv_of(delimiter):
    rows = [f'{n}{delimiter}"{text.replace(chr(34), chr(34) * 2)}"' for n, text in enumerate(TEXTS)]
    return "\n".join([f"id{delimiter}text", *rows, ""]).encode()


def table_file(write):
    def bytes_of():
        out = io.BytesIO()
        write(pa.table({"id": [0, 1, 2], "text": TEXTS}), out)
        return out.getvalue()

    return bytes_of


def write_arrow(new):
    def write(table, out):
        with new(out, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)

    return write


FILES = {
    "a.jsonl": LINES,
    "a.ndjson": LINES,
    "a.json": LINES,
    "array.json": ARRAY,
    "array.jsonl": ARRAY,
    "pretty.json": json.dumps(RECORDS, indent=2).encode(),
    "pretty.jsonl": json.dumps(RECORDS, indent=2).encode(),
    "objects.json": "\n".join(json.dumps(record, indent=1) for record in RECORDS).encode(),
    "strings.json": json.dumps(TEXTS).encode(),
    "A.JSONL": LINES,
    "bom.jsonl": b"\xef\xbb\xbf" + LINES,
    "bom.json": b"\xef\xbb\xbf" + ARRAY,
    "crlf.jsonl": LINES.replace(b"\n", b"\r\n"),
    "a.csv": csv_of(","),
    "semicolons.CSV": csv_of(";"),
    "bom.csv": b"\xef\xbb\xbf" + csv_of(","),
    "a.tsv": csv_of("\t"),
    "a.arrow": table_file(write_arrow(pa.ipc.new_file))(),
    "stream.arrow": table_file(write_arrow(pa.ipc.new_stream))(),
    "a.feather": table_file(pa.feather.write_feather)(),
    "a.PARQUET": table_file(pa.parquet.write_table)(),
    "a.txt": "\n<|endoftext|>\n".join(TEXTS).encode(),
    "bom.txt": b"\xef\xbb\xbf" + "\n<|endoftext|>\n".join(TEXTS).encode(),
    "without_suffix": "\n<|endoftext|>\n".join(TEXTS).encode(),
    "records_without_suffix": LINES,
    "packed_under_another_name.jsonl": gzip.compress(LINES),
    "parquet_under_another_name.jsonl": table_file(pa.parquet.write_table)(),
    "unpacked.jsonl.gz": LINES,
}
FILES |= {f"lines.jsonl.{suffix}": pack(LINES) for suffix, pack in PACKERS.items()}
FILES |= {f"array.json.{suffix}": pack(ARRAY) for suffix, pack in PACKERS.items()}
FILES |= {f"a.csv.{suffix}": pack(csv_of(",")) for suffix, pack in PACKERS.items()}
FILES |= {f"a.TXT.{suffix.upper()}": pack(FILES["a.txt"]) for suffix, pack in PACKERS.items()}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_gives_the_same_texts(tmp_path, name):
    (tmp_path / name).write_bytes(FILES[name])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(read_texts(tmp_path / name)) == TEXTS == list(read_documents(str(tmp_path / name)))


def npz():
    out = io.BytesIO()
    np.savez(out, ids=np.arange(9))
    return out.getvalue()


def zipped(name="a.jsonl", data=LINES):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        file.writestr(name, data)
    return out.getvalue()


def tarred():
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as file:
        member = tarfile.TarInfo("a.jsonl")
        member.size = len(LINES)
        file.addfile(member, io.BytesIO(LINES))
    return out.getvalue()


def torch_file():
    out = io.BytesIO()
    torch.save(torch.arange(4), out)
    return out.getvalue()


def database(folder):
    with sqlite3.connect(folder / "a.db") as connection:
        connection.execute("create table texts (text)")
    return (folder / "a.db").read_bytes()


NOT_TEXT = {
    ".npz archive": lambda _: npz(),
    "zip archive": lambda _: zipped(),
    "Office document": lambda _: zipped("[Content_Types].xml"),
    "tar archive": lambda _: tarred(),
    "torch.save": lambda _: torch_file(),
    "SQLite database": database,
    "pickle": lambda _: pickle.dumps(TEXTS),
    "safetensors file": lambda _: safetensors.numpy.save({"ids": np.arange(4)}),
    "PDF": lambda _: b"%PDF-1.7\n" + b"text of it " * 50,
    "PNG image": lambda _: b"\x89PNG\r\n\x1a\n" + bytes(range(200)),
    "git-lfs pointer": lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n",
    "UTF-16": lambda _: LINES.decode().encode("utf-16"),
    "UTF-16 text": lambda _: LINES.decode().encode("utf-16-le"),
    "UTF-32": lambda _: LINES.decode().encode("utf-32"),
    "UTF-32 text": lambda _: LINES.decode().encode("utf-32-be"),
    "binary data": lambda _: np.random.default_rng(0).bytes(3000),
    "binary data, not text": lambda _: b"\x00" * 500,
    "program": lambda _: b"\x7fELF\x02\x01\x01" + bytes(57),
    "web archive": lambda _: b"WARC/1.0\r\nWARC-Type: warcinfo\r\n" * 9,
    "Avro file": lambda _: b"Obj\x01\x04\x14avro.codec\x08null\x00" + bytes(range(128, 200)),
    "ORC file": lambda _: b"ORC\n\x0b\x00\x00" + bytes(range(128, 200)),
}


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv", "a", "a.parquet"])
@pytest.mark.parametrize("what", NOT_TEXT)
def test_what_is_not_text_is_refused_by_what_it_is(tmp_path, what, name):
    (tmp_path / name).write_bytes(NOT_TEXT[what](tmp_path))
    with pytest.raises(TextError, match=rf"cannot read .*{name}: it is (a |an )?.*{what}"):
        list(read_documents(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl.gz", gzip.compress(tarred()), "unpacked, it is a tar archive: unpack it, and give the folder"),
        ("a.jsonl.gz", gzip.compress(gzip.compress(LINES)), "it is gzip-compressed, and inside gzip; unpack it first"),
        ("a.gz", gzip.compress(FILES["a.PARQUET"]), "it is gzip-compressed, and inside parquet; unpack it first"),
        ("a.jsonl.gz", b"", "it is empty, and not a compressed file as its name says"),
        ("a.jsonl.zst", zstandard.compress(LINES * 50)[:-9], "ends before the end of its compressed data"),
        ("a.jsonl.gz", gzip.compress(LINES * 50)[:-9], "cannot read .*a.jsonl.gz: "),
        ("a.jsonl.gz", gzip.compress(LINES)[:20] + b"\xff" * 99, "cannot read .*a.jsonl.gz: "),
        ("a.parquet", b"<!DOCTYPE html>", "is called .parquet, but it begins with text, and is no Parquet file"),
        ("a.parquet", b"", "is called .parquet, but it is empty"),
        ("a.npy", LINES, "is called .npy, but it begins with text"),
        ("a.parquet", FILES["a.PARQUET"][:-20], "cannot read .*a.parquet: "),
        ("a.arrow", FILES["a.arrow"][:-200], "cannot read .*a.arrow: "),
        ("a.txt", b"one\ntwo\ncaf\xe9\n", "a.txt, line 3: not UTF-8 text .byte 0xe9"),
        ("a.jsonl", LINES + b'{"text": "caf\xe9"}\n', r"a.jsonl, line 4: not UTF-8 text \(byte 14 of the line"),
        ("a.json", b'[{"text": "a"},\n{"text": "caf\xe9"}]', r"a.json: not UTF-8 text \(byte 30:"),
        ("a.csv", b"id,text\n1,a\n2,caf\xe9\n", "a.csv, line 3: not UTF-8 text"),
        ("a.json", b'[{"text": "a"},\n{"text": ]', "a.json, element 2: not valid JSON"),
        ("a.json", b'[{"text": "a"},\n{"text": "b"}', "it ends in the middle of its array"),
        ("a.json", b'[{"text": "a"}\n] [', "goes on after the end of its array"),
        ("a.json", b"[" * 100_000, "not JSON that can be read"),
        ("a.jsonl", b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "a.jsonl, line 1: not JSON that can be read"),
        ("a.json", b'{"version": 1,\n "data": [{"text": "a"}]}', "'data' is a list of records: write that list to"),
        ("a.json", b'{"data": [{"text": "a"}]}', "line 1: no text column .*'data' is a list of records"),
        ("a.json", b'{"text": ["a", "b"]}', "column 'text' holds list, not text"),
        ("a.csv", b"id,body\n1,a\n", r"no text column .* among \['id', 'body'\]; .*its first line is its header"),
        ("a.csv", b"text,text\na,b\n", "has the column 'text' more than once"),
        ("a.csv", b"id,text\n1,a\n2,b,c\n", "a.csv, line 3: 3 fields, but the header has 2"),
        ("a.csv", b'id,text\n1,"a\nb\n2,c\n', "a.csv, line 2: not valid CSV .unexpected end of data"),
        ("a.tsv", b'text\n"Hello," he said\n', "a.tsv, line 2: not valid CSV"),
    ],
)
def test_unsound_files_say_where_and_what(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(TextError, match=message):
        list(read_texts(tmp_path / name))


@pytest.mark.parametrize(
    "text",
    ["ORCs and men", "PARENTS", "PAR1 was a file", "ID3 tags", "GIF8", "GGUF", "BZh9", "II* and so on", "[draft] text"],
)
def test_stories_may_begin_with_the_mark_of_a_file(text):
    assert kind_of_bytes(text.encode() + b"\n" + STORY.encode()) == "text"


def test_text_cut_within_a_character_at_the_end_of_what_is_looked_at_is_text(tmp_path):
    text = "a" + "é" * (1 << 17)
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    assert list(read_texts(tmp_path / "a.txt")) == [text]


def test_records_under_the_name_of_plain_text_are_plain_text_with_a_warning(tmp_path):
    (tmp_path / "a.txt").write_bytes(LINES)
    with pytest.warns(UserWarning, match="looks like JSON lines, but is read as one plain text"):
        assert len(list(read_texts(tmp_path / "a.txt"))) == 1


def test_arrays_are_streamed_element_by_element(tmp_path, monkeypatch):
    """With documents of at most 300 KB allowed, a file of many MB is read; one that is a single long line is not."""
    texts = ["é" * (n * 37 % 9000) for n in range(600)]
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": text, "n": 1e5} for text in texts], ensure_ascii=False))
    monkeypatch.setattr(unpack, "MOST_BYTES", 300_000)
    assert list(read_texts(path)) == texts
    path.write_text(json.dumps([{"text": "é" * 400_000}]))
    with pytest.raises(TextError, match=r"element 1 is longer than 300,000 characters: too much for one document"):
        list(read_texts(path))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.txt.xz", "a.csv.bz2"])
def test_a_line_without_end_does_not_fill_the_memory(tmp_path, monkeypatch, name):
    start = b'{"text": "' if name.startswith("a.jsonl") else b"text\n"
    (tmp_path / name).write_bytes(PACKERS[name.rpartition(".")[2]](start + b"a" * 5_000_000))
    monkeypatch.setattr(unpack, "MOST_BYTES", 300_000)
    with pytest.raises(TextError, match=r"300,000 (bytes|characters)"):
        list(read_texts(tmp_path / name))


def test_chats_and_ids_in_every_form_of_json(tmp_path):
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    files = {
        "one.jsonl": json.dumps(chat),
        "one.json": json.dumps(chat, indent=1),
        "array.json": json.dumps([{"messages": chat}]),
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        assert list(read_chats(tmp_path / name)) == [chat] == list(read_documents(tmp_path / name))
    (tmp_path / "two.json").write_text(json.dumps([chat, chat]))
    assert list(read_chats(tmp_path / "two.json")) == [chat, chat]
    for name, text in {
        "a.json": "[\n1,\n2\n]",
        "b.json": "[1, 2]",
        "c.json": "[[1, 2]]",
        "d.jsonl": "[1, 2]\n",
    }.items():
        (tmp_path / name).write_text(text)
        assert [ids.tolist() for ids in read_tokens(tmp_path / name)] == [[1, 2]]
    long = list(range(1_000_000, 1_060_000))
    (tmp_path / "pretty.json").write_text(json.dumps(long, indent=0))  # read in parts that end within a number
    assert [ids.tolist() for ids in read_tokens(tmp_path / "pretty.json")] == [long]
    (tmp_path / "long.jsonl").write_text(f"{long}\n[3]\n")
    assert [ids.tolist() for ids in read_tokens(tmp_path / "long.jsonl")] == [long, [3]]


def test_a_column_is_never_ignored(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(4))
    with pytest.raises(ConfigError, match=r"a.npy is an array and has no column 'ids'"):
        list(read_tokens(tmp_path / "a.npy", column="ids"))
    (tmp_path / "a.jsonl").write_text('"a bare string"\n')
    with pytest.raises(TextError, match="expected an object with a column 'body', found str"):
        list(read_texts(tmp_path / "a.jsonl", column="body"))


def test_a_pipe_is_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(LINES,))
    writer.start()
    assert list(read_texts(tmp_path / "pipe")) == TEXTS
    writer.join()


@pytest.mark.parametrize("source", ["", " ", 3, None, {"text": ["a"]}, ["a text"], b"a.txt", np.arange(3)])
def test_sources_of_the_wrong_kind(source):
    with pytest.raises(TextError, match="the source of a text is a path or the name of a dataset, got"):
        read_texts(source)


def test_urls_are_not_paths():
    with pytest.raises(TextError, match=r"https://example.org/a.jsonl is a URL"):
        read_texts("https://example.org/a.jsonl")


def test_home_is_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.jsonl").write_bytes(LINES)
    assert list(read_texts("~/a.jsonl")) == TEXTS == list(read_texts("~/*.jsonl"))


def test_invalid_utf8_in_tables_is_an_error_of_its_row(tmp_path):
    bad = pa.StringArray.from_buffers(2, pa.py_buffer(np.array([0, 1, 3], "<i4").tobytes()), pa.py_buffer(b"a\xe9b"))
    table = pa.table({"text": bad})
    pa.feather.write_feather(table, tmp_path / "a.feather")
    pa.parquet.write_table(table, tmp_path / "a.parquet")
    for name in ("a.feather", "a.parquet"):
        with pytest.raises(TextError, match=rf"{name}, row 2: column 'text' is not UTF-8 text"):
            list(read_texts(tmp_path / name))
        with pytest.warns(UserWarning, match="1 bad documents were left out"):
            assert list(read_texts(tmp_path / name, on_bad="skip")) == ["a"]


def test_offsets_of_arrow_files_are_checked(tmp_path):
    wild = pa.StringArray.from_buffers(
        2, pa.py_buffer(np.array([0, 1 << 30, 3], "<i4").tobytes()), pa.py_buffer(b"abc")
    )
    pa.feather.write_feather(pa.table({"text": wild}), tmp_path / "a.feather", compression="uncompressed")
    with pytest.raises(TextError, match=r"cannot read .*a.feather"):
        list(read_texts(tmp_path / "a.feather"))


def test_plain_lines_end_as_python_has_them(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\rthree\n")
    assert list(read_texts(tmp_path / "a.txt")) == ["one\ntwo\nthree"]


def test_ids_in_memory_are_read_too():
    rows = np.arange(6).reshape(2, 3)
    for given in (rows, rows.tolist(), torch.from_numpy(rows)):
        assert [ids.tolist() for ids in read_tokens(given)] == rows.tolist()
    assert (
        [ids.tolist() for ids in read_tokens(np.arange(3))]
        == [[0, 1, 2]]
        == [x.tolist() for x in read_tokens([0, 1, 2])]
    )
    assert token_blocks(read_tokens(rows), None, length=3).n_sequences == 2
    with pytest.raises(ConfigError, match="neither split nor column"):
        read_tokens(rows, column="ids")
    with pytest.raises(TextError, match="token ids, row 1: the record: expected a flat list of token ids"):
        list(read_tokens(np.zeros((2, 3))))


def test_tokens_of_a_place_are_named_with_it(tmp_path):
    (tmp_path / "a.jsonl").write_text("[1, 2]\n\n[3, 4000]\n")
    with pytest.raises(TextError, match=r"document number 1 \(.*a.jsonl, line 3\): token id 4000 is outside"):
        token_blocks(read_tokens(tmp_path / "a.jsonl"), byte_level(), length=1)
