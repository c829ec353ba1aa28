"""A training run's state in one file: tensors, and all else as JSON, bound together by a digest.

In: tensors by name and a JSON-able state. Out: a safetensors file, from which the same comes back, or an error.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actcache.errors import StateError
from actcache.files import parse_json, shown, why_not_tensors, write_whole

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 2
_WITHOUT_DIGEST = 1
"""The version before, in which nothing tells a damaged checkpoint from a sound one."""
WAY_OUT = "delete it to begin again, or take a copy of it that is whole"


def write_checkpoint(path: Path, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Replace the file: one, so that a crash never leaves new weights beside an old state."""
    from safetensors.torch import save

    text = json.dumps({"version": VERSION, **state})
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_whole(path, save(whole, metadata={"state": text, "sha256": _digest(text, whole)}))


def read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """State and tensors of a checkpoint, checked against its digest; one of before there was any only with a warning.

    Raises:
        StateError: not a checkpoint, damaged, or of another version.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    except (SafetensorError, ValueError, OSError) as error:
        reason = why_not_tensors(path, error)
        raise StateError(f"{path} is not a readable checkpoint: it {reason}; {WAY_OUT}") from error
    text = metadata.get("state", "{}")
    try:
        state = parse_json(text.encode())
    except ValueError as error:
        raise StateError(f"{path} is not a readable checkpoint: its state {error}; {WAY_OUT}") from error
    version = state.get("version") if isinstance(state, dict) else None
    if type(version) is not int or version not in (VERSION, _WITHOUT_DIGEST):
        raise StateError(
            f"{path} is a checkpoint of version {shown(version)}, this actcache reads {_WITHOUT_DIGEST} and {VERSION}; "
            f"{WAY_OUT}"
        )
    if version == _WITHOUT_DIGEST and "sha256" not in metadata:
        warnings.warn(
            f"{path} was written by an actcache that kept no digest of its tensors: damage to it cannot be seen",
            stacklevel=2,
        )
    elif metadata.get("sha256") != _digest(text, tensors):
        raise StateError(f"{path} is damaged: its content is not what its digest says; {WAY_OUT}")
    return state, tensors


def _digest(state: str, tensors: Mapping[str, Tensor]) -> str:
    """sha256 (hex) of the state as it is written, and of each tensor's name, dtype, shape and bytes."""
    import torch

    digest = hashlib.sha256(json.dumps(["actcache checkpoint", VERSION, state]).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
