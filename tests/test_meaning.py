"""What the name of a site meant stands in the store, and nothing is added to a store under another meaning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from lm_models import LLAMA_LIKE, random_ids, random_model, small_module
from torch import nn

import actcache as ac
from actcache.errors import StateError, StoreMismatchError
from actcache.extraction import begin, fill
from actcache.lm import LanguageModel, load_lm, names
from actcache.sparse.runs import Pair, evaluate_run, train_run
from actcache.spec import Meaning, Site, TokenBlocks
from actcache.store_options import StoreOptions

OUT, PATTERN = "blocks.1.hook_mlp_out", "blocks.0.attn.hook_pattern"
SETTINGS: dict[str, Any] = {"sequences_per_shard": 4, "skip_first": 0}


@pytest.fixture
def blocks() -> TokenBlocks:
    return ac.token_blocks(random_ids(12, 6, 40).numpy(), None, length=6)


@pytest.fixture
def lm() -> LanguageModel:
    return load_lm(small_module())


def moved(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> LanguageModel:
    """The same model, in which a name stands for something else: as under another version of transformer-lens."""
    inner = names.SiteNames.place

    def place(self: Any, name: str) -> Any:
        found = inner(self, name)
        if name == OUT:
            other = inner(self, "blocks.1.hook_attn_out")
            return replace(other, site=replace(found.site, meaning=other.site.meaning))
        return found

    monkeypatch.setattr(names.SiteNames, "place", place)
    return lm


def test_meanings_of_every_kind_of_name(lm: LanguageModel) -> None:
    from importlib.metadata import version

    tl = version("transformer-lens")
    meaning = {s.site.name: s.site.meaning for s in lm.resolve(["blocks.1.*", "hook_embed"], length=6)}
    assert meaning["hook_embed"] == Meaning(module="embed")
    assert meaning["blocks.1.hook_resid_pre"] == Meaning(module="blocks.1", side="in")
    assert meaning["blocks.1.attn.hook_pattern"] == Meaning(module="blocks.1.attn.hook_pattern", transformer_lens=tl)
    assert None not in meaning.values()
    bridge = load_lm(lm.open_instrumented())
    # An alias means what the HookPoint's own name means.
    assert [s.site.meaning for s in bridge.resolve(["blocks.1.hook_resid_post", "blocks.1.hook_out"])] == 2 * [
        Meaning(module="blocks.1.hook_out", transformer_lens=tl)
    ]
    llama = load_lm(random_model("llama", **LLAMA_LIKE))
    assert str(llama.resolve(["blocks.1.hook_mlp_out"])[0].site.meaning) == "module model.layers.1.mlp, output"
    module = load_lm(nn.Sequential(nn.Embedding(40, 4), nn.Linear(4, 40)))
    assert [str(s.site.meaning) for s in module.resolve([":out", "1:in"])] == [
        "module 1, input",
        "the whole model, output",
    ]


def interrupted(lm: LanguageModel, blocks: TokenBlocks, path: Path) -> None:
    ac.extract(lm, blocks, [OUT], path, part=(1, 2), **SETTINGS)


GO_ON: dict[str, Callable[[LanguageModel, TokenBlocks, Path], Any]] = {
    "extract": lambda lm, blocks, path: ac.extract(lm, blocks, [OUT], path, **SETTINGS),
    "part": lambda lm, blocks, path: ac.extract(lm, blocks, [OUT], path, part=(2, 2), **SETTINGS),
    "auto codec": lambda lm, blocks, path: ac.extract(lm, blocks, [OUT], path, codec="auto", **SETTINGS),
    "begin": lambda lm, blocks, path: begin(lm, blocks, [OUT], path, StoreOptions(**SETTINGS)),
    "fill": lambda lm, blocks, path: fill(lm, path, [1]),
}
GROW: dict[str, Callable[[LanguageModel, TokenBlocks, Path], Any]] = {
    "extend": lambda lm, blocks, path: ac.extend(lm, path, blocks),
    "add_sites": lambda lm, blocks, path: ac.add_sites(lm, path, ["hook_embed"]),
}


@pytest.mark.parametrize("way", [*GO_ON, *GROW])
def test_a_store_is_not_continued_under_another_meaning(
    way: str, lm: LanguageModel, blocks: TokenBlocks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.zarr"
    if way in GO_ON:
        codec = {"codec": "auto"} if way == "auto codec" else {}
        ac.extract(lm, blocks, [OUT], path, part=(1, 2), **SETTINGS, **codec)
    else:
        ac.extract(lm, blocks, [OUT], path, **SETTINGS)
    before = {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}
    with pytest.raises(StoreMismatchError) as caught:
        (GO_ON | GROW)[way](moved(lm, monkeypatch), blocks, path)
    assert "module blocks.1.mlp, output" in str(caught.value)
    assert "module blocks.1.attn, output" in str(caught.value)
    assert {p: p.read_bytes() for p in path.rglob("*") if p.is_file()} == before


def interrupted_early(lm: LanguageModel, blocks: TokenBlocks, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store as an early version would have begun it."""
    resolve = lm.resolve

    def saying_nothing(*args: Any, **options: Any) -> Any:
        return [replace(found, site=replace(found.site, meaning=None)) for found in resolve(*args, **options)]

    with monkeypatch.context() as patch:
        patch.setattr(lm, "resolve", saying_nothing)
        interrupted(lm, blocks, path)


