import bz2
import gzip
import json
import lzma
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from actcache.errors import ConfigError, TextError
from actcache.order import permutation
from actcache.source import pack, read_texts, temporary, token_blocks, tokenise

STORY = "Once upon a time there was a little bird. She could not fly, and so she learned to sing."
BOS = 0


def byte_level_tokenizer(bos: str | None = "<|bos|>") -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<|bos|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([STORY], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos)


TOKENIZER = byte_level_tokenizer()


def concatenated(texts):
    """The stream that packing stands for, made the slow way: ids, and for each the number of its text."""
    ids, document = [], []
    for number, text in enumerate(texts):
        if text.strip():
            tokens = [BOS, *TOKENIZER.encode(text, add_special_tokens=False)]
            ids += tokens
            document += [number] * len(tokens)
    return np.array(ids), np.array(document)


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.one_of(st.text(max_size=40), st.sampled_from(["", " \n\t", STORY])), max_size=30),
    length=st.integers(1, 17),
    count=st.none() | st.integers(1, 40),
    seed=st.integers(0, 3),
)
def test_blocks_are_the_concatenated_stream_in_permuted_order(texts, length, count, seed):
    ids, document = concatenated(texts)
    n_sequences = min(len(ids) // length, count or len(ids))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        if n_sequences == 0:
            with pytest.raises(TextError):
                token_blocks(iter(texts), TOKENIZER, length=length, count=count, seed=seed)
            return
        blocks = token_blocks(iter(texts), TOKENIZER, length=length, count=count, seed=seed)
    order = permutation(n_sequences, seed)
    kept = n_sequences * length
    np.testing.assert_array_equal(blocks.ids, ids[:kept].reshape(-1, length)[order])
    np.testing.assert_array_equal(blocks.document, document[:kept].reshape(-1, length)[order])
    assert blocks.ids.dtype == blocks.document.dtype == np.uint32
    assert blocks.description["n_tokens"] == kept


@pytest.fixture
def tiny_batches(monkeypatch):
    """Every boundary inside: calls of two texts, copies of three sequences."""
    monkeypatch.setattr(tokenise, "DOCUMENTS_PER_CALL", 2)
    monkeypatch.setattr(temporary, "_BYTES_PER_COPY", 3 * 4 * 8)


def test_the_same_blocks_from_small_and_large_batches(tiny_batches, monkeypatch):
    texts = [f"{STORY} {i}" for i in range(25)]
    small = token_blocks(texts, TOKENIZER, length=8, seed=1)
    monkeypatch.undo()
    large = token_blocks(texts, TOKENIZER, length=8, seed=1)
    np.testing.assert_array_equal(small.ids, large.ids)
    assert small.description == large.description


def test_description_tells_seeds_and_texts_apart():
    texts = [f"{STORY} {i}" for i in range(9)]
    one = token_blocks(texts, TOKENIZER, length=16, seed=1).description
    assert one == token_blocks(list(texts), TOKENIZER, length=16, seed=1).description
    assert one["n_documents"] == 9
    assert one["length"] == 16
    other_seed = token_blocks(texts, TOKENIZER, length=16, seed=2).description
    other_bounds = token_blocks([" ".join(texts)], TOKENIZER, length=16, seed=1).description
    assert len({d["tokens"] for d in (one, other_seed, other_bounds)}) == 3
    assert one["tokenizer"] == other_seed["tokenizer"]
    json.dumps(one)


def test_padding_and_truncation_of_earlier_calls_do_not_change_the_tokenizer_digest():
    tokenizer = byte_level_tokenizer()
    before = token_blocks([STORY], tokenizer, length=4).description
    tokenizer(["a", STORY], truncation=True, max_length=3)
    assert token_blocks([STORY], tokenizer, length=4).description == before


def test_reading_stops_as_soon_as_there_are_enough(tiny_batches):
    read = []

    def endless():
        while True:
            read.append(STORY)
            yield STORY

    blocks = token_blocks(endless(), TOKENIZER, length=8, count=5)
    assert blocks.n_sequences == 5
    assert len(read) <= 4
    assert blocks.description["n_documents"] == 1 + int(blocks.document.max())


def test_fewer_sequences_than_asked_warns_with_the_numbers():
    n_tokens = len(concatenated([STORY, STORY])[0])
    with pytest.warns(
        UserWarning, match=rf"asked for 1,000 .*after {n_tokens // 8} .*{n_tokens} tokens in 2 doc"
    ) as caught:
        blocks = token_blocks([STORY, "", STORY], TOKENIZER, length=8, count=1000)
    assert caught[0].filename == __file__
    assert blocks.n_sequences == n_tokens // 8
    assert blocks.document.max() == 2  # the blank text keeps its number


def test_exactly_enough_is_no_reason_to_warn():
    n_tokens = len(concatenated([STORY])[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert token_blocks([STORY], TOKENIZER, length=n_tokens, count=1).n_sequences == 1


def test_progress_ends_at_the_number_of_sequences(tiny_batches):
    calls = []
    blocks = token_blocks([STORY] * 7, TOKENIZER, length=8, count=20, progress=lambda *c: calls.append(c))
    assert calls[-1] == (20, 20) == (blocks.n_sequences, 20)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    calls.clear()
    blocks = token_blocks([STORY] * 7, TOKENIZER, length=8, progress=lambda *c: calls.append(c))
    assert calls[-1] == (blocks.n_sequences, blocks.n_sequences)


def test_blocks_are_not_held_in_memory_and_writing_changes_nobody_elses():
    blocks = token_blocks([STORY] * 3, TOKENIZER, length=8)
    assert isinstance(blocks.ids, np.memmap)
    digest = blocks.description["tokens"]
    blocks.ids[:] = 7
    assert token_blocks([STORY] * 3, TOKENIZER, length=8).description["tokens"] == digest


def test_eos_begins_documents_where_there_is_no_bos():
    tokenizer = byte_level_tokenizer(bos=None)
    with pytest.raises(ConfigError, match="neither a BOS nor an EOS"):
        token_blocks([STORY], tokenizer, length=4)
    tokenizer.eos_token = "<|bos|>"
    assert token_blocks([STORY], tokenizer, length=20).ids[0, 0] == BOS


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "not one document"),
        (["", "  \n"], "not one document"),
        (["Hi."], r"text too short: \d tokens in 1 documents, less than one sequence of 64"),
        (STORY, "single string"),
        ([STORY, None], "text number 1 is NoneType"),
    ],
)
def test_texts_that_cannot_be_packed(texts, message):
    with pytest.raises(TextError, match=message):
        token_blocks(texts, TOKENIZER, length=64)


