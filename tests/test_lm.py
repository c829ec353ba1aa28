"""Every name that a model answers to gives what transformer-lens gives, at the price of the plain forward pass."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from actcache.errors import ConfigError, ModelNotFoundError, SiteError
from actcache.lm import LanguageModel, ResolvedSite, load_lm, open_bridge
from actcache.source import token_blocks
from actcache.stories import StoriesConfig, StoriesLM

SMALL = StoriesConfig(d_model=16, d_mlp=24, n_layers=3, n_heads=2, n_ctx=12, d_vocab=40)
MLP_IN, MLP_OUT = "blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out"


def small_module() -> StoriesLM:
    torch.manual_seed(0)
    return StoriesLM(SMALL).eval()


@pytest.fixture
def lm() -> LanguageModel:
    return load_lm(small_module())


@pytest.fixture(scope="module")
def llama(shared_assets: Path) -> LanguageModel:
    return load_lm(str(shared_assets / "stories260K"))


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(0, 40, (3, 9), generator=torch.Generator().manual_seed(1))


def n_hooks(module: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


def names(sites: list[ResolvedSite]) -> list[str]:
    return [site.site.name for site in sites]


# What transformer-lens gives


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
    bridge = open_bridge(lm)
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


SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "vocab_size": 40}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA_LIKE = {**SIZES, **SPECIAL, "intermediate_size": 20, "max_position_embeddings": 16}
GPT2 = {
    "n_embd": 24,
    "n_layer": 2,
    "n_head": 3,
    "n_positions": 16,
    "vocab_size": 40,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
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
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **config))
    with torch.no_grad():
        for parameter in module.parameters():  # norms and biases that do something
            parameter.add_(0.1 * torch.randn_like(parameter))
    lm = load_lm(module)
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


def test_bridging_leaves_the_plain_model_as_it_was(ids: Tensor, shared_assets: Path) -> None:
    lm = load_lm(str(shared_assets / "stories260K"))
    before, classes = lm.logits(ids), [type(m) for m in lm.module.modules()]
    weights = [p.data_ptr() for p in lm.module.parameters()]
    bridge = open_bridge(lm)
    assert torch.equal(lm.logits(ids), before)
    assert [type(m) for m in lm.module.modules()] == classes
    assert n_hooks(lm.module) == 0
    # The bridge has the same weights, not copies of them.
    assert set(weights) <= {p.data_ptr() for p in bridge.original_model.parameters()}


def test_transformer_lens_models_are_taken_as_they_are(lm: LanguageModel, ids: Tensor) -> None:
    bridge = open_bridge(lm)
    ready = load_lm(bridge)
    assert ready.kind == "transformer_lens"
    assert open_bridge(ready) is bridge
    assert (ready.n_ctx, ready.d_vocab) == (12, 40)
    assert_same_as_bridge(ready, ids)
    site = ready.resolve([MLP_OUT])[0]
    with ready.splice(MLP_IN, site, lambda x: torch.zeros_like(x)):
        ablated = ready.logits(ids)
    with lm.splice(MLP_IN, MLP_OUT, lambda x: torch.zeros_like(x)):
        torch.testing.assert_close(ablated, lm.logits(ids), atol=1e-5, rtol=1e-5)
    assert not any(point.fwd_hooks for point in bridge.hook_dict.values())


def test_hooked_transformer_of_transformer_lens_3(ids: Tensor) -> None:
    if not version("transformer-lens").startswith("3."):
        pytest.skip("transformer-lens 4 has no HookedTransformer")
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
    assert not any(point.fwd_hooks for point in open_bridge(llama).hook_dict.values())


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


# Any module


class Odd(nn.Module):
    """What other people's models do: keyword calls, tuples, in-place activations, layers that do not run."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 6)
        self.up = nn.Linear(6, 10)
        self.act = nn.ReLU(inplace=True)
        self.rnn = nn.GRU(10, 5, batch_first=True)
        self.unused = nn.Linear(3, 3)
        self.head = nn.Linear(5, 20)

    def forward(self, ids: Tensor) -> tuple[Tensor, None]:
        hidden, _ = self.rnn(self.act(self.up(input=self.table(ids))))
        return self.head(hidden), None


