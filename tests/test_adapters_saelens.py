"""SAELens' trainers fed by our loader: what can be said without SAELens, and what SAELens itself says."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import peers
import pytest
import torch

from actcache.adapters.saelens import STATE_FILE, data_provider, multi_data_provider, preset_scaling
from actcache.errors import ConfigError, SiteError, StateError
from actcache.load import Loader

MLP, Z = "blocks.0.hook_mlp_out", "blocks.1.attn.hook_z"
TRAINS = "peers/saelens_trains.py"
EXCHANGE = ("test_saelens_trains_from_an_export", "test_what_saelens_cached_comes_in_exactly")
"""Tests of the files that go to and come from SAELens; beside ours they skip where it is not installed."""


@dataclass
class Config:
    train_batch_size_samples: int


def loader_of(store, sites=(MLP,), **changes):
    return Loader(store, list(sites), **{"batch_rows": 50, "epochs": None, "seed": 3, **changes})


def test_it_never_ends_and_every_batch_is_the_plans_rows(small_store):
    with loader_of(small_store) as loader:
        provider = data_provider(loader, Config(50))
        assert iter(provider) is provider
        for epoch in range(3):
            order = loader.plan.epoch(epoch)
            for number in range(len(loader)):
                acts = next(provider)
                assert acts.shape == (50, 12)
                assert torch.equal(acts, small_store.read(MLP, order.batch_row_ids(number)).float())


def test_the_site_may_be_one_of_several(small_store):
    with loader_of(small_store, ("*",)) as loader:
        beginning = loader.state_dict()
        one, both = data_provider(loader, Config(50), site=Z), multi_data_provider(loader, Config(50))
        first = next(one)
        one.close()
        one.load_state_dict(beginning)
        batch = next(both)
        assert batch.keys() == {MLP, Z}
        assert torch.equal(batch[Z], first)
        with pytest.raises(ConfigError, match=r"one site is needed and the loader has .*name one of them with site="):
            data_provider(loader, Config(50))
        with pytest.raises(SiteError, match=r"'blocks\.9\.hook_z' was asked for, the loader has blocks\.0"):
            data_provider(loader, Config(50), site="blocks.9.hook_z")


def test_resume_is_exact_after_any_batch(small_store, tmp_path):
    n_batches = 2 * len(loader_of(small_store)) + 2
    with loader_of(small_store) as loader:
        provider = data_provider(loader, Config(50))
        expected, states = [], [provider.state_dict()]
        for _ in range(n_batches):
            expected.append(next(provider))
            states.append(json.loads(json.dumps(provider.state_dict())))
    for done, state in enumerate(states[:-1]):
        with loader_of(small_store, read_ahead=1 + done % 3) as loader:
            provider = data_provider(loader, Config(50))
            for _ in range(done % 2):  # from the beginning, and from somewhere else
                next(provider)
            provider.load_state_dict(state)
            assert torch.equal(next(provider), expected[done])
            provider.save_checkpoint(tmp_path)
        with loader_of(small_store) as loader:
            provider = data_provider(loader, Config(50))
            provider.load_checkpoint(tmp_path)
            assert provider.state_dict() == states[done + 1]


def test_data_that_would_end_or_be_miscounted_are_refused_at_once(small_store):
    for make in (data_provider, multi_data_provider):
        with pytest.raises(ConfigError, match=r"ends after epochs=2 \(12 batches\); make it with epochs=None"):
            make(loader_of(small_store, epochs=2), Config(50))
        with pytest.raises(ConfigError, match=r"train_batch_size_samples=64.*batch_rows=50; make them the same"):
            make(loader_of(small_store), Config(64))
        with pytest.raises(ConfigError, match="last of each epoch has 48 rows where the others have 50"):
            make(loader_of(small_store, drop_last=False), Config(50))
    assert small_store.n_rows % 87 == 0
    data_provider(loader_of(small_store, batch_rows=87, drop_last=False), Config(87)).close()


def test_checkpoints_without_our_state_or_with_anothers_are_refused(small_store, tmp_path):
    with loader_of(small_store) as loader:
        provider = data_provider(loader, Config(50))
        provider.save_checkpoint(None)
        with pytest.raises(StateError, match=r"has no actcache_loader\.json; .*save_checkpoint_fn="):
            provider.load_checkpoint(tmp_path)
        provider.save_checkpoint(tmp_path)
        assert [file.name for file in Path(tmp_path).iterdir()] == [STATE_FILE]
    with loader_of(small_store, seed=4) as loader, pytest.raises(StateError, match="seed: saved 3, now 4"):
        data_provider(loader, Config(50)).load_checkpoint(tmp_path)


def test_a_trainer_that_reads_elsewhere_is_refused():
    class Trainer:
        data_provider = iter(())

    with pytest.raises(ConfigError, match=r"is a tuple_iterator; make it with actcache\.adapters\.saelens"):
        preset_scaling(Trainer())


# --- SAELens itself --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_saelens(tmp_path_factory: pytest.TempPathFactory) -> peers.Results:
    tests = [TRAINS, *(f"test_exchange.py::{name}" for name in EXCHANGE)]
    return peers.Results(tests, ["saelens"], tmp_path_factory.mktemp("saelens"))


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", [*peers.tests_in(TRAINS), *EXCHANGE])
def test_with_saelens(with_saelens: peers.Results, name: str) -> None:
    with_saelens.check(name)
