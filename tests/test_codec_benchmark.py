"""The benchmark of the codecs runs, at a size at which no speed means anything, and its sizes keep their promises."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from actcache.store.codecs.presets import offered

pytestmark = pytest.mark.exhaustive

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))


@pytest.fixture(scope="module")
def sites():
    return {found.kind: found for found in __import__("activations").stories_4l(n_tokens=16384)}


@pytest.mark.parametrize("kind", ["residual stream", "MLP input", "ReLU"])
def test_presets_keep_their_promises_on_real_activations(kind, sites):
    found = {figure.name: figure for figure in __import__("chunk_codecs").figures(sites[kind], n_chunks=4, rounds=1)}
    assert set(found) > {preset.name for preset in offered()}
    assert all(figure.row().count("|") == 7 for figure in found.values())
    assert found["lossless"].of_raw <= 0.75
    assert found["lossless"].of_raw < found["blosc lz4-5, bit shuffle"].of_raw
    if kind == "ReLU":
        assert found["sparse"].of_raw < min(0.30, found["lossless"].of_raw)
    assert found["int8"].of_raw <= 0.51
    assert found["int8"].unexplained[0] <= 3e-4
    assert {name for name, figure in found.items() if figure.unexplained} == {
        n for n in found if "int8" in n or "fp8" in n
    }


def test_a_model_that_is_not_here_is_said(tmp_path):
    with pytest.raises(__import__("activations").MissingModelError, match="stories260K"):
        __import__("activations").stories260k(1000, models=tmp_path)
