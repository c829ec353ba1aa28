"""torchdata's StatefulDataLoader and Lightning's Trainer on our loader: resumed after any batch, they go on exactly."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torchdata.stateful_dataloader import StatefulDataLoader

from actcache.adapters.lightning import data_module
from actcache.adapters.torch_data import TorchDataset
from actcache.errors import ConfigError
from actcache.load import Loader
from actcache.store import Store

SITE, OTHER = "blocks.0.hook_mlp_out", "blocks.1.attn.hook_z"
EPOCHS = 3


def loader_of(store: Store, **changes: Any) -> Loader:
    return Loader(store, ["*"], **{"batch_rows": 50, "seed": 3, **changes})


def stateful(store: Store, **changes: Any) -> StatefulDataLoader:
    return StatefulDataLoader(TorchDataset(loader_of(store, **changes)), batch_size=None, num_workers=0)


def assert_equal_batches(mine: list[dict[str, torch.Tensor]], theirs: list[dict[str, torch.Tensor]]) -> None:
    assert len(mine) == len(theirs)
    for one, other in zip(mine, theirs, strict=True):
        assert one.keys() == other.keys() == {SITE, OTHER, "rows"}
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_stateful_data_loader_resumes_exactly_after_every_batch(small_store, epochs):
    """States go through JSON into a new process' objects; what comes is what came, epoch by epoch."""
    unbroken, states = [], []
    data = stateful(small_store, epochs=epochs)
    for epoch in range(EPOCHS):
        unbroken.append([])
        for batch in data:
            unbroken[epoch].append(batch)
            states.append((epoch, len(unbroken[epoch]), json.dumps(data.state_dict())))
        states.append((epoch + 1, 0, json.dumps(data.state_dict())))
    assert len(states) == EPOCHS * (1 + epochs * len(loader_of(small_store)))
    for epoch, number, state in states:
        again = stateful(small_store, epochs=epochs)
        again.load_state_dict(json.loads(state))
        if number:
            assert_equal_batches(list(again), unbroken[epoch][number:])
            epoch += 1
        for later in range(epoch, EPOCHS):
            assert_equal_batches(list(again), unbroken[later])


def test_a_stateful_data_loader_that_never_ends_resumes(small_store):
    data = stateful(small_store, epochs=None)
    batches, state = [], None
    for number, batch in enumerate(data):
        batches.append(batch)
        if number == 10:
            state = data.state_dict()
        if number == 25:
            break
    again = stateful(small_store, epochs=None)
    again.load_state_dict(state)
    assert_equal_batches(list(itertools.islice(again, 15)), batches[11:])


def test_workers_are_refused_by_the_stateful_data_loader_too(small_store):
    data = StatefulDataLoader(TorchDataset(loader_of(small_store)), batch_size=None, num_workers=2)
    with pytest.raises(ConfigError, match=r"num_workers=2 was asked for.*use num_workers=0"):
        next(iter(data))


