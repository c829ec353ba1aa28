"""Audits: sound stores pass, and whatever goes wrong between the model and the store is found, before it is sealed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_models import SMALL, open_small, small_module
from torch import Tensor, nn

import actcache as ac
from actcache.auditing import small_audit_size
from actcache.auditing.draw import draw_cheaply, draw_sequences, stored_sequences
from actcache.cli import main
from actcache.errors import ActcacheError, AuditError, ConfigError, SiteError, StoreIncompleteError, StoreMismatchError
from actcache.lm import LanguageModel
from actcache.lm.inputs import Inputs
from actcache.spec import TokenBlocks
from actcache.store.codecs import int8

SITES = ["blocks.*.mlp.hook_in", "blocks.*.hook_mlp_out"]
LENGTH = SMALL.n_ctx


def blocks_of(n_sequences: int = 24, *, unequal: bool = False, seed: int = 0) -> TokenBlocks:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, LENGTH + 1, n_sequences) if unequal else np.full(n_sequences, LENGTH)
    documents = [rng.integers(0, SMALL.d_vocab, n).tolist() for n in lengths]
    return ac.token_blocks(documents, None, length=LENGTH, packing="documents")


def extracted(lm: LanguageModel, path: Path, patterns: Any = SITES, **options: Any) -> ac.Store:
    blocks = options.pop("blocks", None) or blocks_of()
    options = {"dtype": "float32", "sequences_per_shard": 8, "batch_sequences": 4, **options}
    return ac.extract(lm, blocks, patterns, path / "acts.zarr", **options)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("unequal", [False, True], ids=["equal lengths", "unequal lengths"])
def test_a_store_as_it_should_be_is_sound_at_every_plain_site(tmp_path: Path, dtype: Any, unequal: bool) -> None:
    lm = open_small()
    names = [s.site.name for s in lm.resolve(["*"], length=LENGTH) if not s.instrumented]
    codec = {"blocks.1.*": "int8", "*": "lossless"}
    store = extracted(lm, tmp_path, names, dtype=dtype, codec=codec, blocks=blocks_of(unequal=unequal))
    found = ac.audit(store, lm)
    assert found.sound, str(found)
    assert [site.site for site in found.sites] == store.sites
    assert {site.n_rows for site in found.sites} == {found.sites[0].n_rows}
    table = store.row_table()["sequence"]
    assert found.sites[0].n_rows == int(np.isin(table, found.sequences).sum()), "not all rows of the sequences drawn"
    assert all(0 < site.tolerance < 0.01 for site in found.sites)


def test_the_reference_and_the_worst_row_are_said(tmp_path: Path) -> None:
    lm = open_small()
    store = extracted(lm, tmp_path, ["blocks.1.hook_mlp_out"], dtype="bfloat16")
    site = ac.audit(store, lm, 3).sites[0]
    assert site.reference == "plain model, module blocks.1.mlp, output"
    assert site.worst is not None
    sequence, position = site.worst["sequence"], site.worst["position"]
    assert store.tokens()[sequence, position] == site.worst["token"]
    row = np.flatnonzero((store.row_table()["sequence"] == sequence) & (store.row_table()["position"] == position))
    values: list[Tensor] = []
    handle = lm.module.get_submodule("blocks.1.mlp").register_forward_hook(lambda m, a, out: values.append(out))
    with torch.no_grad():
        lm.module(torch.from_numpy(store.tokens()[sequence].astype(np.int64))[None])
    handle.remove()
    model = values[0][0, position].double()
    error = (store.read("blocks.1.hook_mlp_out", row)[0].double() - model).norm() / model.norm()
    assert float(error) == pytest.approx(site.max_relative_error, rel=1e-6)


def test_attention_patterns_are_held_against_the_instrumented_model(tmp_path: Path) -> None:
    lm = open_small()
    store = extracted(lm, tmp_path, ["blocks.*.attn.hook_pattern"], blocks=blocks_of(unequal=True))
    found = ac.audit(store, lm)
    assert found.sound, str(found)
    assert found.sites[0].reference.startswith(
        "instrumented model, hook blocks.0.attn.hook_pattern of transformer-lens"
    )


def test_an_instrumented_model_that_is_another_function_proves_nothing(tmp_path: Path) -> None:
    lm = open_small()
    store = extracted(lm, tmp_path, ["blocks.1.attn.hook_pattern"])
    with torch.no_grad():
        lm.open_instrumented().blocks[2].mlp.out.weight.add_(0.3)
    found = ac.audit(store, lm)
    assert not found.sound
    assert found.sites[0].reasons == ("the instrumented model is not the plain one: block 2 puts out something else",)


# What can go wrong between the model and the store: each is a capture path with a fault.

Capture = Callable[..., dict[str, Tensor]]


def token_before(capture: Capture) -> Capture:
    return lambda *args: {name: value.roll(1, dims=1) for name, value in capture(*args).items()}


def token_behind(capture: Capture) -> Capture:
    """What a `skip_first` that is applied twice does."""
    return lambda *args: {name: value.roll(-1, dims=1) for name, value in capture(*args).items()}


def row_before(capture: Capture) -> Capture:
    def shifted(*args: Any) -> dict[str, Tensor]:
        return {n: v.flatten(0, 1).roll(1, dims=0).view_as(v) for n, v in capture(*args).items()}

    return shifted


def another_sequence(capture: Capture) -> Capture:
    return lambda *args: {name: value.roll(1, dims=0) for name, value in capture(*args).items()}


def batch_before(capture: Capture) -> Capture:
    kept: list[dict[str, Tensor]] = []

    def late(*args: Any) -> dict[str, Tensor]:
        kept.append({name: value.clone() for name, value in capture(*args).items()})
        return kept[-2] if len(kept) > 1 and kept[-2].keys() == kept[-1].keys() else kept[-1]

    return late


def layer_before(capture: Capture) -> Capture:
    def other(*args: Any) -> dict[str, Tensor]:
        values = capture(*args)
        return {name: values.get(name.replace("blocks.2", "blocks.1"), value) for name, value in values.items()}

    return other


def scaled(capture: Capture) -> Capture:
    return lambda *args: {name: value * 1.02 for name, value in capture(*args).items()}


def rounded(capture: Capture) -> Capture:
    return lambda *args: {name: value.half().float() * (1 + 2e-3) for name, value in capture(*args).items()}


FAULTS = {
    token_before: "the rows are those of the token before their own",
    token_behind: "the rows are those of the token behind their own",
    row_before: "the rows are those of the token before their own",
    another_sequence: None,
    batch_before: None,
    layer_before: "the values are those of blocks.1",
    scaled: "the values are 1.02 times the model's",
    rounded: None,
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_faulty_capture_path_is_found_before_the_store_is_sealed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Callable[[Capture], Capture]
) -> None:
    lm = open_small()
    with monkeypatch.context() as patch:
        patch.setattr(lm, "capture", fault(lm.capture))
        with pytest.raises(AuditError, match=r"nothing was deleted.*--no-audit") as caught:
            extracted(lm, tmp_path)
    reason = FAULTS[fault]
    assert reason is None or reason in str(caught.value)
    store = ac.open_store(tmp_path / "acts.zarr")
    assert not store.sealed
    assert store.n_rows == store.spec.n_rows, "something was deleted"
    (entry,) = store.root.provenance["audits"]
    assert entry["of"] == "extract"
    assert entry["sound"] is False
    assert not ac.audit(store, lm).sound
    # Only without the audit it is sealed, and it says what was found.
    with pytest.raises(AuditError):
        extracted(lm, tmp_path)
    store = extracted(lm, tmp_path, audit=False)
    assert store.sealed
    assert [entry["sound"] for entry in store.root.provenance["audits"]] == [False]


def test_an_int8_site_with_a_wrong_exponent_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = open_small()
    quantise = int8.quantise_rows

    def wrong(values: Any, logical: str, q: Any, scale: Any, powers: Any = None) -> None:
        powers = np.ones(values.shape[1], np.float32) if powers is None else powers.copy()
        powers[3] *= 2
        quantise(values, logical, q, scale, powers)

    monkeypatch.setattr(int8, "quantise_rows", wrong)
    with pytest.raises(AuditError, match="a few features carry the difference"):
        extracted(lm, tmp_path, ["blocks.1.hook_mlp_out"], codec="int8")


def test_values_that_overflow_the_dtype_are_found(tmp_path: Path) -> None:
    module = small_module()
    with torch.no_grad():
        module.blocks[0].mlp.out.weight.mul_(1e9)
    with pytest.warns(UserWarning, match="infinite"), pytest.raises(AuditError, match="too large for float16"):
        extracted(ac.load_lm(module), tmp_path, ["blocks.0.hook_mlp_out"], dtype="float16")


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"autocast": "bfloat16"}], ids=str)
def test_a_model_that_rounds_coarsely_is_allowed_what_it_rounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, str]
) -> None:
    lm = ac.load_lm(small_module(), **options)
    store = extracted(lm, tmp_path, dtype="bfloat16", blocks=blocks_of(unequal=True))
    found = ac.audit(store, lm)
    assert found.sound, str(found)
    assert all(2.0**-6 < site.tolerance < 0.1 for site in found.sites)
    monkeypatch.setattr(lm, "capture", layer_before(lm.capture))
    with pytest.raises(AuditError):
        extracted(lm, tmp_path / "wrong", dtype="bfloat16")


def test_rows_that_are_not_finite_in_the_model_either_are_as_they_should_be(tmp_path: Path) -> None:
    module = small_module()
    with torch.no_grad():
        module.pos_embed.weight[5] = torch.nan
    lm = ac.load_lm(module)
    with pytest.warns(UserWarning, match="NaN"):
        store = extracted(lm, tmp_path, ["hook_pos_embed", "blocks.0.hook_resid_pre"], codec={"hook_p*": "int8"})
    assert ac.audit(store, lm).sound


class Shifting(nn.Module):
    """Makes other tokens out of its input and reads those, as the decoders of some models do."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.first, self.second = nn.Embedding(40, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, ids: Tensor) -> Tensor:
        encoded = self.first(self.embed(ids))
        decoded: Tensor = self.second(self.embed(ids.roll(1, dims=1)))
        return decoded + 0 * encoded


