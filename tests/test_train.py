"""Training: recovers a planted dictionary, resumes to the same bits, is indifferent to units, says what went wrong."""

import json
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from actcache.errors import ConfigError, SiteError, StateError, TrainingError
from actcache.load import Loader
from actcache.sparse.checkpoint import CHECKPOINT
from actcache.sparse.model import SparseMLP
from actcache.sparse.training import TrainConfig, Trainer, resolve_precision


@dataclass(frozen=True)
class Stats:
    count: int
    mean: np.ndarray
    variance: np.ndarray
    n_nan: int
    n_inf: int


class MemoryStore:
    """Arrays in memory with the statistics that a store keeps."""

    def __init__(self, arrays, fingerprint="f0"):
        self.arrays, self.fingerprint = arrays, fingerprint

    def stats(self, site):
        rows = self.arrays[site].double().numpy()
        finite = rows[np.isfinite(rows).all(1)]
        mean, variance = (finite.mean(0), finite.var(0)) if len(finite) else np.zeros((2, rows.shape[1]))
        return Stats(len(finite), mean, variance, int(np.isnan(rows).sum()), int(np.isinf(rows).sum()))


class MemoryLoader:
    """Shuffled batches of a memory store; batch b of epoch e is a function of (e, b)."""

    def __init__(self, store, batch_rows=64, epochs=None):
        self.store, self.batch_rows, self.epochs = store, batch_rows, epochs
        self.sites, self.n_rows = list(store.arrays), len(next(iter(store.arrays.values())))
        self.delivered = 0

    def __len__(self):
        return self.n_rows // self.batch_rows

    def site_stats(self, site):
        return self.store.stats(site)

    def __iter__(self):
        while self.epochs is None or self.delivered < self.epochs * len(self):
            epoch, batch = divmod(self.delivered, len(self))
            order = np.random.default_rng(epoch).permutation(self.n_rows)
            rows = order[batch * self.batch_rows : (batch + 1) * self.batch_rows]
            self.delivered += 1
            yield {site: array[rows] for site, array in self.store.arrays.items()}

    def state_dict(self):
        return {"delivered": self.delivered}

    def load_state_dict(self, state):
        self.delivered = state["delivered"]


def planted(n_rows=4096, d=24, n_features=40, l0=2.0, seed=0):
    """Rows that are sparse positive combinations of random unit directions, and the directions."""
    g = torch.Generator().manual_seed(seed)
    directions_FD = torch.nn.functional.normalize(torch.randn(n_features, d, generator=g), dim=1)
    strength = 0.5 + torch.rand(n_rows, n_features, generator=g)
    active = torch.rand(n_rows, n_features, generator=g) < l0 / n_features
    return (strength * active) @ directions_FD, directions_FD


def loader_of(x, y=None, **options):
    return MemoryLoader(MemoryStore({"in": x, "out": x * 2 + 1 if y is None else y}), **options)


SHORT = TrainConfig(
    n_steps=12, warmup_steps=3, record_every=5, checkpoint_every=4, dead_window_rows=256, precision="float32"
)


def make(d=24, n_latents=48):
    return SparseMLP(d_in=d, d_out=d, n_latents=n_latents)


def train(loader, config=SHORT, mlp=None, **options):
    mlp = make() if mlp is None else mlp
    return mlp, Trainer(mlp, loader, config, **options).fit()


def weights(mlp):
    return torch.cat([w.detach().flatten() for w in mlp.parameters()])


def test_recovers_a_planted_dictionary():
    x, directions_FD = planted(n_rows=8192)
    config = TrainConfig(l1=2.0**4, lr=1e-2, n_steps=400, warmup_steps=50, precision="float32")
    mlp, result = train(loader_of(x, x, batch_rows=512), config, make(n_latents=80))
    found_FD = torch.nn.functional.normalize(mlp.decoder.weight.detach().T, dim=1)
    best_F = (directions_FD @ found_FD.T).max(1).values
    assert best_F.min() > 0.97
    assert result.history["fvu"][-1] < 0.1
    assert result.history["l0"][-1] < 8


def test_a_stronger_penalty_gives_a_sparser_code():
    loader = loader_of(planted()[0])
    config = replace(SHORT, n_steps=150, lr=1e-2)
    l0 = [train(loader, replace(config, l1=2.0**s))[1].history["l0"][-1] for s in (0, 3, 6)]
    assert l0[0] > 1.5 * l0[1] > 2 * l0[2]


class InterruptedRunError(Exception):
    pass


