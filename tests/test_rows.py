"""What leads from a row to its text, and which rows are meant."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import random_bits, random_blocks, spec_of, write_shards
from hypothesis import given, settings
from hypothesis import strategies as st

import actcache as ac
from actcache.errors import ConfigError, CorruptShardError, StoreIncompleteError
from actcache.spec import NO_DOCUMENT, TokenBlocks
from actcache.store import Context, RowFilter, export, open_store
from actcache.store.format.keys import ROW_ARRAYS, row_key, token_key, token_sequences_per_chunk


@pytest.fixture(scope="module")
def many_token_chunks(tmp_path_factory):
    """Sequences so long that a chunk of the tokens holds two shards, and the last chunk and shard are not full."""
    blocks = random_blocks(150, 8192)
    spec = spec_of(blocks, sequences_per_shard=16, rows_per_chunk=16 * 2, skip_first=8190)
    assert token_sequences_per_chunk(spec) == 32
    store = write_shards(tmp_path_factory.mktemp("tokens") / "s.zarr", spec, blocks, random_bits(spec), shards=[3])
    return store, blocks


def test_tokens_of_a_shard_are_those_of_its_sequences_written_or_not(many_token_chunks):
    store, blocks = many_token_chunks
    for shard in range(store.spec.n_shards):
        sequences = store.spec.shard_sequences(shard)
        assert np.array_equal(store.shard_tokens(shard), blocks.ids[sequences.start : sequences.stop])
        assert np.array_equal(store.shard_documents(shard), blocks.document[sequences.start : sequences.stop])
    for shard in (-1, store.spec.n_shards):
        with pytest.raises(IndexError, match=f"shard {shard} asked of .*, which has 0 to 9"):
            store.shard_tokens(shard)


def test_each_chunk_of_the_tokens_is_read_once_and_no_other(many_token_chunks, monkeypatch):
    store, _ = many_token_chunks
    store, read = open_store(store.path), []
    get = store.objects.get
    monkeypatch.setattr(store.objects, "get", lambda key: (read.append(key), get(key))[1])
    for shard in range(2, 7):
        store.shard_tokens(shard)[:] = 0  # the caller's own
        assert store.shard_tokens(shard).any()
    assert read == [token_key("ids", chunk) for chunk in (1, 2, 3)]


def test_damaged_or_exchanged_tokens_of_a_shard_are_noticed(tmp_path):
    blocks = random_blocks(96, 8192)
    spec = spec_of(blocks, sequences_per_shard=16, rows_per_chunk=32, skip_first=8190)
    write_shards(tmp_path / "s.zarr", spec, blocks, random_bits(spec))
    folder = tmp_path / "s.zarr/tokens/ids"
    seen = open_store(tmp_path / "s.zarr")
    assert np.array_equal(seen.tokens(), blocks.ids)
    first, second = folder / "c.0.0", folder / "c.1.0"
    whole = first.read_bytes()
    first.write_bytes(second.read_bytes())
    with pytest.raises(CorruptShardError, match=r"c\.0\.0 .* is not what it was"):
        seen.shard_tokens(1)
    first.write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
    with pytest.raises(CorruptShardError, match=r"tokens/ids/c\.0\.0"):
        open_store(tmp_path / "s.zarr").shard_tokens(1)
    first.unlink()
    with pytest.raises(CorruptShardError, match="is missing"):
        open_store(tmp_path / "s.zarr").shard_tokens(1)


# --- from a row to its text ----------------------------------------------------------------------------------------


def test_every_row_leads_to_the_tokens_around_it(small_store):
    ids, documents, table = small_store.tokens(), small_store.tokens("document"), small_store.row_table()
    for row in range(small_store.n_rows):
        found = small_store.context(row, before=3, after=2)
        sequence, position = int(table["sequence"][row]), int(table["position"][row])
        assert (found.row, found.sequence, found.position) == (row, sequence, position)
        assert found.token == ids[sequence, position] == table["token"][row]
        assert found.document == documents[sequence, position]
        same = documents[sequence] == documents[sequence, position]
        before = [int(i) for i, there in zip(ids[sequence, :position], same[:position], strict=True) if there][-3:]
        after = [int(i) for i, there in zip(ids[sequence, position + 1 :], same[position + 1 :], strict=True) if there]
        assert (list(found.before), list(found.after)) == (before, after[:2])
        across = small_store.context(row, before=3, after=2, across_documents=True)
        assert list(across.before) == ids[sequence, max(0, position - 3) : position].tolist()
        assert list(across.after) == ids[sequence, position + 1 : position + 3].tolist()


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    """A store of real texts, packed, with the model whose tokens they are."""
    lm = ac.load_lm("stories-4l")
    blocks = ac.token_blocks(ac.read_texts("stories-corpus"), lm.tokenizer, length=64, count=24)
    spec = spec_of(blocks, sequences_per_shard=8, rows_per_chunk=63)
    return write_shards(tmp_path_factory.mktemp("stories") / "s.zarr", spec, blocks, random_bits(spec)), lm


def test_the_text_of_a_row_is_that_of_its_document_with_the_token_marked(stories):
    store, lm = stories
    texts = list(ac.read_texts("stories-corpus"))
    for row in np.random.default_rng(0).choice(store.n_rows, 100, replace=False).tolist():
        found = store.context(row, before=10, after=10)
        text = found.text(lm.tokenizer)
        assert text.count("«") == text.count("»") == 1
        inside = lm.tokenizer.decode([found.token]).strip()
        assert text[text.index("«") + 1 : text.index("»")].strip() == inside
        plain = text.replace("«", "").replace("»", "").replace(lm.tokenizer.bos_token, "").strip()
        assert plain in texts[found.document]
        other_marks = found.text(lm.tokenizer, marks=("<b>", "</b>"))
        assert other_marks == text.replace("«", "<b>").replace("»", "</b>")


def test_marks_stand_around_whole_characters():
    """A tokenizer of bytes, the hardest case: four tokens make one character."""
    from tokenizers import Tokenizer, decoders, models

    alphabet = byte_alphabet()
    tokenizer = Tokenizer(models.WordLevel({char: byte for byte, char in alphabet.items()}, unk_token="a"))
    tokenizer.decoder = decoders.ByteLevel()

    class Bytes:
        def decode(self, ids, skip_special_tokens):
            joined = "".join(alphabet[i] for i in ids)
            return tokenizer.decoder.decode([joined])

    text = "ab😀cé."
    ids = list(text.encode())
    marked = []
    for place in range(len(ids)):
        before, after = tuple(ids[:place]), tuple(ids[place + 1 :])
        found = Context(row=0, sequence=0, position=place, document=0, before=before, token=ids[place], after=after)
        marked.append(found.text(Bytes()))
    assert marked == [
        "«a»b😀cé.",
        "a«b»😀cé.",
        *["ab«😀»cé."] * 4,
        "ab😀«c»é.",
        *["ab😀c«é»."] * 2,
        "ab😀cé«.»",
    ]


def byte_alphabet():
    """The character that byte-level tokenizers write for each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + place) for place, byte in enumerate(others)}


