"""Any module: what it is given, what it puts out, and values equal to those of torch's own hooks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lm_models import (
    LLAMA_LIKE,
    assert_equal_to_hooks,
    assert_padding_changes_nothing,
    minilm_folder,
    n_hooks,
    names,
    random_ids,
    random_model,
    small_module,
    smollm2_folder,
)
from torch import Tensor, nn

from actcache.errors import ConfigError, SiteError
from actcache.lm import LanguageModel, load_lm


@pytest.fixture(scope="module")
def llama(llama_folder: Path) -> LanguageModel:
    return load_lm(str(llama_folder))


@pytest.fixture(scope="module")
def minilm() -> LanguageModel:
    return load_lm(str(minilm_folder()))


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(0, 40, (3, 9), generator=torch.Generator().manual_seed(1))


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
        lm.open_instrumented()


def test_module_that_does_not_run_on_ids() -> None:
    with pytest.raises(ConfigError, match="does not run on token ids"):
        load_lm(nn.Linear(3, 3)).resolve(["*"])


def test_hugging_face_architecture_unknown_to_transformer_lens_keeps_its_module_paths(ids: Tensor) -> None:
    from transformers import HeliumConfig, HeliumForCausalLM

    lm = load_lm(HeliumForCausalLM(HeliumConfig(**LLAMA_LIKE, num_key_value_heads=3, head_dim=8)))
    with pytest.warns(UserWarning, match=r"module.path:in.*transformer-lens cannot open HeliumForCausalLM"):
        (site,) = lm.resolve(["model.layers.1.mlp:out"])
    assert lm.capture(ids, [site])["model.layers.1.mlp:out"].shape == (3, 9, 24)


# What modules put out


class Hidden(nn.Module):
    """Embedding, positions, one layer; the table of positions is smaller than that of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.where = nn.Embedding(8, 6)
        self.what = nn.Embedding(30, 6)
        self.torso = nn.Sequential(nn.Linear(6, 6), nn.GELU())
        self.head = nn.Linear(6, 30)

    def forward(self, ids: Tensor) -> Any:
        x = self.what(ids) + self.where(torch.arange(ids.shape[1]))
        return self.put_out(self.head(self.torso(x)), x)

    def put_out(self, logits: Tensor, hidden: Tensor) -> Any:
        return logits


class Pair(NamedTuple):
    logits: Tensor
    hidden: Tensor


@dataclass
class Fields:
    hidden: Tensor
    log_probs: Tensor


def model_output(logits: Tensor, hidden: Tensor) -> Any:
    from transformers.modeling_outputs import CausalLMOutput

    return CausalLMOutput(logits=logits, hidden_states=(hidden,))


OUTPUTS = {
    "tensor": lambda logits, hidden: logits,
    "tuple": lambda logits, hidden: (logits, hidden),
    "list": lambda logits, hidden: [logits, None],
    "named tuple": Pair,
    "dict": lambda logits, hidden: {"hidden": hidden, "logits": logits},
    "dataclass": lambda logits, hidden: Fields(hidden, logits),
    "ModelOutput": model_output,
}


@pytest.mark.parametrize("form", OUTPUTS)
def test_logits_are_found_in_every_form_of_output(form: str) -> None:
    torch.manual_seed(0)
    plain = Hidden()
    ids, wanted = random_ids(2, 7, 30), None
    wanted = load_lm(plain).logits(ids)
    plain.put_out = OUTPUTS[form]  # type: ignore[method-assign]  # the same weights with another output
    lm = load_lm(plain)
    assert torch.equal(lm.logits(ids), wanted)
    assert lm.d_vocab == 30  # not the table of positions
    if form != "dataclass":  # whose fields are in no order that means anything
        assert torch.equal(lm.capture(ids, lm.resolve([":out"]))[":out"], wanted)
        with lm.splice(":out", ":out", torch.zeros_like):
            assert not lm.logits(ids).any()


def test_output_without_logits_says_what_it_is() -> None:
    plain = Hidden()
    plain.put_out = lambda logits, hidden: {"hidden": hidden}  # type: ignore[method-assign]
    lm = load_lm(plain)
    with pytest.raises(ConfigError, match=r"Hidden has no logits: its output is hidden"):
        lm.logits(random_ids(2, 7, 30))
    assert lm.capture(random_ids(2, 7, 30), lm.resolve(["torso.0:out"]))["torso.0:out"].shape == (2, 7, 6)


