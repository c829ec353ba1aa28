"""Extraction: cached values are the model's, the same call finds what is done, foreign stores stay."""

from __future__ import annotations

from dataclasses import fields
from inspect import signature
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import grow_disk, random_blocks, small_disk_in

import actcache as ac
from actcache.cluster import extract_on_cluster
from actcache.errors import ConfigError, SiteError, StorageFullError, StoreMismatchError
from actcache.extraction import settle
from actcache.lm.stories import StoriesConfig, StoriesLM
from actcache.spec import TokenBlocks
from actcache.store_options import StoreOptions

CONFIG = StoriesConfig(d_model=16, d_mlp=32, n_layers=2, n_heads=2, n_ctx=32, d_vocab=2048)
SITES = ["blocks.*.mlp.hook_in", "blocks.*.hook_mlp_out"]
SIZES = {"sequences_per_shard": 8, "rows_per_chunk": 20, "batch_sequences": 3}


def tiny_lm(seed: int = 0):
    torch.manual_seed(seed)
    return ac.load_lm(StoriesLM(CONFIG))


@pytest.fixture(scope="module")
def blocks():
    return random_blocks(29, 21)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, blocks):
    return ac.extract(tiny_lm(), blocks, SITES, tmp_path_factory.mktemp("x") / "whole.zarr", **SIZES)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stored_values_are_the_models_own(tmp_path, blocks, dtype):
    lm = tiny_lm()
    store = ac.extract(lm, blocks, SITES, tmp_path / "s.zarr", dtype=dtype, **SIZES)
    assert store.n_rows == 29 * 20
    table = store.row_table()
    grabbed: dict[str, torch.Tensor] = {}
    module = lm.module
    for layer in range(2):
        mlp = module.blocks[layer].mlp
        mlp.register_forward_hook(
            lambda _m, args, out, layer=layer: grabbed.update(
                {f"blocks.{layer}.mlp.hook_in": args[0], f"blocks.{layer}.hook_mlp_out": out}
            )
        )
    with torch.no_grad():
        module(torch.from_numpy(blocks.ids.astype(np.int64)))
    for site in store.sites:
        expected = grabbed[site][table["sequence"].astype(int), table["position"].astype(int)]
        got = store.read(site, slice(None))
        # The batch shape differs from extraction's, so the last bits of float32 may.
        tolerance = 1e-5 if dtype == "float32" else 1e-2
        torch.testing.assert_close(got.float(), expected, rtol=tolerance, atol=tolerance)
    assert (table["token"] == blocks.ids[table["sequence"], table["position"]]).all()
    assert table["position"].min() == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gpu_stores_what_the_cpu_stores(tmp_path, blocks, dtype):
    stores = [
        ac.extract(ac.load_lm(tiny_lm().module, device=device), blocks, SITES, tmp_path / device, dtype=dtype, **SIZES)
        for device in ("cpu", "cuda")
    ]
    for site in stores[0].sites:
        on_cpu, on_gpu = (store.read(site, slice(None)).float() for store in stores)
        torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-2, atol=1e-2)


def test_progress_ends_at_the_number_of_sequences(tmp_path, blocks):
    seen = []
    ac.extract(tiny_lm(), blocks, SITES, tmp_path / "s.zarr", progress=lambda *a: seen.append(a), **SIZES)
    assert seen[-1] == (29, 29)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_a_second_call_finds_everything_done(unbroken, blocks):
    def written() -> dict[Path, int]:
        return {p: p.stat().st_mtime_ns for p in Path(unbroken.path).rglob("*") if p.is_file()}

    before = written()
    again = ac.extract(tiny_lm(), blocks, SITES, unbroken.path, **SIZES)
    assert again.fingerprint == unbroken.fingerprint
    assert written() == before


def test_another_model_text_or_spec_is_refused(unbroken, blocks):
    with pytest.raises(StoreMismatchError, match=r"model\.weights: the store has .*asked for"):
        ac.extract(tiny_lm(seed=1), blocks, SITES, unbroken.path, **SIZES)
    with pytest.raises(StoreMismatchError, match=r"text\.tokens"):
        ac.extract(tiny_lm(), random_blocks(29, 21, seed=9), SITES, unbroken.path, **SIZES)
    with pytest.raises(StoreMismatchError, match="dtype: the store has 'bfloat16', asked for 'float16'"):
        ac.extract(tiny_lm(), blocks, SITES, unbroken.path, dtype="float16", **SIZES)
    anonymous = TokenBlocks(ids=blocks.ids[::-1], document=blocks.document, description=blocks.description)
    with pytest.raises(StoreMismatchError, match=r"text\.tokens"):
        ac.extract(tiny_lm(), anonymous, SITES, unbroken.path, **SIZES)
    assert ac.verify(unbroken.path) == []


