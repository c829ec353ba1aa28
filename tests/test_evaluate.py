"""Evaluation against naive numpy, and the identities that a spliced loss must obey."""

import numpy as np
import pytest
import torch
from test_train import MemoryLoader, MemoryStore

from actcache.errors import ConfigError
from actcache.lm import load_lm
from actcache.lm.stories import StoriesConfig, StoriesLM
from actcache.sparse.evaluation import SplicedLoss, next_token_loss, reconstruction, spliced_loss
from actcache.sparse.model import SparseMLP
from actcache.spec import NO_DOCUMENT, TokenBlocks

IN, OUT = "blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out"


def random_loader(n_rows=300, batch_rows=32, offset=0.0, epochs=1):
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(n_rows, 6, generator=g), torch.randn(n_rows, 5, generator=g) + torch.arange(5.0) + offset
    return MemoryLoader(MemoryStore({"in": x, "out": y}), batch_rows=batch_rows, epochs=epochs)


def random_mlp():
    torch.manual_seed(1)
    mlp = SparseMLP(d_in=6, d_out=5, n_latents=16)
    with torch.no_grad():
        mlp.encoder.bias[3] = -100.0
    return mlp


def naive(mlp, batches):
    x, y = (np.concatenate([b[site].double().numpy() for b in batches]) for site in ("in", "out"))
    w = {name: value.double().numpy() for name, value in mlp.state_dict().items()}
    a = np.maximum(x @ w["encoder.weight"].T + w["encoder.bias"], 0)
    prediction = a @ w["decoder.weight"].T + w["decoder.bias"]
    fvu = ((prediction - y) ** 2).sum() / ((y - y.mean(0)) ** 2).sum()
    return fvu, (a > 0).sum(1).mean(), (a > 0).mean(0), len(x)


def test_reconstruction_matches_numpy():
    mlp = random_mlp()
    fvu, l0, density, n_rows = naive(mlp, list(random_loader()))
    found = reconstruction(mlp, random_loader())
    assert found.fvu == pytest.approx(fvu, rel=1e-6)
    assert found.l0 == pytest.approx(l0, rel=1e-6)
    assert found.dead_fraction == pytest.approx((density == 0).mean())
    assert found.dead_fraction >= 1 / 16
    assert found.n_rows == n_rows == 288
    np.testing.assert_allclose(found.density, density, atol=1e-12)


def test_fvu_is_exact_far_from_zero():
    mlp = random_mlp()
    with torch.no_grad():
        mlp.decoder.bias += 1e6
    fvu = naive(mlp, list(random_loader(offset=1e6)))[0]
    assert reconstruction(mlp, random_loader(offset=1e6)).fvu == pytest.approx(fvu, rel=1e-2)


def test_mean_prediction_has_fvu_one_and_perfect_prediction_zero():
    loader = random_loader(n_rows=320)
    mlp = random_mlp()
    with torch.no_grad():
        mlp.decoder.weight.zero_()
        mlp.decoder.bias.copy_(loader.store.arrays["out"].mean(0))
    assert reconstruction(mlp, loader).fvu == pytest.approx(1, rel=1e-6)
    identity = SparseMLP(d_in=6, d_out=6, n_latents=12)
    with torch.no_grad():
        for parameter in identity.parameters():
            parameter.zero_()
        eye = torch.eye(6)
        identity.encoder.weight.copy_(torch.cat([eye, -eye]))
        identity.decoder.weight.copy_(torch.cat([eye, -eye], dim=1))
    found = reconstruction(identity, loader, site_in="in", site_out="in")
    assert found.fvu == 0
    assert found.l0 == 6


def test_reconstruction_leaves_the_loader_where_it_was():
    loader = random_loader(epochs=None)
    batches = iter(loader)
    next(batches)
    before = reconstruction(random_mlp(), loader)
    assert before.n_rows == len(loader) * 32
    assert loader.state_dict() == {"delivered": 1}
    assert reconstruction(random_mlp(), loader, n_batches=2).n_rows == 64


def test_reconstruction_of_nothing_is_refused():
    loader = random_loader()
    loader.delivered = len(loader)
    with pytest.raises(ConfigError, match="at least one batch"):
        reconstruction(random_mlp(), loader)
    constant = MemoryLoader(MemoryStore({"in": torch.randn(64, 6), "out": torch.ones(64, 5)}), epochs=1)
    with pytest.raises(ConfigError, match="do not vary"):
        reconstruction(random_mlp(), constant)


@pytest.fixture(scope="module")
def lm():
    torch.manual_seed(0)
    config = StoriesConfig(d_model=16, d_mlp=24, n_layers=2, n_heads=2, n_ctx=12, d_vocab=30)
    return load_lm(StoriesLM(config).eval())


@pytest.fixture(scope="module")
def exact(lm):
    """The sparse MLP that does what the model's own MLP does."""
    mlp = SparseMLP(d_in=16, d_out=16, n_latents=24)
    halves = {"encoder": lm.module.blocks[1].mlp["in"], "decoder": lm.module.blocks[1].mlp["out"]}
    mlp.load_state_dict({f"{half}.{n}": w for half, module in halves.items() for n, w in module.state_dict().items()})
    return mlp


