"""How a model is run on token ids: what its forward pass takes, and what its output means.

Shapes: Q sequences, T positions, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from actcache.errors import ConfigError
from actcache.lm.remembered import Remembered

_LOGITS = ("logits", "log_probs", "log_probabilities")
"""What models call the output that next-token probabilities are computed from."""


class Forward:
    """Calls a model: `forward(tokens, mask)`, with keyword arguments that are the same each time."""

    def __init__(self, module: nn.Module, always: Mapping[str, Any], *, masks: bool) -> None:
        """`masks`: whether its `attention_mask`, if it takes one, is what Hugging Face means by that."""
        self._module = module
        self._always = dict(always)
        self.takes_mask = masks and "attention_mask" in inspect.signature(module.forward).parameters
        # It may have been used already: a single token undoes what longer sequences have done to it.
        with torch.no_grad(), suppress(Exception):  # some models do not take a single token, and may raise anything
            module(torch.zeros((1, 1), dtype=torch.int64, device=device_of(module)), **self._always)
        self._remembered = Remembered(module)

    def __call__(self, tokens: Tensor, mask: Tensor | None = None) -> Any:
        """The model's output in its own form, independent of what was run before."""
        self._remembered.prepare(tokens.shape[1])
        if mask is None:
            return self._module(tokens, **self._always)
        return self._module(tokens, attention_mask=mask, **self._always)


def device_of(module: nn.Module) -> torch.device:
    """Where a model runs: the device of its first parameter that is in memory."""
    return next((p.device for p in module.parameters() if not p.is_meta), torch.device("cpu"))


def huggingface_forward(module: Any) -> Forward:
    """A Hugging Face model without its cache of keys and values, which is of no use here; encoders have none."""
    named = "use_cache" in inspect.signature(module.forward).parameters
    return Forward(module, {"use_cache": False} if named or module.can_generate() else {}, masks=True)


def padding_mask(lengths: Tensor, n_positions: int) -> Tensor:
    """`(Q, T)` int64: 1 at positions that are tokens, 0 after the end of a sequence."""
    return (torch.arange(n_positions, device=lengths.device) < lengths[:, None]).long()


def logits_of(output: Any, name: str) -> Tensor:
    """Logits or log-probabilities `(Q, T, V)` in an output: a tensor, the first of a tuple, or a field of that name.

    Raises:
        ConfigError: the output has none.
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        fields: Mapping[str, Any] = output
    elif isinstance(output, (tuple, list)) and not hasattr(output, "_fields"):
        fields = {"logits": output[0] if output else None}
    else:
        fields = {field: getattr(output, field, None) for field in _LOGITS}
        fields = {field: value for field, value in fields.items() if value is not None}
    for field in _LOGITS:
        found = fields.get(field)
        if isinstance(found, Tensor):
            return found
    has = ", ".join(map(str, fields)) or type(output).__name__
    raise ConfigError(f"{name} has no logits: its output is {has}; cache its sites, or load it with its head")


def ignores_what_follows(run: Callable[[Tensor], Any], ids: Tensor, d_vocab: int) -> bool:
    """Whether positions keep their values, bit for bit, when other tokens follow: padding cannot change them.

    Two forward passes of a few tokens decide, because no config field tells this for all models.
    """
    n_first = ids.shape[1] // 2
    other = ids.clone()
    other[:, n_first:] = (other[:, n_first:] + 1) % d_vocab
    with torch.no_grad():
        one, two = (first_tensor(run(tokens)) for tokens in (ids, other))
    if one is None or two is None or one.ndim < 3 or one.shape[:2] != ids.shape:
        return False
    return torch.equal(one[:, :n_first], two[:, :n_first])


def first_tensor(output: Any) -> Tensor | None:
    """The main output of a model: logits, or hidden states."""
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    return next((value for value in values if isinstance(value, Tensor)), None)


def is_bare(module: Any) -> bool:
    """Whether it is a Hugging Face model without a head, which ends in hidden states."""
    return getattr(module, "base_model", None) is module
