"""Extraction of sequences of unequal length: every token gets its row, and padding none, whatever the batches."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from conftest import random_blocks
from hypothesis import HealthCheck, given, settings
from test_extract import SITES, tiny_lm
from torch import nn

import actcache as ac
from actcache.spec import NO_DOCUMENT, TokenBlocks

SIZES = {"sequences_per_shard": 8, "rows_per_chunk": 20}


def ragged(lengths: list[int], length: int = 21, seed: int = 0) -> TokenBlocks:
    """Random tokens of these lengths, padded to `length`."""
    whole = random_blocks(len(lengths), length, seed)
    there = np.arange(length) < np.array(lengths)[:, None]
    ids, document = np.where(there, whole.ids, 0), np.where(there, whole.document, NO_DOCUMENT)
    return TokenBlocks(ids=ids.astype(np.uint32), document=document.astype(np.uint32), description=whole.description)


LENGTHS = [21, 3, 9, 9, 1, 21, 17, 2, 5, 5, 5, 21, 0, 20, 1, 1, 1, 12, 19]


def alone(lm, blocks: TokenBlocks, site: str) -> dict[tuple[int, int], torch.Tensor]:
    """The activations of each sequence run by itself, without padding, by (sequence, position)."""
    found = {}
    for sequence, length in enumerate(blocks.lengths(range(blocks.n_sequences)).tolist()):
        if length:
            rows = lm.capture(blocks.ids[sequence : sequence + 1, :length], lm.resolve([site]))[site][0]
            found |= {(sequence, position): row for position, row in enumerate(rows)}
    return found


@pytest.mark.parametrize("skip_first", [0, 1])
@pytest.mark.parametrize("batch_sequences", [1, 3, 32])
def test_every_token_has_its_row_and_padding_none(tmp_path, batch_sequences, skip_first):
    lm, blocks = tiny_lm(), ragged(LENGTHS)
    path = tmp_path / "s.zarr"
    sizes = {**SIZES, "rows_per_chunk": 8 * (21 - skip_first) // 8}
    store = ac.extract(
        lm, blocks, SITES, path, dtype="float32", batch_sequences=batch_sequences, skip_first=skip_first, **sizes
    )
    assert store.sealed
    assert ac.verify(path) == []
    assert store.n_rows == sum(max(0, length - skip_first) for length in LENGTHS)
    table, site = store.row_table(), store.sites[-1]
    got, expected = store.read(site, store.row_ids()), alone(lm, blocks, site)
    wanted = {place for place in expected if place[1] >= skip_first}
    places = list(zip(table["sequence"].tolist(), table["position"].tolist(), strict=True))
    assert set(places) == wanted
    assert len(places) == len(wanted)
    torch.testing.assert_close(got, torch.stack([expected[place] for place in places]), rtol=1e-5, atol=1e-5)
    assert store.stats(site).count == store.n_rows


def test_a_loader_gives_each_of_those_rows_once(tmp_path):
    store = ac.extract(tiny_lm(), ragged(LENGTHS), SITES, tmp_path / "s.zarr", **SIZES)
    with ac.Loader(store, [store.sites[0]], batch_rows=16, drop_last=False) as loader:
        rows = torch.cat([batch.rows for batch in loader])
    assert sorted(rows.tolist()) == store.row_ids().tolist()


def test_shards_without_a_single_row_are_no_trouble(tmp_path):
    blocks = ragged([5] * 8 + [1] * 8 + [0] * 8 + [7])
    store = ac.extract(tiny_lm(), blocks, SITES, tmp_path / "s.zarr", **SIZES)
    assert store.sealed
    assert store.shard_n_rows.tolist() == [32, 0, 0, 6]
    assert ac.verify(tmp_path / "s.zarr") == []
    assert store.read(store.sites[0], store.row_ids()).shape == (38, 16)
    with ac.Loader(store, [store.sites[0]], batch_rows=4, drop_last=False) as loader:
        assert sum(len(batch.rows) for batch in loader) == 38


def test_sites_added_later_belong_to_the_same_rows(tmp_path):
    lm, blocks = tiny_lm(), ragged(LENGTHS)
    ac.extract(lm, blocks, SITES, tmp_path / "both.zarr", **SIZES)
    ac.extract(lm, blocks, SITES[:1], tmp_path / "one.zarr", **SIZES)
    store = ac.add_sites(lm, tmp_path / "one.zarr", SITES[1:])
    both = ac.open_store(tmp_path / "both.zarr")
    assert sorted(store.sites) == sorted(both.sites)
    for site in store.sites:
        assert torch.equal(store.read(site, store.row_ids()), both.read(site, both.row_ids()))


def test_a_store_grows_by_ragged_sequences(tmp_path):
    lm, first, more = tiny_lm(), ragged(LENGTHS[:11]), ragged(LENGTHS[11:], seed=5)
    ac.extract(lm, first, SITES, tmp_path / "s.zarr", **SIZES)
    grown = ac.extend(lm, tmp_path / "s.zarr", more)
    assert grown.n_rows == sum(max(0, length - 1) for length in LENGTHS)
    assert ac.verify(tmp_path / "s.zarr") == []


def test_attention_patterns_of_shorter_sequences_are_as_wide_as_those_of_the_longest(tmp_path):
    lm, site = tiny_lm(), "blocks.1.attn.hook_pattern"
    with pytest.warns(UserWarning, match=r"hook_pattern can only be read in the model as transformer-lens runs it"):
        store = ac.extract(lm, ragged([21, 4, 9]), [site], tmp_path / "s.zarr", sequences_per_shard=3, dtype="float32")
    table, rows = store.row_table(), store.read(site, store.row_ids())
    assert rows.shape == (20 + 3 + 8, 2 * 21)
    torch.testing.assert_close(rows.view(-1, 2, 21).sum(2), torch.ones(31, 2))
    ahead = torch.arange(21) > torch.from_numpy(table["position"].astype("int64"))[:, None]
    assert not rows.view(-1, 2, 21)[ahead[:, None].expand(-1, 2, -1)].any()


class Backwards(nn.Module):
    """Each position sees all behind it, so padding would change everything: it must never be given any."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(2048, 6)
        self.out = nn.Linear(6, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.embed(ids).flip(1).cumsum(1).flip(1))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 12), min_size=1, max_size=20).filter(lambda lengths: max(lengths) > 1))
def test_modules_of_which_nothing_is_known_see_no_padding(tmp_path_factory, lengths):
    lm, blocks = ac.load_lm(Backwards()), ragged(lengths, length=12)
    path = tmp_path_factory.mktemp("s") / "s.zarr"
    store = ac.extract(lm, blocks, ["out:out"], path, dtype="float32", sequences_per_shard=6, rows_per_chunk=6)
    table, expected = store.row_table(), alone(lm, blocks, "out:out")
    got = store.read("out:out", store.row_ids())
    places = zip(table["sequence"].tolist(), table["position"].tolist(), strict=True)
    torch.testing.assert_close(got, torch.stack([expected[place] for place in places]), rtol=1e-5, atol=1e-5)
