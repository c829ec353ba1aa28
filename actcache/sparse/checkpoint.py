"""Checkpoints of a training run: one file with tensors, and with everything else as JSON, bound together by a digest.

In: the state of a run between two steps. Out: a safetensors file, from which the same state comes back; or an error, if
the file is damaged or belongs to another run.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actcache.errors import ConfigError, StateError
from actcache.files import parse_json, path_of, shown, why_not_tensors, write_whole

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

    from actcache.sparse.model import SparseMLP

CHECKPOINT = "checkpoint.safetensors"
HISTORY = ("step", "loss", "fvu", "l0", "dead")
"""Columns of a run's history."""
VERSION = 2
_WITHOUT_DIGEST = 1
"""The version before, in which damage cannot be seen."""
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""What Adam keeps for a parameter."""
_WAY_OUT = "delete it to begin again, or take a copy of it that is whole"


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A training run between two steps."""

    step: int
    """Steps done."""
    seconds: float
    """Time in the training loop so far."""
    identity: Mapping[str, Any]
    """Everything that decides the run's bits, JSON-able; `identity["config"]` is the training config."""
    loader: Mapping[str, Any]
    """State of the loader."""
    history: dict[str, list[float]]
    """Columns of `HISTORY`."""
    tensors: Mapping[str, Tensor]
    """Weights, moments and counters by name."""

    def write(self, path: Path) -> None:
        """Replace the file. It is one file, so that a crash never leaves new weights beside an old state."""
        from safetensors.torch import save

        state = {
            "version": VERSION,
            "step": self.step,
            "seconds": self.seconds,
            "identity": self.identity,
            "loader": self.loader,
            "history": self.history,
        }
        text = json.dumps(state)
        whole = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors.items()}
        write_whole(path, save(whole, metadata={"state": text, "sha256": _digest(text, whole)}))

    @classmethod
    def read(cls, path: Path, *, identity: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Checkpoint:
        """The checkpoint of the run with that identity, whose tensors have the dtypes and shapes of `tensors`.

        Raises:
            StateError: the file is not a checkpoint, is damaged, is of another version, or belongs to another run.
        """
        state, found = _read(path)
        _check_state(path, state, identity["config"]["n_steps"])
        _check_identity(path, found=state["identity"], asked=identity)
        _check_tensors(path, found=found, expected=tensors)
        names = ("step", "seconds", "identity", "loader", "history")
        return cls(**{name: state[name] for name in names}, tensors=found)


def checkpoint_in(folder: str | Path) -> Path:
    """The checkpoint's path in a folder, which is checked before the first step.

    Raises:
        ConfigError: there can be no such folder.
    """
    from actcache.store import refuse_inside_store

    folder = path_of(folder, "checkpoint")
    refuse_inside_store(folder)
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir():
        raise ConfigError(f"checkpoint must be a folder, and {existing} is a file; name another place")
    return folder / CHECKPOINT


def tensors_of(mlp: SparseMLP, optimizer: Optimizer) -> dict[str, Tensor]:
    """Weights and moments by name; a moment that the optimizer has not made yet is zero."""
    import torch

    found: dict[str, Tensor] = {}
    for name, parameter in mlp.named_parameters():
        zeros = {"step": torch.zeros(()), "exp_avg": parameter, "exp_avg_sq": parameter}
        moments = optimizer.state.get(parameter) or {key: torch.zeros_like(like) for key, like in zeros.items()}
        found |= {name: parameter, **{f"{name}/{key}": moments[key] for key in _MOMENTS}}
    return found


def restore_tensors(mlp: SparseMLP, optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put the tensors that `tensors_of` named back; to be called without gradients."""
    moments: dict[int, dict[str, Tensor]] = {}
    for index, (name, parameter) in enumerate(mlp.named_parameters()):
        parameter.copy_(tensors[name])
        moments[index] = {key: tensors[f"{name}/{key}"] for key in _MOMENTS}
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """State and tensors of a file, checked against its digest; a file of version 1 has none, and gets a warning."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    except (SafetensorError, ValueError, OSError) as error:
        reason = why_not_tensors(path, error)
        raise StateError(f"{path} is not a readable checkpoint: it {reason}; {_WAY_OUT}") from error
    text = metadata.get("state", "{}")
    try:
        state = parse_json(text.encode())
    except ValueError as error:
        raise StateError(f"{path} is not a readable checkpoint: its state {error}; {_WAY_OUT}") from error
    version = state.get("version") if isinstance(state, dict) else None
    if type(version) is not int or version not in (VERSION, _WITHOUT_DIGEST):
        raise StateError(
            f"{path} is a checkpoint of version {shown(version)}, this actcache reads {_WITHOUT_DIGEST} and {VERSION}; "
            f"{_WAY_OUT}"
        )
    if version == _WITHOUT_DIGEST and "sha256" not in metadata:
        warnings.warn(
            f"{path} was written by an actcache that kept no digest of its tensors: damage to it cannot be seen",
            stacklevel=3,
        )
    elif metadata.get("sha256") != _digest(text, tensors):
        raise StateError(f"{path} is damaged: its content does not match its digest; {_WAY_OUT}")
    return state, tensors


def _digest(state: str, tensors: Mapping[str, Tensor]) -> str:
    """sha256 (hex) of the state as it is written, and of each tensor's name, dtype, shape and bytes."""
    import torch

    digest = hashlib.sha256(json.dumps(["actcache checkpoint", VERSION, state]).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check_state(path: Path, state: Mapping[str, Any], n_steps: int) -> None:
    """Raise `StateError` for the first field that a run of `n_steps` steps cannot have saved."""
    step, seconds, history, identity = (state.get(name) for name in ("step", "seconds", "history", "identity"))
    history = history if isinstance(history, dict) else {}
    columns = history.values()
    numbers = all(type(value) in (int, float) for column in columns if isinstance(column, list) for value in column)
    lengths = {len(column) if isinstance(column, list) else None for column in columns}
    config = identity.get("config") if isinstance(identity, dict) else None
    if isinstance(config, dict):
        n_steps = config.get("n_steps", n_steps)  # `_check_identity` reports a difference
    wrong = {
        "step": type(step) is not int or type(n_steps) is not int or not 0 < step <= n_steps,
        "seconds": not isinstance(seconds, int | float) or not 0 <= seconds < math.inf,
        "history": tuple(history) != HISTORY or len(lengths) != 1 or None in lengths or not numbers,
        "identity": not isinstance(config, dict),
        "loader": not isinstance(state.get("loader"), dict),
    }
    for name, is_wrong in wrong.items():
        if is_wrong:
            raise StateError(f"{path}: its {name} is {shown(state.get(name))}, which no run has saved; {_WAY_OUT}")


def _check_identity(path: Path, *, found: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Raise `StateError` with each difference between the run of a checkpoint and the run that was asked for."""
    flat_found = {**found, **found["config"], "config": None}
    flat_asked = {**asked, **asked["config"], "config": None}
    names = sorted(
        name for name in flat_found.keys() | flat_asked.keys() if flat_found.get(name) != flat_asked.get(name)
    )
    if names:
        differences = "; ".join(f"{name} was {flat_found.get(name)!r}, now {flat_asked.get(name)!r}" for name in names)
        raise StateError(
            f"{path} belongs to another run: {differences}; use another folder, or delete it to begin again"
        )


def _check_tensors(path: Path, *, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    has, wanted = (
        {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} for tensors in (found, expected)
    )
    for name in sorted(has.keys() | wanted.keys()):
        if has.get(name) != wanted.get(name):
            raise StateError(
                f"{path} has {shown(has.get(name))} for the tensor {name}, where this run has "
                f"{shown(wanted.get(name))}; {_WAY_OUT}"
            )
