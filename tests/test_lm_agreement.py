"""The instrumented model is used where it computes what the plain one does, nowhere else; looking changes nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import warnings
from typing import Any

import pytest
import torch
from lm_models import LLAMA_LIKE, SIZES, SPECIAL, names, random_ids, random_model, small_module
from torch import Tensor

from actcache.errors import ConfigError, SiteError
from actcache.lm import bridge, load_lm
from actcache.lm.bridge import _hf_bridge, _native_bridge
from actcache.lm.processes import no_processes
from actcache.spec import Meaning

ALIBI = {**SIZES, **SPECIAL, "alibi": True, "parallel_attn": False, "multi_query": False, "bias": True}


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return random_ids(3, 9, 40)


def assert_module_paths_are_the_modules_own(lm: Any, layers: str, ids: Tensor) -> None:
    assert_reads(lm, f"{layers}.1:out", ids)


def assert_reads(lm: Any, name: str, ids: Tensor) -> None:
    """The name has what the second layer puts out, by a hook of torch's own."""
    layers = next(m for m in lm.module.modules() if isinstance(m, torch.nn.ModuleList))
    seen: list[Tensor] = []
    handle = layers[1].register_forward_hook(lambda _m, _a, out: seen.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        lm.module(ids)
    handle.remove()
    assert torch.equal(lm.capture(ids, lm.resolve([name]))[name], seen[0])


@pytest.mark.filterwarnings("ignore:sites of .* are named")
def test_an_instrumented_model_that_is_another_function_is_not_believed(ids: Tensor) -> None:
    lm = load_lm(random_model("falcon", **ALIBI))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        listed = lm.list_sites(length=9)
    if not lm.disagreement:  # another version of transformer-lens
        assert_reads(lm, "blocks.1.hook_resid_post" if "hook_embed" in lm.site_names else "transformer.h.1:out", ids)
        return
    assert "does not compute what FalconForCausalLM does" in lm.disagreement
    assert not any(entry.instrumented for entry in listed)
    with pytest.raises(SiteError, match=r"blocks.1.hook_resid_post.*off by .*may stand for transformer.h.1:out"):
        lm.resolve(["blocks.1.hook_resid_post"])
    with pytest.raises(SiteError, match="off by"):
        lm.resolve(["blocks.1.attn.hook_pattern"], length=9)
    assert "hook_embed" in lm.site_names  # it agrees, and comes before
    assert_module_paths_are_the_modules_own(lm, "transformer.h", ids)


def changed_bridge(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """Something about every bridge is not as in the model that it was made from."""
    inner = _hf_bridge

    def opened(*args: Any) -> Any:
        found = inner(*args)
        change(found.model.original_model)
        return found

    monkeypatch.setattr(bridge, "_hf_bridge", opened)


def test_behind_the_first_block_that_differs_no_name_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    changed_bridge(
        monkeypatch,
        lambda model: model.model.layers[1].mlp.down_proj.register_forward_hook(lambda _m, _a, out: 1.1 * out),
    )
    lm = load_lm(random_model("llama", **LLAMA_LIKE))
    with pytest.warns(UserWarning, match=r"blocks\.1\.hook_out on \(off by"):
        known = lm.site_names
    hooks = [name for name in known if ":" not in name]
    assert "blocks.0.hook_resid_post" in hooks
    assert "blocks.0.attn.hook_pattern" in hooks  # instrumented, and before the last output that agrees
    assert "blocks.1.attn.hook_q" in hooks  # a plain module's, before the first that does not
    assert "blocks.1.attn.hook_pattern" not in hooks
    assert not {"blocks.1.hook_resid_post", "ln_final.hook_in", "unembed.hook_out"} & set(hooks)
    assert "model.layers.1:out" in known
    with (
        pytest.raises(ConfigError, match="cannot splice sites of the instrumented model"),
        lm.splice("blocks.0.attn.hook_pattern", "blocks.0.attn.hook_pattern", lambda x: x),
    ):
        pass


def test_logits_of_another_scale_leave_the_blocks_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    changed_bridge(monkeypatch, lambda model: model.register_forward_hook(lambda _m, _a, out: _scaled(out)))

    def _scaled(out: Any) -> Any:
        out.logits = 3 * out.logits
        return out

    lm = load_lm(random_model("llama", **LLAMA_LIKE))
    with pytest.warns(UserWarning, match=r"from what it puts out on"):
        assert {"blocks.1.hook_resid_post", "blocks.1.attn.hook_pattern"} <= set(lm.site_names)
    assert lm.disagreement


def test_windows_show_at_the_length_that_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def local(model: Any) -> None:
        layer = model.model.layers[0].mlp.down_proj
        layer.register_forward_hook(lambda _m, _a, out: out if out.shape[1] < 14 else 1.1 * out)

    changed_bridge(monkeypatch, local)
    lm = load_lm(random_model("llama", **LLAMA_LIKE))
    assert lm.resolve(["blocks.0.attn.hook_pattern"], length=12)
    assert not lm.disagreement
    with pytest.raises(SiteError, match=r"sequences of 16 tokens.*blocks\.0\.hook_out"):
        lm.resolve(["blocks.0.attn.hook_pattern"], length=16)
    assert lm.resolve(["blocks.0.hook_resid_post"], length=16)  # of the plain model


def test_the_embedded_models_bridge_is_compared_when_it_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = load_lm(small_module())
    inner = _native_bridge

    def opened(*args: Any) -> Any:
        found = inner(*args)
        with torch.no_grad():
            found.model.state_dict()["blocks.1.mlp.out.bias"].add_(1)
        return found

    monkeypatch.setattr(bridge, "_native_bridge", opened)
    assert lm.site_names
    assert not lm.disagreement  # nothing was opened
    with pytest.raises(SiteError, match=r"blocks.2.attn.hook_pattern cannot be cached.*blocks.1.hook_out"):
        lm.resolve(["blocks.2.attn.hook_pattern"], length=9)
    assert lm.resolve(["blocks.0.attn.hook_pattern"], length=9)


@pytest.mark.parametrize(
    "error",
    [
        AssertionError(),
        RuntimeError("split_with_sizes"),
        IndexError("x"),
        ImportError("y"),
        SystemExit(2),
        OSError("z"),
    ],
)
def test_adapters_may_raise_anything(monkeypatch: pytest.MonkeyPatch, error: BaseException, ids: Tensor) -> None:
    def raising(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(bridge, "_hf_bridge", raising)
    lm = load_lm(random_model("llama", **LLAMA_LIKE))
    reason = str(error) or "AssertionError"
    with pytest.warns(UserWarning, match=rf"transformer-lens cannot open LlamaForCausalLM .*: {reason}"):
        sites = lm.resolve(["model.layers.1.mlp:out"])
    assert lm.capture(ids, sites)["model.layers.1.mlp:out"].shape == (3, 9, 24)
    with pytest.raises(ConfigError) as caught:
        lm.open_instrumented()
    assert caught.value.__cause__ is error


@pytest.mark.filterwarnings("ignore:sites of .* are named")
@pytest.mark.parametrize(
    ("model_type", "config"),
    [
        ("falcon", {**SIZES, **SPECIAL, "hidden_size": 32, "num_attention_heads": 4, "num_kv_heads": 2}),
        ("gpt_neox", {**LLAMA_LIKE, "attention_bias": False}),
    ],
)
def test_variants_that_adapters_do_not_know(model_type: str, config: dict[str, Any], ids: Tensor) -> None:
    more = {"new_decoder_architecture": True} if model_type == "falcon" else {}
    lm = load_lm(random_model(model_type, **config, **more))
    layers = "transformer.h" if model_type == "falcon" else "gpt_neox.layers"
    assert_module_paths_are_the_modules_own(lm, layers, ids)


# Module paths beside hook names


@pytest.mark.parametrize("kind", ["llama", "stories"])
def test_module_paths_are_names_of_every_model(kind: str, ids: Tensor) -> None:
    lm = load_lm(random_model("llama", **LLAMA_LIKE) if kind == "llama" else small_module())
    path = "model.layers.1.mlp:out" if kind == "llama" else "blocks.1.mlp:out"
    found = lm.resolve([path, "blocks.1.hook_mlp_out"])
    assert names(found) == ["blocks.1.hook_mlp_out", path]  # hook names first
    assert found[0].spot == found[1].spot
    assert found[0].site.meaning == found[1].site.meaning == Meaning(module=path.removesuffix(":out"))
    values = lm.capture(ids, found)
    assert torch.equal(*values.values())
    # Patterns that hook names match mean those alone.
    assert not any(":" in name for pattern in ("*", "blocks.*") for name in names(lm.resolve([pattern], length=9)))
    assert not any(":" in name for name in lm.site_names)
    below = lm.resolve([path.replace("1", "*")])
    assert len(below) == len(lm.module.model.layers if kind == "llama" else lm.module.blocks)
    # With instrumented sites beside them, each is read where it belongs.
    pattern = lm.resolve(["blocks.1.attn.hook_pattern"], length=9)
    together = lm.capture(ids, [*pattern, *found])
    assert all(torch.equal(together[name], value) for name, value in values.items())
    with lm.splice(path, path, torch.zeros_like):
        assert not lm.capture(ids, found)[path].any()
    with (
        lm.splice(pattern[0], pattern[0], lambda x: x),
        pytest.raises(ConfigError, match="is not in the instrumented model"),
    ):
        lm.capture(ids, lm.resolve([path]))


# Nothing is started


def test_nothing_is_started_by_looking_at_a_multimodal_model(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers as hf

    started: list[Any] = []

    def start(_self: Any, args: Any, *_: Any) -> None:
        started.append(args)
        raise OSError("stopped by the test")

    # Behind this there is only the system; and what runs a shell.
    monkeypatch.setattr(subprocess.Popen, "_execute_child", start)
    monkeypatch.setattr(os, "system", lambda command: started.append(command) or 1)
    text = {**LLAMA_LIKE, "num_key_value_heads": 3, "head_dim": 8, "query_pre_attn_scalar": 8, "vocab_size": 97}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = hf.Gemma3Config(
        text_config=text,
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=90,
        boi_token_index=91,
        eoi_token_index=92,
    )
    lm = load_lm(hf.Gemma3ForConditionalGeneration(config).eval())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert len(lm.site_names) > 20
    assert started == []
    with pytest.raises(OSError, match="stopped by the test"):
        subprocess.run([sys.executable, "-V"], check=False)  # the test can fail


def test_the_guard_is_for_its_own_thread_and_goes_away() -> None:
    before = subprocess.Popen.__init__, os.system
    elsewhere: list[int] = []
    with no_processes():
        with no_processes(), pytest.raises(PermissionError, match="only looked at"):
            subprocess.run([sys.executable, "-V"], check=False)
        with pytest.raises(PermissionError):
            os.system("true")
        thread = threading.Thread(target=lambda: elsewhere.append(subprocess.run(["true"], check=False).returncode))
        thread.start()
        thread.join()
    assert elsewhere == [0]
    assert (subprocess.Popen.__init__, os.system) == before