def test_any_module_has_its_inputs_and_outputs() -> None:
    torch.manual_seed(0)
    odd = Odd()
    lm, ids = load_lm(odd), torch.arange(12).view(2, 6)
    wanted = ["table:out", "up:in", "up:out", "act:in", "act:out", "rnn:in", "rnn:out", "head:in", "head:out", ":out"]
    assert lm.site_names == wanted
    assert lm.d_vocab == 20
    values = lm.capture(ids, lm.resolve(["*"]))
    up = odd.up(odd.table(ids))
    torch.testing.assert_close(values["up:in"], odd.table(ids))
    torch.testing.assert_close(values["up:out"], up)  # although the activation overwrites it
    torch.testing.assert_close(values["act:out"], up.relu())
    torch.testing.assert_close(values["rnn:out"], odd.rnn(up.relu())[0])
    assert torch.equal(values[":out"], lm.logits(ids))
    with lm.splice("up:in", "up:in", torch.zeros_like), lm.splice("rnn:out", "rnn:out", lambda x: x + 1):
        spliced = lm.logits(ids)
    torch.testing.assert_close(spliced, odd.head(odd.rnn(odd.up.bias.expand(2, 6, 10).relu())[0] + 1))
    with pytest.raises(ConfigError, match="plain torch module"):
        open_bridge(lm)


def test_module_that_does_not_run_on_ids() -> None:
    with pytest.raises(ConfigError, match="does not run on token ids"):
        load_lm(nn.Linear(3, 3)).resolve(["*"])


def test_hugging_face_architecture_unknown_to_transformer_lens_keeps_its_module_paths(ids: Tensor) -> None:
    from transformers import HeliumConfig, HeliumForCausalLM

    lm = load_lm(HeliumForCausalLM(HeliumConfig(**LLAMA_LIKE, num_key_value_heads=3, head_dim=8)))
    with pytest.warns(UserWarning, match=r"module.path:in.*transformer-lens cannot open HeliumForCausalLM"):
        (site,) = lm.resolve(["model.layers.1.mlp:out"])
    assert lm.capture(ids, [site])["model.layers.1.mlp:out"].shape == (3, 9, 24)


# Loading


@pytest.fixture
def stories_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(asdict(SMALL)))
    save_file({k: v.bfloat16() for k, v in small_module().state_dict().items()}, folder / "model.safetensors")
    return folder


def test_folder_of_the_embedded_architecture(stories_folder: Path, ids: Tensor) -> None:
    lm = load_lm(str(stories_folder))
    assert (lm.name, lm.kind, lm.n_ctx, lm.d_vocab, lm.dtype) == ("tiny", "stories", 12, 40, torch.float32)
    torch.testing.assert_close(lm.logits(ids), small_module().bfloat16().float()(ids))
    assert not lm.module.training


def test_embedded_model_with_its_tokenizer() -> None:
    lm = load_lm("stories-4l")
    assert (lm.n_ctx, lm.module.config.n_layers) == (256, 4)
    assert lm.d_vocab == len(lm.tokenizer)
    assert lm.bos == lm.tokenizer.bos_token_id == lm.tokenizer.convert_tokens_to_ids("<|bos|>")
    text = "Once upon a time, there was a little girl named Lily. She loved to play in the park with her dog."
    tokens = torch.tensor([[lm.bos, *lm.tokenizer(text, add_special_tokens=False)["input_ids"]]])
    loss = nn.functional.cross_entropy(lm.logits(tokens)[0, :-1], tokens[0, 1:])
    assert loss < math.log(lm.d_vocab) / 2
    bridge = open_bridge(lm)
    assert bridge.to_tokens(text).tolist() == tokens.tolist()
    torch.testing.assert_close(bridge(tokens), lm.logits(tokens), atol=1e-4, rtol=1e-5)


def test_hugging_face_folder_with_its_tokenizer(llama: LanguageModel) -> None:
    found = (llama.name, llama.kind, llama.n_ctx, llama.d_vocab, llama.bos)
    assert found == ("stories260K", "huggingface", 512, 512, 1)
    tokens = llama.tokenizer("Once upon a time", return_tensors="pt")["input_ids"]
    assert llama.tokenizer.decode(llama.logits(tokens)[0, -1].argmax()).strip() == ","


