"""Documents of all kinds to sequences: packed or one each, with the tokens that begin them."""

import tempfile
import warnings
from itertools import pairwise
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers_at_hand import BOS, CLS, END, SEP, STORY, byte_level, minilm, smollm2
from transformers import AutoTokenizer

from actcache.errors import ConfigError, TextError
from actcache.lm import load_lm
from actcache.order import permutation
from actcache.source import BosPolicy, read_texts, token_blocks, tokenise
from actcache.spec import NO_DOCUMENT

PLAIN = byte_level(bos_token="<|bos|>", eos_token="<|end|>")
ENCODER = byte_level("[CLS] $A [SEP]", cls_token="[CLS]", sep_token="[SEP]")
ENDING = byte_level("$A <|end|>", eos_token="<|end|>")
BEGINNING = byte_level("<|bos|> $A", bos_token="<|bos|>", eos_token="<|end|>")
AS_GPT2 = byte_level(bos_token="<|end|>", eos_token="<|end|>")
"""One token begins texts and ends them, as in GPT-2."""

MARKS = {"plain": ([BOS], []), "encoder": ([CLS], [SEP]), "ending": ([], [END]), "beginning": ([BOS], [])}
TOKENIZERS = {"plain": PLAIN, "encoder": ENCODER, "ending": ENDING, "beginning": BEGINNING}

texts_of_all_sizes = st.lists(st.one_of(st.text(max_size=30), st.sampled_from(["", " \n", STORY])), max_size=20)
ids_with_bos = st.lists(st.lists(st.sampled_from([BOS, 5, 6, 7]), max_size=25), max_size=20)


def plain_ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def sequences_of(blocks):
    """The sequences in the order of their documents, without padding, and the documents of each position."""
    undone = np.argsort(permutation(blocks.n_sequences, blocks.description["seed"]))
    ids, document = np.asarray(blocks.ids)[undone], np.asarray(blocks.document)[undone]
    return [(i[d != NO_DOCUMENT].tolist(), d[d != NO_DOCUMENT].tolist()) for i, d in zip(ids, document, strict=True)]