@pytest.fixture
def zero():
    """A sparse MLP that always gives zero."""
    mlp = SparseMLP(d_in=16, d_out=16, n_latents=24)
    with torch.no_grad():
        mlp.decoder.weight.zero_()
        mlp.decoder.bias.zero_()
    return mlp


@pytest.fixture(scope="module")
def blocks():
    ids = np.random.default_rng(0).integers(0, 30, (7, 12)).astype(np.uint32)
    return TokenBlocks(ids=ids, document=np.zeros_like(ids), description={})


def loss_of(lm, mlp, blocks, **options):
    return spliced_loss(lm, mlp, blocks, site_in=IN, site_out=OUT, **options)


def test_an_exact_mlp_recovers_all_and_a_zero_mlp_nothing(lm, exact, zero, blocks):
    all_of_it, nothing = loss_of(lm, exact, blocks), loss_of(lm, zero, blocks)
    assert abs(all_of_it.zero_ablated - all_of_it.clean) > 1e-3
    assert all_of_it.loss_recovered == pytest.approx(1, abs=1e-4)
    assert nothing.loss_recovered == 0
    assert nothing.spliced == nothing.zero_ablated
    assert (nothing.n_tokens, nothing.mean_ablated) == (77, None)


def test_clean_loss_is_the_plain_cross_entropy(lm, exact, blocks):
    ids = torch.from_numpy(blocks.ids.astype(np.int64))
    wanted = torch.nn.functional.cross_entropy(lm.logits(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert loss_of(lm, exact, blocks).clean == pytest.approx(wanted.item(), rel=1e-6)


def test_batch_size_does_not_matter_and_progress_is_told(lm, zero, blocks):
    seen = []
    small = loss_of(lm, zero, blocks, batch_sequences=3, progress=lambda *done: seen.append(done))
    whole = loss_of(lm, zero, blocks)
    assert seen == [(3, 7), (6, 7), (7, 7)]
    for name in ("clean", "zero_ablated", "spliced"):
        assert getattr(small, name) == pytest.approx(getattr(whole, name), rel=1e-6)


def test_mean_ablation_writes_the_mean(lm, zero, blocks):
    at_zero = loss_of(lm, zero, blocks, mean=np.zeros(16))
    assert at_zero.mean_ablated == at_zero.zero_ablated
    mean = torch.linspace(-3, 3, 16)
    with torch.no_grad():
        zero.decoder.bias.copy_(mean)
    found = loss_of(lm, zero, blocks, mean=mean.double().numpy())
    assert found.mean_ablated == pytest.approx(found.spliced, rel=1e-6)
    assert found.mean_ablated != pytest.approx(found.zero_ablated, rel=1e-4)


def test_first_positions_keep_the_models_own_values(lm, zero, blocks):
    # Every position that predicts a token keeps its own value, so nothing is left to harm.
    kept = loss_of(lm, zero, blocks, skip_first=11, mean=np.zeros(16))
    assert kept.spliced == kept.zero_ablated == kept.mean_ablated == pytest.approx(kept.clean, rel=1e-6)
    some, none = loss_of(lm, zero, blocks, skip_first=1), loss_of(lm, zero, blocks)
    assert some.clean == none.clean
    assert some.zero_ablated != none.zero_ablated


def test_ablation_without_damage_has_no_recovery():
    assert np.isnan(SplicedLoss(clean=1, zero_ablated=1, mean_ablated=None, spliced=1, n_tokens=1).loss_recovered)


@pytest.mark.parametrize("bad", [{"skip_first": 12}, {"skip_first": -1}, {"batch_sequences": 0}])
def test_options_are_checked(lm, zero, blocks, bad):
    with pytest.raises(ConfigError):
        loss_of(lm, zero, blocks, **bad)


def test_uniform_logits_cost_log_v():
    assert next_token_loss(torch.zeros(2, 5, 8), torch.zeros(2, 5, dtype=torch.int64)) == pytest.approx(8 * np.log(8))


def test_padding_is_neither_scored_nor_counted(lm, zero, blocks):
    lengths = np.array([12, 5, 1, 0, 7, 12, 3])
    document = np.where(np.arange(12) < lengths[:, None], 0, NO_DOCUMENT).astype(np.uint32)
    ragged = TokenBlocks(ids=blocks.ids, document=document, description={})
    found = loss_of(lm, zero, ragged, batch_sequences=3)
    assert found.n_tokens == (lengths - 1).clip(0).sum()
    alone = 0.0
    for row, length in zip(blocks.ids.astype(np.int64), lengths.tolist(), strict=True):
        if length > 1:
            ids = torch.from_numpy(row[None, :length])
            alone += torch.nn.functional.cross_entropy(lm.logits(ids)[0, :-1], ids[0, 1:], reduction="sum").item()
    assert found.clean == pytest.approx(alone / found.n_tokens, rel=1e-5)
