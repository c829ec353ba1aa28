"""The sparse MLP: weights survive the disk and the folding of scales; the loss is the documented formula."""

import json

import numpy as np
import pytest
import torch

from actcache.errors import ConfigError, ModelNotFoundError, StateError
from actcache.sparse.model import Scaling, SparseMLP, fold_scaling, initialise
from actcache.sparse.objective import sparse_loss


def make(seed=0, d_in=6, d_out=5, n_latents=16):
    torch.manual_seed(seed)
    return SparseMLP(d_in=d_in, d_out=d_out, n_latents=n_latents)


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_forward_is_linear_relu_linear():
    mlp, x = make(), torch.randn(7, 6)
    hidden = np.maximum(x.numpy() @ mlp.encoder.weight.detach().numpy().T + mlp.encoder.bias.detach().numpy(), 0)
    wanted = hidden @ mlp.decoder.weight.detach().numpy().T + mlp.decoder.bias.detach().numpy()
    np.testing.assert_allclose(mlp.encode(x).detach(), hidden, atol=1e-6)
    np.testing.assert_allclose(mlp(x).detach(), wanted, atol=1e-6)


def test_save_and_load_are_inverse(tmp_path):
    mlp = make()
    mlp.about = {"site_in": "blocks.0.mlp.hook_in", "config": {"l1": 64.0}}
    mlp.save(tmp_path / "new" / "folder")
    loaded = SparseMLP.load(tmp_path / "new" / "folder")
    assert equal(mlp, loaded)
    assert loaded.sizes == mlp.sizes
    assert loaded.about == mlp.about
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == ["config.json", "weights.safetensors"]


def test_saving_again_replaces(tmp_path):
    make(seed=0).save(tmp_path)
    make(seed=1, n_latents=8).save(tmp_path)
    assert equal(SparseMLP.load(tmp_path), make(seed=1, n_latents=8))


def test_load_refuses_a_folder_without_mlp(tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"config\.json is missing"):
        SparseMLP.load(tmp_path)


@pytest.mark.parametrize("offset", [0, 20, -1])
def test_load_refuses_flipped_weights(tmp_path, offset):
    make().save(tmp_path)
    data = bytearray((tmp_path / "weights.safetensors").read_bytes())
    data[offset] ^= 1
    (tmp_path / "weights.safetensors").write_bytes(data)
    with pytest.raises(StateError, match="digest"):
        SparseMLP.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"version": 99}, "version 99"), ({"n_latents": 17}, "do not fit"), ({"activation": "gelu"}, "activation")],
)
def test_load_refuses_a_config_of_something_else(tmp_path, change, message):
    make().save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises((StateError, ConfigError), match=message):
        SparseMLP.load(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 1}'])