def test_a_context_ends_where_its_sequence_ends(tmp_path):
    ids = np.arange(1, 37, dtype=np.uint32).reshape(4, 9)
    document = np.repeat(np.arange(4, dtype=np.uint32)[:, None], 9, axis=1)
    document[1, 5:], ids[1, 5:] = NO_DOCUMENT, 0
    blocks = TokenBlocks(ids=ids, document=document, description={})
    spec = spec_of(blocks, sequences_per_shard=2, rows_per_chunk=8)
    store = write_shards(tmp_path / "s.zarr", spec, blocks, random_bits(spec))
    table = store.row_table()
    row = int(np.flatnonzero((table["sequence"] == 1) & (table["position"] == 4))[0])
    for across in (False, True):
        found = store.context(row, 100, 100, across_documents=across)
        assert (found.before, found.token, found.after) == ((10, 11, 12, 13), 14, ())
    assert store.context(row, 0, 0).before == ()
    with pytest.raises(ConfigError, match="must not be negative, got -1 and 16"):
        store.context(row, before=-1)


def test_rows_that_are_not_there_have_no_context(small_store, tmp_path):
    for row in (-1, small_store.spec.n_rows, 10**12):
        with pytest.raises(IndexError, match="has 0 to 347"):
            small_store.context(row)
    with pytest.raises(TypeError):
        small_store.context(1.5)
    part = export(small_store, tmp_path / "part.zarr", rows=slice(0, 40))
    with pytest.raises(IndexError, match=r"row 41 of .* was left out"):
        part.context(41)
    blocks = random_blocks(29, 13)
    spec = spec_of(blocks)
    unfinished = write_shards(tmp_path / "s.zarr", spec, blocks, random_bits(spec), shards=[1])
    assert unfinished.context(100).row == 100
    with pytest.raises(StoreIncompleteError, match="shard 0"):
        unfinished.context(5)


def test_a_context_reads_one_row_table_and_one_chunk_of_the_tokens(many_token_chunks, monkeypatch):
    store, read = open_store(many_token_chunks[0].path), []
    get = store.objects.get
    monkeypatch.setattr(store.objects, "get", lambda key: (read.append(key), get(key))[1])
    assert store.context(3 * store.spec.rows_per_shard + 5, before=3).before
    tables = [key for key in read if "commit" not in key]
    assert tables == [
        *(row_key(name, 3) for name in ROW_ARRAYS),
        "tokens/ids/c.1.0",
        "tokens/document/c.1.0",
    ]


