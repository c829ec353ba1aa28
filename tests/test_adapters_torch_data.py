"""Our loader as a torch dataset: batches as they are asked for, and no workers; torchdata and Lightning run beside."""

from __future__ import annotations

import itertools
import pickle

import peers
import pytest
import torch
from torch.utils.data import DataLoader

from actcache.adapters.torch_data import TorchDataset
from actcache.errors import ConfigError, SiteError
from actcache.load import Loader

TRAINS = "peers/torch_data_trains.py"
SITE, OTHER = "blocks.0.hook_mlp_out", "blocks.1.attn.hook_z"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> peers.Results:
    return peers.Results([TRAINS], ["torch_data"], tmp_path_factory.mktemp("torch_data"))


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", peers.tests_in(TRAINS))
def test_torchdata_and_lightning(results: peers.Results, name: str) -> None:
    results.check(name)


def loader_of(store, **changes):
    return Loader(store, ["*"], **{"batch_rows": 50, "seed": 3, **changes})


def data_of(store, take=None, **changes):
    return DataLoader(TorchDataset(loader_of(store, **changes), take), batch_size=None)


def test_batches_are_the_loaders(small_store):
    expected = list(loader_of(small_store, epochs=2))
    data = data_of(small_store, epochs=2)
    got = list(data)
    assert len(got) == len(data) == len(expected)
    for batch, other in zip(got, expected, strict=True):
        assert type(batch) is dict
        assert torch.equal(batch["rows"], other.rows)
        assert all(torch.equal(batch[site], other[site]) for site in (SITE, OTHER))


def test_a_batch_is_what_is_taken(small_store):
    expected = next(iter(loader_of(small_store)))
    (first, *_) = data_of(small_store, SITE)
    assert torch.equal(first, expected[SITE])
    (pair, *_) = data_of(small_store, (OTHER, "rows", SITE))
    assert [torch.equal(*both) for both in zip(pair, (expected[OTHER], expected.rows, expected[SITE]), strict=True)]
    table = small_store.row_table()
    for (tokens, positions), batch in zip(
        data_of(small_store, ["tokens", "positions"]), loader_of(small_store), strict=True
    ):
        assert tokens.tolist() == table["token"][batch.rows].tolist()
        assert positions.tolist() == table["position"][batch.rows].tolist()
    with pytest.raises(SiteError, match=r"no 'blocks\.9\.hook_z' in the loader's batches; there are blocks\.0"):
        data_of(small_store, "blocks.9.hook_z")


def test_every_loop_is_the_next_epochs_however_the_last_one_ended(small_store):
    loader = loader_of(small_store)
    orders = [[loader.plan.epoch(e).batch_row_ids(b).tolist() for b in range(len(loader))] for e in range(4)]
    data = data_of(small_store, "rows")
    assert [rows.tolist() for rows in data] == orders[0]
    counted = [rows.tolist() for rows in itertools.islice(data, len(data))]  # never asked whether there is more
    assert counted == orders[1]
    broken_off = [rows.tolist() for rows in itertools.islice(data, 2)]
    assert broken_off + [rows.tolist() for rows in data] == orders[2]
    assert [rows.tolist() for rows in data] == orders[3]


def test_restarting_gives_the_same_each_time(small_store):
    data = DataLoader(TorchDataset(loader_of(small_store, drop_last=False), "rows", restart=True), batch_size=None)
    whole = torch.cat(list(data))
    next(iter(data))
    assert torch.equal(torch.cat(list(data)), whole)
    assert sorted(whole.tolist()) == list(range(small_store.n_rows))


def test_a_loader_without_an_end_has_no_length(small_store):
    data = data_of(small_store, epochs=None)
    with pytest.raises(TypeError, match="has no end and no length"):
        len(data)
    assert len(list(itertools.islice(data, 30))) == 30


ADVICE = r"all batches again, out of order; use num_workers=0: .*threads=\.\.\."


def test_workers_are_refused_and_told_what_to_do(small_store):
    data = DataLoader(
        TorchDataset(loader_of(small_store)), batch_size=None, num_workers=1, multiprocessing_context="fork"
    )
    with pytest.raises(ConfigError, match=f"num_workers=1 was asked for, and every .* {ADVICE}"):
        next(iter(data))


def test_a_dataset_is_not_sent_to_workers_that_are_spawned(small_store):
    data = DataLoader(
        TorchDataset(loader_of(small_store)), batch_size=None, num_workers=1, multiprocessing_context="spawn"
    )
    with pytest.raises(ConfigError, match=ADVICE):
        next(iter(data))
    with pytest.raises(ConfigError, match="sent to another process"):
        pickle.dumps(data.dataset)


@pytest.mark.exhaustive
def test_a_network_learns_through_a_data_loader(small_store):
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(12, 48), torch.nn.ReLU(), torch.nn.Linear(48, 10))
    optimizer = torch.optim.Adam(layers.parameters(), lr=1e-2)
    losses = []
    for source, target in data_of(small_store, (SITE, OTHER), epochs=20):
        loss = (layers(source) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-6:]) < 0.9 * sum(losses[:6])
