"""sparsify's own Trainer on our store: what it learns must be what it learns from the live model, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import spec_of, write_shards
from sparsify import SparseCoder, SparseCoderConfig, TrainConfig, Trainer
from transformers import GPT2Config, GPT2Model

from actcache.adapters.sparsify import replay
from actcache.errors import ConfigError, StateError
from actcache.load import Loader
from actcache.spec import Site, TokenBlocks
from actcache.store import Store

WIDTH, LENGTH, N_SEQUENCES, BATCH = 16, 12, 40, 4
HOOKPOINTS = {f"h.{layer}.mlp": (f"h.{layer}.mlp:in", f"h.{layer}.mlp:out") for layer in range(2)}


class Texts:
    """The tokens as sparsify's MemmapDataset gives them: the data set of a live run."""

    def __init__(self, ids: np.ndarray) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.from_numpy(self.ids[number].astype(np.int64))}

    def select(self, numbers: range) -> Texts:
        return Texts(self.ids[numbers.start : numbers.stop])


@pytest.fixture(scope="module")
def model() -> GPT2Model:
    torch.manual_seed(0)
    sizes = {"n_embd": WIDTH, "n_layer": 2, "n_head": 2, "n_positions": LENGTH, "vocab_size": 64}
    return GPT2Model(GPT2Config(**sizes, initializer_range=0.5)).eval()


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 64, (N_SEQUENCES, LENGTH)).astype(np.uint32)


@pytest.fixture(scope="module")
def store(model: GPT2Model, ids: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """What the model's MLPs took and gave, in 5 shards of 9 sequences that batches of 4 do not divide."""
    seen: dict[str, list[torch.Tensor]] = {name: [] for pair in HOOKPOINTS.values() for name in pair}

    def keep(name: str) -> Any:
        def hook(_: Any, inputs: Any, output: torch.Tensor) -> None:
            seen[f"{name}:in"].append(inputs[0])
            seen[f"{name}:out"].append(output)

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in HOOKPOINTS]
    with torch.no_grad():
        for batch in torch.from_numpy(ids.astype(np.int64)).split(BATCH):
            model(batch)
    for handle in handles:
        handle.remove()
    blocks = TokenBlocks(ids=ids, document=np.zeros_like(ids), description={})
    sites = tuple(Site(name=name, shape=(WIDTH,)) for name in seen)
    spec = spec_of(blocks, sites=sites, dtype="float32", skip_first=0, sequences_per_shard=9, rows_per_chunk=12)
    values = {name: torch.cat(parts).numpy() for name, parts in seen.items()}
    return write_shards(tmp_path_factory.mktemp("gpt2") / "s.zarr", spec, blocks, values)


def config(folder: Path, *, transcode: bool, **changes: Any) -> TrainConfig:
    coder = SparseCoderConfig(expansion_factor=2, k=4, transcode=transcode, skip_connection=transcode)
    settings = {"hookpoints": ["h.*.mlp"], "batch_size": BATCH, "log_to_wandb": False, "save_dir": str(folder)}
    return TrainConfig(coder, **{**settings, **changes})


def trained(trainer: Trainer) -> dict[str, torch.Tensor]:
    trainer.fit()
    return {f"{name}.{key}": value for name, sae in trainer.saes.items() for key, value in sae.state_dict().items()}


def assert_equal_training(mine: dict[str, torch.Tensor], live: dict[str, torch.Tensor]) -> None:
    assert mine.keys() == live.keys()
    assert len(mine) >= 8
    for name, value in live.items():
        assert torch.equal(mine[name], value), name


def test_autoencoders_are_those_of_the_live_model(model, ids, store, tmp_path):
    live = trained(Trainer(config(tmp_path / "live", transcode=False), Texts(ids), model))
    replayed, dataset = replay(store, HOOKPOINTS, order="reading")
    mine = trained(Trainer(config(tmp_path / "mine", transcode=False), dataset, replayed))
    assert_equal_training(mine, live)
    assert SparseCoder.load_from_disk(tmp_path / "mine" / "unnamed" / "h.1.mlp").d_in == WIDTH


