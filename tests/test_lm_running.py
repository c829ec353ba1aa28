"""Autocast, torch.compile, device maps and 8 bits: the same sites, and nothing that stays behind."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_models import SMALL, n_hooks, random_ids, small_module
from torch import Tensor, nn

from actcache.errors import ConfigError
from actcache.lm import LanguageModel, load_lm
from actcache.lm.compiled import largest_parts_without
from actcache.lm.stories import StoriesLM

PATTERNS = ["blocks.*.hook_resid_post", "blocks.1.attn.hook_z"]


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return random_ids(3, 9, 40)


# Autocast


def test_autocast_is_torchs(ids: Tensor) -> None:
    module = small_module()
    lm = load_lm(module, autocast="bfloat16")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        wanted = module(ids)
    assert lm.dtype == torch.float32
    assert wanted.dtype == torch.bfloat16
    assert torch.equal(lm.logits(ids), wanted)
    value = lm.capture(ids, lm.resolve(["blocks.1.hook_mlp_out"]))["blocks.1.hook_mlp_out"]
    assert value.dtype == torch.bfloat16
    assert not torch.is_autocast_enabled("cpu")
    assert lm.identity["autocast"] == "bfloat16"
    assert "autocast" not in load_lm(module).identity
    with pytest.raises(ConfigError, match=r"autocast must be one of bfloat16, float16, got 'float32'"):
        load_lm(module, autocast="float32")


# torch.compile


@pytest.mark.parametrize(
    ("hooked", "parts"),
    [
        ([], [""]),
        (["unembed"], ["blocks.0", "blocks.1", "blocks.2"]),
        (["blocks.0", "blocks.2"], ["blocks.0", "blocks.1", "blocks.2"]),
        (["blocks.1.mlp"], ["blocks.0", "blocks.1.attn", "blocks.1.mlp", "blocks.2"]),
        (["blocks.1.attn.o"], ["blocks.0", "blocks.1.mlp", "blocks.2"]),
    ],
)
def test_parts_are_the_largest_without_a_hook_inside(hooked: list[str], parts: list[str]) -> None:
    module = small_module()
    found = largest_parts_without(module, [module.get_submodule(path) for path in hooked])
    paths = {m: path for path, m in module.named_modules()}
    assert [paths[part] for part in found] == parts


def n_compiled() -> int:
    """Graphs that torch has compiled in this process."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


@pytest.mark.exhaustive
def test_compiled_model_has_the_sites_of_the_plain_one_and_compiles_once(llama_folder: Path) -> None:
    torch._dynamo.reset()
    folder = str(llama_folder)
    plain, lm = load_lm(folder), load_lm(folder, compile=True)
    patterns = ["blocks.2.hook_resid_pre", "blocks.3.hook_resid_post"]
    sites, begun = lm.resolve(patterns), n_compiled()
    ran: list[int] = []
    lm.module.lm_head.register_forward_hook(lambda *_: ran.append(1))

    def check(n_sequences: int) -> None:
        ids = random_ids(n_sequences, 16, 512, seed=n_sequences)
        wanted = plain.capture(ids, plain.resolve(patterns))
        for name, value in lm.capture(ids, sites).items():
            torch.testing.assert_close(value, wanted[name], atol=1e-5, rtol=1e-4)

    check(8)
    first = n_compiled()
    assert first > begun  # something was compiled
    check(8)
    assert n_compiled() == first  # and not again for another batch
    check(5)
    any_size = n_compiled()
    for n_sequences in (3, 7, 2, 8, 6):
        check(n_sequences)
    assert n_compiled() == any_size  # one more for batches of any size, and that is all
    assert ran == []  # the forward pass still ends with the last site
    assert n_hooks(lm.module) == 1
    assert not any("forward" in vars(m) for m in lm.module.modules())


