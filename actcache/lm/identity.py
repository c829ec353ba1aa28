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
    for name, tensor in sorted(module.state_dict().items()):
        if not isinstance(tensor, torch.Tensor):
            continue
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return digest.hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """sha256 (hex) of what decides a tokenizer's ids: its whole definition, or its vocabulary if it is a slow one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return digest_of({"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()})
    # Truncation and padding are leftovers of earlier calls, not part of the definition.
    definition = json.loads(backend.to_str())
    return digest_of({k: v for k, v in definition.items() if k not in ("truncation", "padding")})
