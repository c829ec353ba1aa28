"""SAELens' own trainers on our loader; run where it is installed, by `test_adapters_saelens.py`."""

from __future__ import annotations

import pytest
import sae_lens
import torch
from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, StandardTrainingSAE, StandardTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from sae_lens.training.prefetch import PrefetchingIterator
from sae_lens.training.sae_trainer import SAETrainer

from actcache.adapters.saelens import data_provider, multi_data_provider, preset_scaling
from actcache.errors import ConfigError, SiteError
from actcache.load import Loader
from peers.planted import SITE, TARGET, WIDE, WIDTHS, planted_store

BATCH = 64


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return planted_store(tmp_path_factory.mktemp("stores"))


def loader_of(store, sites=(SITE,), **changes):
    return Loader(store, list(sites), **{"batch_rows": BATCH, "epochs": None, "seed": 3, **changes})


def sae_of(d_in, kind="batchtopk", normalize="none", seed=0):
    torch.manual_seed(seed)
    shared = {"d_in": d_in, "d_sae": 64, "normalize_activations": normalize}
    if kind == "batchtopk":
        return BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(k=4, **shared))
    return StandardTrainingSAE(StandardTrainingSAEConfig(l1_coefficient=0.05, **shared))


def config_of(steps, **changes):
    sizes = {"total_training_samples": steps * BATCH, "train_batch_size_samples": BATCH}
    return SAETrainerConfig(**{**sizes, "lr": 3e-3, "lr_end": 3e-4, **changes})


class Watched(SAETrainer):
    """An SAETrainer that keeps what it was given."""

    def step(self, batch):
        self.seen = [*getattr(self, "seen", []), batch.clone()]
        return super().step(batch)


def plan_rows(loader, n_batches):
    """Row ids of the loader's first batches, from the integers alone."""
    epochs = {}
    for i in range(n_batches):
        epoch, batch = divmod(i, len(loader))
        order = epochs.setdefault(epoch, loader.plan.epoch(epoch))
        yield order.batch_row_ids(batch)


def acts_of(store, number):
    """The batch of that number at SITE."""
    with loader_of(store) as loader:
        *_, rows = plan_rows(loader, number + 1)
    return store.read(SITE, rows).float()


def unexplained(sae, acts):
    """Fraction of the variance that a trained SAE leaves."""
    with torch.no_grad():
        out = sae(acts)
    return float((out - acts).pow(2).sum() / (acts - acts.mean(0)).pow(2).sum())


@pytest.mark.parametrize("kind", ["batchtopk", "standard"])
@pytest.mark.parametrize("normalize", ["none", "expected_average_only_in", "covariance_whitening"])
def test_saetrainer_learns(store, kind, normalize):
    sae, cfg = sae_of(WIDTHS[SITE], kind, normalize), config_of(400)
    with loader_of(store) as loader:
        trainer = SAETrainer(cfg, sae, data_provider(loader, cfg))
        preset_scaling(trainer)
        trained = trainer.fit()
    assert trainer.n_training_samples == 400 * BATCH
    # SAELens folds the normalisation into the weights, so that the SAE takes the values as they are.
    left = unexplained(trained, store.read(SITE, slice(None)).float())
    assert left < 0.25, left


def test_it_trains_on_the_loaders_rows_and_on_each_of_them(store):
    """Nothing is drawn and thrown away: from the first batch on, over the end of an epoch."""
    n_steps = 70
    sae, cfg = sae_of(WIDTHS[SITE], normalize="expected_average_only_in"), config_of(n_steps)
    with loader_of(store) as loader:
        assert len(loader) < n_steps
        provider = data_provider(loader, cfg)
        trainer = Watched(cfg, sae, provider)
        preset_scaling(trainer)
        trainer.fit()
        drawn = [*trainer.seen, next(provider)]  # one more, to see that it is the one that follows
        expected = [store.read(SITE, rows).float() for rows in plan_rows(loader, n_steps + 1)]
    assert all(torch.equal(seen, wanted) for seen, wanted in zip(drawn, expected, strict=True))


@pytest.mark.parametrize("rows", [None, slice(0, 1000)])
def test_the_preset_factor_is_what_saelens_estimates(store, rows):
    cfg = config_of(1, n_batches_for_norm_estimate=1000)
    factors = []
    for preset in (True, False):
        sae = sae_of(WIDTHS[SITE], normalize="expected_average_only_in")
        with loader_of(store, rows=rows) as loader:
            trainer = SAETrainer(cfg, sae, data_provider(loader, cfg))
            if preset:
                factors.append(preset_scaling(trainer)[SITE])
                assert trainer.activation_scaler.scaling_factor == factors[0]
            else:
                trainer.activation_scaler.estimate_scaling_factor(sae.cfg.d_in, trainer.data_provider, 1000)
                factors.append(trainer.activation_scaler.scaling_factor)
    assert factors[0] == pytest.approx(factors[1], rel=0.002)


