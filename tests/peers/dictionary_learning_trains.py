"""dictionary_learning's `trainSAE` on our loader, run where it is installed: `test_adapters_dictionary_learning.py`."""

from __future__ import annotations

import json

import pytest
import torch
from dictionary_learning.buffer import NNsightActivationBuffer
from dictionary_learning.dictionary import AutoEncoder
from dictionary_learning.evaluation import evaluate
from dictionary_learning.trainers import BatchTopKTrainer, StandardTrainer, TopKTrainer
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
from dictionary_learning.training import get_norm_factor, trainSAE

from actcache.adapters.dictionary_learning import ActivationData
from actcache.load import Loader
from peers.planted import SITE, TARGET, WIDE, WIDTHS, planted_store

BATCH, LATENTS = 64, 96


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return planted_store(tmp_path_factory.mktemp("stores"))


def loader_of(store, sites=(SITE,), **changes):
    return Loader(store, list(sites), **{"batch_rows": BATCH, "epochs": None, "seed": 3, **changes})


def trainer_config(trainer, steps, **changes):
    shared = {"activation_dim": WIDTHS[SITE], "dict_size": LATENTS, "layer": 0, "lm_name": "planted", "device": "cpu"}
    shared |= {"trainer": trainer, "steps": steps, "seed": 0, "lr": 3e-3, "warmup_steps": 10}
    if issubclass(trainer, StandardTrainer):
        shared |= {"l1_penalty": 0.01, "sparsity_warmup_steps": None}
    else:
        shared |= {"k": 6}
    return {**shared, **changes}


def made(trainer, steps):
    """A trainer as an object, to look at afterwards, where `trainSAE` makes its own and returns nothing."""
    config = trainer_config(trainer, steps)
    return config.pop("trainer")(**config)


def train(data, trainer, steps, **options):
    trainSAE(data, [{"trainer": lambda: trainer}], steps=steps, device="cpu", **options)


class Watched(StandardTrainer):
    """A StandardTrainer that keeps what it was given."""

    def update(self, step, activations):
        self.seen = [*getattr(self, "seen", []), activations.clone()]
        super().update(step, activations)


def expected_acts(store, loader, n_batches, first=0, site=SITE):
    """The loader's batches, from its plan and the store alone."""
    for i in range(first, first + n_batches):
        epoch, batch = divmod(i, len(loader))
        yield store.read(site, loader.plan.epoch(epoch).batch_row_ids(batch)).float()


def unexplained(out, acts):
    return float((out - acts).pow(2).sum() / (acts - acts.mean(0)).pow(2).sum())


@pytest.mark.parametrize("normalize", [False, True])
def test_trainsae_learns(store, tmp_path, normalize):
    """Two trainers side by side, from what they save: the weights take the values as they are."""
    configs = [trainer_config(kind, 400) for kind in (StandardTrainer, BatchTopKTrainer)]
    with loader_of(store) as loader:
        data = ActivationData(loader)
        trainSAE(data, configs, steps=400, save_dir=str(tmp_path), normalize_activations=normalize, device="cpu")
    acts = store.read(SITE, slice(None)).float()
    for number, kind in enumerate((AutoEncoder, BatchTopKSAE)):
        folder = tmp_path / f"trainer_{number}"
        with torch.no_grad():
            left = unexplained(kind.from_pretrained(str(folder / "ae.pt"))(acts), acts)
        assert left < 0.25, (kind, left)
        config = json.loads((folder / "config.json").read_text())
        assert config["buffer"]["d_submodule"] == WIDTHS[SITE]
        assert config["buffer"]["actcache"]["fingerprint"] == store.fingerprint


def test_what_the_normalisation_read_is_trained_on_too(store):
    """`get_norm_factor` reads some hundred batches, then `trainSAE` begins at the first one, and divides in place."""
    trainer = made(Watched, 70)
    with loader_of(store) as loader:
        train(ActivationData(loader), trainer, 70, normalize_activations=True)
        expected = list(expected_acts(store, loader, 70))
    assert len(loader) < 70  # into the second epoch, whose rows the division must not have changed
    factor = float(expected[0].norm() / trainer.seen[0].norm())
    assert factor == pytest.approx(store.stats(SITE).rms_norm, rel=0.01)
    for seen, wanted in zip(trainer.seen, expected, strict=True):
        assert torch.allclose(seen, wanted / factor, rtol=1e-5, atol=1e-6)


def test_the_norm_factor_is_that_of_the_statistics(store):
    with loader_of(store) as loader:
        assert get_norm_factor(ActivationData(loader), steps=100) == pytest.approx(store.stats(SITE).rms_norm, rel=0.01)


def test_training_in_two_parts_sees_what_one_sees(store):
    """With `steps`, no batch is drawn that is not trained on, so that the state is the one after the last of them."""
    seen, state = [], None
    for n_steps in (40, 45):
        with loader_of(store, read_ahead=3) as loader:
            data, trainer = ActivationData(loader, steps=n_steps), made(Watched, n_steps)
            if state is not None:
                data.load_state_dict(state)
            train(data, trainer, n_steps)
            state = json.loads(json.dumps(data.state_dict()))
            seen += trainer.seen
            expected = list(expected_acts(store, loader, 85))
    assert all(torch.equal(had, wanted) for had, wanted in zip(seen, expected, strict=True))


def test_the_same_data_serves_several_trainings(store):
    """A second call of `trainSAE` begins where the first began, so that two runs can be compared."""
    trainers = [made(TopKTrainer, 20) for _ in range(2)]
    with loader_of(store) as loader:
        data = ActivationData(loader)
        for trainer in trainers:
            train(data, trainer, 20)
    first, second = (trainer.ae.state_dict() for trainer in trainers)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


class TranscoderTrainer(StandardTrainer):
    """What a transcoder needs of a trainer of dictionary_learning: a loss that takes the pair apart."""

    def loss(self, x, step, logging=False, **kwargs):
        features = self.ae.encode(x[:, 0])
        error = (self.ae.decode(features) - x[:, 1]).pow(2).sum(dim=-1).mean()
        return error + self.l1_penalty * self.sparsity_warmup_fn(step) * features.norm(p=1, dim=-1).mean()


def test_pairs_are_those_of_its_own_buffer_and_train_a_transcoder(store):
    buffer = NNsightActivationBuffer(None, None, torch.nn.Linear(24, 24), io="in_and_out")
    with loader_of(store, (SITE, TARGET, WIDE)) as loader:
        data = ActivationData(loader, pair=(SITE, TARGET))
        first = next(iter(data))
        assert first.shape[1:] == buffer.activations.shape[1:]
        assert data.config["io"] == buffer.io
        for place, site in enumerate((SITE, TARGET)):
            assert torch.equal(first[:, place], next(expected_acts(store, loader, 1, site=site)))
        trainer = made(TranscoderTrainer, 600)
        train(data, trainer, 600, transcoder=True)
    target = store.read(TARGET, slice(None)).float()
    with torch.no_grad():
        left = unexplained(trainer.ae(store.read(SITE, slice(None)).float()), target)
    assert left < 0.35, left


def test_evaluate_reads_from_it(store):
    trainer = made(BatchTopKTrainer, 400)
    with loader_of(store) as loader:
        data = ActivationData(loader)
        train(data, trainer, 400)
        found = evaluate(trainer.ae, iter(data), device="cpu", n_batches=len(loader))
    assert found["frac_variance_explained"] > 0.75
