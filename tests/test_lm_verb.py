"""`actcache sites` says what can be cached of a model, and what it costs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from lm_models import LLAMA_LIKE, random_model

from actcache.cli import main


def test_sites_of_a_model_with_shapes_and_bytes(llama_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(llama_folder)
    patterns = ["blocks.1.attn.hook_pattern", "blocks.1.attn.hook_k", "blocks.1.hook_resid_post"]
    assert main(["sites", folder, *patterns, "--length", "100"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[:3]] == [
        ["blocks.1.attn.hook_k", "4", "x", "8", "64", "B/token"],
        ["blocks.1.attn.hook_pattern", "8", "x", "100", "1,600", "B/token", "instrumented"],
        ["blocks.1.hook_resid_post", "64", "128", "B/token"],
    ]
    assert lines[3].startswith("instrumented: ")
    assert main(["sites", folder, *patterns, "--length", "100", "--store-dtype", "float32", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"] == "tiny-llama"
    assert found["sites"][1] == {
        "name": patterns[0],
        "shape": [8, 100],
        "bytes_per_token": 3200,
        "instrumented": True,
    }


def test_without_patterns_every_name_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    from actcache.lm import load_lm

    assert main(["sites", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["sites"]
    assert [site["name"] for site in found] == load_lm("stories-4l").site_names
    assert next(s for s in found if s["name"] == "blocks.0.attn.hook_pattern")["shape"] == [8, 256]


def test_what_is_not_offered_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(tmp_path / "small")
    sizes = {"num_hidden_layers": 1, "ffn_dim": 20, "word_embed_proj_dim": 24}
    random_model("opt", **{**LLAMA_LIKE, **sizes}).save_pretrained(folder)
    assert main(["sites", folder]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "not offered: pos_embed.hook_in: has no axis of features (shape 2x11 for 2x11 tokens" in text
    assert main(["sites", folder, "model.decoder.layers.0:out", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [site["name"] for site in found["sites"]] == ["model.decoder.layers.0:out"]
    assert (found["not_offered"], found["disagreement"]) == ([], "")


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["blocks.1.*"], "the model comes first: actcache sites stories-4l 'blocks.1.*'"),
        (["stories-4l", "blocks.1.hook_mlp_uot"], "did you mean blocks.1.hook_mlp_out"),
        (["./no/model"], "no model at './no/model'"),
    ],
)
def test_what_cannot_be_listed(typed: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sites", *typed]) == 1
    assert message in " ".join(capsys.readouterr().err.split())