def test_a_missing_tokenizer_is_named_when_the_first_text_is_seen(tiny_batches):
    texts = (STORY if i < 2 else pytest.fail("read on") for i in range(3))
    with pytest.raises(ConfigError, match=r"needs a tokenizer, got None; .* module brings none: pass"):
        token_blocks(texts, None, length=8)


@pytest.mark.parametrize("options", [{"length": 0}, {"length": 8, "count": 0}, {"length": 8.0}])
def test_sizes_must_be_positive(options):
    with pytest.raises(ConfigError, match="must be a positive integer"):
        token_blocks([STORY], TOKENIZER, **options)


RECORDS = ["first\nstory", "second “story”", ""]


def write(path, kind):
    lines = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(RECORDS)) + "\n"
    if kind == "jsonl":
        path.write_text(lines)
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif kind == "jsonl.xz":
        path.write_bytes(lzma.compress(lines.encode()))
    elif kind == "jsonl.bz2":
        path.write_bytes(bz2.compress(lines.encode()))
    elif kind == "parquet":
        pa.parquet.write_table(pa.table({"id": [0, 1, 2], "text": RECORDS}), path)
    else:
        path.write_text("\n<|endoftext|>\n".join(RECORDS), encoding="utf-8")


@pytest.mark.parametrize("kind", ["txt", "jsonl", "jsonl.gz", "jsonl.xz", "jsonl.bz2", "parquet"])
def test_every_kind_of_file_gives_the_same_texts(tmp_path, kind):
    write(tmp_path / f"a.{kind}", kind)
    assert list(read_texts(str(tmp_path / f"a.{kind}"))) == RECORDS
    write(tmp_path / f"b.{kind}", kind)
    (tmp_path / "notes.md").write_text("no text of ours")
    assert list(read_texts(str(tmp_path))) == RECORDS * 2


UNFINISHED = """
import actcache

lm = actcache.load_lm("stories-4l")  # with it loaded, modules are taken apart before the texts are
texts = actcache.read_texts("a.jsonl")
next(texts)
"""


def test_texts_that_are_left_unread_end_without_a_word(tmp_path):
    write(tmp_path / "a.jsonl", "jsonl")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", UNFINISHED],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(pack.__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_column_chooses_among_several(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "no", "body": "yes"}\n')
    pa.parquet.write_table(pa.table({"text": ["no"], "body": ["yes"]}), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        assert list(read_texts(str(tmp_path / name), column="body")) == ["yes"]
    (tmp_path / "b.jsonl").write_text('"a bare string"\n')
    assert list(read_texts(str(tmp_path / "b.jsonl"))) == ["a bare string"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "fine"}\n{"text": \n', "a.jsonl, line 2: not valid JSON"),
        ("a.jsonl", b'{"body": "x"}\n', r"no text column 'text' or 'story' or 'content' among \['body'\]; name one"),
        ("a.jsonl", b"[1, 2]\n", "expected an object with a text column, found list"),
        ("a.jsonl", b'{"text": 3}\n', "column 'text' holds int, not text"),
        ("a.txt", b"caf\xe9", "not UTF-8"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "story"}\n' * 99)[:-12], "cannot read .*a.jsonl.gz"),
        ("a.jsonl.xz", b"not xz", "a.jsonl.xz, line 1: not valid JSON"),
        ("a.parquet", b"not parquet", "cannot read .*a.parquet"),
    ],
)
def test_unsound_files_say_which_and_what(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TextError, match=message):
        list(read_texts(str(tmp_path / name)))


def test_what_is_not_there_is_said_at_once(tmp_path):
    with pytest.raises(TextError, match="no such file or folder"):
        read_texts(str(tmp_path / "nothing.txt"))
    with pytest.raises(TextError, match="holds no text"):
        read_texts(str(tmp_path))
    with pytest.raises(TextError, match="no text at 'no-such-owner/no-such-dataset'"):
        read_texts("no-such-owner/no-such-dataset")


def test_a_column_of_plain_text_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text(STORY)
    with pytest.raises(TextError, match="plain text and has no column"):
        list(read_texts(str(tmp_path / "a.txt"), column="text"))


def test_a_datasets_folder_name_is_streamed(tmp_path, monkeypatch):
    """The `datasets` library itself reads a local dataset, reached by a name that is no path from here."""
    import datasets

    (tmp_path / "stories").mkdir()
    (tmp_path / "stories" / "train.jsonl").write_text("".join(json.dumps({"story": t}) + "\n" for t in RECORDS))
    load = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda path, *a, **k: load(str(tmp_path / path), *a, **k))
    assert list(read_texts("stories")) == RECORDS
