"""dictionary_learning's `trainSAE` fed by our loader: what can be said without it, and what it says itself."""

from __future__ import annotations

import json
from itertools import islice

import peers
import pytest
import torch

from actcache.adapters.dictionary_learning import ActivationData
from actcache.errors import ConfigError, SiteError, StateError
from actcache.load import Loader

MLP, Z = "blocks.0.hook_mlp_out", "blocks.1.attn.hook_z"
TRAINS = "peers/dictionary_learning_trains.py"


def loader_of(store, sites=(MLP,), **changes):
    return Loader(store, list(sites), **{"batch_rows": 50, "epochs": None, "seed": 3, **changes})


def expected(store, loader, batches, site=MLP):
    for i in batches:
        epoch, batch = divmod(i, len(loader))
        yield store.read(site, loader.plan.epoch(epoch).batch_row_ids(batch)).float()


def same(found, wanted):
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_every_pass_begins_at_the_same_batch_and_goes_over_the_end_of_an_epoch(small_store):
    with loader_of(small_store) as loader:
        data = ActivationData(loader)
        for n_batches in (3, 15, 15):
            assert same(islice(data, n_batches), expected(small_store, loader, range(n_batches)))


def test_a_pass_begins_where_the_loader_stood(small_store):
    with loader_of(small_store) as loader:
        for _ in islice(loader, 4):
            pass
        data = ActivationData(loader)
        for _ in range(2):
            assert same(islice(data, 5), expected(small_store, loader, range(4, 9)))


def test_dividing_in_place_changes_nothing_but_the_batch(small_store):
    with loader_of(small_store) as loader:
        data = ActivationData(loader)
        kept = []
        for acts in islice(data, 15):
            kept.append(acts.clone())
            acts /= 7.0
        assert same(kept, expected(small_store, loader, range(15)))
        assert same(islice(data, 15), kept)


def test_resume_is_exact_after_any_batch(small_store):
    with loader_of(small_store) as loader:
        data = ActivationData(loader)
        states = [data.state_dict()]
        for _ in islice(data, 14):
            states.append(json.loads(json.dumps(data.state_dict())))
    for done, state in enumerate(states):
        with loader_of(small_store, read_ahead=1 + done % 3) as loader:
            data = ActivationData(loader, steps=4)
            next(iter(data))
            data.load_state_dict(state)
            for _ in range(2):  # a pass begins again there
                assert same(data, expected(small_store, loader, range(done, done + 4)))
    with loader_of(small_store, seed=4) as loader, pytest.raises(StateError, match="seed: saved 3, now 4"):
        ActivationData(loader).load_state_dict(states[0])


def test_with_steps_a_pass_ends_and_draws_no_more(small_store):
    with loader_of(small_store) as loader:
        data = ActivationData(loader, steps=7)
        assert len(list(data)) == 7
        data.load_state_dict(data.state_dict())
        assert same(islice(data, 1), expected(small_store, loader, [7]))


def test_pairs_are_aligned_copies(small_store):
    with loader_of(small_store, ("*",)) as loader:
        data = ActivationData(loader, pair=(MLP, MLP))
        acts = next(iter(data))
        assert acts.shape == (50, 2, 12)
        acts[:, 0] = 0
        assert torch.equal(acts[:, 1], next(expected(small_store, loader, range(1))))
        with pytest.raises(ConfigError, match=r"blocks\.0\.hook_mlp_out is 12 wide, blocks\.1\.attn\.hook_z 10"):
            ActivationData(loader, pair=(MLP, Z))
        with pytest.raises(ConfigError, match="a site or a pair of sites, not both"):
            ActivationData(loader, MLP, pair=(MLP, MLP))


def test_config_is_json_and_says_where_the_rows_are_from(small_store):
    with loader_of(small_store, ("*",)) as loader:
        one, pair = ActivationData(loader, Z), ActivationData(loader, pair=(MLP, MLP))
        for data, io, width in ((one, "out", 10), (pair, "in_and_out", 12)):
            config = json.loads(json.dumps(data.config))
            assert (config["io"], config["d_submodule"]) == (io, width)
            assert (config["ctx_len"], config["out_batch_size"], config["device"]) == (13, 50, "cpu")
            assert config["actcache"]["fingerprint"] == small_store.fingerprint
            assert config["actcache"]["model"] == {"name": "random"}


def test_data_that_cannot_serve_are_refused_at_once(small_store):
    with pytest.raises(ConfigError, match=r"ends after epochs=2 \(12 batches\); make it with epochs=None"):
        ActivationData(loader_of(small_store, epochs=2))
    with pytest.raises(ConfigError, match="one site is needed"):
        ActivationData(loader_of(small_store, ("*",)))
    with pytest.raises(SiteError, match="the loader has"):
        ActivationData(loader_of(small_store), pair=(MLP, "blocks.9.hook_z"))
    with pytest.raises(ConfigError, match="steps must be"):
        ActivationData(loader_of(small_store), steps=0)


# --- dictionary_learning itself --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_dictionary_learning(tmp_path_factory: pytest.TempPathFactory) -> peers.Results:
    return peers.Results([TRAINS], ["dictionary_learning"], tmp_path_factory.mktemp("dictionary_learning"))


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", peers.tests_in(TRAINS))
def test_with_dictionary_learning(with_dictionary_learning: peers.Results, name: str) -> None:
    with_dictionary_learning.check(name)
