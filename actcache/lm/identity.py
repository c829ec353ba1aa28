"""Digests that say which base model, and which tokenizer, activations came from."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import nn

from actcache.spec import digest_of


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


def _state_dict(module: nn.Module) -> dict[str, Any]:
    """With the weights that accelerate keeps on disk until a layer runs, which are empty in the module itself."""
    if not any(p.is_meta for p in module.parameters()):
        return module.state_dict()
    from accelerate.utils.modeling import get_state_dict_offloaded_model  # type: ignore[import-untyped]

    return get_state_dict_offloaded_model(module)  # type: ignore[no-any-return]  # untyped library


def quantization_of(module: Any) -> str | None:
    """How a Hugging Face model's weights are packed, by its config: `bitsandbytes-8bit`, `gptq`, ...; None if not."""
    config = getattr(getattr(module, "config", None), "quantization_config", None)
    if config is None:
        return None
    plain = config if isinstance(config, dict) else config.to_dict()
    method = str(getattr(plain.get("quant_method"), "value", plain.get("quant_method")))
    bits = 8 if plain.get("load_in_8bit") else 4 if plain.get("load_in_4bit") else plain.get("bits")
    return f"{method}-{bits}bit" if bits else method


def tokenizer_digest(tokenizer: Any) -> str:
    """sha256 (hex) of what decides a tokenizer's ids: its whole definition, or its vocabulary if it is a slow one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return digest_of({"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()})
    # Truncation and padding are leftovers of earlier calls, not part of the definition.
    definition = json.loads(backend.to_str())
    return digest_of({k: v for k, v in definition.items() if k not in ("truncation", "padding")})
