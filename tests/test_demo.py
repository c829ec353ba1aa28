"""The main job end to end, small: everything is written, means what it says, and is found again the second time."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actcache.demo import DemoConfig, pairs_of, run_demo
from actcache.errors import ActcacheError, ConfigError, SiteError
from actcache.source import read_texts
from actcache.sparse.metrics import LayerRow, Metrics, Stage
from actcache.sparse.runs import Pair, density_histogram

pytestmark = pytest.mark.exhaustive


class Listener:
    """Hears what a terminal would show."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.heard: dict[str, tuple[int, int]] = {}

    def stage(self, title: str, _unit: str) -> Any:
        def progress(done: int, total: int) -> None:
            self.heard[title] = (done, total)

        return progress


def small(out: Path, **changes: Any) -> DemoConfig:
    return replace(DemoConfig(out=out).small(), **{"n_steps": 60, **changes})


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], Listener]:
    out, listener = tmp_path_factory.mktemp("runs") / "demo", Listener()
    metrics = run_demo(small(out), on_stage=listener.stage, say=listener.said.append)
    return out, metrics, listener


def test_everything_is_written_and_the_metrics_are_complete(first: tuple[Path, dict[str, Any], Listener]) -> None:
    out, metrics, listener = first
    assert json.loads((out / "metrics.json").read_text()) == metrics
    assert "</html>" in (out / "report.html").read_text()
    assert [row["layer"] for row in metrics["layers"]] == [0, 1, 2, 3]
    for row in metrics["layers"]:
        assert all(isinstance(row[key], float) for key in ("clean", "zero_ablated", "spliced", "loss_recovered", "l0"))
        assert 0 < row["fvu"] < 1
        assert 0 <= row["dead_fraction"] <= 1
        assert row["loss_recovered"] == pytest.approx(
            1 - (row["spliced"] - row["clean"]) / (row["zero_ablated"] - row["clean"])
        )
        assert sum(row["density_histogram"]["counts"]) + row["density_histogram"]["n_never"] == row["n_latents"]
        assert row["history"]["step"][-1] == 60
    assert all(stage["seconds"] > 0 and not stage["reused"] for stage in metrics["stages"].values())
    assert metrics["stages"]["extract"]["tokens_per_s"] > 0
    assert 0.5 < metrics["store"]["bytes_per_activation"] < 2
    assert all(done == total for done, total in listener.heard.values())
    assert listener.heard["Train layer 3"] == (60, 60)
    assert listener.said == []
    assert metrics.keys() == Metrics.__annotations__.keys()
    assert all(row.keys() == LayerRow.__annotations__.keys() for row in metrics["layers"])
    assert all(stage.keys() <= Stage.__annotations__.keys() for stage in metrics["stages"].values())


def test_the_numbers_are_those_of_the_files(first: tuple[Path, dict[str, Any], Listener]) -> None:
    from actcache.sparse.model import SparseMLP
    from actcache.store import open_store

    out, metrics, _ = first
    row, held_out = metrics["layers"][2], open_store(out / "held_out.zarr")
    mlp = SparseMLP.load(out / "sparse" / "layer_2")
    x, y = (held_out.read(row[side], slice(None)).float() for side in ("site_in", "site_out"))
    with torch.no_grad():
        fvu = (mlp(x) - y).square().sum() / (y - y.mean(0)).square().sum()
        l0 = (mlp.encode(x) > 0).sum(1).float().mean()
    assert row["fvu"] == pytest.approx(float(fvu), rel=1e-3)
    assert row["l0"] == pytest.approx(float(l0), rel=1e-3)
    assert row["n_rows_evaluated"] == held_out.n_rows


def test_no_document_is_both_trained_on_and_evaluated_on(first: tuple[Path, dict[str, Any], Listener]) -> None:
    from actcache.lm import load_lm
    from actcache.store import open_store

    out, _, _ = first
    texts, tokenizer = list(read_texts("stories-corpus")), load_lm("stories-4l").tokenizer

    def documents(name: str, every: int, held: bool) -> set[int]:
        # A store counts the documents that it was given; these are their numbers in the corpus.
        given = [i for i in range(len(texts)) if (i % every == 0) == held]
        return {given[i] for i in np.unique(open_store(out / name).tokens("document")).tolist()}

    trained, evaluated = documents("acts.zarr", 16, False), documents("held_out.zarr", 16, True)
    assert trained
    assert evaluated
    assert not trained & evaluated
    begun = tokenizer.decode(open_store(out / "held_out.zarr").tokens()[0])
    assert any(piece.strip()[:40] in texts[i] for i in evaluated for piece in begun.split("<|bos|>") if piece.strip())