def stop_at(step):
    def progress(done, _total):
        if done == step:
            raise InterruptedRunError

    return progress


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("stop", range(1, 13))
def test_resumes_to_the_same_bits_wherever_it_stopped(tmp_path, stop, precision):
    config, x = replace(SHORT, precision=precision), planted()[0]
    straight, result = train(loader_of(x), config)
    with pytest.raises(InterruptedRunError):
        train(loader_of(x), config, checkpoint=tmp_path, progress=stop_at(stop))
    steps = []
    resumed, again = train(
        loader_of(x), config, checkpoint=tmp_path, progress=lambda done, total: steps.append((done, total))
    )
    assert torch.equal(weights(straight), weights(resumed))
    assert again.history == result.history
    assert steps == [(step, 12) for step in range(stop // 4 * 4 + 1, 13)]


def test_resumes_to_the_same_bits_from_a_store_on_disk(tmp_path, small_store):
    def run(**options):
        mlp = SparseMLP(d_in=12, d_out=10, n_latents=20)
        with Loader(small_store, small_store.sites, batch_rows=32, seed=3, epochs=None) as loader:
            train(loader, replace(SHORT, n_steps=40), mlp, **options)
        return mlp

    straight = run()
    with pytest.raises(InterruptedRunError):
        run(checkpoint=tmp_path, progress=stop_at(27))
    assert torch.equal(weights(run(checkpoint=tmp_path)), weights(straight))


def test_a_finished_run_is_not_trained_again(tmp_path):
    first, result = train(loader_of(planted()[0]), checkpoint=tmp_path)
    second, again = train(loader_of(planted()[0]), checkpoint=tmp_path, progress=stop_at(12))
    assert torch.equal(weights(first), weights(second))
    assert (again.history, again.n_steps, again.seconds) == (result.history, 12, result.seconds)


def test_checkpoints_are_one_file_without_pickle_and_their_interval_changes_nothing(tmp_path):
    x = planted()[0]
    a, _ = train(loader_of(x), checkpoint=tmp_path / "a")
    b, _ = train(loader_of(x), replace(SHORT, checkpoint_every=7), checkpoint=tmp_path / "b")
    assert torch.equal(weights(a), weights(b))
    assert [p.name for p in (tmp_path / "a").iterdir()] == [CHECKPOINT]
    with safe_open(tmp_path / "a" / CHECKPOINT, framework="pt") as file:
        assert "encoder.weight/exp_avg_sq" in file.keys()  # noqa: SIM118


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"config": replace(SHORT, l1=3.0)}, r"l1 was 64\.0, now 3\.0"),
        ({"config": replace(SHORT, n_steps=13)}, "n_steps was 12, now 13"),
        ({"mlp": make(n_latents=40)}, "mlp was .*48.*40"),
        ({"site_out": "in"}, "sites was"),
    ],
)
def test_refuses_a_checkpoint_of_another_run(tmp_path, other, message):
    x = planted()[0]
    train(loader_of(x), checkpoint=tmp_path)
    with pytest.raises(StateError, match=message):
        train(loader_of(x), checkpoint=tmp_path, **other)


def test_refuses_a_checkpoint_of_another_store(tmp_path):
    x = planted()[0]
    train(loader_of(x), checkpoint=tmp_path)
    other = MemoryLoader(MemoryStore({"in": x, "out": x}, fingerprint="f1"))
    with pytest.raises(StateError, match="store was 'f0', now 'f1'"):
        train(other, checkpoint=tmp_path)


@pytest.mark.parametrize("data", [b"", b"nonsense", b"\x00" * 64])
def test_refuses_a_checkpoint_that_is_none(tmp_path, data):
    (tmp_path / CHECKPOINT).write_bytes(data)
    with pytest.raises(StateError, match="not a readable checkpoint"):
        train(loader_of(planted()[0]), checkpoint=tmp_path)


def test_refuses_a_checkpoint_of_another_version(tmp_path):
    save_file({"w": torch.zeros(1)}, tmp_path / CHECKPOINT, metadata={"state": '{"version": 99}'})
    with pytest.raises(StateError, match="version 99"):
        train(loader_of(planted()[0]), checkpoint=tmp_path)


def checkpoint_of(folder, **options):
    """The path and the bytes of a real checkpoint in the middle of a run."""
    with pytest.raises(InterruptedRunError):
        train(loader_of(planted()[0]), mlp=make(n_latents=6), checkpoint=folder, progress=stop_at(6), **options)
    return folder / CHECKPOINT, (folder / CHECKPOINT).read_bytes()