@pytest.mark.parametrize("rows", [None, slice(0, 1000)])
@pytest.mark.parametrize("normalize", [None, "rms", "center-rms"])
def test_the_preset_whitening_is_what_saelens_estimates(store, rows, normalize):
    cfg, found = config_of(1, train_batch_size_samples=50), []
    for preset in (True, False):
        sae = sae_of(WIDTHS[SITE], normalize="covariance_whitening")
        with loader_of(store, batch_rows=50, rows=rows, normalize=normalize) as loader:
            assert len(loader) * 50 == loader.plan.n_rows  # so that an epoch's estimate is that of all rows
            trainer = SAETrainer(cfg, sae, data_provider(loader, cfg))
            if preset:
                assert preset_scaling(trainer) == {SITE: None}
            else:
                trainer.activation_scaler.estimate_whitening(sae.cfg.d_in, trainer.data_provider, len(loader))
            found.append(trainer.activation_scaler.whitening)
    ours, theirs = found
    assert torch.allclose(ours.mean, theirs.mean, atol=1e-6)
    # Eigenvectors have no sign; what they make together has.
    assert torch.allclose(ours.matrix @ ours.matrix.T, theirs.matrix @ theirs.matrix.T, rtol=1e-4, atol=1e-6)
    assert torch.allclose(ours.matrix @ ours.inverse_matrix, torch.eye(WIDTHS[SITE], dtype=torch.float64), atol=1e-9)


def test_a_normalising_loader_is_taken_into_account(store):
    """Where the loader divides by the root mean square, what is left for SAELens is a factor near 1."""
    cfg, sae = config_of(1), sae_of(WIDTHS[SITE], normalize="expected_average_only_in")
    with loader_of(store, normalize="rms") as loader:
        trainer = SAETrainer(cfg, sae, data_provider(loader, cfg))
        preset = preset_scaling(trainer)[SITE]
        trainer.activation_scaler.estimate_scaling_factor(sae.cfg.d_in, trainer.data_provider, 200)
    assert 1 < preset < 1.5
    assert preset == pytest.approx(trainer.activation_scaler.scaling_factor, rel=0.01)
    with loader_of(store, normalize="center-rms") as loader:
        trainer = SAETrainer(cfg, sae_of(24, normalize="expected_average_only_in"), data_provider(loader, cfg))
        with pytest.raises(ConfigError, match="centres"):
            preset_scaling(trainer)