def test_ids_beyond_a_plain_modules_table_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"token id 30.*Hidden knows 30 tokens"):
        load_lm(Hidden()).logits(torch.full((1, 4), 30))


# Equal to torch's own hooks, bit for bit


def test_embedded_architecture_equals_hooks(ids: Tensor) -> None:
    lm = load_lm(small_module())
    block = lm.module.blocks[1]
    places = {
        "hook_embed": (lm.module.embed, "out"),
        "blocks.1.hook_resid_pre": (block, "in"),
        "blocks.1.attn.hook_q": (block.attn.q, "out"),
        "blocks.1.attn.hook_z": (block.attn.o, "in"),
        "blocks.1.mlp.hook_in": (block.mlp, "in"),
        "blocks.2.hook_resid_post": (lm.module.blocks[2], "out"),
        "unembed.hook_in": (lm.module.unembed, "in"),
    }
    assert_equal_to_hooks(lm, ids, places)


def llama_places(module: Any, blocks: tuple[int, ...]) -> dict[str, tuple[nn.Module, str]]:
    places = {"hook_embed": (module.model.embed_tokens, "out"), "ln_final.hook_in": (module.model.norm, "in")}
    for n in blocks:
        layer = module.model.layers[n]
        places |= {
            f"blocks.{n}.hook_resid_post": (layer, "out"),
            f"blocks.{n}.hook_attn_out": (layer.self_attn, "out"),
            f"blocks.{n}.attn.hook_q": (layer.self_attn.q_proj, "out"),
            f"blocks.{n}.attn.hook_k": (layer.self_attn.k_proj, "out"),
            f"blocks.{n}.attn.hook_z": (layer.self_attn.o_proj, "in"),
            f"blocks.{n}.hook_mlp_out": (layer.mlp, "out"),
            f"blocks.{n}.mlp.hook_post": (layer.mlp.down_proj, "in"),
        }
    return places


def test_grouped_query_attention_equals_hooks(llama: LanguageModel) -> None:
    assert_equal_to_hooks(llama, random_ids(4, 32, 512), llama_places(llama.module, tuple(range(5))))