def quietly(*arguments, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return token_blocks(*arguments, **options)


@settings(max_examples=80, deadline=None)
@given(
    texts=texts_of_all_sizes,
    name=st.sampled_from(sorted(TOKENIZERS)),
    length=st.integers(3, 24),
    count=st.none() | st.integers(1, 12),
    seed=st.integers(0, 2),
)
def test_each_document_is_its_own_tokens_in_order_and_only_cut_ones_are_lost(texts, name, length, count, seed):
    tokenizer, (begin, end) = TOKENIZERS[name], MARKS[name]
    whole = {n: plain_ids(tokenizer, text) for n, text in enumerate(texts) if text.strip()}
    whole = dict(list(whole.items())[:count])
    if not whole:
        with pytest.raises(TextError, match="not one document"):
            token_blocks(texts, tokenizer, length=length, packing="documents")
        return
    blocks = quietly(texts, tokenizer, length=length, count=count, seed=seed, packing="documents")
    room = length - len(begin) - len(end)
    expected = [(begin + ids[:room] + end, number) for number, ids in whole.items()]
    assert sequences_of(blocks) == [(ids, [number] * len(ids)) for ids, number in expected]
    there = blocks.document != NO_DOCUMENT
    assert (there[:, :-1] >= there[:, 1:]).all()  # pads only at the end
    assert not blocks.ids[~there].any()
    assert blocks.description["n_tokens_cut"] == sum(max(0, len(ids) - room) for ids in whole.values())
    assert blocks.description["n_tokens"] == there.sum() == blocks.lengths(range(blocks.n_sequences)).sum()
    assert blocks.description["tokens"] == blocks.digest()


@settings(max_examples=80, deadline=None)
@given(
    rows=ids_with_bos,
    length=st.integers(2, 9),
    count=st.none() | st.integers(1, 9),
    bos=st.sampled_from(get_args(BosPolicy)),
)
def test_packed_ids_are_the_stream_with_what_the_policy_puts_in(rows, length, count, bos):
    stream = []
    for row in filter(None, rows):
        if bos in ("document", "sequence") and row[0] != BOS:
            row = [BOS, *row]
        for token in row:
            if bos == "sequence" and len(stream) % length == 0 and token != BOS:
                stream.append(BOS)
            stream.append(token)
    n_sequences = min(len(stream) // length, count or len(stream))
    if not n_sequences:
        with pytest.raises(TextError):
            token_blocks(rows, PLAIN, length=length, count=count, bos=bos)
        return
    blocks = quietly(rows, PLAIN, length=length, count=count, bos=bos)
    found = [token for ids, _ in sequences_of(blocks) for token in ids]
    assert found == stream[: n_sequences * length]
    if bos == "sequence":
        assert (blocks.ids[:, 0] == BOS).all()
    documents = [number for _, numbers in sequences_of(blocks) for number in numbers]
    assert all(a <= b for a, b in pairwise(documents))


@settings(max_examples=40, deadline=None)
@given(texts=texts_of_all_sizes, name=st.sampled_from(sorted(TOKENIZERS)), length=st.integers(2, 9))
def test_packed_texts_have_the_marks_of_their_tokenizer(texts, name, length):
    tokenizer = TOKENIZERS[name]
    begin, end = MARKS[name]
    stream = [token for text in texts if text.strip() for token in begin + plain_ids(tokenizer, text) + end]
    if len(stream) < length:
        return
    found = [token for ids, _ in sequences_of(token_blocks(texts, tokenizer, length=length)) for token in ids]
    assert found == stream[: len(stream) // length * length]


def test_a_cut_document_is_what_the_tokenizer_itself_would_truncate_it_to():
    blocks = quietly([STORY], ENCODER, length=9, packing="documents")
    assert blocks.ids[0].tolist() == ENCODER(STORY, truncation=True, max_length=9)["input_ids"]


@pytest.mark.parametrize("form", ["lists", "numpy", "uint16", "tensors", "matrix", "tensor matrix", "generator"])
def test_ids_come_in_any_form_and_rows_of_full_length_stay_as_they_are(form):
    rows = np.random.default_rng(0).integers(0, 300, (7, 11))
    forms = {
        "lists": rows.tolist(),
        "numpy": list(rows),
        "uint16": rows.astype(np.uint16),
        "tensors": [torch.from_numpy(row) for row in rows],
        "matrix": rows,
        "tensor matrix": torch.from_numpy(rows),
        "generator": (tuple(row) for row in rows),
    }
    blocks = token_blocks(forms[form], None, length=11, seed=4)
    np.testing.assert_array_equal(blocks.ids, rows[permutation(7, 4)])
    np.testing.assert_array_equal(blocks.document[:, 0], permutation(7, 4))
    assert blocks.ids.dtype == np.uint32


def test_rows_are_packed_to_another_length():
    rows = np.arange(40).reshape(4, 10)
    blocks = token_blocks(rows, None, length=8, seed=0)
    assert [ids for ids, _ in sequences_of(blocks)] == np.arange(40).reshape(5, 8).tolist()


@pytest.mark.parametrize("flat", [np.arange(10), list(range(10)), torch.arange(10)])
def test_flat_ids_are_one_document(flat):
    blocks = token_blocks(flat, None, length=5)
    assert blocks.description["n_documents"] == 1
    assert sequences_of(blocks) == [([0, 1, 2, 3, 4], [0] * 5), ([5, 6, 7, 8, 9], [0] * 5)]


def test_long_ids_are_copied_in_pieces(monkeypatch, tmp_path):
    flat = np.random.default_rng(1).integers(0, 300, 1000).astype(np.uint16)
    np.save(tmp_path / "ids.npy", flat)
    mapped = np.load(tmp_path / "ids.npy", mmap_mode="r")
    options = {"length": 7, "bos": "sequence", "seed": 2}
    large = token_blocks(flat, PLAIN, **options)
    monkeypatch.setattr(tokenise, "IDS_PER_PIECE", 13)
    small = token_blocks([mapped], PLAIN, **options)
    np.testing.assert_array_equal(small.ids, large.ids)
    assert small.description == large.description
    [(marked, _)] = sequences_of(token_blocks([STORY], ENCODER, length=len(ENCODER(STORY)["input_ids"])))
    assert marked == ENCODER(STORY)["input_ids"]


@pytest.mark.parametrize(
    ("rows", "tokenizer", "message"),
    [
        ([[1, -3, 2]], None, "document number 0: token id -3 is outside 0 to 4,294,967,295"),
        ([np.array([3, -1], dtype=np.int16)], None, "token id -1 is outside"),
        ([[1], [1, 2**32]], None, "document number 1: token id 4294967296 is outside"),
        ([np.array([2**63 + 1], dtype=np.uint64)], None, "token id 9223372036854775809 is outside"),
        ([[5, 4000]], PLAIN, "token id 4000 is outside 0 to 316; ids must be those of the model's own tokenizer"),
        ([[1.5, 2.0]], None, r"integers, found float64 of shape \(2,\)"),
        ([[True, False]], None, "integers, found bool"),
        ([[1, "a"]], None, "document number 0: expected a flat list of token ids"),
        ([[[1], [2]]], None, r"of shape \(2, 1\)"),
        ([[[1], [2, 3]]], None, "document number 0: these are no token ids"),
        ([[1, 2], None], None, "text number 1 is NoneType, not a string, a list of token ids or a chat"),
        ([{"text": STORY}], PLAIN, r"of records, pass one column, such as \(record\['text'\]"),
        ([{"role": "user", "content": "Hi"}], PLAIN, "a chat is a list of messages: pass a list of chats"),
        (np.zeros((2, 2, 2), dtype=int), None, r"\(Q, T\) or a flat array, got shape \(2, 2, 2\)"),
    ],
)
def test_what_is_no_document_is_refused_with_its_number(rows, tokenizer, message):
    with pytest.raises(TextError, match=message):
        token_blocks(rows, tokenizer, length=1)


def test_empty_rows_keep_their_numbers_and_give_no_sequence():
    blocks = token_blocks([[], [1, 2], np.array([], dtype=np.int32), [3]], None, length=2, packing="documents")
    assert sequences_of(blocks) == [([1, 2], [1, 1]), ([3], [3])]


def test_cut_tokens_are_told_once_with_the_numbers():
    with pytest.warns(
        UserWarning, match="2 of 3 documents are longer than 4 tokens: 5 tokens were cut off, 9 kept"
    ) as caught:
        blocks = token_blocks([[1] * 6, [2], [3] * 7], None, length=4, packing="documents")
    assert [w.filename for w in caught] == [__file__]
    assert blocks.description == {
        "length": 4,
        "seed": 0,
        "n_documents": 3,
        "n_tokens": 9,
        "tokens": blocks.digest(),
        "packing": "documents",
        "n_tokens_cut": 5,
        "kinds": {"tokens": 3},
    }


@pytest.mark.parametrize("options", [{"packing": "documents"}, {"bos": "sequence"}, {"bos": "none"}])
def test_a_source_that_ends_early_says_how_much_there_was_in_every_mode(options):
    with pytest.warns(
        UserWarning, match=r"asked for 99 sequences of 8 tokens, but the text ends after \d+ \(\d+ tokens in 3 doc"
    ):
        blocks = quietly_cut([STORY] * 3, PLAIN, length=8, count=99, **options)
    assert blocks.n_sequences < 99
    n_each = len(plain_ids(PLAIN, STORY)) + (options.get("bos") != "none")
    if "bos" not in options:
        assert blocks.n_sequences == 3  # no document comes twice
    else:
        assert blocks.n_sequences == -(-3 * n_each // (7 if options["bos"] == "sequence" else 8)) - 1


def quietly_cut(*arguments, **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*cut off")
        return token_blocks(*arguments, **options)


def test_documents_stop_at_the_count():
    read = []
    texts = (read.append(i) or STORY for i in range(10**9))
    blocks = quietly(texts, PLAIN, length=8, count=5, packing="documents")
    assert blocks.n_sequences == 5 == blocks.description["n_documents"]
    assert len(read) <= tokenise.DOCUMENTS_PER_CALL


def test_default_arguments_are_described_as_ever_and_others_say_what_is_different():
    ordinary = {"length", "seed", "n_documents", "n_tokens", "tokenizer", "tokens"}
    for tokenizer in (PLAIN, BEGINNING):
        assert set(token_blocks([STORY], tokenizer, length=4).description) == ordinary
    found = token_blocks([STORY], ENCODER, length=4).description
    assert found["marks"] == {"text": f"[{CLS}] + ids + [{SEP}]"}
    assert token_blocks([STORY], PLAIN, length=4, bos="none").description["bos"] == "none"
    sequence = token_blocks([[5, 6, 7, 8]], PLAIN, length=4, bos="sequence").description
    assert (sequence["bos"], sequence["marks"], sequence["kinds"]) == (
        "sequence",
        {"tokens": f"[{BOS}] + ids + []"},
        {"tokens": 1},
    )


def test_the_embedded_corpus_gives_the_blocks_that_the_first_stores_were_made_from():
    """Of the version that had texts, packing and nothing else."""
    blocks = token_blocks(read_texts("stories-corpus"), load_lm("stories-4l").tokenizer, length=128, count=37, seed=3)
    assert blocks.description == {
        "length": 128,
        "seed": 3,
        "n_documents": 23,
        "n_tokens": 4736,
        "tokenizer": "3eaecc4b67e4ee6af80cf08df7e6b8d8ba70cd01e7c296986800d33318c5a842",
        "tokens": "e3e4cf0fa1c99aa4e73cdcf57b78627e96400a81fc5b950e1537db2f01cbf4f2",
    }


def test_policies_that_need_a_tokenizer_say_so():
    for bos in ("document", "sequence"):
        with pytest.raises(ConfigError, match=f"bos='{bos}' needs a tokenizer"):
            token_blocks([[1, 2]], None, length=2, bos=bos)
    with pytest.raises(ConfigError, match="bos must be one of auto, document, sequence, none, got 'always'"):
        token_blocks([[1, 2]], None, length=2, bos="always")
    with pytest.raises(ConfigError, match="packing must be one of packed, documents, got 'rows'"):
        token_blocks([[1, 2]], None, length=2, packing="rows")


def test_a_tokenizer_that_can_begin_nothing_serves_where_nothing_is_begun():
    bare = byte_level()
    with pytest.raises(ConfigError, match="or pass bos='none'"):
        token_blocks([STORY], bare, length=4)
    assert token_blocks([STORY], bare, length=4, bos="none").ids[0].tolist()
    assert token_blocks([[5, 6, 7, 8]], bare, length=4).ids[0].tolist() == [5, 6, 7, 8]


def test_the_token_that_begins_documents_is_the_one_that_the_tokenizer_itself_begins_texts_with():
    tokenizer = byte_level("[CLS] $A [SEP]", bos_token="<|bos|>", eos_token="<|end|>")
    blocks = token_blocks([STORY, [CLS, 5], [5]], tokenizer, length=64, packing="documents", bos="document")
    assert first_of_each(blocks) == [[CLS, *plain_ids(tokenizer, STORY)], [CLS, 5], [CLS, 5]]


def test_there_must_be_room_between_the_marks():
    with pytest.raises(ConfigError, match="length must be more than 2, the tokens that are put around each document"):
        token_blocks([STORY], ENCODER, length=2, packing="documents")
    with pytest.raises(ConfigError, match="length must be more than 1, the tokens that begin a sequence"):
        token_blocks([STORY], PLAIN, length=1, bos="sequence")


# On real text: what `auto` does is what the model saw.


@pytest.fixture(scope="module")
def stories():
    texts = read_texts("stories-corpus")
    return [next(texts) for _ in range(40)]


def first_of_each(blocks):
    return [ids for ids, _ in sequences_of(blocks)]


def test_llama_documents_are_what_its_tokenizer_makes_of_them(llama_folder, stories):
    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    blocks = quietly(stories, tokenizer, length=512, packing="documents")
    assert first_of_each(blocks) == [tokenizer(t)["input_ids"][:512] for t in stories]
    assert (blocks.ids[:, 0] == tokenizer.bos_token_id).all()


def test_encoder_documents_are_what_its_tokenizer_makes_of_them(stories):
    tokenizer = minilm()
    blocks = quietly(stories, tokenizer, length=128, packing="documents")
    expected = [tokenizer(t, truncation=True, max_length=128)["input_ids"] for t in stories]
    assert first_of_each(blocks) == expected
    assert max(map(len, expected)) == 128  # some are cut
    assert min(map(len, expected)) < 128  # and some padded
    assert blocks.description["marks"] == {"text": "[101] + ids + [102]"}


def test_gpt2_documents_begin_with_the_end_of_text(stories):
    blocks = quietly(stories, AS_GPT2, length=64, packing="documents")
    assert first_of_each(blocks) == [([END, *plain_ids(AS_GPT2, t)])[:64] for t in stories]


def test_sequences_begin_with_bos_as_saelens_has_them(stories):
    blocks = token_blocks(stories, AS_GPT2, length=64, bos="sequence")
    stream = [token for t in stories for token in [END, *plain_ids(AS_GPT2, t)]]
    expected, at = [], 0
    while at < len(stream):
        n_taken = 64 if stream[at] == END else 63
        expected.append(([] if n_taken == 64 else [END]) + stream[at : at + n_taken])
        at += n_taken
    assert first_of_each(blocks) == [ids for ids in expected if len(ids) == 64]


@pytest.mark.exhaustive
def test_embedded_and_smollm2_documents_begin_with_their_bos():
    for tokenizer, bos in ((load_lm("stories-4l").tokenizer, "<|bos|>"), (smollm2(), "<|im_start|>")):
        blocks = token_blocks([STORY, "The end."], tokenizer, length=64, packing="documents")
        begin = tokenizer.convert_tokens_to_ids(bos)
        assert first_of_each(blocks) == [[begin, *plain_ids(tokenizer, t)] for t in (STORY, "The end.")]


CHAT = [
    {"role": "user", "content": "What do birds do?"},
    {"role": "assistant", "content": "They sing, and some fly."},
]
SHAREGPT = [{"from": "human", "value": CHAT[0]["content"]}, {"from": "gpt", "value": CHAT[1]["content"]}]


@pytest.mark.exhaustive
def test_chats_are_what_the_real_template_makes_of_them():
    tokenizer = smollm2()
    expected = tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=False)
    assert tokenizer.decode(expected).startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    blocks = token_blocks([CHAT, STORY, SHAREGPT], tokenizer, length=80, packing="documents")
    bos = tokenizer.bos_token_id
    assert first_of_each(blocks) == [expected, [bos, *plain_ids(tokenizer, STORY)], expected]
    assert blocks.description["kinds"] == {"chat": 2, "text": 1}
    packed = token_blocks([CHAT] * 4, tokenizer, length=20, bos="document")
    stream = expected * 4  # they begin with it already
    assert [t for ids in first_of_each(packed) for t in ids] == stream[: len(stream) // 20 * 20]


TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"


def test_a_template_that_is_given_is_used_and_described():
    text = "<|user|>What do birds do?\n<|assistant|>They sing, and some fly.\n"
    blocks = token_blocks([CHAT], PLAIN, length=99, packing="documents", chat_template=TEMPLATE)
    assert first_of_each(blocks) == [plain_ids(PLAIN, text)]
    own = byte_level(bos_token="<|bos|>")
    own.chat_template = TEMPLATE
    assert token_blocks([CHAT], own, length=99, packing="documents").description == blocks.description
    other = token_blocks([CHAT], PLAIN, length=99, packing="documents", chat_template=TEMPLATE + "\n")
    assert other.description["chat_template"] != blocks.description["chat_template"]
    begun = token_blocks([CHAT], PLAIN, length=99, packing="documents", chat_template=TEMPLATE, bos="document")
    assert first_of_each(begun) == [[BOS, *plain_ids(PLAIN, text)]]


def test_chats_that_cannot_be_rendered_are_named():
    with pytest.raises(ConfigError, match="has no chat template; give one with chat_template"):
        token_blocks([CHAT], PLAIN, length=8)
    with pytest.raises(ConfigError, match="token_blocks needs a tokenizer"):
        token_blocks([CHAT], None, length=8)
    with pytest.raises(TextError, match=r"chat number 1: a message .* found \['speaker', 'text'\]"):
        token_blocks([CHAT, [{"speaker": "a", "text": "b"}]], PLAIN, length=8, chat_template=TEMPLATE)
    refusing = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(TextError, match="chat number 0: the chat template refuses it: roles must alternate"):
        token_blocks([CHAT], PLAIN, length=8, chat_template=refusing)


def test_temporary_files_are_gone_and_arrays_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    blocks = quietly([[1, 2, 3]] * 5, None, length=2, packing="documents")
    assert not list(tmp_path.iterdir())
    assert isinstance(blocks.ids, np.memmap)
    assert blocks.ids.sum() == 15
