"""Every name that a model answers to gives what transformer-lens gives, of version 3 and of version 4.

`make test` runs this file and its siblings with both.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lm_models import (
    GPT2,
    LLAMA_LIKE,
    MLP_IN,
    MLP_OUT,
    SIZES,
    SPECIAL,
    minilm_folder,
    n_hooks,
    random_ids,
    random_model,
    small_module,
    smollm2_folder,
)
from torch import Tensor

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


def cached(bridge: Any, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and, for every hook that fires on activations, its value with positions on the second axis."""
    n_sequences, n_positions = ids.shape
    with torch.no_grad():
        logits, cache = bridge.run_with_cache(ids)
    values: dict[str, Tensor] = {}
    for name in bridge.hook_dict:
        value = cache[name] if name in cache.cache_dict else None
        if value is None or not value.is_floating_point():
            continue
        if value.ndim == 4 and value.shape[1] != n_positions:
            value = value.transpose(1, 2)
        if value.shape[0] == n_sequences * n_positions:
            value = value.unflatten(0, ids.shape)
        values[name] = value.expand(n_sequences, *value.shape[1:])
    return logits, values


def assert_same_as_bridge(lm: LanguageModel, ids: Tensor) -> None:
    bridge = lm.open_instrumented()
    logits, wanted = cached(bridge, ids)
    torch.testing.assert_close(lm.logits(ids), logits, atol=2e-5, rtol=1e-5)
    assert set(lm.site_names) == set(wanted)
    sites = {name: lm.resolve([name], length=ids.shape[1])[0] for name in lm.site_names}
    plain = lm.capture(ids, [site for site in sites.values() if not site.instrumented])
    everything = lm.capture(ids, list(sites.values()))
    for name, site in sites.items():
        assert site.site.shape == tuple(wanted[name].shape[2:]), name
        for found in (plain.get(name), everything[name]):
            if found is not None:
                assert found.shape == (*ids.shape, site.site.width), name
                close = torch.isclose(found, wanted[name].flatten(2), atol=1e-5, rtol=1e-5)
                assert close.all(), name


def test_every_name_of_the_embedded_architecture_equals_the_bridge(lm: LanguageModel, ids: Tensor) -> None:
    assert_same_as_bridge(lm, ids)
    instrumented = {name for name in lm.site_names if lm.resolve([name], length=9)[0].instrumented}
    assert {name.split(".", 2)[2] for name in instrumented} == {"attn.hook_attn_scores", "attn.hook_pattern"}


def test_every_name_of_a_hugging_face_model_equals_the_bridge(llama: LanguageModel) -> None:
    assert_same_as_bridge(llama, torch.randint(3, 512, (3, 9), generator=torch.Generator().manual_seed(2)))


HEADS = {"num_key_value_heads": 3}
SCALED = {"embedding_multiplier": 2.0, "residual_multiplier": 0.5}


@pytest.mark.parametrize(
    ("model_type", "config", "has_to_be_instrumented"),
    [
        ("gpt2", GPT2, "attn.hook_q"),  # one projection for q, k and v
        ("gpt_neox", LLAMA_LIKE, "attn.hook_q"),  # ... with heads interleaved, and parallel blocks
        ("qwen3", {**LLAMA_LIKE, **HEADS, "head_dim": 8}, "attn.hook_rot_q"),  # norms of heads
        ("granite", {**LLAMA_LIKE, **SCALED}, "hook_mlp_out"),  # branches scaled before they are added
        ("mixtral", {**LLAMA_LIKE, **HEADS, "num_local_experts": 4}, "attn.hook_pattern"),  # routers flatten sequences
        ("falcon", {**SIZES, **SPECIAL}, "attn.hook_pattern"),  # adds to the MLP's output in place
    ],
)
def test_architectures_with_traps_equal_the_bridge(
    model_type: str, config: dict[str, Any], has_to_be_instrumented: str, ids: Tensor
) -> None:
    lm = load_lm(random_model(model_type, **config))
    assert_same_as_bridge(lm, ids)
    assert all(site.instrumented for site in lm.resolve([f"blocks.*.{has_to_be_instrumented}"], length=9))
    # In Granite even this one is scaled; elsewhere nothing but the plain model is needed for the common sites.
    common = ["blocks.*.hook_resid_*", *([] if model_type == "granite" else ["blocks.*.hook_mlp_out"])]
    assert not any(site.instrumented for site in lm.resolve(common))


