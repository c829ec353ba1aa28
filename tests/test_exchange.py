"""Imports and exports: the same values come out, rows that do not count stay out, and what does not fit is refused."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import random_bits, random_blocks, spec_of, write_shards
from test_damage import Died, FailingStore, contents

from actcache.errors import ConfigError, SiteError, StoreError, StoreIncompleteError, StoreMismatchError
from actcache.exchange import export_saelens, import_saelens
from actcache.spec import Site
from actcache.store import export, verify

RESID, MLP = "blocks.0.hook_resid_post", "blocks.0.hook_mlp_out"
Q, T = 21, 7


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()


def values_of(hook: str, dtype: Any = np.float32, shape: tuple[int, ...] = (Q, T)) -> np.ndarray:
    width = 5 if hook == RESID else 3
    return np.random.default_rng(len(hook)).standard_normal((*shape, width)).astype(dtype)


def token_ids(shape: tuple[int, ...] = (Q, T)) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 50_000, shape)


def in_place(store, hook) -> torch.Tensor:
    """`(Q, T, D)` float64 values where they belong; NaN where there is no row."""
    table, rows = store.row_table(), store.read(hook, store.row_ids())
    placed = torch.full((store.spec.n_sequences, store.spec.sequence_length, rows.shape[1]), float("nan")).double()
    placed[table["sequence"].astype(np.int64), table["position"].astype(np.int64)] = rows.double()
    return placed


def same(store, hook, expected) -> bool:
    return torch.equal(in_place(store, hook), torch.as_tensor(expected).double())


def saelens_cache(folder: Path, acts: dict[str, np.ndarray], ids: np.ndarray | None, **saving: Any) -> Path:
    """A dataset made as SAELens' `CacheActivationsRunner` makes its shards."""
    features: dict[str, Any] = {
        hook: datasets.Array2D(shape=values.shape[1:], dtype=values.dtype.name) for hook, values in acts.items()
    }
    columns: dict[str, Any] = {hook: torch.from_numpy(values) for hook, values in acts.items()}
    if ids is not None:
        features["token_ids"] = datasets.Sequence(datasets.Value("int32"), length=ids.shape[1])
        columns["token_ids"] = torch.from_numpy(ids).to(torch.int32)
    made = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    made.save_to_disk(str(folder), **saving)
    return folder


# --- SAELens: in -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_saelens_cache_comes_in_exactly(tmp_path, dtype):
    acts = {RESID: values_of(RESID, dtype), MLP: values_of(MLP, dtype)}
    cache = saelens_cache(tmp_path / "cache", acts, token_ids(), num_shards=3)
    seen = []
    store = import_saelens(
        cache, tmp_path / "x.zarr", sequences_per_shard=4, progress=lambda done, total: seen.append((done, total))
    )
    assert store.sealed
    assert verify(store.objects) == []
    assert store.sites == [RESID, MLP]
    assert store.spec.dtype == np.dtype(dtype).name
    assert all(same(store, hook, values) for hook, values in acts.items())
    assert np.array_equal(store.tokens(), token_ids())
    table = store.row_table()
    assert np.array_equal(table["token"], token_ids()[table["sequence"], table["position"]])
    assert store.spec.model["name"] == "imported from cache"
    assert store.spec.text["tokens"] == store.token_blocks().digest()
    assert seen[-1] == (Q, Q)
    assert import_saelens(cache, tmp_path / "x.zarr", sequences_per_shard=4).fingerprint == store.fingerprint


def test_bfloat16_on_request_rounds_as_torch_does(tmp_path):
    acts = {RESID: values_of(RESID)}
    cache = saelens_cache(tmp_path / "cache", acts, token_ids())
    store = import_saelens(cache, tmp_path / "x.zarr", dtype="bfloat16", skip_first=2, codec="sparse")
    expected = torch.from_numpy(acts[RESID]).bfloat16().double()
    expected[:, :2] = float("nan")
    assert torch.equal(in_place(store, RESID).nan_to_num(9), expected.nan_to_num(9))
    assert store.n_rows == Q * (T - 2)


def test_columns_of_two_dtypes_become_the_wider(tmp_path):
    acts = {RESID: values_of(RESID, np.float16), MLP: values_of(MLP)}
    store = import_saelens(saelens_cache(tmp_path / "cache", acts, token_ids()), tmp_path / "x.zarr")
    assert store.spec.dtype == "float32"
    assert all(same(store, hook, values) for hook, values in acts.items())


def test_without_token_ids_they_are_zero_and_the_store_says_so(tmp_path):
    cache = saelens_cache(tmp_path / "cache", {MLP: values_of(MLP)}, None)
    store = import_saelens(cache, tmp_path / "x.zarr", codec="auto")
    assert not store.tokens().any()
    assert "no token ids" in store.spec.text["note"]
    assert store.spec.sites[0].codec_reason
    assert verify(store.objects) == []


