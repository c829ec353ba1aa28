"""Documents that are not valid: named where they lie, or left out and counted; and what else a text may hide."""

import json
import warnings

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from tokenizers_at_hand import BOS, END, STORY, byte_level

from actcache.errors import ConfigError, TextError
from actcache.source import read_chats, read_documents, read_texts, read_tokens, token_blocks, tokenise
from actcache.spec import NO_DOCUMENT

PLAIN = byte_level(bos_token="<|bos|>", eos_token="<|end|>")
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]

BAD_LINES = [
    ('{"text": ', "not valid JSON"),
    ('{"body": "x"}', "no text column"),
    ('{"text": 3}', "holds int, not text"),
    ('{"text": null}', "holds NoneType"),
    ('{"text": "half \\ud83d"}', r"character 6 is U\+D83D, half of a pair"),
    ("[1, 2]", "expected an object with a text column, found list"),
    ('{"text": "caf\udce9"}', "not UTF-8"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_a_bad_line_is_named_or_left_out(tmp_path, line, message):
    good = json.dumps({"text": STORY})
    path = tmp_path / "a.jsonl"
    path.write_bytes(f"{good}\n{line}\n\n{good}\n{line}\n".encode("utf-8", "surrogateescape"))
    with pytest.raises(TextError, match=rf"a.jsonl, line 2: .*{message}"):
        list(read_texts(path))
    with pytest.warns(UserWarning, match=rf"2 bad documents were left out; the first: .*line 2: .*{message}") as caught:
        assert list(read_texts(path, on_bad="skip")) == [STORY, STORY]
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="2 bad documents were left out; the first: .*line 2: ") as caught:
        blocks = token_blocks(read_texts(path, on_bad="skip"), PLAIN, length=8)
    assert [w.filename for w in caught] == [__file__]
    assert blocks.description["n_bad_documents"] == 2
    assert blocks.description["n_documents"] == 2
    assert set(blocks.document.flat) <= {0, 1}


def test_without_bad_documents_nothing_is_described():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        skipping = token_blocks([STORY], PLAIN, length=8, on_bad="skip")
    assert skipping.description == token_blocks([STORY], PLAIN, length=8).description


def test_either_side_may_ask_to_leave_bad_documents_out(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": 3}\n' + json.dumps({"text": STORY}))
    for options in ({"on_bad": "skip"}, {}), ({}, {"on_bad": "skip"}):
        with pytest.warns(UserWarning, match="1 bad documents"):
            blocks = token_blocks(read_texts(tmp_path, **options[0]), PLAIN, length=8, **options[1])
        assert blocks.description["n_bad_documents"] == 1


def test_rows_of_tables_are_counted_from_one(tmp_path):
    rows = [STORY, None, STORY, None]
    pa.parquet.write_table(pa.table({"text": rows * 600}), tmp_path / "a.parquet")
    (tmp_path / "b.csv").write_text('text,n\n"one\ntwo",1\nbad\nthree,2\n')
    with pytest.raises(TextError, match=r"a.parquet, row 2: column 'text' holds NoneType"):
        list(read_texts(tmp_path / "a.parquet"))
    with pytest.warns(UserWarning, match="1,200 bad documents were left out; the first: .*a.parquet, row 2"):
        assert list(read_texts(tmp_path / "a.parquet", on_bad="skip")) == [STORY] * 1200
    with pytest.raises(TextError, match=r"b.csv, line 4: 1 fields, but the header has 2"):
        list(read_texts(tmp_path / "b.csv"))
    with pytest.warns(UserWarning, match="1 bad documents"):
        assert list(read_texts(tmp_path / "b.csv", on_bad="skip")) == ["one\ntwo", "three"]


def test_a_file_that_cannot_be_read_is_an_error_either_way(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": STORY}))
    (tmp_path / "b.jsonl").write_bytes(b"PK\x03\x04")
    with pytest.raises(TextError, match=r"b.jsonl: it is a zip archive"):
        list(read_texts(tmp_path, on_bad="skip"))


def test_reading_goes_on_behind_an_error(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": 3}\n{"text": "b"}\n')
    documents = read_texts(tmp_path)
    assert next(documents) == "a"
    with pytest.raises(TextError):
        next(documents)
    assert list(documents) == ["b"]


BAD_DOCUMENTS = [
    ("half \ud83d", "text number 1: character 6 is U.D83D, half of a pair"),
    (None, "text number 1 is NoneType"),
    ({"text": STORY}, "of records, pass one column"),
    ([1, -3], "document number 1: token id -3 is outside"),
    ([1, 4000], "document number 1: token id 4000 is outside"),
    ([1.5], "document number 1: expected a flat list of token ids"),
    ([[1], [2, 3]], "document number 1: these are no token ids"),
    ([{"speaker": "a"}], "chat number 1: a message of a chat has role and content"),
    ([{"role": "user", "content": 3}], "chat number 1: the content of a message of 'user' must be a text, found int"),
    ([{"role": None, "content": "a"}], "chat number 1: the role of a message must be a text, found NoneType"),
    ([{"role": "user", "content": "half \ud83d"}], "chat number 1: character .* half of a pair"),
    ([{"role": "user", "content": [{"type": "image", "url": "a"}]}], "a part of the type 'image'; only text is read"),
    ([{"role": "user", "content": [{"type": "text", "text": None}]}], "a part of the content .* has no text"),
    ([{"role": "user", "content": None}], "a message of 'user' has no content, and nothing else either"),
    (
        [{"role": "raise", "content": "a"}],
        "chat number 1: the chat template refuses it: integer division or modulo by zero",
    ),
    ([{"role": "dict", "content": "a", "calls": [{"name": "f"}]}], "the chat template cannot write .* as Python does"),
]
ODD_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'raise' %}{{ 1 // 0 }}{% endif %}"
    "{% if m.role == 'dict' %}{{ m.calls[0] }}{% endif %}{{ m.content }}{% endfor %}"
)


@pytest.mark.parametrize("packing", ["packed", "documents"])
@pytest.mark.parametrize(("document", "message"), BAD_DOCUMENTS)
def test_a_bad_document_among_good_ones_is_named_or_left_out(document, message, packing):
    documents = [[1, 2, 3], document, STORY, CHAT]
    options = {"length": 4, "packing": packing, "chat_template": ODD_TEMPLATE}
    with pytest.raises(TextError, match=message):
        token_blocks(documents, PLAIN, **options)
    with pytest.warns(UserWarning, match=rf"1 bad documents were left out; the first: .*{message}"):
        blocks = token_blocks(documents, PLAIN, on_bad="skip", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        blank = token_blocks([[1, 2, 3], "", STORY, CHAT], PLAIN, **options)
    assert blocks.digest() == blank.digest()  # numbers of documents as if it were blank
    assert blocks.description == {**blank.description, "n_bad_documents": 1}


def test_nothing_of_a_document_stays_whose_end_is_bad(monkeypatch):
    monkeypatch.setattr(tokenise, "IDS_PER_PIECE", 3)
    rows = [[1, 2, 3, 4], [5, 6, 7, 8, -1, 3], [9, 10, 11, 12]]
    with pytest.warns(UserWarning, match="token id -1"):
        blocks = token_blocks(rows, None, length=4, on_bad="skip")
    assert sorted(blocks.ids.tolist()) == [rows[0], rows[2]]
    assert sorted(blocks.document[:, 0].tolist()) == [0, 2]
    assert blocks.description["kinds"] == {"tokens": 2}


def test_what_lies_behind_the_last_sequence_is_not_counted(monkeypatch):
    documents = [STORY, None, STORY, *[None] * 5]
    descriptions = []
    for size in (1, 512):
        monkeypatch.setattr(tokenise, "DOCUMENTS_PER_CALL", size)
        with pytest.warns(UserWarning, match="1 bad"):
            blocks = token_blocks(documents, PLAIN, length=64, count=2, packing="documents", on_bad="skip")
        descriptions.append(blocks.description)
    assert descriptions[0] == descriptions[1]
    assert descriptions[0]["n_bad_documents"] == 1


def test_where_all_are_bad_the_first_is_told():
    with pytest.raises(
        TextError, match=r"not one document .*; 2 bad documents were left out; the first: text number 0"
    ):
        token_blocks([None, None], PLAIN, length=4, on_bad="skip")


def test_what_a_tokenizer_raises_is_blamed_on_the_document():
    class Fragile:
        bos_token_id = BOS
        backend_tokenizer = PLAIN.backend_tokenizer

        def __call__(self, texts, **options):
            if any("crash" in text for text in ([texts] if isinstance(texts, str) else texts)):
                raise RuntimeError("index out of bounds")
            return PLAIN(texts, **options)

        def get_vocab(self):
            return PLAIN.get_vocab()

    with pytest.raises(TextError, match="text number 1: the tokenizer fails: index out of bounds"):
        token_blocks([STORY, "crash", STORY], Fragile(), length=8)
    with pytest.warns(UserWarning, match="1 bad"):
        blocks = token_blocks([STORY, "crash", STORY], Fragile(), length=8, on_bad="skip")
    assert blocks.digest() == token_blocks([STORY, "", STORY], PLAIN, length=8).digest()


def test_policies_for_bad_documents_are_checked(tmp_path):
    for call in (
        lambda: read_texts("stories-corpus", on_bad="ignore"),
        lambda: token_blocks([STORY], PLAIN, length=8, on_bad="ignore"),
    ):
        with pytest.raises(ConfigError, match="on_bad must be one of error, skip, got 'ignore'"):
            call()


# Control tokens.

SPELLED = "It ends with <|end|> and <|bos|> here. "


def test_spelled_control_tokens_are_tokens_by_default_and_counted():
    plain = PLAIN(SPELLED, add_special_tokens=False)["input_ids"]
    assert END in plain
    with pytest.warns(
        UserWarning, match=r"documents spell control tokens of the tokenizer 4 times: .*--control-tokens"
    ):
        blocks = token_blocks([SPELLED, STORY, SPELLED], PLAIN, length=64, packing="documents")
    row = blocks.ids[np.flatnonzero(blocks.document[:, 0] == 0)[0]].tolist()
    assert row[: len(plain) + 1] == [BOS, *plain]
    assert "control_tokens" not in blocks.description


def test_spelled_control_tokens_can_be_the_characters_that_they_are():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        blocks = token_blocks([SPELLED], PLAIN, length=64, packing="documents", control_tokens="text")
    ids = blocks.ids[0, : int(blocks.lengths(range(1))[0])].tolist()
    assert ids[0] == BOS
    assert not {BOS, END} & set(ids[1:])
    assert PLAIN.decode(ids[1:]) == SPELLED
    assert blocks.description["control_tokens"] == "text"
    token_blocks([SPELLED], PLAIN, length=8, bos="none", control_tokens="text")
    assert PLAIN.backend_tokenizer.encode_special_tokens is False  # the tokenizer is as it was
    with pytest.raises(ConfigError, match="control_tokens must be one of token, text"):
        token_blocks([SPELLED], PLAIN, length=64, control_tokens="error")


def test_a_token_for_unknown_text_is_no_control_token_unless_it_is_one_otherwise_too():
    unknown = byte_level(bos_token="<|bos|>", unk_token="<|end|>")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        token_blocks(["a <|end|> b"], unknown, length=2)
    gpt2_like = byte_level(bos_token="<|end|>", eos_token="<|end|>", unk_token="<|end|>")
    with pytest.warns(UserWarning, match="documents spell control tokens of the tokenizer once"):
        token_blocks(["a <|end|> b"], gpt2_like, length=2)


def test_control_tokens_of_slow_tokenizers(tmp_path):
    from transformers import ByT5Tokenizer

    slow = ByT5Tokenizer()
    with pytest.warns(UserWarning, match="once"):
        assert 1 in token_blocks(["a</s>b"], slow, length=3, bos="none").ids
    blocks = token_blocks(["a</s>b"], slow, length=6, bos="none", control_tokens="text")
    assert blocks.ids.tolist() == [[ord(c) + 3 for c in "a</s>b"]]


def test_control_tokens_that_a_message_spells():
    chat = [{"role": "user", "content": "say <|end|>"}]
    template = "<|bos|>{{ messages[0].content }}<|end|>"
    with pytest.warns(UserWarning, match="spell control tokens of the tokenizer once"):
        token_blocks([chat, CHAT], PLAIN, length=4, chat_template=template)
    with pytest.raises(TextError, match=r"chat number 0: a message spells '<\|end\|>', which cannot be told from"):
        token_blocks([chat], PLAIN, length=4, chat_template=template, control_tokens="text")
    blocks = token_blocks([CHAT, SPELLED], PLAIN, length=4, chat_template=template, control_tokens="text")
    assert (blocks.ids == END).sum() == 1  # that of the template


# Options that nothing is there for.


def test_options_without_use_are_told():
    with pytest.warns(UserWarning, match="chat_template was given, but there is no chat"):
        token_blocks([STORY], PLAIN, length=8, chat_template=TEMPLATE)
    with pytest.warns(UserWarning, match="control_tokens='text' was given, but there are only token ids"):
        token_blocks([[1, 2]], PLAIN, length=2, control_tokens="text")


def test_more_documents_to_skip_than_there_are(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    assert list(read_documents(tmp_path).skip(1)) == ["b"]
    with pytest.raises(TextError, match="3 documents were to be left out at the beginning, but there are only 2"):
        read_documents(tmp_path).skip(3)


# Chats.


def rendered(chat, template=TEMPLATE):
    blocks = token_blocks([chat], PLAIN, length=99, packing="documents", chat_template=template)
    return PLAIN.decode(blocks.ids[0][blocks.document[0] != NO_DOCUMENT].tolist())


def test_content_parts_are_joined_where_the_template_knows_texts_only():
    parts = [{"type": "text", "text": "Hi "}, {"type": "text", "text": "there"}]
    for content in (parts, ["Hi ", "there"], [{"text": "Hi there"}], "Hi there"):
        assert rendered([{"role": "user", "content": content}]) == "<|user|>Hi there\n"
    strict = "{% for m in messages %}{{ m.role + ':' + m.content.strip() }}{% endfor %}"
    assert rendered([{"role": "user", "content": parts}], strict) == "user:Hi there"


def test_content_parts_are_given_to_a_template_that_knows_them():
    template = (
        "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for p in m.content if p.type == 'text' %}[{{ p.text }}]{% endfor %}{% endif %}{% endfor %}"
    )
    parts = [{"type": "text", "text": "Hi"}, {"type": "text", "text": "there"}]
    assert rendered([{"role": "user", "content": parts}], template) == "[Hi][there]"


def test_a_template_may_be_a_file_and_must_have_a_place_for_messages(tmp_path):
    (tmp_path / "t.jinja").write_text(TEMPLATE)
    assert rendered(CHAT, tmp_path / "t.jinja") == rendered(CHAT)
    with pytest.raises(ConfigError, match="is none of these: it has nothing to put messages in"):
        rendered(CHAT, str(tmp_path / "t.jinja"))
    with pytest.raises(ConfigError, match=r"chat_template: .*gone.jinja"):
        rendered(CHAT, tmp_path / "gone.jinja")


def test_missing_contents_are_never_written_as_none(tmp_path):
    calls = [{"function": {"name": "f", "arguments": {"x": True}}}]
    chat = [*CHAT, {"role": "assistant", "content": None, "tool_calls": calls, "name": None}]
    assert rendered(chat) == "<|user|>Hi\n<|assistant|>Ho\n<|assistant|>\n"
    template = TEMPLATE + "{% for c in messages[-1].tool_calls %}{{ c.function | tojson }}{% endfor %}"
    assert rendered(chat, template).endswith('{"name": "f", "arguments": {"x": true}}')
    naive = TEMPLATE + "{{ messages[-1].tool_calls[0].function.arguments }}"
    with pytest.raises(TextError, match=r"cannot write {'x': True}, and shows it as Python does"):
        rendered(chat, naive)
    # Tables fill up what a message lacks.
    pa.parquet.write_table(pa.table({"messages": [[*CHAT, {"role": "tool", "name": "f"}]]}), tmp_path / "a.parquet")
    (read,) = read_chats(tmp_path)
    assert read[0] == {"role": "user", "content": "Hi", "name": None}
    assert rendered(read) == "<|user|>Hi\n<|assistant|>Ho\n<|tool|>\n"


def test_messages_out_of_a_table_of_pandas():
    import pandas

    chats = pandas.Series([np.array(CHAT, dtype=object)])
    blocks = token_blocks(chats, PLAIN, length=99, packing="documents", chat_template=TEMPLATE)
    assert blocks.description["kinds"] == {"chat": 1}


def test_chats_of_a_file_are_named_by_their_line(tmp_path):
    lines = [{"messages": CHAT}, {"messages": [{"role": "user"}]}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(
        TextError, match=r"chat number 1 \(.*a.jsonl, line 2\): a message of a chat has role and content"
    ):
        token_blocks(read_chats(tmp_path), PLAIN, length=4, chat_template=TEMPLATE)
    with pytest.warns(UserWarning, match="1 bad"):
        token_blocks(read_chats(tmp_path, on_bad="skip"), PLAIN, length=4, chat_template=TEMPLATE)


def test_bad_masks_are_bad_documents(tmp_path):
    lines = [{"input_ids": [1, 2], "attention_mask": m} for m in ([1, 0], ["1", "0"], [1], None, "10")]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.warns(UserWarning, match=r"3 bad documents .*line 2: the attention mask must be of zeros and ones"):
        assert [ids.tolist() for ids in read_tokens(tmp_path, on_bad="skip")] == [[1], [1, 2]]