def test_rows_of_a_model_that_reads_other_tokens_than_the_store_says_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(Inputs, "check_not_moved", lambda *_: None)  # which refuses such a model
    lm = ac.load_lm(Shifting())
    store = extracted(lm, tmp_path, ["first:out", "second:out"], audit=False)
    encoder, decoder = ac.audit(store, lm).sites
    assert encoder.sound
    assert not decoder.sound
    assert "makes other tokens out of the sequence" in decoder.reasons[0]


# Which sequences, which model


def test_sequences_are_drawn_over_all_shards_and_the_same_again(tmp_path: Path) -> None:
    store = extracted(open_small(), tmp_path, blocks=blocks_of(40, unequal=True), sequences_per_shard=5)
    drawn = draw_sequences(store, 8, 0)
    assert [entry.shard for entry in drawn] == list(range(8))
    assert drawn == draw_sequences(store, 8, 0) != draw_sequences(store, 8, 1)
    everything = draw_sequences(store, 100, 0)
    assert sorted(s for entry in everything for s in entry.sequences) == list(range(40))
    assert all(20 <= s < 30 for entry in draw_sequences(store, 4, 0, range(20, 30)) for s in entry.sequences)
    lengths = blocks_of(40, unequal=True).lengths(range(40))
    for entry in draw_sequences(store, 24, 0):
        assert lengths[entry.sequences].min() == lengths[list(store.spec.shard_sequences(entry.shard))].min()