def test_no_flipped_bit_of_a_checkpoint_reaches_a_result(tmp_path):
    path, sound = checkpoint_of(tmp_path)
    header = 8 + int.from_bytes(sound[:8], "little")
    rng = np.random.default_rng(0)
    places = {*rng.integers(0, header, 250).tolist(), *rng.integers(header, len(sound), 150).tolist(), *range(8)}
    for place in sorted(places):
        bits = bytearray(sound)
        bits[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(bits)
        with pytest.raises(StateError, match=f"{CHECKPOINT} .*delete it to begin again"):
            train(loader_of(planted(64)[0]), mlp=make(n_latents=6), checkpoint=tmp_path)


def test_a_refused_checkpoint_leaves_the_run_and_the_file_as_they_were(tmp_path):
    path, sound = checkpoint_of(tmp_path)
    path.write_bytes(sound[:-40])
    mlp, loader = make(n_latents=6), loader_of(planted()[0])
    before = weights(mlp)
    with pytest.raises(StateError, match="is damaged, cut short or not a safetensors file"):
        train(loader, mlp=mlp, checkpoint=tmp_path)
    assert torch.equal(weights(mlp), before)
    assert loader.delivered == 0
    assert path.read_bytes() == sound[:-40]


def test_a_checkpoint_of_before_there_was_a_digest_is_continued_with_a_warning(tmp_path):
    straight, _ = train(loader_of(planted()[0]), mlp=make(n_latents=6))
    path, _ = checkpoint_of(tmp_path)
    with safe_open(path, framework="pt") as file:
        state = json.loads(file.metadata()["state"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, path, metadata={"state": json.dumps({**state, "version": 1})})
    with pytest.warns(UserWarning, match="kept no digest of its tensors"):
        resumed, _ = train(loader_of(planted()[0]), mlp=make(n_latents=6), checkpoint=tmp_path)
    assert torch.equal(weights(resumed), weights(straight))
    without_digest = pytest.warns(UserWarning, match="no digest")
    # What such a checkpoint says is held against what a run of these settings can have saved.
    for change in ({"step": 13}, {"step": 4.0}, {"step": True}, {"seconds": "1"}, {"history": {}}, {"loader": None}):
        save_file(tensors, path, metadata={"state": json.dumps({**state, "version": 1, **change})})
        with pytest.raises(StateError, match=f"its {next(iter(change))} is"), without_digest:
            train(loader_of(planted()[0]), mlp=make(n_latents=6), checkpoint=tmp_path)
    for change in ({"last_fired": tensors["last_fired"].int()}, {"more": torch.zeros(1)}):
        save_file({**tensors, **change}, path, metadata={"state": json.dumps({**state, "version": 1})})
        with pytest.raises(StateError, match=f"for the tensor {next(iter(change))}"), without_digest:
            train(loader_of(planted()[0]), mlp=make(n_latents=6), checkpoint=tmp_path)


def test_what_is_no_checkpoint_is_named_with_what_it_is(tmp_path):
    (tmp_path / CHECKPOINT).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 7\n")
    with pytest.raises(StateError, match="git lfs pull"):
        train(loader_of(planted()[0]), checkpoint=tmp_path)
    (tmp_path / "other" / CHECKPOINT).mkdir(parents=True)
    with pytest.raises(StateError, match=r"cannot be read \(Is a directory\)"):
        train(loader_of(planted()[0]), checkpoint=tmp_path / "other")
    for below in ("", "run/mlp"):
        with pytest.raises(ConfigError, match=f"checkpoint must be a folder, and .*{CHECKPOINT} is a file"):
            train(loader_of(planted()[0]), checkpoint=tmp_path / CHECKPOINT / below)


def test_units_of_the_activations_do_not_matter():
    x, y = planted()[0], planted(seed=1)[0] + 0.3
    mlp, _ = train(loader_of(x, y))
    # Powers of two commute with rounding, so here the whole run agrees to the bit.
    other, _ = train(loader_of(x * 8, y / 4))
    assert torch.equal(other(x * 8) * 4, mlp(x))
    metric, _ = train(loader_of(x * 10, y * 0.3))
    torch.testing.assert_close(metric(x * 10) / 0.3, mlp(x), rtol=1e-3, atol=1e-3)


def test_given_weights_in_raw_units_are_kept():
    mlp, x = make(), planted()[0]
    before = mlp(x).detach()
    start = weights(mlp)
    train(loader_of(x), replace(SHORT, start="given", lr=0.0), mlp)
    torch.testing.assert_close(mlp(x), before, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weights(mlp), start, rtol=1e-5, atol=1e-6)


def test_an_autoencoder_scales_its_rows_once():
    x = planted()[0] * 50
    mlp, result = train(
        loader_of(x, batch_rows=256), replace(SHORT, n_steps=200, lr=1e-2, l1=0.0), site_in="in", site_out="in"
    )
    fvu = ((mlp(x) - x).square().sum() / (x - x.mean(0)).square().sum()).item()
    assert fvu == pytest.approx(result.history["fvu"][-1], rel=0.3)
    assert fvu < 0.2


def test_history_is_of_what_was_trained():
    loader = loader_of(planted()[0], batch_rows=256)
    mlp, result = train(loader, replace(SHORT, lr=0.0, l1=0.0, decoder_norm=1.0))
    x, y = loader.store.arrays["in"], loader.store.arrays["out"]
    fvu = ((mlp(x) - y).square().sum() / (y - y.mean(0)).square().sum()).item()
    history = result.history
    assert history["step"] == [5, 10, 12]
    assert history["fvu"] == pytest.approx([fvu] * 3, rel=0.1)
    assert history["loss"] == pytest.approx([24 * value for value in history["fvu"]], rel=1e-5)
    assert history["l0"][-1] == pytest.approx((mlp.encode(x) > 0).sum(1).float().mean().item(), rel=0.05)
    assert (result.n_steps, result.n_rows) == (12, 12 * 256)


def test_dead_latents_are_counted_over_the_window():
    mlp = make()
    with torch.no_grad():
        mlp.encoder.bias[:12] = -1e6
    config = replace(SHORT, start="given", lr=0.0, n_steps=6, record_every=1)
    _, result = train(loader_of(planted()[0]), config, mlp)
    # The window is 256 rows, four batches: before that nothing is known to be dead.
    assert result.history["dead"][:3] == [0, 0, 0]
    assert result.history["dead"][3:] == [0.25] * 3


def test_learning_rate_rises_stays_and_falls():
    config = TrainConfig(lr=1.0, n_steps=100, warmup_steps=10, decay_fraction=0.2)
    rates = [config.learning_rate(step) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10:80] == [1.0] * 70
    assert all(a > b > 0 for a, b in pairwise(rates[80:]))
    assert rates[-1] == pytest.approx(1 / 20)


def test_nan_activations_are_named_and_the_mlp_is_left_alone(tmp_path):
    x = planted()[0]
    y = x.clone()
    y[100, 3] = torch.nan
    mlp = make()
    before = weights(mlp).clone()
    with pytest.raises(TrainingError, match=r"not finite at step .*out: 1 NaN and 0 Inf"):
        train(loader_of(x, y), replace(SHORT, n_steps=200), mlp, checkpoint=tmp_path)
    assert torch.equal(weights(mlp), before)


def test_divergence_asks_for_a_lower_rate():
    with pytest.raises(TrainingError, match="lower lr"):
        train(loader_of(planted()[0]), replace(SHORT, lr=1e30, clip=None))


def test_a_loader_that_ends_too_early_is_named():
    with pytest.raises(ConfigError, match=r"needs 12 batches, the loader ended after 8"):
        train(loader_of(planted(n_rows=512)[0], epochs=1))


def test_sites_are_checked():
    loader = loader_of(planted()[0])
    with pytest.raises(SiteError, match="'nowhere' is not among"):
        Trainer(make(), loader, SHORT, site_in="nowhere")
    with pytest.raises(ConfigError, match="24 wide, but the sparse MLP takes 20 and gives 20"):
        Trainer(make(d=20), loader, SHORT)


def test_a_constant_site_cannot_be_scaled():
    with pytest.raises(ConfigError, match="out cannot be scaled"):
        Trainer(make(), loader_of(planted()[0], torch.ones(4096, 24)), SHORT)


def test_a_site_without_a_finite_row_says_how_many_values_are_not():
    y = torch.full((4096, 24), torch.inf)
    y[:, 0] = torch.nan
    with pytest.raises(ConfigError, match=r"out .*no row of it is finite \(NaN: 4,096, Inf: 94,208\)"):
        Trainer(make(), loader_of(planted()[0], y), SHORT)
    y = torch.ones(4096, 24)
    y[0, 0] = torch.nan
    with pytest.raises(ConfigError, match=r"out .*standard deviation .* is 0.0 \(NaN: 1, Inf: 0\)"):
        Trainer(make(), loader_of(planted()[0], y), SHORT)


@pytest.mark.parametrize(
    "bad",
    [
        {"l1": -1},
        {"lr": float("nan")},
        {"n_steps": 0},
        {"warmup_steps": 9999},
        {"decay_fraction": 1.5},
        {"clip": -1.0},
        {"precision": "float16"},
        {"start": "random"},
        {"betas": (0.9, 1.0)},
    ],
)
def test_config_is_checked(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        TrainConfig(**bad)


def test_precision_can_be_chosen_and_auto_is_one_of_them():
    cpu = torch.device("cpu")
    assert resolve_precision("float32", cpu) == torch.float32
    assert resolve_precision("bfloat16", cpu) == torch.bfloat16
    assert resolve_precision("auto", cpu) in (torch.float32, torch.bfloat16)


def test_bfloat16_training_agrees_with_float32():
    x = planted()[0]
    config = replace(SHORT, n_steps=100, lr=1e-2, l1=2.0**1)
    results = [train(loader_of(x), replace(config, precision=p))[1] for p in ("float32", "bfloat16")]
    fvu = [result.history["fvu"][-1] for result in results]
    assert fvu[0] == pytest.approx(fvu[1], rel=0.05)
    assert [result.precision for result in results] == ["float32", "bfloat16"]
