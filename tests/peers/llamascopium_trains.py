"""Llamascopium's Initializer and Trainer on our loader: an autoencoder and a transcoder, from the first batch on."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from llamascopium import Initializer, InitializerConfig, SAEConfig, Trainer, TrainerConfig
from llamascopium.utils.misc import calculate_activation_norm

from actcache.adapters.llamascopium import ActivationStream
from actcache.load import Loader
from actcache.store import Store
from peers.planted import SITE, TARGET, WIDTHS, planted_store

BATCH, STEPS = 64, 90


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return planted_store(tmp_path_factory.mktemp("stores"))


def loader_of(store: Store, *sites: str, **changes: Any) -> Loader:
    return Loader(store, sites, **{"batch_rows": BATCH, "epochs": None, "seed": 3, **changes})


class Noting(ActivationStream):
    """A stream that notes the batches of each iteration."""

    def __iter__(self) -> Any:
        self.iterations = [*getattr(self, "iterations", []), []]
        for batch in super().__iter__():
            self.iterations[-1].append({name: value.clone() for name, value in batch.items()})
            yield batch


def config_of(source: str, target: str) -> SAEConfig:
    return SAEConfig(
        hook_point_in=source,
        hook_point_out=target,
        d_model=WIDTHS[source],
        expansion_factor=4,
        act_fn="topk",
        top_k=6,
        device="cpu",
        dtype=torch.float32,
    )


def trainer_of(folder: Path) -> Trainer:
    settings = {"total_training_tokens": STEPS * BATCH, "lr": 3e-3, "lr_warm_up_steps": 5, "l1_coefficient": None}
    quiet = {"amp_dtype": torch.float32, "log_frequency": 10_000, "n_checkpoints": 0, "k_warmup_steps": 0}
    return Trainer(TrainerConfig(**settings, **quiet, initial_k=6, exp_result_path=str(folder)))


def sae_of(target: str, stream: ActivationStream) -> Any:
    torch.manual_seed(0)
    initializer = Initializer(InitializerConfig(init_encoder_with_decoder_transpose=target == SITE))
    return initializer.initialize_sae_from_config(
        config_of(SITE, target), stream, activation_norm=stream.activation_norm()
    )


@torch.no_grad()
def fvu_of(sae: Any, batch: dict[str, torch.Tensor], target: str) -> float:
    batch = sae.normalize_activations(batch)
    wanted = batch[target]
    missed = wanted - sae.decode(sae.encode(batch[SITE]))
    return float(missed.square().sum() / (wanted - wanted.mean(0)).square().sum())


@pytest.mark.parametrize("target", [SITE, TARGET])
def test_a_run_learns_from_the_plans_batches_and_loses_none_to_initialising(store, tmp_path, target):
    sites = list(dict.fromkeys([SITE, target]))
    with loader_of(store, *sites) as loader:
        stream = Noting(loader)
        sae, trainer = sae_of(target, stream), trainer_of(tmp_path)
        trainer.fit(sae, stream)
        assert trainer.cur_step == STEPS
        assert trainer.cur_tokens == STEPS * BATCH
        assert len(stream.iterations) == 3  # Initializer's look at a batch, Trainer's, and the training itself
        assert all(torch.equal(part[0][SITE], stream.iterations[2][0][SITE]) for part in stream.iterations)
        tokens = torch.from_numpy(store.row_table()["token"].astype("int64"))
        for number, batch in enumerate(stream.iterations[2]):
            epoch, within = divmod(number, len(loader))
            rows = loader.plan.epoch(epoch).batch_row_ids(within)
            assert batch.keys() == {*sites, "tokens", "mask"}
            assert torch.equal(batch["tokens"], tokens[rows])
            assert batch["mask"].all()
            assert all(torch.equal(batch[site], store.read(site, rows).float()) for site in sites)
        assert number == STEPS - 1
    other = ActivationStream(loader_of(store, *sites, seed=9))
    batch = next(iter(other))
    assert fvu_of(sae, batch, target) < 0.6 * fvu_of(sae_of(target, other), batch, target)


def test_a_stream_goes_on_from_a_state_and_begins_there_each_time(store):
    with loader_of(store, SITE) as loader:
        stream = ActivationStream(loader)
        before = list(itertools.islice(stream, 5))
        state = json.loads(json.dumps(stream.state_dict()))
        after = list(itertools.islice(stream, 8))[5:]
    assert torch.equal(before[0][SITE], next(iter(stream))[SITE])
    again = ActivationStream(loader_of(store, SITE))
    again.load_state_dict(state)
    for _ in range(2):
        for mine, theirs in zip(itertools.islice(again, 3), after, strict=True):
            assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_the_norm_of_the_store_is_what_llamascopium_calculates(store):
    whole = ActivationStream(loader_of(store, SITE, TARGET, epochs=1, drop_last=False))
    theirs = calculate_activation_norm(whole, [SITE, TARGET], batch_num=len(whole.loader))
    assert whole.activation_norm() == pytest.approx(theirs, rel=1e-4)


def test_hook_points_may_have_other_names(store):
    stream = ActivationStream(loader_of(store, SITE, TARGET), {"in": SITE, "out": TARGET})
    batch = next(iter(stream))
    assert batch.keys() == {"in", "out", "tokens", "mask"}
    assert stream.activation_norm().keys() == {"in", "out"}