def test_a_dataset_of_chosen_sequences_comes_in_as_chosen(tmp_path):
    saelens_cache(tmp_path / "cache", {MLP: values_of(MLP)}, token_ids())
    chosen = datasets.load_from_disk(str(tmp_path / "cache")).select([5, 3, 11])
    chosen.save_to_disk(str(tmp_path / "chosen"))
    store = import_saelens(tmp_path / "chosen", tmp_path / "x.zarr")
    assert same(store, MLP, values_of(MLP)[[5, 3, 11]])
    assert np.array_equal(store.tokens(), token_ids()[[5, 3, 11]])


def ragged(folder: Path, rows: list[Any]) -> Path:
    """A cache whose Arrow file holds other shapes than its features promise."""
    saelens_cache(folder, {MLP: np.zeros((2, 2, 3), np.float32)}, None)
    file = next(folder.glob("*.arrow"))
    schema = datasets.Features({MLP: datasets.Array2D(shape=(2, 3), dtype="float32")}).arrow_schema
    kind = schema.field(MLP).type
    column = pa.ExtensionArray.from_storage(kind, pa.array(rows, kind.storage_type))
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, schema) as stream:
        stream.write_batch(pa.record_batch([column], schema=schema))
    return folder


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[[1, 2, 3], [4, 5, 6]], [[1, 2, 3]]], "not all of shape"),
        ([[[1, 2, 3], [4, 5, 6]], [[1, 2, 3], [4, 5]]], "not all of shape"),
        ([[[1, 2], [3, 4], [5, 6]], [[1, 2], [3, 4], [5, 6]]], "not all of shape"),
        ([[[1, 2, 3], [4, 5, 6]], None], "not all of shape"),
        ([[[1, 2, 3], [4, 5, 6]], [[1, 2, 3], [4, 5, None]]], "missing"),
    ],
)
def test_a_cache_that_breaks_its_promise_is_refused(tmp_path, rows, message):
    cache = ragged(tmp_path / "cache", rows)
    with pytest.raises(ConfigError, match=message):
        import_saelens(cache, tmp_path / "x.zarr")


def test_what_is_no_saelens_cache_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"not a folder that datasets\.load_from_disk opens"):
        import_saelens(tmp_path / "nowhere", tmp_path / "x.zarr")
    only_tokens = datasets.Dataset.from_dict({"token_ids": [[1, 2]], "text": ["a"]})
    only_tokens.save_to_disk(str(tmp_path / "text"))
    with pytest.raises(ConfigError, match=r"no column of activations .* token_ids, text"):
        import_saelens(tmp_path / "text", tmp_path / "x.zarr")
    datasets.DatasetDict({"train": only_tokens}).save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(ConfigError, match=r"several splits \(train\)"):
        import_saelens(tmp_path / "splits", tmp_path / "x.zarr")
    two = {RESID: values_of(RESID), MLP: values_of(MLP)[:, 1:]}
    with pytest.raises(ConfigError, match="different lengths"):
        import_saelens(saelens_cache(tmp_path / "two", two, None), tmp_path / "x.zarr")
    negative = saelens_cache(tmp_path / "negative", {MLP: values_of(MLP)}, -token_ids())
    with pytest.raises(ConfigError, match="holds values that are not token ids"):
        import_saelens(negative, tmp_path / "x.zarr")
    assert not (tmp_path / "x.zarr").exists()


def test_an_import_that_died_at_any_put_is_continued_by_the_same_call(tmp_path):
    acts = {RESID: values_of(RESID), MLP: values_of(MLP)}
    cache = saelens_cache(tmp_path / "cache", acts, token_ids())

    def run(location):
        return import_saelens(cache, location, sequences_per_shard=8, rows_per_chunk=14)

    unbroken = FailingStore(10**9, Died())
    fingerprint = run(unbroken).fingerprint
    n_puts = 10**9 - unbroken.puts_left
    for k in range(0, n_puts, 5):
        location = FailingStore(k, Died())
        with pytest.raises(Died):
            run(location)
        location.puts_left = -1
        assert run(location).fingerprint == fingerprint, f"put {k}"
        assert contents(location) == contents(unbroken), f"put {k}"


def test_other_activations_of_the_same_tokens_do_not_continue_a_store(tmp_path):
    one = saelens_cache(tmp_path / "one" / "cache", {MLP: values_of(MLP)}, token_ids())
    other = saelens_cache(tmp_path / "other" / "cache", {MLP: values_of(MLP) + 1}, token_ids())
    import_saelens(one, tmp_path / "x.zarr")
    with pytest.raises(StoreMismatchError, match="sample"):
        import_saelens(other, tmp_path / "x.zarr")


