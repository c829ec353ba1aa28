"""Token ids and chats, read from wherever they lie; and the options of the command line that say which text."""

import bz2
import json
from typing import Annotated

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from cyclopts import App
from tokenizers_at_hand import BOS, END, STORY, byte_level

from actcache.cli.options import Flat, TextOptions
from actcache.cli.screen import Screen
from actcache.errors import ConfigError, TextError
from actcache.source import read_chats, read_documents, read_texts, read_tokens, token_blocks

ROWS = [[5, 6, 7, 8], [9, 10, 11, 12], [65000, 0, 1, 2]]
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]


def write_tokens(place, kind, column):
    table = {column: ROWS, "id": [0, 1, 2]}
    if kind == "jsonl.bz2":
        lines = "".join(json.dumps({"id": i, column: row}) + "\n" for i, row in enumerate(ROWS))
        (place / "a.jsonl.bz2").write_bytes(bz2.compress(lines.encode()))
    elif kind == "bare.jsonl":
        (place / "a.jsonl").write_text("".join(f"{row}\n" for row in ROWS))
    elif kind == "parquet":
        pa.parquet.write_table(pa.table(table), place / "a.parquet")
    elif kind == "fixed.parquet":
        fixed = pa.array(ROWS, type=pa.list_(pa.uint16(), 4))
        pa.parquet.write_table(pa.table({column: fixed}), place / "a.parquet", row_group_size=2)
    elif kind == "npy":
        np.save(place / "a.npy", np.array(ROWS, dtype=np.uint16))
    elif kind == "saved":
        # As SAELens and sparsify write them: rows of one length, and a mapping of indices from the shuffle.
        datasets.Dataset.from_dict(table).select([2, 0, 1]).select([1, 2, 0]).save_to_disk(str(place))
    else:
        dataset = datasets.Dataset.from_dict(table)
        datasets.DatasetDict(train=dataset, test=dataset.select([1])).save_to_disk(str(place))


@pytest.mark.parametrize("column", ["tokens", "input_ids"])
@pytest.mark.parametrize(
    "kind", ["jsonl.bz2", "bare.jsonl", "parquet", "fixed.parquet", "npy", "saved", "saved with splits"]
)
def test_every_kind_of_source_gives_the_same_ids(tmp_path, kind, column):
    write_tokens(tmp_path, kind, column)
    for read in (read_tokens, read_documents):
        rows = list(read(str(tmp_path)))
        assert [row.tolist() for row in rows] == ROWS
        assert all(row.ndim == 1 and row.dtype.kind in "iu" for row in rows)
    blocks = token_blocks(read_tokens(tmp_path), None, length=4)
    assert sorted(blocks.ids.tolist()) == sorted(ROWS)


def test_lists_of_unequal_length_keep_their_bounds(tmp_path):
    rows = [[], [1], [2, 3], [], list(range(3000)), [4]]
    pa.parquet.write_table(pa.table({"tokens": pa.array(rows, pa.large_list(pa.int32()))}), tmp_path / "a.parquet")
    datasets.Dataset.from_dict({"tokens": rows}).save_to_disk(str(tmp_path / "saved"))
    for place in (tmp_path / "a.parquet", tmp_path / "saved"):
        assert [row.tolist() for row in read_tokens(place)] == rows


def test_more_rows_than_are_read_at_a_time(tmp_path):
    rows = [[i, i + 1] for i in range(2500)]
    datasets.Dataset.from_dict({"tokens": rows}).save_to_disk(str(tmp_path))
    assert [row.tolist() for row in read_tokens(tmp_path)] == rows


def test_texts_of_a_saved_dataset_are_read_and_a_missing_split_named(tmp_path):
    dataset = datasets.Dataset.from_dict({"text": [STORY, "Two."], "n": [1, 2]})
    datasets.DatasetDict(train=dataset, test=dataset.select([1])).save_to_disk(str(tmp_path))
    assert list(read_texts(tmp_path)) == [STORY, "Two."]
    assert list(read_texts(tmp_path, split="test")) == ["Two."]
    with pytest.raises(TextError, match="has the splits train, test, not 'valid'; choose one with --split"):
        read_texts(tmp_path, split="valid")
    with pytest.raises(TextError, match=r"no token column 'tokens' or 'input_ids' among .*; read_texts reads its text"):
        read_tokens(tmp_path)