def test_a_small_audit_reads_some_shards_whole_and_a_little_of_every_other(tmp_path: Path) -> None:
    store = extracted(open_small(), tmp_path, blocks=blocks_of(40), sequences_per_shard=5, rows_per_chunk=11)
    drawn = draw_cheaply(store, 4, None, one_shard_of=4, most_shards=32)
    assert sorted(entry.shard for entry in drawn) == list(range(8))
    assert [len(entry.sequences) for entry in drawn if entry.chunk is None] == [2, 2]
    for entry in drawn:
        (first, *_) = list(stored_sequences(store, entry))
        assert 0 < len(first.rows) <= 11
        assert (entry.chunk is None) == (len(first.rows) == 11)


def test_a_small_audit_is_a_hundredth_of_the_run() -> None:
    assert [small_audit_size(n) for n in (1, 3, 100, 3000, 10**6)] == [1, 3, 4, 10, 32]


def test_a_store_of_chosen_rows_is_audited_on_those(tmp_path: Path) -> None:
    lm = open_small()
    extracted(lm, tmp_path)
    rows = ac.RowFilter(positions=slice(2, 5))
    part = ac.export(ac.open_store(tmp_path / "acts.zarr"), tmp_path / "part.zarr", rows=rows)
    found = ac.audit(part, lm, 50)
    assert found.sound
    assert found.sites[0].n_rows == part.n_rows