# --- SAELens: out ----------------------------------------------------------------------------------------------------


def write_four_shards(path: Path) -> tuple[Any, Any, dict[str, np.ndarray]]:
    """A store of bfloat16 that an extraction might have made, the last shard partial; its tokens; its values."""
    blocks = random_blocks(29, 13)
    spec = spec_of(blocks)
    bits = random_bits(spec)
    store = write_shards(path, spec, blocks, bits)
    return store, blocks, {name: (values.astype(np.uint32) << 16).view(np.float32) for name, values in bits.items()}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_four_shards(tmp_path_factory.mktemp("written") / "x.zarr")


def test_an_export_is_laid_out_as_saelens_reads_it(written, tmp_path):
    store, blocks, acts = written
    seen = []
    folder = export_saelens(store, tmp_path / "cache", progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    found = datasets.load_from_disk(str(folder))
    assert found.column_names == [*store.sites, "token_ids"]
    for hook, values in acts.items():
        feature = found.features[hook]
        assert isinstance(feature, datasets.Array2D)
        assert (tuple(feature.shape), feature.dtype) == (values.shape[1:], "float32")
        # In batches across the boundaries of its files, in the format that SAELens sets.
        found.set_format(type="torch", columns=[hook, "token_ids"], dtype=torch.float32)
        parts = [found[start : start + 6] for start in range(0, len(found), 6)]
        assert torch.equal(torch.cat([part[hook] for part in parts]), torch.from_numpy(values))
        ids = torch.cat([part["token_ids"] for part in parts]).numpy()
        assert np.array_equal(ids, blocks.ids[:, 1:])
    assert sorted(file.name for file in folder.iterdir()) == [
        *(f"data-{number:05d}-of-00004.arrow" for number in range(4)),
        "dataset_info.json",
        "state.json",
    ]


def test_what_goes_out_comes_in_again(written, tmp_path):
    store, blocks, acts = written
    export_saelens(store, tmp_path / "cache", sites=["*mlp*"])
    back = import_saelens(tmp_path / "cache", tmp_path / "back.zarr", dtype="bfloat16")
    assert back.sites == ["blocks.0.hook_mlp_out"]
    assert same(back, back.sites[0], acts[back.sites[0]])
    assert np.array_equal(back.tokens(), blocks.ids[:, 1:])


@pytest.mark.parametrize(
    ("dtype", "asked", "given"),
    [
        ("float16", None, "float16"),
        ("float16", "float32", "float32"),
        ("float32", None, "float32"),
        ("float32", "float16", "float16"),
    ],
)
def test_exports_of_each_dtype(tmp_path, dtype, asked, given):
    blocks = random_blocks(5, 6)
    spec = spec_of(blocks, dtype=dtype, sequences_per_shard=2, rows_per_chunk=10)
    bits = random_bits(spec)
    store = write_shards(tmp_path / "x.zarr", spec, blocks, bits)
    found = datasets.load_from_disk(str(export_saelens(store, tmp_path / "cache", dtype=asked))).with_format("numpy")
    for hook, values in bits.items():
        assert found.features[hook].dtype == given
        assert np.array_equal(found[:][hook], values.astype(given))


def test_an_export_is_continued_and_nothing_else_is_touched(written, tmp_path):
    store, _blocks, _acts = written
    whole = export_saelens(store, tmp_path / "whole")
    broken = shutil.copytree(whole, tmp_path / "broken")
    (broken / "state.json").unlink()
    (broken / "data-00002-of-00004.arrow").rename(broken / "data-00002-of-00004.partial")
    kept = (broken / "data-00001-of-00004.arrow").stat().st_mtime_ns
    export_saelens(store, broken)
    assert {file.name: file.read_bytes() for file in broken.iterdir()} == {
        file.name: file.read_bytes() for file in whole.iterdir()
    }
    assert (broken / "data-00001-of-00004.arrow").stat().st_mtime_ns == kept
    for options in ({"sites": ["*mlp*"]}, {"dtype": "float16"}):
        with pytest.raises(ConfigError, match="holds something else"):
            export_saelens(store, whole, **options)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="holds something else"):
        export_saelens(store, tmp_path / "mine")


