"""Reading order, a split by sequences, and several stores as one."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import random_bits, random_blocks, spec_of, write_shards
from hypothesis import given, settings
from hypothesis import strategies as st

from actcache.errors import ConfigError, StateError
from actcache.load import Loader, MixedLoader, split_sequences
from actcache.load.mix import turn
from actcache.load.split import _fractions
from actcache.store import RowFilter, Store, export

pytestmark = pytest.mark.filterwarnings("ignore:batches of .* rows are going to have")


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Store]:
    folder, blocks = tmp_path_factory.mktemp("modes"), random_blocks(45, 13)
    spec = spec_of(blocks)
    whole = write_shards(folder / "whole.zarr", spec, blocks, random_bits(spec))
    kept = np.random.default_rng(5).random(spec.n_rows) < 0.6
    kept[spec.rows_per_shard : 2 * spec.rows_per_shard] = False
    more = random_blocks(61, 13)
    return {
        "whole": whole,
        "holes": export(whole, folder / "holes.zarr", rows=kept),
        "grown": write_shards(folder / "grown.zarr", spec_of(more), more, random_bits(spec_of(more))),
    }


def loader_of(store: Store, **changes: object) -> Loader:
    settings = {"batch_rows": 40, "memory": 20_000, "seed": 3, "threads": 2}
    return Loader(store, ["*"], **{**settings, **changes})


@pytest.mark.parametrize("name", ["whole", "holes"])
@pytest.mark.parametrize("rows", [None, RowFilter(positions=slice(5, None), sequences=range(3, 41))])
def test_reading_order_gives_whole_sequences_one_after_another(stores, name, rows):
    store = stores[name]
    table, ids = store.row_table(), store.row_ids()
    wanted = ids if rows is None else store.checked_rows(rows)
    place = np.searchsorted(ids, wanted)
    order = np.lexsort((table["position"][place], table["sequence"][place]))
    values = {site: store.read(site, wanted[order]).float() for site in store.sites}
    loader = loader_of(store, order="sequence", rows=rows, drop_last=False, epochs=2)
    batches = list(loader)
    assert len(batches) == 2 * len(loader)
    for epoch in (batches[: len(loader)], batches[len(loader) :]):
        assert torch.cat([batch.rows for batch in epoch]).tolist() == wanted[order].tolist()
        for site, expected in values.items():
            assert torch.equal(torch.cat([batch[site] for batch in epoch]), expected)
        seen: set[int] = set()
        for batch in epoch:
            here = set(batch.sequences.tolist())
            assert not here & seen
            assert len(here) <= 40 // store.spec.rows_per_sequence == 3
            seen |= here
        assert [len(set(batch.sequences.tolist())) for batch in epoch[:-1]] == [3] * (len(epoch) - 1)


def test_ranks_take_turns_in_reading_order(stores):
    settings = {"order": "sequence", "drop_last": False}
    whole = [batch.rows.tolist() for batch in loader_of(stores["whole"], **settings)]
    parts = [
        [batch.rows.tolist() for batch in loader_of(stores["whole"], **settings, rank=rank, world_size=2)]
        for rank in range(2)
    ]
    for number in range(len(whole) // 2 * 2):
        assert parts[number % 2][number // 2] == whole[number]


def test_reading_order_says_what_it_needs(stores):
    with pytest.raises(ConfigError, match=r"whole sequences of 12 rows; batch_rows must be at least that, got 11"):
        loader_of(stores["whole"], order="sequence", batch_rows=11)
    with pytest.raises(ConfigError, match=r"holds two whole shards, .* give it memory=8448 or more"):
        loader_of(stores["whole"], order="sequence", memory=8000)
    with pytest.raises(ConfigError, match="one lane"):
        loader_of(stores["whole"], order="sequence", lanes=2)
    with pytest.raises(ConfigError, match="order must be one of shuffled, sequence, got 'random'"):
        loader_of(stores["whole"], order="random")
    loader = loader_of(stores["whole"], order="sequence")
    with pytest.raises(ConfigError, match="shuffles nothing"):
        loader.shuffle_report()
    with pytest.raises(StateError, match="order: saved None, now 'sequence'"):
        loader.load_state_dict({**loader.state_dict(), "settings": _without(loader, "order")})


def _without(loader: Loader, name: str) -> dict[str, object]:
    return {key: value for key, value in loader.state_dict()["settings"].items() if key != name}


def test_a_split_divides_sequences_and_stays_when_the_store_grows(stores):
    store, grown = stores["whole"], stores["grown"]
    train, held_out = split_sequences(store, validation=0.2, seed=1)
    both = [*train.sequences, *held_out.sequences]
    assert sorted(both) == list(range(45))
    assert 3 <= len(held_out.sequences) <= 16
    later = split_sequences(grown, validation=0.2, seed=1)[1]
    assert held_out.sequences == tuple(s for s in later.sequences if s < 45)
    assert split_sequences(store, 0.2, 1) == (train, held_out) != split_sequences(store, 0.2, 2)
    seen = [
        set(torch.cat([b.sequences for b in loader_of(store, rows=part, batch_rows=5, drop_last=False)]).tolist())
        for part in (train, held_out)
    ]
    assert seen == [set(train.sequences), set(held_out.sequences)]
    wider = split_sequences(store, validation=0.4, seed=1)[1]
    assert set(held_out.sequences) < set(wider.sequences)
    for share in (0, 1, -0.1, 1e-9, float("nan")):
        with pytest.raises(ConfigError, match="split"):
            split_sequences(store, validation=share)


def test_the_share_of_a_split_is_met_and_does_not_depend_on_the_machine():
    for seed in range(5):
        assert abs((_fractions(100_000, seed) < 0.05).mean() - 0.05) < 0.003
    assert (_fractions(6, 0) * 1000).astype(int).tolist() == [487, 826, 597, 376, 840, 170]


@pytest.mark.parametrize("weights", [[1.0], [0.7, 0.3], [1, 1, 1], [5, 1, 0.01]])
def test_turns_are_in_proportion_at_every_length(weights):
    for seed in (0, 7):
        turns = np.array([turn(step, weights, seed) for step in range(4000)])
        for number, weight in enumerate(weights):
            so_far = np.cumsum(turns == number) - np.arange(1, 4001) * weight / sum(weights)
            assert np.abs(so_far).max() < 4


def test_a_mixture_gives_each_loaders_own_batches_in_turn(stores):
    def parts(**changes):
        return [loader_of(stores["whole"], epochs=None, **changes), loader_of(stores["grown"], epochs=None, **changes)]

    with MixedLoader(list(zip(parts(), [3, 1], strict=True)), n_batches=60) as mixture:
        mixed = list(mixture)
    assert [batch.source for batch in mixed] == [turn(step, [3, 1]) for step in range(60)]
    for number, loader in enumerate(parts()):
        own = [batch for batch in mixed if batch.source == number]
        for got, expected in zip(own, loader, strict=False):
            assert torch.equal(got.rows, expected.rows)
            assert torch.equal(got[loader.sites[0]], expected[loader.sites[0]])
        loader.close()


def test_what_does_not_mix_is_refused(stores):
    whole, grown = stores["whole"], stores["grown"]
    ever = {"epochs": None}
    with pytest.raises(ConfigError, match="at least one pair"):
        MixedLoader([])
    with pytest.raises(ConfigError, match="weights above 0"):
        MixedLoader([(loader_of(whole, **ever), 0.0)])
    with pytest.raises(ConfigError, match=r"ends after 1 epochs; give each epochs=None"):
        MixedLoader([(loader_of(whole), 1.0)])
    with pytest.raises(ConfigError, match="same sites and batch_rows"):
        MixedLoader([(loader_of(whole, **ever), 1.0), (loader_of(grown, batch_rows=20, **ever), 1.0)])
    mixture = MixedLoader([(loader_of(whole, **ever), 1.0), (loader_of(grown, **ever), 1.0)])
    state = mixture.state_dict()
    for change, message in [
        ({"version": 3}, "version 3"),
        ({"weights": [1.0, 2.0]}, r"saved with weights=\[1.0, 2.0\]"),
        ({"n_batches": 9}, "saved with n_batches=9"),
        ({"loaders": {}}, "is no state of a mixture"),
        ({"loaders": {**state["loaders"], "each": {}}}, "loader 0 of the mixture, of .*another store"),
    ]:
        with pytest.raises(StateError, match=message):
            mixture.load_state_dict({**state, **change})


def sixteen(stores: dict[str, Store], **of_the_eleventh: object) -> MixedLoader:
    """Loaders of two stores, no two of which have the same settings."""
    parts = []
    for number in range(16):
        store = stores["whole" if number % 3 else "grown"]
        settings = {
            "seed": 1000 + number,
            "rows": RowFilter(sequences=range(number, 45)),
            "memory": 3000 + 700 * number,
        }
        settings |= of_the_eleventh if number == 11 else {}
        loader = loader_of(settings.pop("store", store), epochs=None, read_ahead=1, threads=1, **settings)
        parts.append((loader, 1 / (3 + number)))
    return MixedLoader(parts)


def test_the_state_of_many_loaders_is_small_and_says_which_of_them_is_another(stores):
    with sixteen(stores) as mixture:
        for _ in zip(range(150), mixture, strict=False):
            pass
        text = json.dumps(mixture.state_dict())
        assert len(text) < 2000
        following = [(batch.source, batch.rows.tolist()) for _, batch in zip(range(40), mixture, strict=False)]
    with sixteen(stores) as again:
        again.load_state_dict(json.loads(text))
        assert json.dumps(again.state_dict()) == text
        assert [(b.source, b.rows.tolist()) for _, b in zip(range(40), again, strict=False)] == following
    for change, message in [
        ({"seed": 7}, "seed: saved 1011, now 7"),
        ({"store": stores["holes"]}, "belongs to another store"),
        ({"rows": RowFilter(sequences=range(5))}, "saved with a choice of rows .* has a choice of rows"),
        ({"rows": None}, "saved with a choice of rows .* has all rows"),
        ({"drop_last": False}, "drop_last: saved True, now False"),
        ({"memory": 1}, "give the loader memory="),
    ]:
        other = sixteen(stores, **change)
        before = other.state_dict()
        with pytest.raises(StateError, match=f"loader 11 of the mixture, of .*{message}"):
            other.load_state_dict(json.loads(text))
        assert other.state_dict() == before  # those before it have not moved either


def test_states_of_mixtures_that_had_those_of_their_loaders_whole_go_on(stores):
    with sixteen(stores) as mixture, sixteen(stores) as again:
        for _ in zip(range(30), mixture, strict=False):
            pass
        states = [loader.state_dict() for loader in mixture.loaders]
        old = {**mixture.state_dict(), "version": 1, "loaders": states}
        again.load_state_dict(json.loads(json.dumps(old)))
        assert again.state_dict() == mixture.state_dict()


@settings(max_examples=12, deadline=None)
@given(
    weights=st.lists(st.floats(0.05, 3), min_size=3, max_size=3),
    batch_rows=st.integers(10, 60),
    seed=st.integers(0, 99),
)
def test_every_row_of_each_store_comes_once_in_an_epoch_of_its_own(stores, weights, batch_rows, seed):
    loaders = [
        loader_of(store, batch_rows=batch_rows, seed=seed, epochs=None, drop_last=False, threads=1)
        for store in stores.values()
    ]
    with MixedLoader(list(zip(loaders, weights, strict=True)), n_batches=90, seed=seed) as mixture:
        batches = list(mixture)
    for number, loader in enumerate(loaders):
        rows = [batch.rows for batch in batches if batch.source == number]
        for epoch in range(len(rows) // len(loader)):
            whole = torch.cat(rows[epoch * len(loader) : (epoch + 1) * len(loader)])
            assert np.array_equal(np.sort(whole.numpy()), loader.store.row_ids())
        assert abs(len(rows) - 90 * weights[number] / sum(weights)) < 4