def test_a_damaged_saved_dataset_is_named(tmp_path):
    write_tokens(tmp_path, "saved", "tokens")
    next(tmp_path.glob("*.arrow")).write_bytes(b"nothing of the kind")
    with pytest.raises(TextError, match=r"cannot read .*looks like a folder of save_to_disk"):
        list(read_tokens(tmp_path))


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_ids_under_an_attention_mask_of_zero_are_left_out(tmp_path, kind):
    table = {
        "input_ids": [[7, 8, 0, 0], [0, 5, 6, 9], [1, 2, 3, 4]],
        "attention_mask": [[1, 1, 0, 0], [0, 1, 1, 1], [1, 1, 1, 1]],
    }
    if kind == "parquet":
        pa.parquet.write_table(pa.table(table), tmp_path / "a.parquet")
    else:
        rows = [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [row.tolist() for row in read_tokens(tmp_path)] == [[7, 8], [5, 6, 9], [1, 2, 3, 4]]


def test_arrays_are_memory_mapped(tmp_path):
    for name, array in (("flat", np.arange(10, dtype=np.uint16)), ("rows", np.arange(10).reshape(2, 5))):
        np.save(tmp_path / f"{name}.npy", array)
        for row in read_tokens(tmp_path / f"{name}.npy"):
            assert isinstance(row, np.memmap)
    assert [len(row) for row in read_tokens(tmp_path)] == [10, 5, 5]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 3)), r"expected token ids, .* found float64 of shape \(2, 3\)"),
        (np.zeros((1, 2, 3), dtype=int), r"found int64 of shape \(1, 2, 3\)"),
        (np.array(["a", None], dtype=object), "cannot read .*a.npy: .*Python objects"),
    ],
)
def test_arrays_that_hold_no_ids_are_refused(tmp_path, array, message):
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    with pytest.raises(TextError, match=message):
        list(read_tokens(tmp_path / "a.npy"))


@pytest.mark.parametrize(
    ("read", "line", "message"),
    [
        (read_tokens, '{"tokens": "text"}', "line 1: column 'tokens' holds str, not token ids"),
        (read_tokens, '{"tokens": [1.5]}', "line 1: column 'tokens': expected a flat list of token ids"),
        (read_tokens, '{"tokens": [[1]]}', r"of shape \(1, 1\)"),
        (read_tokens, '{"tokens": [1, null]}', "expected a flat list of token ids"),
        (read_tokens, '{"tokens": 3}', "holds int, not token ids"),
        (read_tokens, '{"input_ids": [1, 2], "attention_mask": [1]}', "2 ids, but an attention mask of 1"),
        (read_tokens, '"text"', "expected an object with a token column, found str"),
        (read_texts, '{"tokens": [1]}', "among .'tokens'.; name one with --column; read_tokens reads its token column"),
        (read_texts, '{"text": [1]}', "column 'text' holds list, not text"),
        (read_texts, '{"text": []}', "column 'text' holds list, not text"),
        (read_chats, '{"messages": "Hi"}', "column 'messages' holds str, not a chat"),
        (read_documents, '{"body": "x"}', "no text, chat, token column 'text' or .* or 'input_ids' among"),
        (read_documents, '{"text": null}', "holds NoneType, not text or a chat or token ids"),
    ],
)
def test_records_that_hold_something_else_are_named(tmp_path, read, line, message):
    (tmp_path / "a.jsonl").write_text(line + "\n")
    with pytest.raises(TextError, match=message):
        list(read(tmp_path / "a.jsonl"))


def test_nulls_in_a_table_are_refused(tmp_path):
    for name, rows in (("row", [[1], None]), ("id", [[1], [2, None]])):
        pa.parquet.write_table(pa.table({"tokens": rows}), tmp_path / f"{name}.parquet")
        with pytest.raises(TextError, match=f"{name}.parquet.* column 'tokens'"):
            list(read_tokens(tmp_path / f"{name}.parquet"))


def test_each_reader_passes_over_files_that_cannot_be_its_own(tmp_path):
    (tmp_path / "a.txt").write_text(STORY)
    np.save(tmp_path / "b.npy", np.array(ROWS))
    assert list(read_texts(tmp_path)) == [STORY] == list(read_documents(tmp_path))
    assert [row.tolist() for row in read_tokens(tmp_path)] == ROWS
    with pytest.raises(TextError, match=r"holds no text: expected files ending in .jsonl"):
        read_chats(tmp_path)
    with pytest.raises(TextError, match=r"b.npy holds an array, not text; read_tokens reads it"):
        list(read_texts(tmp_path / "b.npy"))
    with pytest.raises(TextError, match=r"a.txt is plain text and has no columns"):
        list(read_tokens(tmp_path / "a.txt"))