def test_the_code_that_the_report_shows_runs(first: tuple[Path, dict[str, Any], Listener]) -> None:
    from actcache.report import view

    _, metrics, _ = first
    names: dict[str, Any] = {}
    for snippet in view.snippets(metrics):
        exec(snippet["code"], names)
    assert names["acts_ND"].shape == (4096, 128)
    assert names["latents_NF"].shape == (4096, 256)
    assert names["batch"].rows.shape == (2048,)


def test_the_second_run_reuses_store_and_layers(first: tuple[Path, dict[str, Any], Listener]) -> None:
    out, metrics, _ = first
    listener = Listener()
    again = run_demo(small(out), on_stage=listener.stage, say=listener.said.append)
    assert sum("reusing it" in sentence for sentence in listener.said) == 2 + 4
    assert any("acts.zarr" in sentence for sentence in listener.said)
    for stage in ("extract", "train"):
        assert again["stages"][stage]["reused"]
        assert again["stages"][stage]["made_in_s"] > 0
    assert again["stages"]["extract"]["tokens_per_s"] == metrics["stages"]["extract"]["tokens_per_s"]
    assert again["store"]["fingerprint"] == metrics["store"]["fingerprint"]
    same = ("clean", "spliced", "fvu", "l0", "history")
    assert [[row[key] for key in same] for row in again["layers"]] == [
        [row[key] for key in same] for row in metrics["layers"]
    ]


@pytest.mark.exhaustive
def test_other_training_settings_train_anew_on_the_same_store(first: tuple[Path, dict[str, Any], Listener]) -> None:
    out, metrics, _ = first
    listener = Listener()
    again = run_demo(small(out, l1=(2.0**9,), n_steps=50), on_stage=listener.stage, say=listener.said.append)
    assert again["stages"]["extract"]["reused"]
    assert not again["stages"]["train"]["reused"]
    assert sum("again" in sentence for sentence in listener.said) == 4
    assert again["layers"][0]["l0"] < metrics["layers"][0]["l0"]


def test_other_text_settings_are_refused_and_change_nothing(first: tuple[Path, dict[str, Any], Listener]) -> None:
    out, _, _ = first
    before = (out / "metrics.json").read_bytes()
    with pytest.raises(ActcacheError, match=r"acts\.zarr"):
        run_demo(small(out, length=64))
    assert (out / "metrics.json").read_bytes() == before


def test_config_is_checked() -> None:
    with pytest.raises(ConfigError, match="n_steps"):
        DemoConfig(n_steps=0)
    with pytest.raises(ConfigError, match="held_out_every"):
        DemoConfig(held_out_every=1)
    with pytest.raises(ConfigError, match="l1"):
        DemoConfig(l1=())


def test_the_learning_rate_is_that_of_the_trainers_recipe() -> None:
    from actcache.sparse.training import TrainConfig

    assert DemoConfig().lr == TrainConfig().lr


def test_each_layer_has_its_penalty_and_further_layers_the_last() -> None:
    config = DemoConfig(l1=(2.0, 8.0))
    assert [config.train_config(layer).l1 for layer in range(4)] == [2.0, 8.0, 8.0, 8.0]


def test_pairs_are_made_by_layer() -> None:
    sites = ["blocks.0.mlp.hook_in", "blocks.0.hook_mlp_out", "blocks.10.mlp.hook_in", "blocks.10.hook_mlp_out"]
    assert [pair.layer for pair in pairs_of(sites)] == [0, 10]
    with pytest.raises(SiteError, match="layers 10"):
        pairs_of(sites[:-1])
    assert Pair(site_in="model.mlp:in", site_out="model.mlp:out").layer == "model.mlp:out"
    assert "/" not in Pair(site_in="a/b", site_out="c/d").name


def test_density_histogram_counts_every_latent_once() -> None:
    density = np.array([0.0, 0.0, 1e-4, 0.5, 1.0])
    found = density_histogram(density, 10_000)
    assert found["n_never"] == 2
    assert sum(found["counts"]) == 3
    assert found["counts"][0] == 1
    assert found["counts"][-1] == 1
    assert found["log10_edges"][0] == -4
    assert found["log10_edges"][-1] == 0