def test_a_part_of_the_blocks_gives_a_sound_store(tmp_path, blocks):
    store = ac.extract(tiny_lm(), blocks.take(slice(-4, None)), "blocks.0.hook_mlp_out", tmp_path / "s.zarr")
    assert store.sites == ["blocks.0.hook_mlp_out"]
    assert ac.verify(tmp_path / "s.zarr") == []


def test_bad_input(tmp_path, blocks):
    with pytest.raises(SiteError, match="did you mean"):
        ac.extract(tiny_lm(), blocks, ["blocks.0.hook_mlp_outt"], tmp_path / "s.zarr")
    with pytest.raises(ConfigError, match=r"sequences of 33 tokens, but .* has a context of 32"):
        ac.extract(tiny_lm(), random_blocks(2, 33), SITES, tmp_path / "s.zarr")
    with pytest.raises(ConfigError, match="no codec preset 'zip'"):
        ac.extract(tiny_lm(), blocks, SITES, tmp_path / "s.zarr", codec="zip")
    assert not (tmp_path / "s.zarr").exists()


def test_default_sizes_make_chunks_of_half_a_megabyte():
    from actcache.extraction import store_spec

    lm = tiny_lm()
    sites = [place.site for place in lm.resolve(SITES)]
    spec = store_spec(lm, random_blocks(2000, 32), sites, StoreOptions(dtype="float32"))
    assert spec.sequences_per_shard == 512
    assert 1 << 17 <= spec.rows_per_chunk * 16 * 4 <= 1 << 19
    assert spec.rows_per_shard % spec.rows_per_chunk == 0


def test_nan_activations_are_counted_and_reported(tmp_path, blocks):
    lm = tiny_lm()
    with torch.no_grad():
        lm.module.pos_embed.weight[5, 0] = float("nan")
    store = ac.extract(lm, blocks, ["blocks.0.mlp.hook_in"], tmp_path / "s.zarr", **SIZES)
    assert store.stats("blocks.0.mlp.hook_in").n_nan > 0
    assert store.info()["sites"]["blocks.0.mlp.hook_in"]["n_nan"] > 0


@pytest.fixture
def small_disk(tmp_path):
    with small_disk_in(tmp_path / "disk", "256k") as folder:
        yield folder


def test_a_full_disk_says_what_is_missing_and_the_same_call_finishes(small_disk, blocks, unbroken):
    with pytest.raises(StorageFullError, match=r"bytes needed, [\d,]+ free; make room and give the same command again"):
        ac.extract(tiny_lm(), blocks, SITES, small_disk / "s.zarr", **SIZES)
    grow_disk(small_disk)
    finished = ac.extract(tiny_lm(), blocks, SITES, small_disk / "s.zarr", **SIZES)
    assert finished.fingerprint == unbroken.fingerprint
    assert ac.verify(small_disk / "s.zarr") == []


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"codec": 5}, "codec must be the name of one, or names by pattern of sites, got 5"),
        ({"codec": {"*": 5}}, "codec must be"),
        ({"dtype": "int8"}, "dtype must be one of bfloat16, float16, float32"),
        ({"skip_first": -1}, "skip_first must be an integer from 0 up"),
        ({"skip_first": True}, "skip_first must be an integer from 0 up"),
        ({"seed": 1.5}, "seed must be an integer"),
        ({"sequences_per_shard": 0}, "sequences_per_shard must be a positive integer"),
        ({"rows_per_chunk": 2.0}, "rows_per_chunk must be a positive integer"),
    ],
)
def test_a_wrong_store_option_is_refused_where_it_is_given(tmp_path, blocks, wrong, said):
    with pytest.raises(ConfigError, match=said):
        StoreOptions(**wrong)
    with pytest.raises(ConfigError, match=said):
        ac.extract(tiny_lm(), blocks, SITES, tmp_path / "s.zarr", **wrong)
    assert not (tmp_path / "s.zarr").exists()


def test_every_door_has_the_same_store_options():
    options = {field.name: field.default for field in fields(StoreOptions)}
    for door in (ac.extract, extract_on_cluster):
        parameters = signature(door).parameters
        assert {name: parameters[name].default for name in options} == options
    imports = {**options, "dtype": None, "skip_first": 0}
    for door in (ac.import_npy, ac.import_saelens, ac.import_safetensors):
        parameters = signature(door).parameters
        assert {name: parameters[name].default for name in options} == imports
    assert type(StoreOptions(seed=np.int64(3)).seed) is int


def test_a_store_that_is_continued_is_opened_once_before_it_is_written(tmp_path, blocks, monkeypatch):
    path, opened = tmp_path / "s.zarr", []
    ac.extract(tiny_lm(), blocks, SITES, path, codec="auto", **SIZES)
    monkeypatch.setattr(settle, "open_store", lambda place: opened.append(place) or ac.open_store(place))
    ac.extract(tiny_lm(), blocks, SITES, path, codec="auto", **SIZES)
    assert len(opened) == 1