def test_exports_that_saelens_could_not_use_are_refused(written, tmp_path):
    store, blocks, _acts = written
    out = tmp_path / "cache"
    part = export(store, tmp_path / "part.zarr", rows=slice(0, 100))
    with pytest.raises(StoreError, match="100 of the 348 rows"):
        export_saelens(part, out)
    with pytest.raises(SiteError, match="no site matches"):
        export_saelens(store, out, sites=["*resid*"])
    with pytest.raises(ConfigError, match="not bfloat16"):
        export_saelens(store, out, dtype="bfloat16")
    unfinished = write_shards(tmp_path / "u.zarr", store.spec, blocks, random_bits(store.spec), shards=[0])
    with pytest.raises(StoreIncompleteError, match="not finished"):
        export_saelens(unfinished, out)
    assert not out.exists()
    spec = replace(store.spec, sites=(Site(name=MLP, shape=(3,)),))
    large = random_bits(spec)
    large[MLP][0, 0, 0] = 0x4790  # 73728 as a bfloat16
    loud = write_shards(tmp_path / "loud.zarr", spec, blocks, large)
    with pytest.raises(ConfigError, match="beyond what float16 holds; choose float32"):
        export_saelens(loud, out, dtype="float16")


# --- SAELens itself, in the environment of tests/test_adapters_saelens.py ---------------------------------------------


@pytest.fixture
def tiny():
    """A model in which SAELens finds its hooks, and 64 sequences for it."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    sizes = {"n_layers": 1, "d_model": 12, "n_ctx": 16, "d_head": 4, "n_heads": 2, "d_vocab": 64, "act_fn": "relu"}
    blocks = random_blocks(64, 13)
    blocks.ids[:] %= 64
    tokens = datasets.Dataset.from_dict({"tokens": blocks.ids.astype(np.int64)})
    return HookedTransformer(HookedTransformerConfig(**sizes)), blocks, tokens


@pytest.mark.needs("sae-lens")
def test_saelens_trains_from_an_export(tiny, tmp_path):
    from sae_lens import (
        BatchTopKTrainingSAEConfig,
        LanguageModelSAERunnerConfig,
        LanguageModelSAETrainingRunner,
        LoggingConfig,
    )

    model, blocks, tokens = tiny
    spec = spec_of(blocks)
    bits = random_bits(spec)
    store = write_shards(tmp_path / "x.zarr", spec, blocks, bits)
    config = LanguageModelSAERunnerConfig(
        sae=BatchTopKTrainingSAEConfig(d_in=12, d_sae=24, k=4),
        model_name="none",
        hook_name=MLP,
        dataset_path="none",
        streaming=False,
        use_cached_activations=True,
        cached_activations_path=str(export_saelens(store, tmp_path / "cache")),
        context_size=store.spec.rows_per_sequence,
        store_batch_size_prompts=8,
        train_batch_size_tokens=32,
        n_batches_in_buffer=4,
        training_tokens=1024,
        device="cpu",
        logger=LoggingConfig(log_to_wandb=False),
        n_eval_batches=1,
        checkpoint_path=None,
    )
    runner = LanguageModelSAETrainingRunner(config, override_dataset=tokens, override_model=model)
    acts, ids = runner.activations_store.get_raw_llm_batch()
    expected = (bits[MLP][:8].astype(np.uint32) << 16).view(np.float32)
    assert torch.equal(acts, torch.from_numpy(expected).flatten(0, 1))
    assert np.array_equal(ids.numpy(), blocks.ids[:8, 1:].reshape(-1))
    runner.activations_store.current_row_idx = 0
    before = runner.sae.W_dec.detach().clone()
    trained = runner.run()
    assert not torch.equal(trained.W_dec, before)
    assert trained.W_dec.isfinite().all()


@pytest.mark.needs("sae-lens")
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_saelens_cached_comes_in_exactly(tiny, tmp_path, monkeypatch, dtype):
    from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig, cache_activations_runner

    model, blocks, tokens = tiny
    monkeypatch.setattr(cache_activations_runner, "load_model", lambda **_: model)  # it would ask the hub for a name
    config = CacheActivationsRunnerConfig(
        dataset_path="none",
        model_name="none",
        model_batch_size=8,
        hook_name=MLP,
        d_in=12,
        training_tokens=64 * 13,
        context_size=13,
        new_cached_activations_path=str(tmp_path / "cache"),
        shuffle=False,
        dtype=dtype,
        device="cpu",
        prepend_bos=False,
        streaming=False,
        buffer_size_gb=16 * 13 * 12 * 4 / 1e9,
    )
    CacheActivationsRunner(config, override_dataset=tokens).run()
    store = import_saelens(tmp_path / "cache", tmp_path / "x.zarr", sequences_per_shard=20)
    ids = torch.from_numpy(blocks.ids.astype(np.int64))
    with torch.no_grad():
        # In the batches in which SAELens runs the model: others may differ in the last bit.
        parts = [model.run_with_cache(part)[1][MLP] for part in ids.split(8)]
    expected = torch.cat(parts).to(getattr(torch, dtype))
    assert expected.any()
    assert same(store, MLP, expected)
    assert np.array_equal(store.tokens(), blocks.ids)