def test_attention_patterns_equal_those_of_the_model_itself(llama: LanguageModel, llama_folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    eager = AutoModelForCausalLM.from_pretrained(llama_folder, attn_implementation="eager")
    ids = random_ids(2, 16, 512)
    with torch.no_grad():
        wanted = eager(ids, output_attentions=True).attentions
    for name, value in llama.capture(ids, llama.resolve(["blocks.*.attn.hook_pattern"], length=16)).items():
        pattern = value.view(2, 16, 8, 16).transpose(1, 2)
        torch.testing.assert_close(pattern, wanted[int(name.split(".")[1])], atol=1e-6, rtol=1e-5)


@pytest.mark.exhaustive
def test_smollm2_from_a_gguf_file_equals_hooks() -> None:
    lm = load_lm(str(next(smollm2_folder().glob("*.gguf"))))
    assert (lm.name, lm.n_ctx, lm.d_vocab, lm.bos) == ("SmolLM2-135M-Instruct.Q4_1", 8192, 49152, 1)
    assert lm.tokenizer.decode(lm.tokenizer("Once upon", add_special_tokens=False)["input_ids"]) == "Once upon"
    ids = random_ids(2, 8, 49152)
    assert_equal_to_hooks(lm, ids, llama_places(lm.module, (0, 15, 29)))
    assert_padding_changes_nothing(lm, ids, torch.tensor([8, 3]), ["blocks.1.hook_resid_post"])


def test_minilm_equals_hooks(minilm: LanguageModel) -> None:
    places: dict[str, tuple[nn.Module, str]] = {"hook_embed": (minilm.module.embeddings, "out")}
    for n, layer in enumerate(minilm.module.encoder.layer):
        places |= {
            f"blocks.{n}.hook_resid_post": (layer, "out"),
            f"blocks.{n}.attn.hook_q": (layer.attention.self.query, "out"),
            f"blocks.{n}.attn.hook_z": (layer.attention.output.dense, "in"),
            f"blocks.{n}.mlp.hook_post": (layer.output.dense, "in"),
        }
    assert_equal_to_hooks(minilm, random_ids(4, 20, 30000), places)


# Encoders and padding


def test_minilm_embeds_sentences_as_transformers_does(minilm: LanguageModel) -> None:
    texts = ["a cat sat on the mat", "the kitten rested upon a small rug in the sun", "interest rates rose"]
    encoded = minilm.tokenizer(texts, padding=True, return_tensors="pt")
    lengths = encoded["attention_mask"].sum(1)
    with torch.no_grad():
        wanted = minilm.module(**encoded).last_hidden_state
    last = "blocks.5.hook_resid_post"
    values = minilm.capture(encoded["input_ids"], minilm.resolve([last]), lengths)[last]
    mean = [nn.functional.normalize(values[q, :n].mean(0), dim=0) for q, n in enumerate(lengths)]
    for q, n in enumerate(lengths):
        torch.testing.assert_close(values[q, :n], wanted[q, :n], atol=1e-5, rtol=1e-5)
    assert mean[0] @ mean[1] > 0.4 > 0.2 > mean[0] @ mean[2]


def test_padding_of_an_encoder_is_masked(minilm: LanguageModel) -> None:
    assert minilm.takes_padding
    ids, lengths = random_ids(4, 20, 30000), torch.tensor([20, 7, 1, 13])
    sites = ["hook_embed", "blocks.*.hook_resid_post", "blocks.*.attn.hook_z"]
    assert_padding_changes_nothing(minilm, ids, lengths, sites)
    (last,) = minilm.resolve(["blocks.5.hook_resid_post"])
    full, none = minilm.capture(ids, [last], lengths=[20] * 4), minilm.capture(ids, [last])
    assert torch.equal(full[last.site.name], none[last.site.name])
    # Without the mask, what stands behind a sequence is read by it: so the test above can fail.
    masked = minilm.capture(ids, [last], lengths)[last.site.name]
    assert not torch.allclose(masked[1, :7], none[last.site.name][1, :7], atol=0.1)


def test_padding_of_an_encoder_is_masked_in_the_instrumented_model(minilm: LanguageModel) -> None:
    ids, lengths = random_ids(3, 12, 30000), torch.tensor([5, 12, 9])
    instrumented = [listed.site.name for listed in minilm.list_sites() if listed.instrumented]
    assert_padding_changes_nothing(minilm, ids, lengths, [next(n for n in instrumented if n.endswith("hook_scale"))])
    assert_padding_changes_nothing(minilm, ids, lengths, ["blocks.4.ln2.hook_normalized", "blocks.5.hook_resid_post"])


def test_padding_of_causal_models_needs_no_mask(llama: LanguageModel, ids: Tensor) -> None:
    masks: list[Any] = []
    handle = llama.module.register_forward_pre_hook(
        lambda _m, _a, kwargs: masks.append(kwargs.get("attention_mask")), with_kwargs=True
    )
    assert_padding_changes_nothing(llama, random_ids(3, 24, 512), torch.tensor([24, 2, 11]), ["blocks.*.hook_*_out"])
    assert masks.count(None) == len(masks) > 0
    handle.remove()
    lm = load_lm(small_module())
    assert lm.takes_padding
    assert_padding_changes_nothing(lm, ids, torch.tensor([9, 2, 5]), ["blocks.*.hook_resid_post"])
    bridge = load_lm(lm.open_instrumented())
    assert bridge.takes_padding
    assert_padding_changes_nothing(bridge, ids, torch.tensor([9, 2, 5]), ["blocks.*.hook_resid_post"])


@pytest.mark.parametrize(("model_type", "auto"), [("bert", "AutoModel"), ("roberta", "AutoModelForMaskedLM")])
@pytest.mark.filterwarnings("ignore:sites of .* are named")
def test_random_encoders_are_found_to_need_a_mask(model_type: str, auto: str, ids: Tensor) -> None:
    config = {**LLAMA_LIKE, "max_position_embeddings": 32}
    lm = load_lm(random_model(model_type, auto, **config))
    # Not every version of transformer-lens opens RoBERTa.
    last = "blocks.1.hook_resid_post" if "blocks.1.hook_resid_post" in lm.site_names else "*encoder.layer.1:out"
    assert_padding_changes_nothing(lm, ids % 30 + 5, torch.tensor([9, 2, 5]), [last])


def test_plain_modules_take_no_padding(ids: Tensor) -> None:
    lm = load_lm(Odd())
    assert not lm.takes_padding
    sites = lm.resolve(["up:out"])
    with pytest.raises(ConfigError, match=r"sequences of 4 to 9 tokens.*Odd.*equal length"):
        lm.capture(ids % 20, sites, [9, 4, 9])
    assert lm.capture(ids % 20, sites, [9, 9, 9])["up:out"].shape == (3, 9, 10)


@pytest.mark.parametrize("lengths", [[9, 9], [0, 9, 9], [9, 9, 10], [[9], [9], [9]]])
def test_lengths_that_cannot_be(lengths: Any, ids: Tensor) -> None:
    lm = load_lm(small_module())
    with pytest.raises(ConfigError, match=r"lengths must be 3 numbers of 1 to 9 tokens"):
        lm.capture(ids, lm.resolve(["hook_embed"]), lengths)


# The forward pass ends with the last site


class _Ran:
    """Names of the modules that ran, by torch's own hooks."""

    def __init__(self, module: nn.Module, paths: list[str]) -> None:
        self.names: list[str] = []
        for path in paths:
            module.get_submodule(path).register_forward_hook(lambda *_, path=path: self.names.append(path))


def test_forward_stops_in_every_kind_of_model(llama_folder: Path, ids: Tensor) -> None:
    kinds: list[tuple[Any, str, list[str], str]] = [
        (str(llama_folder), "blocks.1.hook_mlp_out", ["model.layers.1.mlp", "model.layers.2"], ""),
        (random_model("bert", "AutoModel", **LLAMA_LIKE), "blocks.0.hook_resid_post", ["encoder.layer.1"], ""),
        (Odd(), "up:out", ["up", "act", "head"], ""),
    ]
    for model, site, paths, _ in kinds:
        lm = load_lm(model)
        (resolved,) = lm.resolve([site])
        ran = _Ran(lm.module, paths)
        lm.capture(ids % 20, [resolved])
        assert ran.names == [path for path in paths[:1] if "layer.1" not in path or "mlp" in path], type(lm.module)
        assert n_hooks(lm.module) == len(paths)


def test_forward_stops_in_the_instrumented_model(llama_folder: Path, ids: Tensor) -> None:
    lm = load_lm(str(llama_folder))
    sites = lm.resolve(["blocks.1.attn.hook_pattern"], length=9)
    bridge = lm.open_instrumented()
    ran: list[str] = []
    for n in (0, 1, 2):
        bridge.hook_dict[f"blocks.{n}.hook_mlp_out"].add_hook(lambda value, hook: ran.append(hook.name))
    lm.capture(ids, sites)
    assert len(ran) == 1
    assert "blocks.0" in ran[0]
    bridge.reset_hooks()


# What can be cached


def test_list_of_sites_has_shapes_and_says_what_is_instrumented(llama: LanguageModel) -> None:
    listed = {entry.site.name: entry for entry in llama.list_sites(length=20)}
    assert list(listed) == llama.site_names
    assert listed["blocks.0.attn.hook_pattern"].site.shape == (8, 20)
    assert listed["blocks.0.attn.hook_k"].site.shape == (4, 8)
    resolved = llama.resolve(["*"], length=20)
    assert {site.site.name: (site.site.shape, site.instrumented) for site in resolved} == {
        site.site.name: (listed[site.site.name].site.shape, listed[site.site.name].instrumented) for site in resolved
    }
    some = llama.list_sites(["blocks.0.hook_*"], length=20)
    assert [entry.site.name for entry in some] == names(llama.resolve(["blocks.0.hook_*"]))
    with pytest.raises(SiteError, match="did you mean"):
        llama.list_sites(["blocks.0.hook_mlp_uot"])


def test_list_of_the_embedded_model_is_that_of_its_bridge_without_opening_it() -> None:
    lm = load_lm(small_module())
    listed = lm.list_sites(length=9)
    assert [entry.site.shape for entry in listed if entry.instrumented] == 6 * [(2, 9)]
    assert [entry.site for entry in listed] == [
        site.site for site in (lm.resolve([entry.site.name], length=9)[0] for entry in listed)
    ]
    assert len(lm.list_sites(["blocks.0.attn.*"])) == len(lm.resolve(["blocks.0.attn.*"], length=12))
