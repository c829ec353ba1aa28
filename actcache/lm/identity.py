"""What says which base model, and which tokenizer, activations came from: digests, and settings without weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from actcache.spec import digest_of

_LABELS = ("name", "revision")
"""Entries of an identity that say where a model came from, not what it computes."""
_NOT_ALWAYS_THERE = {"found": ("config", "tokenizer"), "asked": ("tokenizer",)}
"""Entries that are compared only if both sides have them: stores of early versions have no `config`; and without a
tokenizer the tokens are token ids, whose digest the store has."""

_NO_VALUE = frozenset(
    {
        *("architectures", "auto_map", "dtype", "is_composition", "keys_to_ignore_at_inference", "model_type"),
        *("name_or_path", "quantization_config", "torch_dtype", "torchscript", "transformers_version"),
        *("transformers_weights", "vocab_size", "bos_token_id", "eos_token_id", "tokenizer_class"),
        *("id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "task_specific_params"),
        *("initializer_factor", "initializer_range", "pretraining_tp", "router_aux_loss_coef"),
        *("output_attentions", "output_hidden_states", "output_router_logits", "return_dict", "use_return_dict"),
        *("chunk_size_feed_forward", "use_cache"),
    }
)
"""Entries of a Hugging Face config that change no activation in eval mode, or are recorded elsewhere."""
_NO_VALUE_ENDS = ("_name_or_path", "_implementation", "dropout", "dropout_prob", "pdrop", "layerdrop", "drop_rate")


def weights_digest(module: nn.Module) -> str:
    """sha256 (hex) over the state dict in sorted order: names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(_state_dict(module).items()):
        if not isinstance(tensor, torch.Tensor):
            continue
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return digest.hexdigest()


def computation_of(module: Any) -> dict[str, Any]:
    """What a Hugging Face config says about the computation beyond the weights: rotary bases, epsilons, soft caps, ...

    Only what differs from the defaults of the config's class, so that a model keeps its identity when a later version
    of transformers adds a setting. JSON-able; empty for a module without a config.
    """
    config: Any = getattr(module, "config", None)
    if not hasattr(config, "to_dict"):
        return {}
    try:
        usual = type(config)().to_dict()
    except Exception:  # configs of some models cannot be made without arguments
        usual = {}
    found: dict[str, Any] = json.loads(json.dumps(_differences(config.to_dict(), usual), default=str, sort_keys=True))
    return found


def _differences(config: Mapping[str, Any], usual: Mapping[str, Any]) -> dict[str, Any]:
    """Where a config, and the configs in it, differ from the defaults, except in what changes no value."""
    # How many positions there are is a claim, and changes values only where rotary positions are stretched to it.
    kinds = {*_rope_kinds(config.get("rope_parameters")), "default"}
    stretched = len(kinds) > 1 or config.get("rope_scaling") is not None
    different: dict[str, Any] = {}
    for key, value in config.items():
        if key in _NO_VALUE or key.endswith(_NO_VALUE_ENDS) or (key == "max_position_embeddings" and not stretched):
            continue
        if isinstance(value, Mapping):
            known = usual.get(key)
            value = _differences(value, known if isinstance(known, Mapping) else {})
            if not value and known is not None:
                continue
        elif key in usual and value == usual[key]:
            continue
        different[key] = value
    return different


def _rope_kinds(parameters: Any) -> list[Any]:
    """The kinds of rotary positions; each kind of layer may have its own."""
    if not isinstance(parameters, Mapping):
        return []
    here = [parameters["rope_type"]] if "rope_type" in parameters else []
    return here + [kind for value in parameters.values() for kind in _rope_kinds(value)]


def is_same_model(found: Mapping[str, Any], asked: Mapping[str, Any]) -> bool:
    """Whether two identities belong to models that give the same activations; names do not matter.

    Args:
        found: the identity in a store.
        asked: the identity of an open model.
    """
    for key in {*found, *asked} - {*_LABELS}:
        one, other = found.get(key), asked.get(key)
        optional = (one is None and key in _NOT_ALWAYS_THERE["found"]) or (
            other is None and key in _NOT_ALWAYS_THERE["asked"]
        )
        if one != other and not optional:
            return False
    return True


def _state_dict(module: nn.Module) -> dict[str, Any]:
    """The state dict with the weights that accelerate keeps on disk, which are empty in the module itself."""
    if not any(p.is_meta for p in module.parameters()):
        return module.state_dict()
    from accelerate.utils.modeling import get_state_dict_offloaded_model  # type: ignore[import-untyped]

    return get_state_dict_offloaded_model(module)  # type: ignore[no-any-return]  # untyped library


def quantization_of(module: Any) -> str | None:
    """How a Hugging Face model's weights are packed, by its config: `bitsandbytes-8bit`, `gptq`, ...; or None."""
    config = getattr(getattr(module, "config", None), "quantization_config", None)
    if config is None:
        return None
    plain = config if isinstance(config, dict) else config.to_dict()
    method = str(getattr(plain.get("quant_method"), "value", plain.get("quant_method")))
    bits = 8 if plain.get("load_in_8bit") else 4 if plain.get("load_in_4bit") else plain.get("bits")
    return f"{method}-{bits}bit" if bits else method


def tokenizer_digest(tokenizer: Any) -> str:
    """sha256 (hex) of what decides a tokenizer's ids: its whole definition, or of a slow tokenizer its vocabulary."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return digest_of({"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()})
    # Truncation and padding are leftovers of earlier calls, not part of the definition.
    definition = json.loads(backend.to_str())
    return digest_of({k: v for k, v in definition.items() if k not in ("truncation", "padding")})