def test_another_model_is_refused(tmp_path: Path) -> None:
    store = extracted(open_small(), tmp_path)
    other = small_module()
    with torch.no_grad():
        other.embed.weight.add_(1)
    with pytest.raises(StoreMismatchError, match="weights: the store has"):
        ac.audit(store, ac.load_lm(other))
    with pytest.raises(StoreMismatchError, match="dtype: the store has 'float32'"):
        ac.audit(store, ac.load_lm(small_module(), dtype="bfloat16"))
    with pytest.raises(StoreMismatchError, match="autocast: the store has None"):
        ac.audit(store, ac.load_lm(small_module(), autocast="bfloat16"))


def test_what_cannot_be_audited_is_said(tmp_path: Path) -> None:
    lm = open_small()
    store = extracted(lm, tmp_path)
    with pytest.raises(SiteError, match="no site matches"):
        ac.audit(store, lm, sites="blocks.7.*")
    with pytest.raises(ConfigError, match="n_sequences"):
        ac.audit(store, lm, 0)
    with lm.splice("blocks.0.hook_mlp_out", "blocks.0.hook_mlp_out", lambda x: x), pytest.raises(ConfigError):
        ac.audit(store, lm)
    left_open = extracted(lm, tmp_path / "open", part=(1, 2))
    assert not left_open.sealed
    assert ac.audit(left_open, lm).sound, "committed shards can be looked at"
    with pytest.raises(StoreIncompleteError, match="no rows"):
        ac.audit(ac.export(store, tmp_path / "none.zarr", rows=np.zeros(store.spec.n_rows, bool)), lm)


@pytest.mark.parametrize(
    "wrong",
    [
        *({"n_sequences": value} for value in (None, "8", 1.5, True, -1, [])),
        *({"seed": value} for value in (None, "0", -1, 0.5)),
        *({"lm": value} for value in (None, "stories-4l", 5)),
        *({"sites": value} for value in (None, 5, [5])),
        *({"progress": value} for value in (5, "bar")),
        *({"store": value} for value in (5, "", "nowhere.zarr")),
    ],
    ids=str,
)
def test_wrong_arguments_end_in_one_sentence(tmp_path: Path, wrong: dict[str, Any]) -> None:
    lm = open_small()
    arguments = {"store": extracted(lm, tmp_path, audit=False), "lm": lm, **wrong}
    with pytest.raises(ActcacheError):
        ac.audit(**arguments)


def test_more_sequences_than_there_are_are_all_of_them(tmp_path: Path) -> None:
    lm = open_small()
    assert len(ac.audit(extracted(lm, tmp_path, audit=False), lm, 10**30).sequences) == 24


