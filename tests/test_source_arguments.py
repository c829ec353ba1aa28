"""Arguments of every kind: what can be meant works, and everything else is one sentence that says what to do."""

import tempfile
from pathlib import Path

import datasets
import numpy as np
import pandas
import pyarrow as pa
import pytest
import torch
from tokenizers_at_hand import STORY, byte_level

from actcache.errors import ActcacheError, ConfigError, StorageFullError, TextError
from actcache.estimate import plan
from actcache.extraction import extend, extract
from actcache.lm import load_lm
from actcache.source import as_token_blocks, read_texts, token_blocks
from actcache.spec import TokenBlocks

PLAIN = byte_level(bos_token="<|bos|>", eos_token="<|end|>")
TEXTS = [STORY, "Two. " * 9, "Three é. " * 9]
IDS = np.random.default_rng(0).integers(0, 300, (6, 8))
SITE = "blocks.0.hook_mlp_out"


@pytest.mark.parametrize(
    "texts",
    [
        tuple(TEXTS),
        iter(TEXTS),
        np.array(TEXTS),
        np.array(TEXTS, dtype=object),
        pandas.Series(TEXTS),
        pandas.DataFrame({"text": TEXTS})["text"],
        pa.array(TEXTS),
        pa.chunked_array([TEXTS[:1], TEXTS[1:]]),
        datasets.Dataset.from_dict({"text": TEXTS})["text"],
        (row["text"] for row in datasets.Dataset.from_dict({"text": TEXTS})),
        dict(enumerate(TEXTS)).values(),
    ],
    ids=lambda texts: type(texts).__name__,
)
def test_texts_come_in_any_iterable(texts):
    assert token_blocks(texts, PLAIN, length=8).description == token_blocks(TEXTS, PLAIN, length=8).description


@pytest.mark.parametrize(
    "ids",
    [IDS, IDS.astype(">u2"), torch.from_numpy(IDS), IDS.tolist(), list(torch.from_numpy(IDS)), pa.array(IDS.tolist())],
    ids=["array", "big-endian", "tensor", "lists", "tensors", "arrow"],
)
def test_ids_come_in_any_form(ids):
    assert token_blocks(ids, None, length=8).digest() == token_blocks(IDS, None, length=8).digest()


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (STORY, r"a single string; pass a list of texts, or read_texts\(path\)"),
        (Path("a.txt"), r"texts is a path; pass what is in it: read_texts\('a.txt'\)"),
        (STORY.encode(), "texts is bytes; decode them"),
        ({"text": TEXTS}, r"texts is a dict with 'text'; pass one column, such as texts\['text'\]"),
        ({}, "texts is a dict with nothing in it"),
        (PLAIN(TEXTS), r"pass one column, such as texts\['input_ids'\]"),
        (pandas.DataFrame({"body": TEXTS}), r"texts is a DataFrame; pass one of its columns, such as texts\['body'\]"),
        (pa.table({"body": TEXTS}), r"texts is a Table; pass one of its columns, such as texts\['body'\]"),
        (datasets.Dataset.from_dict({"text": TEXTS}), r"of records, pass one column"),
        (
            datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": TEXTS})),
            "texts is a DatasetDict with 'train'",
        ),
        (set(TEXTS), "texts is a set, whose order changes from run to run; pass a list"),
        (None, "texts is NoneType; pass a list"),
        (7, "texts is int; pass a list"),
        (torch.tensor(7), "texts is a Tensor of a single value"),
        ([Path("a.txt")], "text number 0 is PosixPath"),
        ([STORY.encode()], "text number 0 is bytes"),
        (pandas.Series([STORY, None]), "text number 1 is (float|NoneType)"),
        (torch.rand(2, 3), "document number 0: expected a flat list of token ids, which are integers, found float32"),
        (torch.ones(2, 3, dtype=torch.bool), "integers, found bool"),
        (as_token_blocks(IDS), "texts is TokenBlocks already; pass them to extract"),
    ],
)
def test_what_holds_no_documents_is_one_sentence(texts, message):
    with pytest.raises(TextError, match=message) as caught:
        token_blocks(texts, PLAIN, length=2)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [0, -1, True, 8.0, "8", None, np.float64(8), [8], float("nan")])
@pytest.mark.parametrize("name", ["length", "count", "seed"])
def test_numbers_of_the_wrong_kind(name, value):
    if (name == "count" and value is None) or (name == "seed" and value in (0, -1) and value is not True):
        return
    options = {"length": 8, name: value}
    with pytest.raises(ConfigError, match=f"token_blocks: {name} must be an? (positive )?integer, got "):
        token_blocks(TEXTS, PLAIN, **options)


def test_numbers_of_numpy_and_torch_are_numbers():
    usual = token_blocks(TEXTS, PLAIN, length=8, count=3, seed=2)
    given = token_blocks(TEXTS, PLAIN, length=np.int64(8), count=np.uint8(3), seed=np.int32(2))
    assert given.description == usual.description
    assert type(given.description["length"]) is int