def test_tokens_of_another_store_are_not_taken_for_the_context_of_a_row(tmp_path):
    for name, seed in (("a", 0), ("b", 1)):
        blocks = random_blocks(29, 13, seed)
        spec = spec_of(blocks)
        write_shards(tmp_path / name, spec, blocks, random_bits(spec))
    (tmp_path / "a/tokens/ids/c.0.0").write_bytes((tmp_path / "b/tokens/ids/c.0.0").read_bytes())
    with pytest.raises(CorruptShardError, match=r"row 7 of .* belongs to token"):
        open_store(tmp_path / "a").context(7)


# --- which rows ----------------------------------------------------------------------------------------------------

choices = st.one_of(
    st.none(),
    st.builds(range, st.integers(-5, 40), st.integers(-5, 60), st.sampled_from([-7, -1, 1, 2, 5])),
    st.lists(st.integers(0, 40), max_size=12),
    st.builds(
        slice, st.none() | st.integers(-30, 30), st.none() | st.integers(-30, 30), st.sampled_from([None, 2, -3])
    ),
)
documents = choices.filter(lambda c: not isinstance(c, slice) or min(c.start or 0, c.stop or 0) >= 0)


@settings(max_examples=200, deadline=None)
@given(
    exclude=st.sets(st.integers(0, 2047), max_size=300),
    only=st.none() | st.just(range(0, 2048, 2)) | st.sets(st.integers(0, 2047), max_size=300),
    positions=choices,
    sequences=choices,
    documents=documents,
)
def test_a_filter_keeps_the_rows_for_which_all_of_it_holds(small_store, exclude, only, positions, sequences, documents):
    kept = RowFilter(
        exclude_tokens=exclude, only_tokens=only, positions=positions, sequences=sequences, documents=documents
    )
    table, document = small_store.row_table(), small_store.tokens("document")

    def chosen(value, choice, n):
        return choice is None or value in (range(n)[choice] if isinstance(choice, slice) else choice)

    expected = [
        row
        for row, (sequence, position, token) in enumerate(zip(*(v.tolist() for v in table.values()), strict=True))
        if token not in exclude
        and chosen(token, only, 1 << 32)
        and chosen(position, positions, 13)
        and chosen(sequence, sequences, 29)
        and chosen(int(document[sequence, position]), documents, 1 << 32)
    ]
    assert small_store.checked_rows(kept).tolist() == expected


def test_a_filter_reads_what_it_names(small_store):
    late = RowFilter(positions=range(6, 13), exclude_tokens=np.array([3, 4], np.uint32))
    rows = small_store.checked_rows(late)
    assert 0 < len(rows) < small_store.n_rows
    for site in small_store.sites:
        assert torch.equal(small_store.read(site, late), small_store.read(site, rows))


def test_a_filter_of_a_store_with_holes_keeps_rows_that_there_are(small_store, tmp_path):
    kept = np.random.default_rng(0).random(small_store.spec.n_rows) < 0.5
    holes = export(small_store, tmp_path / "holes.zarr", rows=kept)
    ids, table = holes.row_ids(), holes.row_table()
    assert np.array_equal(holes.checked_rows(RowFilter()), ids)
    assert np.array_equal(holes.checked_rows(RowFilter(positions=[2, 7])), ids[np.isin(table["position"], [2, 7])])


def test_a_filter_says_what_a_part_of_a_store_takes(small_store, tmp_path):
    late = RowFilter(positions=slice(-4, None))
    part = export(small_store, tmp_path / "late.zarr", rows=late)
    assert part.n_rows == len(small_store.checked_rows(late)) == 29 * 4
    assert set(part.row_table()["position"].tolist()) == {9, 10, 11, 12}


def test_special_tokens_are_those_of_the_tokenizer(stories):
    store, lm = stories
    kept = replace(RowFilter.without_special_tokens(lm.tokenizer), positions=range(2, 64))
    assert set(kept.exclude_tokens) == set(lm.tokenizer.all_special_ids) != set()
    table = store.row_table()
    wanted = ~np.isin(table["token"], lm.tokenizer.all_special_ids) & (table["position"] >= 2)
    assert 0 < wanted.sum() < (table["position"] >= 2).sum()
    assert np.array_equal(store.checked_rows(kept), np.flatnonzero(wanted))
    with pytest.raises(ConfigError, match="a object does not say which tokens are special; name them"):
        RowFilter.without_special_tokens(object())


@pytest.mark.parametrize(
    "wrong",
    [
        {"exclude_tokens": "the"},
        {"exclude_tokens": 5},
        {"exclude_tokens": [-1]},
        {"only_tokens": [1.5]},
        {"only_tokens": slice(3)},
        {"positions": [[1, 2]]},
        {"sequences": [True, False]},
        {"documents": slice(-3, None)},
    ],
)
def test_what_is_no_filter_is_refused_when_it_is_made(wrong):
    with pytest.raises(ConfigError, match=f"row filter: {next(iter(wrong))}|not counted from the end"):
        RowFilter(**wrong)
    assert RowFilter(only_tokens={3, 1, 2}) == RowFilter(only_tokens=[1, 2, 3, 3])
