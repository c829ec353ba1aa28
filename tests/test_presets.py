"""Presets: help, docs and `auto` go by the objects; what is no longer offered can still be read."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import random_bits, random_blocks, spec_of, write_shards
from lm_models import open_small

import actcache as ac
from actcache.cli import build_app
from actcache.errors import ConfigError, StoreVersionError
from actcache.source import token_blocks
from actcache.store import PRESETS, export, open_store, verify
from actcache.store.codecs.fit import AUTO, choose_codec
from actcache.store.codecs.presets import offered

DOCS = Path(__file__).parents[1] / "docs"
OFFERED = [preset.name for preset in offered()]


def test_the_tables_of_the_docs_have_the_presets_that_are_offered():
    tables = (DOCS / "codecs.md").read_text().split("\n### ")[1:]
    assert len(tables) > 5
    for table in tables:
        assert sorted(re.findall(r"^\| \*\*(\w+)\*\*", table, re.MULTILINE)) == sorted(OFFERED)
    listed = re.findall(r"^\| `(\w+)` \|", (DOCS / "format.md").read_text(), re.MULTILINE)
    assert listed == OFFERED


def test_help_lists_the_presets_that_are_offered():
    app, said = build_app(), {}
    for verb in ("extract", "add-sites", "export", "import"):
        arguments = app[verb].assemble_argument_collection(parse_docstring=True)
        (said[verb],) = (argument.parameter.help for argument in arguments if argument.name == "--codec")
    for help_text in said.values():
        assert f"({', '.join(OFFERED)})" in help_text
        assert f"`{AUTO}`" in help_text
    documented = ac.extract.__doc__.partition("codec:")[2].partition("dtype:")[0]
    assert set(re.findall(r"`(\w+)`", documented)) == {*OFFERED, AUTO}


def test_auto_chooses_among_those_that_are_lossless(monkeypatch):
    chunk = random_bits(spec_of(random_blocks(40, 13)))["blocks.0.hook_mlp_out"]
    codec, reason = choose_codec([chunk])
    assert (codec, "sparse" in reason) == ("lossless", True)
    better = replace(PRESETS["lossless"], name="better", codec=PRESETS["lossless"].codec)
    monkeypatch.setitem(PRESETS, "sparse", replace(PRESETS["sparse"], lossless=False))
    monkeypatch.setitem(PRESETS, "better", better)
    codec, reason = choose_codec([chunk])
    assert codec == "lossless"
    assert "better" in reason
    assert "sparse" not in reason


def test_a_store_of_a_preset_that_is_no_longer_offered_lives_on(tmp_path):
    blocks = random_blocks(29, 13)
    spec = spec_of(blocks, "fast")
    bits = random_bits(spec)
    store = write_shards(tmp_path / "s.zarr", spec, blocks, bits, shards=[0])
    assert not store.sealed
    store = write_shards(tmp_path / "s.zarr", spec, blocks, bits)
    assert verify(store.path) == []
    copy = export(store, tmp_path / "copy.zarr")
    assert {site.codec for site in copy.spec.sites} == {"fast"}
    site = store.sites[0]
    assert torch.equal(copy.read(site, slice(None)), store.read(site, slice(None)))
    with pytest.raises(ConfigError, match="'fast' is no longer offered; there are raw, lossless, sparse, int8, or"):
        export(store, tmp_path / "more.zarr", codec="fast")


def test_an_extraction_with_a_preset_that_is_no_longer_offered_is_continued(tmp_path, monkeypatch):
    lm, path = open_small(), tmp_path / "s.zarr"
    blocks = token_blocks([[*range(1, 25)]] * 8, None, length=12)
    ask = {"codec": "fast", "sequences_per_shard": 4, "audit": False}
    with pytest.raises(ConfigError, match="no longer offered"):
        ac.extract(lm, blocks, ["blocks.1.hook_mlp_out"], path, **ask)
    monkeypatch.setitem(PRESETS, "fast", replace(PRESETS["fast"], offered=True))  # as in an earlier version
    ac.extract(lm, blocks, ["blocks.1.hook_mlp_out"], path, part=(1, 2), **ask)
    monkeypatch.undo()
    assert not open_store(path).sealed
    assert ac.extract(lm, blocks, ["blocks.1.hook_mlp_out"], path, **ask).sealed


@pytest.mark.parametrize("step", ["numcodecs.pcodec", "numcodecs.bitround"])
def test_a_store_with_a_step_that_is_not_known_here_says_which(tmp_path, step):
    blocks = random_blocks(29, 13)
    spec = spec_of(blocks, "raw")
    store = write_shards(tmp_path / "s.zarr", spec, blocks, random_bits(spec))
    root = Path(store.path) / "zarr.json"
    found = json.loads(root.read_text())
    found["attributes"]["actcache"]["spec"]["sites"][0]["codec"] = json.dumps([{"name": step, "configuration": {}}])
    root.write_text(json.dumps(found))
    with pytest.raises(StoreVersionError, match=rf"cannot decode: codec '{step}' cannot be used here; there are blosc"):
        open_store(store.path)