def test_transcoders_without_some_tokens_are_those_of_the_live_model(model, ids, store, tmp_path):
    settings = {"transcode": True, "exclude_tokens": [3, 5, 8], "optimizer": "adam", "lr_warmup_steps": 2}
    live = trained(Trainer(config(tmp_path / "live", **settings), Texts(ids), model))
    replayed, dataset = replay(store, HOOKPOINTS, order="reading")
    mine = trained(Trainer(config(tmp_path / "mine", **settings), dataset, replayed))
    assert_equal_training(mine, live)
    kept_all = config(tmp_path / "all", **{**settings, "exclude_tokens": []})
    with pytest.raises(AssertionError):  # the tokens that were left out do make a difference
        assert_equal_training(trained(Trainer(kept_all, dataset, replayed)), live)


def test_a_resumed_run_goes_on_as_that_of_the_live_model(model, ids, store, tmp_path):
    replayed, dataset = replay(store, HOOKPOINTS, order="reading")
    ends = []
    for name, data, source in [("live", Texts(ids), model), ("mine", dataset, replayed)]:
        settings = config(tmp_path / name, transcode=False)
        Trainer(settings, data.select(range(3 * BATCH)), source).fit()
        again = Trainer(config(tmp_path / name, transcode=False), data, source)
        again.load_state(str(tmp_path / name / "unnamed"))
        assert again.global_step == 3
        ends.append(trained(again))
    assert_equal_training(*ends)


def test_rows_in_stored_order_train_as_well(store, tmp_path):
    model, dataset = replay(store, ["h.0.mlp:out", "h.1.mlp:out"], rows_per_item=5)
    assert len(dataset) == N_SEQUENCES * LENGTH // 5
    settings = config(tmp_path, transcode=False, hookpoints=["h.1.mlp:out"], optimizer="adam", lr=1e-2)
    trainer = Trainer(settings, dataset, model)
    sae, rows = trainer.saes["h.1.mlp:out"], store.read("h.1.mlp:out", slice(None))
    before = sae(rows).fvu.item()
    trainer.fit()
    assert trainer.global_step == -(-len(dataset) // BATCH)
    assert sae(rows).fvu.item() < before


def test_what_a_replay_cannot_do_is_said(store, tmp_path):
    model, dataset = replay(store, {"h.0.mlp": "h.0.mlp:out"})
    with pytest.raises(ConfigError, match="needs the input"):
        Trainer(config(tmp_path, transcode=True), dataset, model).fit()
    for loss in ("ce", "kl"):
        with pytest.raises(ConfigError, match='loss_fn="fvu"'):
            Trainer(config(tmp_path, transcode=False, loss_fn=loss), dataset, model).fit()
    with pytest.raises(ConfigError, match=r"hookpoints=\['h.0.mlp'\]"):
        Trainer(config(tmp_path, transcode=False, hookpoints=[]), dataset, model)
    other = replay(store, {"h.0.mlp": "h.0.mlp:out"})[1]
    with pytest.raises(StateError, match="handed out just before"):
        Trainer(config(tmp_path, transcode=False), other, model).fit()


def test_the_coder_trains_in_a_loop_of_ones_own(store):
    torch.manual_seed(0)
    coder = SparseCoder(WIDTH, SparseCoderConfig(expansion_factor=2, k=4, transcode=True))
    optimizer = torch.optim.Adam(coder.parameters(), lr=1e-2)
    losses = []
    with Loader(store, ["h.0.mlp:*"], batch_rows=48, epochs=8) as loader:
        for batch in loader:
            out = coder(batch["h.0.mlp:in"], batch["h.0.mlp:out"])
            out.fvu.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(out.fvu.item())
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