def test_a_tokenizer_may_be_given_by_name_folder_or_in_the_form_of_tokenizers(tmp_path):
    PLAIN.save_pretrained(tmp_path / "tok")
    usual = token_blocks(TEXTS, PLAIN, length=8).description
    for place in (str(tmp_path / "tok"), tmp_path / "tok"):
        assert token_blocks(TEXTS, place, length=8).description["tokens"] == usual["tokens"]
    stories = token_blocks(TEXTS, "stories-4l", length=8).description
    assert stories == token_blocks(TEXTS, load_lm("stories-4l").tokenizer, length=8).description
    bare = token_blocks(TEXTS, PLAIN.backend_tokenizer, length=8, bos="none")
    assert bare.digest() == token_blocks(TEXTS, PLAIN, length=8, bos="none").digest()


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        ("no-such/tokenizer", "no tokenizer 'no-such/tokenizer'"),
        (Path("/no/such/folder"), "no tokenizer '/no/such/folder'"),
        (type(PLAIN), "or None for token ids, got the class"),
        (7, "or None for token ids, got int"),
        ({"a": 1}, "or None for token ids, got dict"),
        (load_lm, "or None for token ids, got function"),
    ],
)
def test_what_is_no_tokenizer_is_one_sentence(tokenizer, message):
    with pytest.raises(ConfigError, match=message):
        token_blocks(TEXTS, tokenizer, length=8)


def test_a_model_in_place_of_its_tokenizer_is_told():
    with pytest.raises(ConfigError, match=r"got LanguageModel; pass its tokenizer: .tokenizer"):
        token_blocks(TEXTS, load_lm("stories-4l"), length=8)


def test_a_folder_without_a_tokenizer_is_none(tmp_path):
    with pytest.raises(ConfigError, match="no tokenizer"):
        token_blocks(TEXTS, tmp_path, length=8)


def full(*_, **__):
    """A temporary file without room: the device answers every write with the system's own error."""
    return open("/dev/full", "w+b")


@pytest.mark.parametrize("n_documents", [1, 3000])
def test_a_full_folder_of_temporary_files_is_named(monkeypatch, n_documents):
    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(StorageFullError, match=r"no room in .*set the environment variable TMPDIR") as caught:
        token_blocks([STORY] * n_documents, PLAIN, length=8)
    assert isinstance(caught.value.__cause__, OSError)


def test_a_folder_of_temporary_files_that_is_not_there_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(ConfigError, match=r"temporary files cannot be written .*TMPDIR"):
        token_blocks(TEXTS, PLAIN, length=8)


# Token blocks of arrays.


@pytest.fixture(scope="module")
def lm():
    return load_lm("stories-4l")


@pytest.mark.parametrize(
    "ids", [IDS, torch.from_numpy(IDS), IDS.tolist(), list(IDS), IDS.astype(np.uint16)], ids=lambda i: type(i).__name__
)
def test_ids_are_extracted_as_they_are(lm, ids, tmp_path):
    store = extract(lm, ids, [SITE], tmp_path / "a.zarr")
    assert store.sealed
    assert np.array_equal(store.tokens("ids"), IDS)
    assert np.array_equal(store.tokens("document"), np.repeat(np.arange(6)[:, None], 8, axis=1))
    again = extract(lm, as_token_blocks(IDS), [SITE], tmp_path / "a.zarr")
    assert again.fingerprint == store.fingerprint
    grown = extend(lm, tmp_path / "a.zarr", ids[:2])
    assert np.array_equal(grown.tokens("ids"), np.concatenate([IDS, IDS[:2]]))


def test_what_an_extraction_of_ids_costs(lm):
    assert plan(lm, IDS, [SITE], time_budget_s=0.01, batch_sequences=2).amounts.n_sequences == 6


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (TEXTS, r"got a list of str: token_blocks\(..., length=...\) makes blocks of it"),
        (STORY, r"got str; of texts and chats token_blocks\(texts, tokenizer, length=...\) makes blocks"),
        (iter(TEXTS), r"token_blocks\(texts, tokenizer, length=...\) makes blocks"),
        (read_texts("stories-corpus"), r"got Documents; .*token_blocks\(texts, tokenizer"),
        ([1, 2, 3], "got a flat list of ids: token_blocks"),
        ([[1, 2], [3]], r"not equally long: token_blocks\(rows, None, length=..., packing='documents'\)"),
        ([], r"must be \(Q, T\), at least one sequence"),
        (np.arange(4), r"must be \(Q, T\), .* found shape \(4,\)"),
        (np.zeros((2, 3)), "must be integers, found float64"),
        (torch.ones(2, 3, dtype=torch.bool), "must be integers, found bool"),
        (np.array([[1, -1]]), "token id -1 is outside"),
        ([[1, "a"]], "these are no token ids"),
        ({"input_ids": IDS}, r"got a mapping; pass its ids, such as batch\['input_ids'\]"),
        (None, "got NoneType"),
    ],
)
def test_what_holds_no_blocks_is_one_sentence(lm, blocks, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        extract(lm, blocks, [SITE], tmp_path / "a.zarr")
    assert not (tmp_path / "a.zarr").exists()


def test_a_store_in_place_of_its_blocks_is_told(lm, small_store, tmp_path):
    with pytest.raises(ConfigError, match=r"pass its token_blocks\(\)"):
        extract(lm, small_store, [SITE], tmp_path / "a.zarr")


def test_token_blocks_take_arrays_of_any_integers():
    blocks = TokenBlocks(ids=IDS.tolist(), document=torch.zeros(6, 8, dtype=torch.int64), description={})
    assert blocks.ids.dtype == blocks.document.dtype == np.uint32
    for wrong in (IDS.astype(float), IDS - 300, [["a"]], [[1], [2, 3]], IDS.astype(np.int64) << 33):
        with pytest.raises(ConfigError, match="token blocks: ids must be"):
            TokenBlocks(ids=wrong, document=np.zeros((6, 8), np.uint32), description={})


@pytest.mark.parametrize("source", [b"a", 3, Path(), {"a": 1}, object()])
def test_readers_answer_everything_with_errors_of_ours(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ActcacheError):
        read_texts(source)
