"""Arrays come in: the same values from `.npy` and safetensors files, masked positions stay out, misfits are refused."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_exchange import MLP, RESID, Q, T, in_place, saelens_cache, same, token_ids, values_of, write_four_shards

from actcache.cli import main
from actcache.errors import ConfigError
from actcache.exchange import import_npy, import_safetensors
from actcache.load import Loader
from actcache.store import open_store, verify

# --- npy -------------------------------------------------------------------------------------------------------------


def saved(folder: Path, **arrays: np.ndarray) -> dict[str, Path]:
    for name, values in arrays.items():
        np.save(folder / f"{name}.npy", values)
    return {name: folder / f"{name}.npy" for name in arrays}


def test_npy_files_of_sequences_come_in_exactly(tmp_path):
    resid, mlp = values_of(RESID), values_of(MLP)
    files = saved(tmp_path, resid=np.asfortranarray(resid), mlp=mlp.astype(">f4"), tokens=token_ids())
    arrays = {RESID: files["resid"], MLP: files["mlp"]}
    store = import_npy(arrays, tmp_path / "x.zarr", tokens=files["tokens"], sequences_per_shard=6, rows_per_chunk=21)
    assert same(store, RESID, resid)
    assert same(store, MLP, mlp)
    assert np.array_equal(store.tokens(), token_ids())
    assert verify(store.objects) == []
    # The same tokens as an array are the same tokens.
    again = import_npy(arrays, tmp_path / "x.zarr", tokens=token_ids(), sequences_per_shard=6, rows_per_chunk=21)
    assert again.fingerprint == store.fingerprint


def test_npy_rows_become_sequences_of_one_token_in_shards_of_a_fair_size(tmp_path):
    rows = np.random.default_rng(1).standard_normal((1009, 96)).astype(np.float16)  # a prime number of rows
    store = import_npy({"layer": saved(tmp_path, rows=rows)["rows"]}, tmp_path / "x.zarr")
    assert store.n_rows == 1009
    assert store.spec.sequence_length == 1
    assert store.spec.n_shards == 1
    assert store.spec.rows_per_chunk >= 256
    assert same(store, "layer", rows[:, None])
    loader = Loader(store, ["layer"], batch_rows=64, drop_last=False)
    assert sorted(row for batch in loader for row in batch.rows.tolist()) == list(range(1009))


def test_npy_of_float64_is_rounded_on_request_only(tmp_path):
    wide = values_of(MLP, np.float64)
    file = saved(tmp_path, wide=wide)["wide"]
    with pytest.raises(ConfigError, match="float64, which stores do not have"):
        import_npy({MLP: file}, tmp_path / "x.zarr")
    store = import_npy({MLP: file}, tmp_path / "x.zarr", dtype="float32")
    assert same(store, MLP, wide.astype(np.float32))


def test_values_beyond_the_dtype_are_refused_but_infinities_are_values(tmp_path):
    values = values_of(MLP)
    values[3, 2, 1] = np.inf
    values[4, 0, 0] = np.nan
    store = import_npy({MLP: saved(tmp_path, fine=values)["fine"]}, tmp_path / "fine.zarr", dtype="float16")
    expected = values.astype(np.float16)
    assert np.array_equal(in_place(store, MLP).numpy(), expected.astype(np.float64), equal_nan=True)
    values[5, 1, 2] = -70_000
    with pytest.raises(ConfigError, match=r"values up to 7e\+04, beyond what float16 holds"):
        import_npy({MLP: saved(tmp_path, large=values)["large"]}, tmp_path / "x.zarr", dtype="float16")


def test_int8_is_fitted_to_the_rows_that_count(tmp_path):
    # Feature 1 is a thousand times larger than the others; in masked rows so is feature 0.
    acts = np.random.default_rng(3).standard_normal((40, T, 6)).astype(np.float32)
    acts[..., 1] *= 1000
    acts[:, 0, 0] = 1e6
    mask = np.ones((40, T), bool)
    mask[:, 0] = False
    folder = chunked(tmp_path / "hook", torch.from_numpy(acts), token_ids((40, T)), mask, [0, 11])
    store = import_safetensors({MLP: folder}, tmp_path / "x.zarr", codec="int8")
    site = store.spec.sites[0]
    assert site.codec == "int8"
    assert [index for index, exponent in enumerate(site.feature_exponents) if exponent] == [1]
    ours, theirs = torch.from_numpy(acts)[:, 1:].double(), in_place(store, MLP)[:, 1:]
    small = [0, 2, 3, 4, 5]
    assert (ours - theirs)[..., small].square().sum() < 1e-3 * ours[..., small].square().sum()
    assert import_safetensors({MLP: folder}, tmp_path / "x.zarr", codec="int8").fingerprint == store.fingerprint


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("something was unpickled",))


def test_npy_files_that_do_not_fit_are_refused(tmp_path):
    files = saved(tmp_path, a=values_of(MLP), b=values_of(MLP)[:-1], whole=token_ids(), few=token_ids()[:, 1:])
    out = tmp_path / "x.zarr"
    with pytest.raises(ConfigError, match="there is no file"):
        import_npy({MLP: tmp_path / "c.npy"}, out)
    with pytest.raises(ConfigError, match=r"other has the shape \(20, 7, 3\), but mine has \(21, 7, 3\)"):
        import_npy({"mine": files["a"], "other": files["b"]}, out)
    with pytest.raises(ConfigError, match="int64 of shape"):
        import_npy({MLP: files["whole"]}, out)
    with pytest.raises(ConfigError, match=r"tokens has the shape \(21, 6\)"):
        import_npy({MLP: files["a"]}, out, tokens=files["few"])
    with pytest.raises(ConfigError, match="holds values that are not token ids"):
        import_npy({MLP: files["a"]}, out, tokens=token_ids().astype(float))
    with pytest.raises(ConfigError, match="at least one hook"):
        import_npy({}, out)
    np.save(tmp_path / "bomb.npy", np.array([Bomb()], object), allow_pickle=True)
    with pytest.raises(ConfigError, match=r"not a \.npy file of plain numbers"):
        import_npy({MLP: tmp_path / "bomb.npy"}, out)
    (tmp_path / "text.npy").write_text("1 2 3")
    with pytest.raises(ConfigError, match=r"not a \.npy file of plain numbers"):
        import_npy({MLP: tmp_path / "text.npy"}, out)
    assert not out.exists()


# --- safetensors -----------------------------------------------------------------------------------------------------


def chunked(folder: Path, acts: torch.Tensor, ids: Any, mask: Any, cuts: list[int], **more: Any) -> Path:
    """Chunks of a hook as Llamascopium writes them; `cuts` are the first sequences of each."""
    folder.mkdir(parents=True)
    edges = [*cuts, len(acts)]
    for number, (start, stop) in enumerate(pairwise(edges)):
        tensors = {"activation": acts[start:stop], "tokens": torch.as_tensor(ids)[start:stop]}
        if mask is not None:
            tensors["mask"] = torch.as_tensor(mask)[start:stop]
            tensors["attention_mask"] = torch.ones_like(tensors["tokens"])
        tensors |= more
        # Numbers of different lengths: chunk-10 comes after chunk-9, not after chunk-1.
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / f"chunk-{number + 8}.safetensors"
        )
    return folder


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_safetensors_chunks_come_in_exactly_and_masked_positions_stay_out(tmp_path, dtype):
    mask = np.random.default_rng(2).random((Q, T)) < 0.7
    acts = {hook: torch.from_numpy(values_of(hook)).to(dtype) for hook in (RESID, MLP)}
    for hook, values in acts.items():
        chunked(tmp_path / "cache" / hook, values, token_ids(), mask, [0, 6, 7, 15])
    store = import_safetensors(tmp_path / "cache", tmp_path / "x.zarr", sequences_per_shard=4, skip_first=1)
    assert sorted(store.sites) == sorted(acts)
    assert store.spec.dtype == str(dtype).removeprefix("torch.")
    assert store.n_rows == mask[:, 1:].sum() < store.spec.n_rows
    there = torch.from_numpy(mask) & (torch.arange(T) > 0)
    for hook, values in acts.items():
        placed = in_place(store, hook)
        assert torch.equal(placed[there], values[there].double())
        assert placed[~there].isnan().all()
    assert np.array_equal(store.tokens(), token_ids())
    assert verify(store.objects) == []
    loader = Loader(store, [MLP], batch_rows=5, drop_last=False)
    assert sorted(row for batch in loader for row in batch.rows.tolist()) == store.row_ids().tolist()
    again = import_safetensors(
        {hook: tmp_path / "cache" / hook for hook in store.sites},
        tmp_path / "y.zarr",
        sequences_per_shard=4,
        skip_first=1,
    )
    assert {hook: again.stats(hook).mean.tolist() for hook in again.sites} == {
        hook: store.stats(hook).mean.tolist() for hook in store.sites
    }


def test_safetensors_of_single_rows_and_without_mask(tmp_path):
    rows = torch.from_numpy(values_of(MLP, shape=(50,))).bfloat16()
    folder = chunked(tmp_path / "rows", rows, token_ids((50,)), None, [0, 20, 40])
    store = import_safetensors({MLP: folder}, tmp_path / "x.zarr")
    assert store.n_rows == 50
    assert same(store, MLP, rows[:, None].double())
    assert np.array_equal(store.tokens()[:, 0], token_ids((50,)))


def test_a_shard_in_which_every_position_is_masked_has_no_rows(tmp_path):
    mask = np.ones((Q, T), int)
    mask[4:12] = 0
    folder = chunked(tmp_path / "hook", torch.from_numpy(values_of(MLP)), token_ids(), mask, [0, 9])
    store = import_safetensors({MLP: folder}, tmp_path / "x.zarr", sequences_per_shard=4)
    assert store.shard_n_rows.tolist() == [4 * T, 0, 0, 4 * T, 4 * T, T]
    assert verify(store.objects) == []
    assert in_place(store, MLP)[4:12].isnan().all()
    assert torch.equal(in_place(store, MLP)[12:], torch.from_numpy(values_of(MLP))[12:].double())
    assert sum(len(batch.rows) for batch in Loader(store, [MLP], batch_rows=8, drop_last=False)) == store.n_rows


def test_safetensors_that_do_not_fit_are_refused(tmp_path):
    acts, ids, mask, out = torch.from_numpy(values_of(MLP)), token_ids(), np.ones((Q, T), bool), tmp_path / "x.zarr"
    good = chunked(tmp_path / "good", acts, ids, mask, [0, 9])
    with pytest.raises(ConfigError, match="no folder with files"):
        import_safetensors(good, out)
    with pytest.raises(ConfigError, match=r"holds no files chunk-N\.safetensors"):
        import_safetensors({MLP: tmp_path / "nowhere"}, out)
    other = chunked(tmp_path / "other", acts, ids + 1, mask, [0, 9])
    with pytest.raises(ConfigError, match="differ in their tokens or masks"):
        import_safetensors({"a": good, "b": other}, out)
    masked = chunked(tmp_path / "masked", acts, ids, ~mask, [0, 9])
    with pytest.raises(ConfigError, match="differ in their tokens or masks"):
        import_safetensors({"a": good, "b": masked}, out)
    cut = chunked(tmp_path / "cut", acts, ids, mask, [0, 8])
    with pytest.raises(ConfigError, match=r"the 2 chunks of b are of .*but the 2 of a"):
        import_safetensors({"a": good, "b": cut}, out)
    (good / "chunk-9.safetensors").rename(good / "chunk-9")
    save_file({"activation": acts}, good / "chunk-9.safetensors")
    with pytest.raises(ConfigError, match="lacks tokens; it has activation"):
        import_safetensors({MLP: good}, out)
    save_file({"activation": acts, "tokens": torch.zeros(Q, T + 1)}, good / "chunk-9.safetensors")
    with pytest.raises(ConfigError, match=r"but tokens of shape \(21, 8\)"):
        import_safetensors({MLP: good}, out)
    save_file({"activation": acts.half(), "tokens": torch.as_tensor(ids)}, good / "chunk-9.safetensors")
    with pytest.raises(ConfigError, match=r"has torch\.float16 activations"):
        import_safetensors({MLP: good}, out)
    (good / "chunk-9.safetensors").write_bytes((good / "chunk-9").read_bytes()[:-10])
    with pytest.raises(ConfigError, match="cannot be read as a safetensors file"):
        import_safetensors({MLP: good}, out)
    assert not out.exists()


# --- the command line ------------------------------------------------------------------------------------------------


def test_the_command_line_imports_each_format(tmp_path, capsys):
    acts = values_of(MLP)
    cache = saelens_cache(tmp_path / "cache", {MLP: acts}, token_ids())
    files = saved(tmp_path, acts=acts, tokens=token_ids())
    chunked(tmp_path / "chunks" / MLP, torch.from_numpy(acts), token_ids(), None, [0, 9])
    asked = {
        "saelens": [str(cache)],
        "npy": [f"{MLP}={files['acts']}", "--tokens", str(files["tokens"])],
        "safetensors": [str(tmp_path / "chunks")],
    }
    for form, sources in asked.items():
        out = tmp_path / f"{form}.zarr"
        more = ["--dtype", "bfloat16", "--codec", "raw", "--sequences-per-shard", "6"]
        assert main(["import", "--format", form, *sources, "--out", str(out), *more, "--json"]) == 0
        shown = capsys.readouterr()
        assert json.loads(shown.out)["n_rows"] == Q * T
        events = [json.loads(line) for line in shown.err.splitlines() if line.startswith("{")]
        assert [(e["event"], e["done"]) for e in events if e["event"] == "done"] == [("done", 21)]
        store = open_store(out)
        assert same(store, MLP, torch.from_numpy(acts).bfloat16().double())
        assert np.array_equal(store.tokens(), token_ids())
        assert store.spec.sites[0].codec == "raw"
    one = [f"{MLP}={tmp_path / 'chunks' / MLP}"]
    assert main(["import", "--format", "safetensors", *one, "--out", str(tmp_path / "one.zarr")]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "saelens", "a", "b"], "takes one folder, not 2"),
        (["--format", "npy", "a.npy"], "given as HOOK=PATH"),
        (["--format", "npy", "h=a.npy", "h=b.npy"], "each hook once"),
        (["--format", "npy", "h=nowhere.npy"], "there is no file nowhere.npy"),
        (["--format", "saelens", "nowhere", "--tokens", "t.npy"], "--tokens goes with --format npy"),
        (["--format", "parquet", "x"], "not 'parquet'; see 'actcache import --help'"),
    ],
)
def test_imports_that_make_no_sense_are_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["import", *arguments, "--out", "x.zarr"]) == 1
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.out == ""
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_exports_for_saelens(tmp_path, capsys):
    store, blocks, _acts = write_four_shards(tmp_path / "x.zarr")
    wanted = ["export", store.path, "--format", "saelens", "--out", str(tmp_path / "cache"), "--sites", "*mlp*"]
    assert main(wanted) == 0
    assert "context_size=12" in capsys.readouterr().out
    assert main([*wanted, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["n_sequences"] == blocks.n_sequences
    assert datasets.load_from_disk(str(tmp_path / "cache")).column_names == [MLP, "token_ids"]
    assert main([*wanted, "--rows", "0:4"]) == 1
    assert "only --sites goes with it" in capsys.readouterr().err