def test_hugging_face_folder_without_tokenizer(tmp_path: Path, shared_assets: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(shared_assets / "stories260K" / name, tmp_path)
    lm = load_lm(str(tmp_path))
    assert lm.tokenizer is None
    assert lm.bos == 1
    assert lm.identity["tokenizer"] is None
    assert len(lm.resolve(["blocks.*.hook_mlp_out"])) == 5


def test_models_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"no model at .*nowhere.*no such folder"):
        load_lm(str(tmp_path / "nowhere"))
    with pytest.raises(ModelNotFoundError, match=r"no model in folder .*config.json"):
        load_lm(str(tmp_path))
    with pytest.raises(ModelNotFoundError, match=r"'nobody/nothing'.*'stories-4l'.*folder.*Hugging Face"):
        load_lm("nobody/nothing")


def test_checkpoints_that_are_incomplete_or_of_another_kind(tmp_path: Path, shared_assets: Path) -> None:
    from safetensors.torch import load_file

    source = shared_assets / "stories260K"
    shutil.copy(source / "config.json", tmp_path)
    with pytest.raises(ModelNotFoundError, match=r"no model in folder .*model.safetensors"):
        load_lm(str(tmp_path))
    weights = load_file(source / "model.safetensors")
    some = {k: v for k, v in weights.items() if "layers.3.mlp" not in k}
    save_file(some, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks 3 of the weights.*layers.3.mlp"):
        load_lm(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(ConfigError, match="not a causal language model"):
        load_lm(str(tmp_path))


@pytest.mark.parametrize("wanted", ["bfloat16", torch.bfloat16])
def test_dtype_by_name(stories_folder: Path, ids: Tensor, wanted: Any) -> None:
    lm = load_lm(str(stories_folder), dtype=wanted)
    assert lm.dtype == torch.bfloat16
    assert lm.capture(ids, lm.resolve([MLP_OUT]))[MLP_OUT].dtype == torch.bfloat16
    with lm.splice(MLP_IN, MLP_OUT, lambda x: torch.zeros_like(x, dtype=torch.float32)):
        assert lm.logits(ids).dtype == torch.bfloat16


def test_half_precision_finds_the_same_plain_modules(shared_assets: Path, llama: LanguageModel) -> None:
    half = load_lm(str(shared_assets / "stories260K"), dtype="bfloat16")
    assert half.site_names == llama.site_names
    plain = [[s.site.name for s in lm.resolve(["*"], length=4) if not s.instrumented] for lm in (half, llama)]
    assert plain[0] == plain[1]


def test_options_outside_their_range() -> None:
    with pytest.raises(ConfigError, match=r"dtype must be one of bfloat16.*'int8'"):
        load_lm(small_module(), dtype="int8")
    with pytest.raises(ConfigError, match=r"device 'cuda:99' cannot be used"):
        load_lm(small_module(), device="cuda:99")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_models_run_on_a_gpu(ids: Tensor) -> None:
    lm = load_lm(small_module(), device="cuda")
    value = lm.capture(ids, lm.resolve([MLP_OUT]))[MLP_OUT]
    assert value.device.type == "cuda"
    cpu = load_lm(small_module())
    torch.testing.assert_close(value.cpu(), cpu.capture(ids, cpu.resolve([MLP_OUT]))[MLP_OUT], atol=1e-4, rtol=1e-3)


def test_identity_is_what_decides_the_activations(llama: LanguageModel) -> None:
    one, same = load_lm(small_module()).identity, load_lm(small_module()).identity
    assert one == same == json.loads(json.dumps(one))
    changed = small_module()
    with torch.no_grad():
        changed.blocks[2].mlp["in"].bias[3] += 1e-3
    assert load_lm(changed).identity["weights"] != one["weights"]
    assert load_lm(small_module(), dtype="bfloat16").identity["weights"] != one["weights"]
    assert {k: v for k, v in one.items() if k != "weights"} == {
        "name": "stories-4l",
        "class": "StoriesLM",
        "dtype": "float32",
        "tokenizer": None,
    }
    blocks = token_blocks(["Once upon a time there was a cat."], llama.tokenizer, length=4)
    assert llama.identity["tokenizer"] == blocks.description["tokenizer"]