@pytest.mark.parametrize("way", [*GO_ON][:2])
def test_a_store_that_does_not_say_is_continued_with_a_warning(
    way: str, lm: LanguageModel, blocks: TokenBlocks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.zarr"
    interrupted_early(lm, blocks, path, monkeypatch)
    with pytest.warns(UserWarning, match=r"does not say what blocks.1.hook_mlp_out meant"):
        store = GO_ON[way](lm, blocks, path)
    assert store.sealed
    assert store.spec.sites[0].meaning is None
    assert "meaning" not in store.spec.to_dict()["sites"][0]


def test_sites_added_to_a_store_that_does_not_say_do_say(
    lm: LanguageModel, blocks: TokenBlocks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.zarr"
    interrupted_early(lm, blocks, path, monkeypatch)
    with pytest.warns(UserWarning, match="does not say"):
        ac.extract(lm, blocks, [OUT], path, **SETTINGS)
    with pytest.warns(UserWarning, match="does not say"):
        store = ac.add_sites(lm, path, ["hook_embed"])
    assert [site.meaning for site in store.spec.sites] == [None, Meaning(module="embed")]
    with pytest.warns(UserWarning, match="does not say"):
        assert ac.extend(lm, path, blocks).sealed
    assert ac.verify(path) == []


def test_an_abandoned_site_of_another_meaning_is_made_again(
    lm: LanguageModel, blocks: TokenBlocks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.zarr"
    ac.extract(lm, blocks, ["hook_embed"], path, **SETTINGS)

    class StoppedError(Exception):
        pass

    def stop(status: Any) -> None:
        if status.n_sequences_here > 8:
            raise StoppedError

    with monkeypatch.context() as patch, pytest.raises(StoppedError):
        ac.add_sites(moved(lm, patch), path, [OUT], watch=stop)
    store = ac.add_sites(lm, path, [OUT])
    whole = ac.extract(lm, blocks, ["hook_embed", OUT], tmp_path / "b.zarr", **SETTINGS)
    assert store.fingerprint == whole.fingerprint
    assert ac.verify(path) == []


def test_a_run_is_not_evaluated_under_another_meaning(
    lm: LanguageModel, blocks: TokenBlocks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ac.extract(lm, blocks, [OUT], tmp_path / "a.zarr", **SETTINGS)
    run, config = tmp_path / "run", ac.TrainConfig(l1=1.0, n_steps=2, warmup_steps=1, record_every=1)
    train_run(run, store, Pair(site_in=OUT, site_out=OUT), config, n_latents=8, batch_rows=16)
    with pytest.raises(StateError, match=r"when that was module blocks.1.mlp, output.*it is module blocks.1.attn"):
        evaluate_run(run, moved(lm, monkeypatch), blocks, on_stage=lambda *_: lambda *_: None)


def test_a_site_survives_its_json() -> None:
    site = Site(name="a:out@2", shape=(3,), meaning=Meaning(module="a", call=2))
    assert Site.from_dict(site.to_dict()) == site