@pytest.mark.exhaustive
def test_compiled_model_splices_and_takes_other_sites(ids: Tensor) -> None:
    torch._dynamo.reset()
    plain, lm = load_lm(small_module()), load_lm(small_module(), compile=True)
    assert lm.identity["compiled"] is True
    torch.testing.assert_close(lm.logits(ids), plain.logits(ids), atol=1e-5, rtol=1e-4)
    for patterns in (["blocks.1.hook_resid_post"], ["blocks.1.mlp.hook_post", "hook_embed"]):
        wanted = plain.capture(ids, plain.resolve(patterns))
        for name, value in lm.capture(ids, lm.resolve(patterns)).items():
            torch.testing.assert_close(value, wanted[name], atol=1e-5, rtol=1e-4)
    with lm.splice("blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out", torch.zeros_like):
        ablated = lm.logits(ids)
    with plain.splice("blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out", torch.zeros_like):
        torch.testing.assert_close(ablated, plain.logits(ids), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(lm.logits(ids), plain.logits(ids), atol=1e-5, rtol=1e-4)
    with pytest.raises(ConfigError, match=r"torch.compile gains nothing"):
        load_lm(plain.open_instrumented(), compile=True)


@pytest.mark.exhaustive
def test_a_forward_of_the_models_own_comes_back_after_a_compiled_run(ids: Tensor) -> None:
    module = small_module()
    calls: list[int] = []

    def forward(*args: Any) -> Any:
        calls.append(1)
        return type(module.blocks[2]).forward(module.blocks[2], *args)

    module.blocks[2].forward = forward
    lm = load_lm(module, compile=True)
    lm.capture(ids, lm.resolve(["blocks.2.hook_resid_post"]))
    assert module.blocks[2].forward is forward
    assert calls


# Device maps and 8 bits


def assert_like(lm: LanguageModel, plain: LanguageModel, tolerance: float) -> None:
    ids = random_ids(2, 9, 512)
    patterns = [*PATTERNS, "blocks.2.attn.hook_pattern"]
    wanted = plain.capture(ids, plain.resolve(patterns, length=9))
    for name, value in lm.capture(ids, lm.resolve(patterns, length=9)).items():
        assert (value.float() - wanted[name]).norm() <= tolerance * wanted[name].norm(), name
    assert not any(site.instrumented for site in lm.resolve(PATTERNS))


LAYERS = [f"model.layers.{n}" for n in range(5)]
ON_DISK: dict[str, Any] = {
    **dict.fromkeys(["model.embed_tokens", *LAYERS, "model.norm", "model.rotary_emb", "lm_head"], "cpu"),
    "model.layers.2": "disk",
}
ALL_ON_DISK = {**dict.fromkeys(ON_DISK, "disk"), "model.norm": "cpu"}


# transformer-lens 3 opens no model that is partly on disk: its sites are module paths.
needs_4 = pytest.mark.needs("transformer-lens>=4")
PARTLY_ON_DISK = [pytest.param(where, marks=needs_4) for where in (ON_DISK, ALL_ON_DISK)]


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}, *PARTLY_ON_DISK])
def test_model_spread_by_a_device_map_is_the_same_model(llama_folder: Path, device_map: Any) -> None:
    folder = str(llama_folder)
    lm, plain = load_lm(folder, device_map=device_map), load_lm(folder)
    assert lm.recipe == {"model": folder, "device_map": device_map}
    assert lm.identity == plain.identity
    if torch.cuda.is_available() and device_map == "auto":
        pytest.skip("is on a GPU here, which computes in another order")
    assert_like(lm, plain, 0.0)


@pytest.mark.needs("bitsandbytes")
def test_model_in_8_bits(llama_folder: Path) -> None:
    folder = str(llama_folder)
    lm, plain = load_lm(folder, load_in_8bit=True, device="cpu"), load_lm(folder)
    assert lm.quantization == lm.identity["quantization"] == "bitsandbytes-8bit"
    assert lm.module.model.layers[0].mlp.up_proj.weight.dtype == torch.int8
    assert lm.identity["weights"] != plain.identity["weights"]
    assert lm.identity == load_lm(**(lm.recipe or {})).identity
    assert_like(lm, plain, 0.05)


def test_8_bits_without_the_package_says_what_to_install(llama_folder: Path) -> None:
    if importlib.util.find_spec("bitsandbytes") is not None:
        pytest.skip("bitsandbytes is installed")
    with pytest.raises(ConfigError, match=r"load_in_8bit needs bitsandbytes.*pip install bitsandbytes"):
        load_lm(str(llama_folder), load_in_8bit=True)


def test_placements_that_contradict_each_other(llama_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"device='cpu' and device_map='auto'.*say one"):
        load_lm(str(llama_folder), device="cpu", device_map="auto")
    for model in (StoriesLM(SMALL), "stories-4l"):
        with pytest.raises(ConfigError, match=r"device_map is for models that are loaded from Hugging Face"):
            load_lm(model, device_map="auto")
    with pytest.raises(ConfigError, match=r"load_in_8bit is for models .* Linear is not"):
        load_lm(nn.Linear(2, 2), load_in_8bit=True)