class Autoencoder(lightning.LightningModule):
    """Three lines of one, which notes the rows that it gets."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(torch.nn.Linear(12, 24), torch.nn.ReLU(), torch.nn.Linear(24, 12))
        self.rows: list[list[int]] = []
        self.validated: list[list[int]] = []

    def _loss(self, acts: torch.Tensor) -> torch.Tensor:
        return (self.layers(acts) - acts).square().mean()

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], number: int) -> torch.Tensor:
        acts, rows = batch
        self.rows.append(rows.tolist())
        return self._loss(acts)

    def validation_step(self, batch: tuple[torch.Tensor, torch.Tensor], number: int) -> None:
        acts, rows = batch
        self.validated.append(rows.tolist())
        self.log("loss", self._loss(acts))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def trainer(folder: Path, *callbacks: Any, **settings: Any) -> lightning.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return lightning.Trainer(default_root_dir=folder, callbacks=list(callbacks), **{**quiet, **settings})


def module_of(store: Store) -> Any:
    validation = loader_of(store, rows=range(320, 348), batch_rows=10, drop_last=False)
    return data_module(loader_of(store, rows=range(320), batch_rows=80), validation, take=(SITE, "rows"))


@pytest.mark.filterwarnings("error:.*(workers|resumable|__len__|length)")
def test_lightning_resumes_exactly_from_the_checkpoint_of_any_batch(small_store, tmp_path):
    every_batch = lightning.pytorch.callbacks.ModelCheckpoint(
        dirpath=tmp_path / "steps", filename="{step}", every_n_train_steps=1, save_top_k=-1
    )
    unbroken = Autoencoder()
    run = trainer(tmp_path, every_batch, max_epochs=EPOCHS, num_sanity_val_steps=2)
    run.fit(unbroken, datamodule=module_of(small_store))
    per_epoch = 4
    assert len(unbroken.rows) == run.global_step == EPOCHS * per_epoch
    plan = loader_of(small_store, rows=range(320), batch_rows=80).plan
    expected = [plan.epoch(e).batch_row_ids(b).tolist() for e in range(EPOCHS) for b in range(per_epoch)]
    assert unbroken.rows == expected
    # Validation is the same each time, the check before training included.
    assert unbroken.validated[2:] == EPOCHS * unbroken.validated[2:5]
    assert unbroken.validated[:2] == unbroken.validated[2:4]
    for step in range(1, EPOCHS * per_epoch + 1):
        again = Autoencoder()
        checkpoint = tmp_path / "steps" / f"step={step}.ckpt"
        trainer(tmp_path, max_epochs=EPOCHS, enable_checkpointing=False).fit(
            again, datamodule=module_of(small_store), ckpt_path=checkpoint, weights_only=True
        )
        assert again.rows == unbroken.rows[step:], step
        for mine, theirs in zip(again.parameters(), unbroken.parameters(), strict=True):
            assert torch.equal(mine, theirs)


def test_lightning_resumes_from_the_checkpoint_of_an_epochs_end(small_store, tmp_path):
    settings = {"enable_checkpointing": False, "num_sanity_val_steps": 0}
    unbroken, first, second = Autoencoder(), Autoencoder(), Autoencoder()
    trainer(tmp_path, max_epochs=4, **settings).fit(unbroken, datamodule=module_of(small_store))
    run = trainer(tmp_path, max_epochs=2, **settings)
    run.fit(first, datamodule=module_of(small_store))
    run.save_checkpoint(tmp_path / "end.ckpt")
    trainer(tmp_path, max_epochs=4, **settings).fit(
        second, datamodule=module_of(small_store), ckpt_path=tmp_path / "end.ckpt", weights_only=True
    )
    assert first.rows + second.rows == unbroken.rows


def test_a_data_module_makes_the_loader_of_its_rank(small_store, tmp_path):
    asked = []

    def make(rank: int, world_size: int) -> Loader:
        asked.append((rank, world_size))
        return loader_of(small_store, rank=rank, world_size=world_size)

    settings = {"max_epochs": 1, "enable_checkpointing": False}
    trainer(tmp_path, **settings).fit(Autoencoder(), datamodule=data_module(make, take=(SITE, "rows")))
    assert asked == [(0, 1)]
    with pytest.raises(ConfigError, match=r"process 0 of 1, and its loader is for rank 1 of 2.*function \(rank"):
        trainer(tmp_path, **settings).fit(
            Autoencoder(), datamodule=data_module(loader_of(small_store, rank=1, world_size=2))
        )
    with pytest.raises(ConfigError, match=r"use Loader\(epochs=1\) and Trainer\(max_epochs"):
        trainer(tmp_path, **settings).fit(Autoencoder(), datamodule=data_module(loader_of(small_store, epochs=None)))


class Recorder(Autoencoder):
    """Writes the rows that its process trained on."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def on_train_end(self) -> None:
        (self.folder / f"{self.global_rank}.json").write_text(json.dumps(self.rows))


def test_processes_of_lightning_share_the_epochs(small_store, tmp_path):
    run = trainer(
        tmp_path, max_epochs=2, enable_checkpointing=False, strategy="ddp_fork", devices=2, num_sanity_val_steps=0
    )
    data = data_module(
        lambda rank, world_size: loader_of(small_store, rank=rank, world_size=world_size), take=(SITE, "rows")
    )
    run.fit(Recorder(tmp_path), datamodule=data)
    parts = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    per_epoch = len(loader_of(small_store, rank=0, world_size=2))
    assert [len(part) for part in parts] == [2 * per_epoch] * 2
    for epoch in range(2):
        seen = [row for part in parts for batch in part[epoch * per_epoch :][:per_epoch] for row in batch]
        assert len(seen) == len(set(seen)) == 2 * per_epoch * 50