def test_load_refuses_a_config_that_is_none(tmp_path, text):
    make().save(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(StateError):
        SparseMLP.load(tmp_path)


@pytest.mark.parametrize("bad", [{"d_in": 0}, {"n_latents": 1.5}, {"activation": "gelu"}])
def test_sizes_are_checked(bad):
    with pytest.raises(ConfigError):
        SparseMLP(**{"d_in": 4, "d_out": 4, "n_latents": 8, **bad})


def test_folded_mlp_does_on_raw_rows_what_the_source_does_on_scaled_ones():
    source, raw = make(seed=0).double(), make(seed=1).double()
    scaling = Scaling(scale_in=0.37, scale_out=11.3)
    fold_scaling(source, raw, scaling)
    x = torch.randn(9, 6, dtype=torch.float64)
    torch.testing.assert_close(raw(x), source(x * 0.37) / 11.3, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(raw.encode(x), source.encode(x * 0.37), rtol=1e-12, atol=1e-12)


def test_folding_back_is_exact_for_powers_of_two():
    source, raw, back = make(seed=0), make(seed=1), make(seed=2)
    scaling = Scaling(scale_in=0.25, scale_out=8.0)
    fold_scaling(source, raw, scaling)
    fold_scaling(raw, back, scaling.inverse())
    assert not equal(source, raw)
    assert equal(source, back)


def test_initial_prediction_is_the_mean_target_and_the_mean_input_is_centred():
    mlp, mean_in, mean_out = make(d_in=5), torch.randn(5), torch.randn(5)
    initialise(mlp, mean_in, mean_out, decoder_norm=0.0, seed=3)
    torch.testing.assert_close(mlp(torch.randn(4, 5)), mean_out.expand(4, 5))
    torch.testing.assert_close(mlp.encoder(mean_in), torch.zeros(16), atol=1e-6, rtol=0)


@pytest.mark.parametrize("d_in", [5, 6])
def test_initial_encoder_is_the_decoder_transposed_where_widths_agree(d_in):
    mlp = make(d_in=d_in)
    initialise(mlp, torch.zeros(d_in), torch.zeros(5), decoder_norm=0.5, seed=3)
    torch.testing.assert_close(mlp.decoder.weight.norm(dim=0), torch.full((16,), 0.5))
    torch.testing.assert_close(mlp.encoder.weight.norm(dim=1), torch.ones(16))
    if d_in == 5:
        torch.testing.assert_close(mlp.encoder.weight * 0.5, mlp.decoder.weight.T)


def test_seed_decides_the_initial_weights():
    weights = []
    for seed in (1, 1, 2):
        mlp = make(seed=len(weights))
        initialise(mlp, torch.zeros(6), torch.zeros(5), decoder_norm=0.1, seed=seed)
        weights.append(mlp.encoder.weight.detach())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_loss_is_the_documented_formula():
    mlp, x, y = make(), torch.randn(7, 6), torch.randn(7, 5)
    loss, error, latents = sparse_loss(mlp, x, y, 2.0**5, torch.float32)
    a = mlp.encode(x).detach().numpy()
    norms = np.linalg.norm(mlp.decoder.weight.detach().numpy(), axis=0)
    wanted_error = ((mlp(x).detach().numpy() - y.numpy()) ** 2).sum(1).mean()
    wanted_l1 = 32 * np.sqrt(5) * (a * norms).mean(1).mean()
    np.testing.assert_allclose(error.item(), wanted_error, rtol=1e-5)
    np.testing.assert_allclose(loss.item(), wanted_error + wanted_l1, rtol=1e-5)
    np.testing.assert_allclose(latents.detach(), a, atol=1e-6)


def test_penalty_cannot_be_escaped_by_rescaling_latents():
    mlp, x, y = make(), torch.randn(7, 6), torch.randn(7, 5)
    before = sparse_loss(mlp, x, y, 2.0**5, torch.float32)[0].item()
    with torch.no_grad():
        mlp.encoder.weight.mul_(0.01)
        mlp.encoder.bias.mul_(0.01)
        mlp.decoder.weight.mul_(100)
    assert sparse_loss(mlp, x, y, 2.0**5, torch.float32)[0].item() == pytest.approx(before, rel=1e-5)


def test_bfloat16_products_stay_close_and_gradients_are_float32():
    mlp, x, y = make(n_latents=64), torch.randn(256, 6), torch.randn(256, 5)
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        mlp.zero_grad()
        loss, _, _ = sparse_loss(mlp, x, y, 2.0**5, dtype)
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in mlp.parameters()]))
    assert gradients[1].dtype == torch.float32
    assert (gradients[0] - gradients[1]).norm() < 0.02 * gradients[0].norm()


def test_load_refuses_every_flipped_bit(tmp_path):
    make().save(tmp_path)
    for file in (tmp_path / "config.json", tmp_path / "weights.safetensors"):
        sound = file.read_bytes()
        for place in range(0, len(sound), 1 + len(sound) // 400):
            bits = bytearray(sound)
            bits[place] ^= 1 << place % 8
            file.write_bytes(bits)
            try:
                SparseMLP.load(tmp_path)
            except StateError:
                continue
            # JSON has more than one way to write a space.
            assert json.loads(bits) == json.loads(sound), (file.name, place)
        file.write_bytes(sound)
    SparseMLP.load(tmp_path)


def test_load_takes_an_mlp_of_before_its_config_had_a_digest(tmp_path):
    mlp = make()
    mlp.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["config_sha256"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.equal(SparseMLP.load(tmp_path).encoder.weight, mlp.encoder.weight)


@pytest.mark.parametrize("change", [{"d_in": True}, {"d_in": 1e300}, {"d_out": 10**15}, {"n_latents": "40"}])
def test_load_refuses_sizes_before_it_makes_room_for_them(tmp_path, change):
    make().save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(StateError, match=r"d_in|do not fit|n_latents"):
        SparseMLP.load(tmp_path)


def test_files_that_are_none_are_named_with_what_they_are(tmp_path):
    make().save(tmp_path)
    (tmp_path / "config.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 7\n")
    with pytest.raises(StateError, match="git lfs pull"):
        SparseMLP.load(tmp_path)
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(StateError, match="nested too deep"):
        SparseMLP.load(tmp_path)
    with pytest.raises(ModelNotFoundError, match="no sparse MLP"):
        SparseMLP.load(tmp_path / "config.json")
    with pytest.raises(ConfigError, match=r"config\.json.* cannot be written"):
        make().save(tmp_path / "config.json")
    with pytest.raises(ConfigError, match="must be a path, got 7"):
        SparseMLP.load(7)
