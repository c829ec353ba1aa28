"""Names and patterns find their sites, capture pays for what it reads only, and splices replace what they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_models import MLP_IN, MLP_OUT, n_hooks, names, small_module
from torch import Tensor, nn

from actcache.errors import ConfigError, SiteError
from actcache.lm import LanguageModel, load_lm


@pytest.fixture
def lm() -> LanguageModel:
    return load_lm(small_module())


@pytest.fixture(scope="module")
def llama(llama_folder: Path) -> LanguageModel:
    return load_lm(str(llama_folder))


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(0, 40, (3, 9), generator=torch.Generator().manual_seed(1))


# Names and patterns


def test_sites_come_in_the_order_of_the_forward_pass_whatever_the_order_of_patterns(lm: LanguageModel) -> None:
    found = names(lm.resolve(["blocks.*.hook_mlp_out", "hook_embed", "blocks.*.mlp.hook_in"]))
    below = [name for i in range(3) for name in (f"blocks.{i}.mlp.hook_in", f"blocks.{i}.hook_mlp_out")]
    assert found == ["hook_embed", *below]
    assert names(lm.resolve([found[3], found[0]])) == [found[0], found[3]]


def test_a_pattern_takes_each_place_once_and_written_names_are_kept(lm: LanguageModel, ids: Tensor) -> None:
    sites = lm.resolve(["blocks.0.*"], length=9)
    assert len({site.spot for site in sites}) == len(sites)
    assert "blocks.0.hook_mlp_out" in names(sites)
    assert "blocks.0.mlp.hook_out" not in names(sites)
    both = lm.resolve(["blocks.0.hook_mlp_out", "blocks.0.mlp.hook_out"])
    assert both[0].spot == both[1].spot
    values = lm.capture(ids, both)
    assert len(values) == 2
    assert torch.equal(*values.values())


def test_unknown_name_names_the_nearest(lm: LanguageModel) -> None:
    with pytest.raises(SiteError, match=r"'blocks.1.hook_mlpout'.*did you mean.*blocks.1.hook_mlp_out"):
        lm.resolve(["blocks.1.hook_mlpout"])
    with pytest.raises(SiteError, match=r"blocks\.7"):
        lm.resolve(["hook_embed", "blocks.7.*"])


def test_attention_patterns_are_rows_of_queries_and_need_a_length(lm: LanguageModel, ids: Tensor) -> None:
    with pytest.raises(ConfigError, match=r"2 heads x keys.*length="):
        lm.resolve(["blocks.1.attn.hook_pattern"])
    pattern, mlp_out = lm.resolve(["blocks.1.attn.hook_pattern", MLP_OUT], length=9)
    assert pattern.site.shape == (2, 9)
    assert (pattern.instrumented, mlp_out.instrumented) == (True, False)
    values = lm.capture(ids, [pattern, mlp_out])
    torch.testing.assert_close(values[pattern.site.name].view(3, 9, 2, 9).sum(-1), torch.ones(3, 9, 2))
    torch.testing.assert_close(values[MLP_OUT], lm.capture(ids, [mlp_out])[MLP_OUT], atol=1e-6, rtol=1e-5)


# What capture does, and what it leaves alone


def test_forward_stops_after_the_last_site(lm: LanguageModel, ids: Tensor) -> None:
    ran: list[str] = []
    for name in ("blocks.1.attn", "blocks.1.mlp", "blocks.2", "unembed"):
        lm.module.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
    lm.site_names  # noqa: B018  # the survey runs the whole model, once
    ran.clear()
    lm.capture(ids, lm.resolve(["blocks.1.mlp.hook_in", "hook_embed"]))
    assert ran == ["blocks.1.attn"]
    ran.clear()
    lm.capture(ids, 2 * lm.resolve(["blocks.1.mlp.hook_in"]))
    assert ran == ["blocks.1.attn"]
    ran.clear()
    lm.capture(ids, lm.resolve(["blocks.*.hook_mlp_out"]))
    assert ran == ["blocks.1.attn", "blocks.1.mlp"]  # the last MLP ends it, before its block returns
    assert lm.capture(ids, []) == {}


def test_values_are_handed_out_uncopied_and_without_gradients(lm: LanguageModel, ids: Tensor) -> None:
    lm.site_names  # noqa: B018
    produced: list[Tensor] = []
    lm.module.blocks[1].mlp.register_forward_hook(lambda _m, _a, out: produced.append(out))
    value = lm.capture(ids, lm.resolve([MLP_OUT]))[MLP_OUT]
    assert value.data_ptr() == produced[0].data_ptr()
    assert value.grad_fn is None
    assert not value.requires_grad
    # An ordinary tensor: it can be trained on and changed in place.
    nn.Linear(16, 1)(value).sum().backward()
    value.add_(1)


def test_nothing_stays_behind_even_after_errors(lm: LanguageModel, ids: Tensor) -> None:
    sites = lm.resolve(["blocks.*"], length=9)
    plain = [site for site in sites if not site.instrumented]
    lm.capture(ids, plain)
    assert n_hooks(lm.module) == 0

    def broken(*_: Any) -> None:
        raise RuntimeError("broken layer")

    handle = lm.module.blocks[2].attn.register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="broken layer"):
        lm.capture(ids, plain)
    with pytest.raises(RuntimeError, match="broken layer"), lm.splice(MLP_IN, MLP_OUT, lambda x: x):
        lm.logits(ids)
    handle.remove()
    assert n_hooks(lm.module) == 0
    assert torch.equal(lm.logits(ids), lm.module(ids))


def test_numpy_ids_of_any_integer_type_are_taken(lm: LanguageModel, ids: Tensor) -> None:
    sites = lm.resolve([MLP_OUT])
    wanted = lm.capture(ids, sites)[MLP_OUT]
    for array in (ids.numpy().astype(np.uint32), ids.numpy().astype(np.int16), ids.int()):
        assert torch.equal(lm.capture(array, sites)[MLP_OUT], wanted)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.zeros((1, 13), np.uint32), r"13 tokens.*12 positions.*at most 12"),
        (np.full((1, 4), 40, np.uint32), r"token id 40.*40 tokens"),
        (np.full((1, 4), -1), r"token id -1.*40 tokens"),
        (np.zeros(4, np.uint32), r"\(sequences, positions\).*\(4,\)"),
    ],
)
def test_ids_that_the_model_cannot_take(lm: LanguageModel, bad: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        lm.capture(bad, lm.resolve([MLP_OUT]))
    with pytest.raises(ConfigError, match=message):
        lm.logits(bad)


# Splicing


def test_splicing_the_mlp_itself_changes_nothing_and_zeros_ablate_it(lm: LanguageModel, ids: Tensor) -> None:
    clean, mlp = lm.logits(ids), small_module().blocks[1].mlp
    with lm.splice(MLP_IN, MLP_OUT, mlp):
        torch.testing.assert_close(lm.logits(ids), clean, atol=1e-6, rtol=1e-6)
    with lm.splice(MLP_IN, MLP_OUT, torch.zeros_like):
        ablated = lm.logits(ids)
    handle = lm.module.blocks[1].mlp.register_forward_hook(lambda _m, _a, out: torch.zeros_like(out))
    assert torch.equal(ablated, lm.module(ids))
    handle.remove()
    assert not torch.allclose(ablated, clean)
    assert torch.equal(lm.logits(ids), clean)


def test_splices_nest_reach_captures_and_may_stay_in_one_place(lm: LanguageModel, ids: Tensor) -> None:
    last = lm.resolve(["blocks.2.hook_mlp_out"])
    with lm.splice(MLP_IN, MLP_OUT, torch.zeros_like), lm.splice("hook_embed", "hook_embed", lambda x: 2 * x):
        value = lm.capture(ids, last)["blocks.2.hook_mlp_out"]
    module = small_module()
    with torch.no_grad():
        module.embed.weight.mul_(2)
        module.blocks[1].mlp["out"].weight.zero_()
        module.blocks[1].mlp["out"].bias.zero_()
    wanted = load_lm(module).capture(ids, load_lm(module).resolve(["blocks.2.hook_mlp_out"]))["blocks.2.hook_mlp_out"]
    torch.testing.assert_close(value, wanted, atol=1e-6, rtol=1e-5)


def test_splicing_an_input_and_heads(lm: LanguageModel, ids: Tensor) -> None:
    with lm.splice("blocks.1.attn.hook_v", "blocks.1.attn.hook_z", torch.zeros_like):
        no_heads = lm.capture(ids, lm.resolve(["blocks.1.hook_attn_out"]))["blocks.1.hook_attn_out"]
    torch.testing.assert_close(no_heads, lm.module.blocks[1].attn.o.bias.detach().expand(3, 9, 16))


def test_splice_in_the_instrumented_model(llama: LanguageModel, ids: Tensor) -> None:
    pattern, attn_out = "blocks.1.attn.hook_pattern", "blocks.1.hook_attn_out"
    clean = llama.logits(ids)
    with llama.splice(pattern, pattern, lambda x: x):
        torch.testing.assert_close(llama.logits(ids), clean, atol=2e-5, rtol=1e-5)
    with llama.splice(pattern, pattern, torch.zeros_like):
        assert not llama.capture(ids, llama.resolve([attn_out]))[attn_out].any()
    with llama.splice(attn_out, attn_out, lambda x: x), pytest.raises(ConfigError, match="splice of plain sites"):
        llama.capture(ids, llama.resolve([pattern], length=9))
    assert torch.equal(llama.logits(ids), clean)
    assert not any(point.fwd_hooks for point in llama.open_instrumented().hook_dict.values())


def test_splice_that_cannot_be(lm: LanguageModel, ids: Tensor) -> None:
    with (
        pytest.raises(SiteError, match=r"blocks.1.hook_mlp_out comes after blocks.1.mlp.hook_in"),
        lm.splice(MLP_OUT, MLP_IN, lambda x: x),
    ):
        lm.logits(ids)
    with (
        pytest.raises(ConfigError, match=r"holds \(3, 9, 16\), got \(3, 9, 24\)"),
        lm.splice("blocks.1.mlp.hook_post", MLP_OUT, lambda x: x),
    ):
        lm.logits(ids)
    with pytest.raises(SiteError, match="no site matches 'nowhere'"), lm.splice("nowhere", MLP_OUT, lambda x: x):
        pass
    with pytest.raises(ConfigError, match="matches 3"), lm.splice("blocks.*.hook_mlp_out", MLP_OUT, lambda x: x):
        pass
