"""What is stored of each architecture of transformers is what independent hooks see, document by document.

Documents of unequal length go through the model in batches when they are stored. Here each of them runs alone, and
plain torch hooks on the list of layers and on some modules give the values to compare with. The audit, which does the
same in its own way, has to agree at every site.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import CAUSAL, D_VOCAB, MASKED, small_model
from torch import Tensor, nn

import actcache as ac

pytestmark = pytest.mark.exhaustive

LENGTHS = (24, 9, 17, 12, 24, 5, 1, 23)
ALL = [
    *(pytest.param("AutoModelForCausalLM", *entry, id=name) for name, entry in CAUSAL.items()),
    *(pytest.param("AutoModelForMaskedLM", *entry, id=name) for name, entry in MASKED.items()),
]


def layers_of(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The model's layers: its outermost list of modules that run."""
    lists = [(path.count("."), path, m) for path, m in module.named_modules() if isinstance(m, nn.ModuleList)]
    _, path, found = min(lists, key=lambda entry: entry[0])
    return [(f"{path}.{name}", layer) for name, layer in found.named_children()]


def names_of(lm: Any, name: str) -> list[str]:
    """The name of a module's output; where it runs several times in one pass, one name a run."""
    return [known for known in lm.site_names if known.startswith(f"{name}@")] or [name]


def test_there_are_forty_architectures_and_more() -> None:
    assert len({model_type for model_type, _ in (*CAUSAL.values(), *MASKED.values())}) >= 40


@pytest.mark.parametrize(("auto", "model_type", "sizes"), ALL)
def test_what_is_stored_is_what_independent_hooks_see(
    tmp_path: Path, auto: str, model_type: str, sizes: dict[str, Any]
) -> None:
    rng = np.random.default_rng(0)
    documents = [rng.integers(3, D_VOCAB, n).tolist() for n in LENGTHS]
    blocks = ac.token_blocks(documents, None, length=max(LENGTHS), packing="documents")
    module = small_model(model_type, sizes, auto)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of architectures that transformer-lens does not know
        lm = ac.load_lm(module)
        every = lm.resolve(["*"], length=max(LENGTHS))
        layers = lm.resolve([name for path, _ in layers_of(module) for name in names_of(lm, f"{path}:out")])
        plain = list(dict.fromkeys(s.site.name for s in (*every, *layers) if not s.instrumented))
        instrumented = [site.site.name for site in every if site.instrumented and "hook_pattern" in site.site.name]
        options: dict[str, Any] = {"dtype": "float32", "skip_first": 0, "batch_sequences": 4, "sequences_per_shard": 8}
        store = ac.extract(lm, blocks, plain, tmp_path / "plain.zarr", **options, audit=False)
        if instrumented:
            patterns = ac.extract(lm, blocks, instrumented, tmp_path / "patterns.zarr", **options, audit=False)
            assert ac.audit(patterns, lm, len(LENGTHS)).sound
    found = ac.audit(store, lm, len(LENGTHS))
    assert found.sound, str(found)
    assert found.sites[0].n_rows == sum(LENGTHS)
    assert_layers_are_as_hooks_see_them(store, lm)


def assert_layers_are_as_hooks_see_them(store: ac.Store, lm: Any) -> None:
    """Each layer's output, under whatever names the store has it, of each document alone."""
    layers = layers_of(lm.module)
    outputs = {
        path: [s.site for s in lm.resolve(store.sites) if s.module is m and s.side == "out"] for path, m in layers
    }
    assert any(outputs.values()), "no layer is stored"
    table, lengths = store.row_table(), store.token_blocks().lengths(range(len(LENGTHS)))
    for sequence, (ids, length) in enumerate(zip(store.tokens(), lengths, strict=True)):
        seen = outputs_alone(lm.module, layers, ids[:length])
        rows = np.flatnonzero(table["sequence"] == sequence)
        for path, found in outputs.items():
            for site in found:
                wanted = seen[path][max(site.meaning.call, 1) - 1][0][table["position"][rows].astype(np.int64)]
                stored = store.read(site.name, rows)
                assert (stored - wanted).norm() <= 1e-5 * wanted.norm(), (site.name, sequence)


def outputs_alone(module: nn.Module, layers: list[tuple[str, nn.Module]], ids: Any) -> dict[str, list[Tensor]]:
    """What each layer puts out, run by run, when one sequence goes through the model."""
    seen: dict[str, list[Tensor]] = {}

    def keep(path: str, out: Any) -> None:
        seen.setdefault(path, []).append(out[0] if isinstance(out, (tuple, list)) else out)

    handles = [m.register_forward_hook(lambda _m, _a, out, path=path: keep(path, out)) for path, m in layers]
    with torch.no_grad():
        module(torch.from_numpy(ids.astype(np.int64))[None])
    for handle in handles:
        handle.remove()
    return seen
