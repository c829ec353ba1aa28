"""A sequence has the values that it has alone, whatever stands beside it in a batch and whatever was run before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_models import DYNAMIC_ROPE, LLAMA_LIKE, LONG_ROPE, names, random_ids, random_model, small_module
from torch import Tensor

import actcache as ac
from actcache.errors import ConfigError
from actcache.lm import LanguageModel, load_lm

SIZES = {**LLAMA_LIKE, "max_position_embeddings": 64, "num_key_value_heads": 3, "original_max_position_embeddings": 16}
LAST = "model.layers.1:out"


def long_rope() -> Any:
    return random_model("phi3", **SIZES, rope_parameters=LONG_ROPE)


def dynamic_rope() -> Any:
    return random_model("llama", **{**SIZES, "max_position_embeddings": 16}, rope_parameters=DYNAMIC_ROPE)


def opened(module: Any) -> LanguageModel:
    lm = load_lm(module)
    lm.check_length(64)  # the frequencies grow behind the positions that the config says, which is only a claim
    return lm


def alone(module: Any, ids: Tensor) -> Tensor:
    """By a hook of torch's own, in a model that has run nothing else."""
    seen: list[Tensor] = []
    handle = module.model.layers[1].register_forward_hook(lambda _m, _a, out: seen.append(out))
    with torch.no_grad():
        module(ids)
    handle.remove()
    return seen[0]


def test_padding_is_harmless_up_to_the_length_where_it_is_not() -> None:
    lm = load_lm(long_rope())
    (site,) = lm.resolve([LAST])
    assert lm.takes_padding  # it is causal
    assert lm.takes_padding_to(16, [site])
    assert not lm.takes_padding_to(17, [site])
    assert lm.takes_padding_to(12, [site])
    assert lm.takes_padding_to(60, lm.resolve(["model.embed_tokens:out"]))  # no rotation there
    ids = random_ids(2, 40, 40)
    with pytest.raises(ConfigError, match=r"sequences of 10 to 40 tokens.*equal length"):
        lm.capture(ids, [site], [40, 10])
    with pytest.raises(ConfigError, match=r"sequences of 10 to 40 tokens.*equal length"):
        lm.logits(ids, [40, 10])
    assert lm.capture(ids[:, :16], [site], [16, 10])[LAST].shape == (2, 16, 24)


def test_what_was_seen_is_not_tried_again() -> None:
    lm = load_lm(long_rope())
    sites = lm.resolve([LAST])
    lm.takes_padding_to(16, sites)
    lm.takes_padding_to(40, sites)
    ran: list[int] = []
    lm.module.register_forward_hook(lambda *_: ran.append(1))
    assert [lm.takes_padding_to(n, sites) for n in (2, 9, 16, 40, 41, 64)] == [True, True, True, False, False, False]
    assert ran == []


@pytest.mark.parametrize("make", [long_rope, dynamic_rope])
@pytest.mark.parametrize("batch_sequences", [1, 4])
@pytest.mark.filterwarnings("ignore")
def test_stored_values_are_those_of_each_document_alone(make: Any, batch_sequences: int, tmp_path: Path) -> None:
    lengths = [14, 40, 10, 30, 12, 30, 9, 20]
    docs = [random_ids(1, n, 40, seed=n)[0].tolist() for n in lengths]
    blocks = ac.token_blocks(docs, None, length=48, packing="documents")
    lm = opened(make())
    lm.capture(random_ids(1, 48, 40), lm.resolve([LAST]))  # something long was run before
    store = ac.extract(
        lm, blocks, [LAST], tmp_path / "a.zarr", dtype="float32", skip_first=0, batch_sequences=batch_sequences
    )
    table, values = store.row_table(), store.read(LAST, store.row_ids())
    for sequence, n in enumerate(blocks.lengths(range(blocks.n_sequences)).tolist()):
        rows = np.flatnonzero(table["sequence"] == sequence)
        found = values[rows[np.argsort(table["position"][rows])]]
        wanted = alone(make(), torch.tensor(blocks.ids[sequence : sequence + 1, :n].astype(np.int64)))[0]
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_lengths_in_any_order_leave_nothing_behind() -> None:
    lm = opened(dynamic_rope())
    sites = lm.resolve([LAST])
    for n in (40, 20, 30, 12, 30, 48, 17):
        ids = random_ids(1, n, 40, seed=n)
        assert torch.equal(lm.capture(ids, sites)[LAST], alone(dynamic_rope(), ids)), n
    # A model that was used before it came here.
    module = dynamic_rope()
    alone(module, random_ids(1, 60, 40))
    lm, ids = opened(module), random_ids(1, 20, 40)
    assert torch.equal(lm.capture(ids, lm.resolve([LAST]))[LAST], alone(dynamic_rope(), ids))


def test_a_counter_of_the_models_own_is_left_alone() -> None:
    module = small_module()
    module.blocks[0].n_passes = 0
    module.blocks[0].register_forward_hook(lambda m, *_: setattr(m, "n_passes", m.n_passes + 1))
    lm = load_lm(module)
    sites = lm.resolve(["hook_unembed"])
    begun = module.blocks[0].n_passes
    for n in (12, 3, 9, 4):
        lm.capture(random_ids(1, n, 40), sites)
    assert module.blocks[0].n_passes == begun + 4


@pytest.mark.parametrize("lengths", [[12, 7, 1], [11, 11, 2]])
def test_ordinary_models_go_on_batching_unequal_lengths(lengths: list[int]) -> None:
    lm: LanguageModel = load_lm(small_module())
    sites = lm.resolve(["blocks.*.hook_resid_post", "blocks.1.attn.hook_pattern"], length=12)
    assert lm.takes_padding_to(12, sites)
    values = lm.capture(random_ids(3, 12, 40), sites, lengths)
    assert set(values) == set(names(sites))


def test_evaluation_runs_what_may_not_be_padded_alone() -> None:
    docs = [random_ids(1, n, 40, seed=n)[0].tolist() for n in (40, 12, 9)]
    blocks = ac.token_blocks(docs, None, length=40, packing="documents")
    lm = load_lm(long_rope())
    mlp = ac.SparseMLP(d_in=24, d_out=24, n_latents=8)
    both = {"site_in": "model.layers.1.mlp:in", "site_out": "model.layers.1.mlp:out"}
    together = ac.spliced_loss(lm, mlp, blocks, **both, batch_sequences=3, skip_first=1)
    apart = ac.spliced_loss(lm, mlp, blocks, **both, batch_sequences=1, skip_first=1)
    assert together.n_tokens == apart.n_tokens == 39 + 11 + 8
    for name in ("clean", "zero_ablated", "spliced"):
        assert getattr(together, name) == pytest.approx(getattr(apart, name), rel=1e-6)
    logits = [
        torch.nn.functional.cross_entropy(
            lm.module(torch.tensor([d])).logits[0, :-1], torch.tensor(d[1:]), reduction="sum"
        )
        for d in docs
    ]
    assert together.clean == pytest.approx(float(sum(logits)) / 58, rel=1e-5)