def test_common_sites_never_need_the_instrumented_model(llama: LanguageModel) -> None:
    below = ["hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out", "mlp.hook_in"]
    heads = ["mlp.hook_pre", "mlp.hook_post", "attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_z"]
    sites = llama.resolve([f"blocks.*.{name}" for name in below + heads])
    assert len(sites) == 5 * 12
    assert not any(site.instrumented for site in sites)
    assert {s.site.shape for s in sites if s.site.name.endswith("attn.hook_k")} == {(4, 8)}


def test_bridging_leaves_the_plain_model_as_it_was(ids: Tensor, llama_folder: Path) -> None:
    lm = load_lm(str(llama_folder))
    before, classes = lm.logits(ids), [type(m) for m in lm.module.modules()]
    weights = [p.data_ptr() for p in lm.module.parameters()]
    bridge = lm.open_instrumented()
    assert torch.equal(lm.logits(ids), before)
    assert [type(m) for m in lm.module.modules()] == classes
    assert n_hooks(lm.module) == 0
    # The bridge has the same weights, not copies of them.
    assert set(weights) <= {p.data_ptr() for p in bridge.original_model.parameters()}


def test_transformer_lens_models_are_taken_as_they_are(lm: LanguageModel, ids: Tensor) -> None:
    bridge = lm.open_instrumented()
    ready = load_lm(bridge)
    assert ready.kind == "transformer_lens"
    assert ready.open_instrumented() is bridge
    assert (ready.n_ctx, ready.d_vocab) == (12, 40)
    assert_same_as_bridge(ready, ids)
    site = ready.resolve([MLP_OUT])[0]
    with ready.splice(MLP_IN, site, lambda x: torch.zeros_like(x)):
        ablated = ready.logits(ids)
    with lm.splice(MLP_IN, MLP_OUT, lambda x: torch.zeros_like(x)):
        torch.testing.assert_close(ablated, lm.logits(ids), atol=1e-5, rtol=1e-5)
    assert not any(point.fwd_hooks for point in bridge.hook_dict.values())


@pytest.mark.needs("transformer-lens<4")
def test_hooked_transformer_of_transformer_lens_3(ids: Tensor) -> None:
    import transformer_lens

    sizes = {"d_model": 16, "d_head": 8, "n_heads": 2, "n_layers": 2, "n_ctx": 12, "d_mlp": 24, "d_vocab": 40}
    config = transformer_lens.HookedTransformerConfig(**sizes, act_fn="relu", normalization_type="LN", device="cpu")
    hooked = transformer_lens.HookedTransformer(config)
    lm = load_lm(hooked)
    _, cache = hooked.run_with_cache(ids)
    sites = lm.resolve(["blocks.*.hook_resid_*", "blocks.*.attn.hook_z", "blocks.*.mlp.hook_post"])
    assert len(sites) == 2 * 5
    for name, value in lm.capture(ids, sites).items():
        assert torch.equal(value, cache[name].flatten(2)), name


def with_layer_norms() -> Any:
    """A `HookedTransformer` of version 3, whose layer norms do something."""
    import transformer_lens

    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_head": 8, "n_heads": 2, "n_layers": 2, "n_ctx": 12, "d_mlp": 24, "d_vocab": 40}
    config = transformer_lens.HookedTransformerConfig(**sizes, act_fn="relu", normalization_type="LN", device="cpu")
    hooked = transformer_lens.HookedTransformer(config)
    with torch.no_grad():
        for parameter in hooked.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return hooked