# Growing, sharing


def test_what_is_added_is_audited_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, path = open_small(), tmp_path / "acts.zarr"
    extracted(lm, tmp_path)
    before = ac.open_store(path)
    with monkeypatch.context() as patch:
        patch.setattr(lm, "capture", token_before(lm.capture))
        with pytest.raises(AuditError):
            ac.add_sites(lm, path, ["blocks.0.attn.hook_z"])
        assert ac.open_store(path).fingerprint == before.fingerprint, "the store is what it was"
        with pytest.raises(AuditError):
            ac.extend(lm, path, blocks_of(16, seed=1))
        assert ac.open_store(path).fingerprint == before.fingerprint
    ac.add_sites(lm, path, ["blocks.0.attn.hook_z"], audit=False)
    assert not ac.audit(path, lm).sound
    ac.delete_sites(path, ["blocks.0.attn.hook_z"])
    assert ac.audit(path, lm).sound


def test_each_step_of_a_store_leaves_its_audit_in_the_provenance(tmp_path: Path) -> None:
    lm, path = open_small(), tmp_path / "acts.zarr"
    extracted(lm, tmp_path)
    ac.extend(lm, path, blocks_of(12, seed=1))
    store = ac.add_sites(lm, path, ["blocks.0.attn.hook_z"])
    audits = store.root.provenance["audits"]
    assert [(entry["of"], entry["sound"]) for entry in audits] == [
        ("extract", True),
        ("extend", True),
        ("add_sites", True),
    ]
    assert list(audits[-1]["sites"]) == ["blocks.0.attn.hook_z"]
    assert len(audits[0]["sites"]) == 6


def test_of_several_writers_the_one_that_seals_audits(tmp_path: Path) -> None:
    lm = open_small()
    first = extracted(lm, tmp_path, part=(1, 2))
    assert "audits" not in first.root.provenance
    store = extracted(lm, tmp_path, part=(2, 2))
    assert store.sealed
    assert [entry["sound"] for entry in store.root.provenance["audits"]] == [True]


# The command line


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(arguments)
    out, err = capsys.readouterr()
    return code, out, err


def test_the_verb_says_sound_or_not_by_its_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "acts.zarr")
    make = ("extract", "--sites", "blocks.2.hook_mlp_out", "--length", "16", "--count", "32", "--out", path)
    code, out, err = run(capsys, *make)
    assert code == 0, err
    assert "sound after extract" in out
    code, out, err = run(capsys, "audit", path, "--sequences", "5")
    assert code == 0, err
    assert "is sound" in out
    assert "plain model, module blocks.2.mlp, output" in out
    code, out, _ = run(capsys, "audit", path, "--json")
    assert code == 0
    found = json.loads(out)
    assert found["sound"] is True
    assert found["sites"][0]["n_rows"] == 8 * 15

    capture = LanguageModel.capture
    with monkeypatch.context() as patch:
        patch.setattr(LanguageModel, "capture", lambda *args: token_before(lambda *a: capture(*a))(*args))
        other = [*make[:-1], str(tmp_path / "wrong.zarr")]
        code, out, err = run(capsys, *other)
        assert code == 2
        assert "blocks.2.hook_mlp_out" in err
        assert "token before" in err
        assert not ac.open_store(other[-1]).sealed
    code, out, err = run(capsys, *other, "--no-audit")
    assert code == 0, err
    assert "FAILED after extract" in " ".join(out.split())
    code, out, _ = run(capsys, "audit", other[-1])
    assert code == 2
    assert "NOT what the model computes" in out


def test_a_store_of_another_model_asks_for_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = nn.Sequential(nn.Embedding(40, 8), nn.Linear(8, 8))
    extracted(ac.load_lm(module), tmp_path, ["1:out"])
    code, _, err = run(capsys, "audit", str(tmp_path / "acts.zarr"))
    assert code == 1
    assert "--model" in err