@pytest.mark.parametrize("stop_at", [1, 37, 62, 63])
def test_a_run_resumes_exactly(store, tmp_path, stop_at):
    """Broken off after some batch, also the last of an epoch, and continued from its checkpoint by new objects."""
    n_steps = 80  # an epoch has 62 batches

    def trainer_of(loader, steps, folder=None):
        cfg = config_of(steps, checkpoint_path=folder and str(folder), save_final_checkpoint=False)
        provider = data_provider(loader, cfg)
        sae = sae_of(WIDTHS[SITE], "standard", "expected_average_only_in")
        return SAETrainer(cfg, sae, provider, save_checkpoint_fn=provider.save_checkpoint)

    with loader_of(store) as loader:
        trainer = trainer_of(loader, n_steps)
        preset_scaling(trainer)
        whole = trainer.fit()

    with loader_of(store) as loader:
        trainer = trainer_of(loader, n_steps, tmp_path)
        preset_scaling(trainer)
        for _ in range(stop_at):
            trainer.step(next(trainer.data_provider))
            trainer.n_training_steps += 1
        trainer.save_checkpoint("broken_off")
        factor = trainer.activation_scaler.scaling_factor
    checkpoint = tmp_path / "broken_off"

    with loader_of(store, read_ahead=5, threads=1) as loader:
        trainer = trainer_of(loader, n_steps)
        trainer.load_trainer_state(checkpoint)
        trainer.sae.load_weights_from_checkpoint(checkpoint)
        trainer.data_provider.load_checkpoint(checkpoint)
        assert preset_scaling(trainer) == {SITE: factor}  # that of the checkpoint
        resumed = trainer.fit()
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_a_run_goes_on_exactly_from_the_checkpoints_that_it_wrote(store, tmp_path):
    """Each with the loader's state after the batch that it was written after."""
    cfg = config_of(60, n_checkpoints=2, checkpoint_path=str(tmp_path), save_final_checkpoint=True)
    with loader_of(store) as loader:
        provider = data_provider(loader, cfg)
        trainer = SAETrainer(cfg, sae_of(24), provider, save_checkpoint_fn=provider.save_checkpoint)
        whole = trainer.fit().state_dict()
    folders = {int(folder.name.removeprefix("final_")): folder for folder in tmp_path.iterdir()}
    assert len(folders) == 3
    assert not list(tmp_path.rglob("*.partial"))
    for samples, folder in folders.items():
        with loader_of(store) as loader:
            provider = data_provider(loader, cfg)
            provider.load_checkpoint(folder)
            assert next(provider).equal(acts_of(store, samples // BATCH))
    with loader_of(store) as loader:
        provider = data_provider(loader, cfg)
        trainer = SAETrainer(cfg, sae_of(24, seed=9), provider, save_checkpoint_fn=provider.save_checkpoint)
        first = folders[min(folders)]
        trainer.load_trainer_state(first)
        trainer.sae.load_weights_from_checkpoint(first)
        provider.load_checkpoint(first)
        resumed = trainer.fit().state_dict()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_multisaetrainer_learns_every_site_and_another_target_of_it(store):
    sites = {"in": SITE, "wide": WIDE, "wide again": WIDE}
    saes = {name: sae_of(WIDTHS[site], normalize="expected_average_only_in") for name, site in sites.items()}
    cfg = config_of(400)
    with loader_of(store, (SITE, TARGET, WIDE)) as loader:
        provider = multi_data_provider(loader, cfg)
        trainer = MultiSAETrainer(cfg, saes, sites, provider)
        factors = preset_scaling(trainer)
        assert factors.keys() == {SITE, WIDE}
        assert all(part.activation_scaler.scaling_factor for part in trainer.trainers.values())
        trained = trainer.fit()
        assert next(provider)[SITE].equal(acts_of(store, 400))
    for name, site in sites.items():
        left = unexplained(trained[name], store.read(site, slice(None)).float())
        assert left < 0.25, (name, left)


def test_batches_of_several_sites_are_aligned(store):
    with loader_of(store, (SITE, WIDE)) as loader:
        provider = multi_data_provider(loader, config_of(1))
        for rows in plan_rows(loader, 5):
            batch = next(provider)
            assert type(batch) is dict
            assert all(torch.equal(batch[site], store.read(site, rows).float()) for site in (SITE, WIDE))


def test_bfloat16_batches_train(store):
    sae, cfg = sae_of(WIDTHS[SITE], normalize="expected_average_only_in"), config_of(400)
    with loader_of(store, dtype=torch.bfloat16) as loader:
        trainer = SAETrainer(cfg, sae, data_provider(loader, cfg))
        preset_scaling(trainer)
        trained = trainer.fit()
    assert unexplained(trained, store.read(SITE, slice(None)).float()) < 0.25


def test_saelens_may_draw_in_a_thread_of_its_own(store):
    cfg = config_of(10)
    with loader_of(store) as loader:
        ahead = PrefetchingIterator(data_provider(loader, cfg), prefetch=3)
        trainer = Watched(cfg, sae_of(WIDTHS[SITE]), ahead)
        trainer.fit()
        ahead.close()
        expected = [store.read(SITE, rows).float() for rows in plan_rows(loader, 10)]
        assert all(torch.equal(seen, wanted) for seen, wanted in zip(trainer.seen, expected, strict=True))
        trainer = SAETrainer(cfg, sae_of(24, normalize="expected_average_only_in"), ahead)
        with pytest.raises(ConfigError, match="data_provider is a PrefetchingIterator"):
            preset_scaling(trainer)


def test_saes_that_do_not_fit_are_refused(store):
    cfg = config_of(10)
    with loader_of(store) as loader:
        trainer = SAETrainer(cfg, sae_of(30, normalize="expected_average_only_in"), data_provider(loader, cfg))
        with pytest.raises(ConfigError, match=r"d_in=30, blocks\.0\.hook_mlp_in is 24 wide"):
            preset_scaling(trainer)
        saes = {"a": sae_of(24, normalize="expected_average_only_in")}
        trainer = MultiSAETrainer(cfg, saes, {"a": "blocks.7.hook_z"}, multi_data_provider(loader, cfg))
        with pytest.raises(SiteError, match=r"blocks\.7\.hook_z"):
            preset_scaling(trainer)


def test_a_saelens_that_would_estimate_all_the_same_is_told(store, monkeypatch):
    cfg = config_of(10)
    with loader_of(store) as loader:
        trainer = SAETrainer(cfg, sae_of(24, normalize="expected_average_only_in"), data_provider(loader, cfg))
        monkeypatch.setattr(sae_lens, "__version__", "6.51.8")
        with pytest.raises(ConfigError, match=r"SAELens 6\.51\.8 always estimates its scaling"):
            preset_scaling(trainer)