def assert_read_from_hook_points(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """Whatever was done to its weights, a transformer-lens model's values are those of its own hooks."""
    lm = load_lm(model)
    sites = lm.resolve(["blocks.*.hook_resid_*", "blocks.*.attn.hook_z", "blocks.*.mlp.hook_post"])
    assert all(site.instrumented for site in sites)
    _, cache = model.run_with_cache(ids)
    values = lm.capture(ids, sites)
    assert len(values) == 2 * 5
    for name, value in values.items():
        assert torch.equal(value, cache[name].flatten(2)), name
    return values


@pytest.mark.needs("transformer-lens<4")
def test_folded_and_centred_weights_of_transformer_lens_3_are_taken_as_they_are(ids: Tensor) -> None:
    hooked = with_layer_norms()
    before = assert_read_from_hook_points(hooked, ids)
    hooked.load_and_process_state_dict(hooked.state_dict(), fold_ln=True, center_writing_weights=True)
    after = assert_read_from_hook_points(hooked, ids)
    name = "blocks.1.hook_resid_post"
    centred = before[name] - before[name].mean(-1, keepdim=True)
    torch.testing.assert_close(after[name], centred, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(after[name], before[name], atol=1e-3)


def test_bridge_in_compatibility_mode_is_taken_as_it_is(ids: Tensor) -> None:
    lm = load_lm(random_model("gpt2", **GPT2))
    name = "blocks.1.hook_resid_post"
    plain = lm.capture(ids, lm.resolve([name]))[name]
    bridge = load_lm(random_model("gpt2", **GPT2)).open_instrumented()
    bridge.enable_compatibility_mode()
    processed = assert_read_from_hook_points(bridge, ids)[name]
    torch.testing.assert_close(processed, plain - plain.mean(-1, keepdim=True), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(processed, plain, atol=1e-3)


def test_encoder_without_a_head_has_the_names_of_one_with_a_head() -> None:
    lm = load_lm(str(minilm_folder()))
    ids = random_ids(2, 9, lm.d_vocab or 0)
    common = ["blocks.*.hook_resid_*", "blocks.*.hook_mlp_out", "blocks.*.attn.hook_q", "blocks.*.attn.hook_z"]
    sites = lm.resolve(["hook_embed", *common])
    assert len(sites) == 1 + 6 * 6
    assert not any(site.instrumented for site in sites)
    bridge = lm.open_instrumented()
    with torch.no_grad():
        _, cache = bridge.run_with_cache(ids)
    for name, value in lm.capture(ids, sites).items():
        torch.testing.assert_close(value, cache[name].flatten(2), atol=1e-5, rtol=1e-5)
    # The bridge's head is a stand-in; nothing of it can be cached.
    assert not [name for name in lm.site_names if name.startswith(("unembed", "hook_unembed", "mlm_head", "ln_final"))]
    assert n_hooks(lm.module) == 0


def test_masked_language_model_equals_the_bridge(ids: Tensor) -> None:
    lm = load_lm(random_model("bert", "AutoModelForMaskedLM", **LLAMA_LIKE))
    assert lm.logits(ids).shape == (3, 9, 40)
    _, wanted = cached(lm.open_instrumented(), ids)
    sites = lm.resolve([name for name in lm.site_names if name in wanted], length=9)
    assert len(sites) > 50
    for name, value in lm.capture(ids, [site for site in sites if not site.instrumented]).items():
        torch.testing.assert_close(value, wanted[name].flatten(2), atol=1e-5, rtol=1e-5)


@pytest.mark.exhaustive
def test_grouped_query_attention_of_a_real_model_equals_the_bridge() -> None:
    lm = load_lm(str(smollm2_folder()))
    ids = random_ids(2, 8, lm.d_vocab or 0)
    below = ["hook_resid_post", "hook_mlp_out", "attn.hook_q", "attn.hook_k", "attn.hook_z"]
    sites = lm.resolve([f"blocks.{block}.{name}" for block in (0, 15, 29) for name in below])
    assert not any(site.instrumented for site in sites)
    assert {s.site.shape for s in sites if s.site.name.endswith("hook_k")} == {(3, 64)}
    with torch.no_grad():
        _, cache = lm.open_instrumented().run_with_cache(ids)
    for name, value in lm.capture(ids, sites).items():
        difference = (value - cache[name].flatten(2)).norm()
        assert difference <= 1e-5 * value.norm(), name