def test_chats_are_read_in_either_form(tmp_path):
    sharegpt = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
    lines = [{"messages": CHAT, "id": 1}, {"conversations": sharegpt}, {"messages": []}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert list(read_chats(tmp_path)) == [CHAT, sharegpt, []]
    datasets.Dataset.from_dict({"messages": [CHAT, CHAT]}).save_to_disk(str(tmp_path / "saved"))
    assert list(read_chats(tmp_path / "saved")) == [CHAT, CHAT] == list(read_documents(tmp_path / "saved"))


def test_the_first_usual_column_counts_and_a_named_one_decides_by_what_it_holds(tmp_path):
    record = {"input_ids": [1, 2], "messages": CHAT, "text": STORY}
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    assert list(read_documents(tmp_path)) == [STORY]
    assert list(read_documents(tmp_path, column="messages")) == [CHAT]
    assert [ids.tolist() for ids in read_documents(tmp_path, column="input_ids")] == [[1, 2]]


def test_a_streamed_dataset_gives_ids(tmp_path, monkeypatch):
    """The `datasets` library itself reads a local dataset, reached by a name that is no path from here."""
    (tmp_path / "owner").mkdir()
    pa.parquet.write_table(pa.table({"tokens": ROWS}), tmp_path / "owner" / "validation.parquet")
    load = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda path, *a, **k: load(str(tmp_path / path), *a, **k))
    assert [row.tolist() for row in read_tokens("owner", split="validation")] == ROWS
    with pytest.raises(TextError, match=r"no text at 'owner'.*split"):
        read_tokens("owner", split="nothing")


def options(*arguments):
    """Text options as they are typed."""
    app = App(result_action="return_value", exit_on_error=False)

    @app.default
    def take(*, text: Annotated[TextOptions | None, Flat] = None) -> TextOptions:
        return text or TextOptions()

    return app(list(arguments))


def test_the_command_line_reads_ids_without_being_told(tmp_path):
    rows = np.random.default_rng(0).integers(0, 300, (9, 6))
    np.save(tmp_path / "a.npy", rows)
    typed = options("--text", str(tmp_path / "a.npy"), "--length", "6", "--skip-documents", "2")
    blocks = typed.blocks(byte_level(), Screen(json=True))
    assert sorted(blocks.ids.tolist()) == sorted(rows[2:].tolist())


def test_the_command_line_passes_all_options_through(tmp_path):
    (tmp_path / "chats.jsonl").write_text(json.dumps({"talk": CHAT, "text": "no"}) + "\n")
    (tmp_path / "template.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}. {% endfor %}")
    tokenizer = byte_level(bos_token="<|bos|>")
    typed = options(
        *("--text", str(tmp_path), "--column", "talk", "--length", "64", "--packing", "documents"),
        *("--bos", "document", "--chat-template", str(tmp_path / "template.jinja")),
    )
    blocks = typed.blocks(tokenizer, Screen(json=True))
    n_tokens = int(blocks.lengths(range(1))[0])
    assert blocks.ids[0, 0] == BOS
    assert tokenizer.decode(blocks.ids[0, 1:n_tokens].tolist()) == "user: Hi. assistant: Ho. "


def test_the_command_line_leaves_bad_documents_out_and_spells_control_tokens(tmp_path):
    lines = ['{"text": "skipped"}', '{"text": null}', '{"text": "a <|end|> b"}']
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    (tmp_path / "test.jsonl").write_text('{"text": "other"}')
    tokenizer = byte_level(bos_token="<|bos|>", eos_token="<|end|>")
    typed = options(
        *(
            "--text",
            str(tmp_path),
            "--split",
            "train",
            "--length",
            "12",
            "--skip-documents",
            "1",
            "--packing",
            "documents",
        ),
        *("--on-bad", "skip", "--control-tokens", "text"),
    )
    with pytest.warns(UserWarning, match=r"1 bad documents were left out; the first: .*train.jsonl, line 2"):
        blocks = typed.blocks(tokenizer, Screen(json=True))
    assert tokenizer.decode(blocks.ids[0][: blocks.lengths(range(1))[0]].tolist()) == "<|bos|>a <|end|> b"
    assert (blocks.ids == END).sum() == 0
    assert blocks.description["n_bad_documents"] == 1


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (("--skip-documents", "-1"), "--skip-documents must not be negative"),
        (("--split", "test"), r"has no splits: leave split \(--split\) out"),
        (("--length", "0"), "length must be a positive integer"),
        (("--chat-template", "/no/such/file"), "--chat-template takes a file with a Jinja template, and /no/such/file"),
        (("--chat-template", "/usr/bin/env"), "--chat-template takes a file"),
        (("--chat-template", "/"), "--chat-template takes a file"),
    ],
)
def test_options_of_the_command_line_that_cannot_be_meant(typed, message):
    with pytest.raises(ConfigError, match=message):
        options(*typed).blocks(byte_level(bos_token="<|bos|>"), Screen(json=True))


def test_the_default_text_is_the_embedded_corpus():
    tokenizer = byte_level(bos_token="<|bos|>")
    blocks = options("--count", "3").blocks(tokenizer, Screen(json=True))
    assert blocks.description == token_blocks(read_texts("stories-corpus"), tokenizer, length=256, count=3).description
