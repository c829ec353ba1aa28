"""A model is its content: weights, and what changes values; not where it lies or what it is called."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lm_models import LLAMA_LIKE, random_model, small_module

import actcache as ac
from actcache.errors import StoreMismatchError
from actcache.lm import load_lm
from actcache.lm.identity import is_same_model
from actcache.spec import TokenBlocks

SITE = "blocks.1.hook_resid_post"
IDS = np.random.default_rng(0).integers(3, 40, (12, 8)).astype(np.uint32)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "model-a"
    random_model("llama", **LLAMA_LIKE).save_pretrained(folder)
    return folder


def blocks_of(ids: Any) -> TokenBlocks:
    return TokenBlocks(ids=ids, document=np.zeros_like(ids), description={})


def copied(saved: Path, folder: Path, **changes: Any) -> Path:
    shutil.copytree(saved, folder)
    plain = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in plain.items() if v != "-"}))
    return folder


def root_of(path: Any) -> bytes:
    return (Path(path) / "zarr.json").read_bytes()


def begun(folder: Path, path: Path, without: tuple[str, ...] = ()) -> Path:
    """An unfinished store: its second shard is not there; perhaps of a version that did not say all of a model."""
    settings: dict[str, Any] = {"sequences_per_shard": 4, "skip_first": 0}
    ac.extract(load_lm(folder), blocks_of(IDS), [SITE], path, part=(1, 3), **settings)
    root = json.loads(root_of(path))
    model = root["attributes"]["actcache"]["spec"]["model"]
    root["attributes"]["actcache"]["spec"]["model"] = {k: v for k, v in model.items() if k not in without}
    (path / "zarr.json").write_text(json.dumps(root))
    return path


def go_on(folder: Path, path: Path) -> Any:
    return ac.extract(load_lm(folder), blocks_of(IDS), [SITE], path, sequences_per_shard=4, skip_first=0)


def test_the_same_weights_in_another_folder_go_on_with_a_store(saved: Path, tmp_path: Path) -> None:
    other = copied(saved, tmp_path / "model-b", _name_or_path="elsewhere", transformers_version="4.1", use_cache=False)
    path = begun(saved, tmp_path / "a.zarr")
    store = go_on(other, path)
    assert store.sealed
    assert store.spec.model["name"] == "model-a"
    whole = ac.extract(load_lm(saved), blocks_of(IDS), [SITE], tmp_path / "b.zarr", sequences_per_shard=4, skip_first=0)
    assert store.fingerprint == whole.fingerprint
    lm = load_lm(other)
    assert ac.extend(lm, path, blocks_of(IDS[:5])).spec.model["name"] == "model-a"
    assert ac.add_sites(lm, path, ["blocks.0.hook_resid_post"]).spec.model["name"] == "model-a"
    assert ac.verify(path) == []


def test_a_store_of_a_version_that_did_not_say_all_goes_on_as_it_is(saved: Path, tmp_path: Path) -> None:
    path = begun(saved, tmp_path / "a.zarr", without=("config",))
    before = json.loads(root_of(path))["attributes"]["actcache"]["spec"]
    store = go_on(copied(saved, tmp_path / "model-b"), path)
    assert store.sealed
    assert json.loads(root_of(path))["attributes"]["actcache"]["spec"] == before


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rms_norm_eps": 1e-3}, r"model.config.rms_norm_eps: the store has None, asked for 0.001"),
        ({"hidden_act": "gelu"}, r"model.config.hidden_act"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, r"rope_parameters: .*500000"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}, r"rope_parameters"),
        ({"num_attention_heads": 6, "num_key_value_heads": 6, "head_dim": 4}, r"num_attention_heads"),
    ],
)
def test_what_changes_values_without_a_weight_is_another_model(
    saved: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    path = begun(saved, tmp_path / "a.zarr")
    other = copied(saved, tmp_path / "model-b", **changes)
    one, two = load_lm(saved), load_lm(other)
    assert one.identity["weights"] == two.identity["weights"]
    assert not np.array_equal(one.logits(IDS).float(), two.logits(IDS).float())
    before = root_of(path)
    with pytest.raises(StoreMismatchError, match=said):
        go_on(other, path)
    with pytest.raises(StoreMismatchError, match=said):
        ac.extraction.fill(two, path, [1])
    assert root_of(path) == before


@pytest.mark.parametrize(
    "changes",
    [
        {"use_cache": False, "_name_or_path": "x", "transformers_version": "5.0", "attention_dropout": 0.5},
        {"initializer_range": 0.5, "id2label": {"0": "a"}, "torch_dtype": "float32", "dtype": "-"},
        {"max_position_embeddings": 64},  # of plain rotary positions this is a claim
        {"rms_norm_eps": 1e-6, "hidden_act": "silu"},  # what is usual, spelled out
    ],
)
def test_what_changes_no_value_is_the_same_model(saved: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    other = load_lm(copied(saved, tmp_path / "model-b", **changes))
    here = load_lm(saved)
    assert {k: v for k, v in other.identity.items() if k != "name"} == {
        k: v for k, v in here.identity.items() if k != "name"
    }
    assert np.array_equal(other.logits(IDS).float(), here.logits(IDS).float())


def test_positions_that_rotary_angles_are_stretched_to_count(saved: Path, tmp_path: Path) -> None:
    rope = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}
    one = load_lm(copied(saved, tmp_path / "a", **rope)).identity
    two = load_lm(copied(saved, tmp_path / "b", **rope, max_position_embeddings=4)).identity
    assert not is_same_model(one, two)


def test_a_model_that_is_all_defaults_says_so(tmp_path: Path) -> None:
    """Otherwise its stores would look like those that do not say."""
    from transformers import CTRLConfig, CTRLLMHeadModel

    module = CTRLLMHeadModel(CTRLConfig(n_layer=1, n_embd=16, n_head=2, dff=8, vocab_size=40))
    module.config = CTRLConfig()
    assert load_lm(module).identity["config"] == {}


def test_the_embedded_architecture_says_what_it_said() -> None:
    assert set(load_lm(small_module()).identity) == {"name", "class", "dtype", "weights", "tokenizer"}


def test_a_tokenizer_decides_only_where_both_have_one() -> None:
    model = {"name": "a", "class": "A", "dtype": "float32", "weights": "1", "tokenizer": "2"}
    assert is_same_model(model, {**model, "name": "b", "revision": "main"})
    assert is_same_model(model, {**model, "tokenizer": None})
    assert is_same_model({**model, "tokenizer": None}, model)
    for key in ("class", "dtype", "weights", "tokenizer"):
        assert not is_same_model(model, {**model, key: "other"}), key
    assert not is_same_model(model, {**model, "autocast": "bfloat16"})
    assert not is_same_model({**model, "config": {"a": 1}}, model)
    assert is_same_model(model, {**model, "config": {"a": 1}})
    assert not is_same_model({**model, "config": {}}, {**model, "config": {"a": 1}})
