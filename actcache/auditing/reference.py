"""What the model computes for one sequence, alone, at its own length, in the whole forward pass.

Plain torch hooks on the modules that a store names give the values. The axis of positions is found by a second run at
another length: it is the one whose size follows the tokens.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from actcache.auditing.compare import FloatRows
from actcache.lm import LanguageModel
from actcache.spec import Meaning

_SAME_FUNCTION = {torch.float32: 1e-3, torch.float64: 1e-3}
_SAME_FUNCTION_16_BIT = 5e-2
"""Relative difference of logits and block outputs up to which two models count as the same function."""
_BLOCK = "blocks.{}.hook_out"


@dataclass(slots=True)
class _Watched:
    """What passed in one forward pass; events are numbered in their order."""

    values: dict[tuple[str, str], list[tuple[int, Any]]] = field(default_factory=dict)
    """`(module path, side)` -> `(moment, value)` of each call."""
    lookups: list[tuple[int, int, Tensor]] = field(default_factory=list)
    """Of each lookup in an embedding: `(moment, rows of its table, ids)`."""
    n_events: int = 0

    def moment(self) -> int:
        """Count an event, and return its number."""
        self.n_events += 1
        return self.n_events


class Reference:
    """Computes the values of one model at some places, one sequence at a time.

    Args:
        lm: the model.
        meanings: what each site stands for.
    """

    def __init__(self, lm: LanguageModel, meanings: Mapping[str, Meaning]) -> None:
        self.lm, self.meanings = lm, meanings
        self._axes: dict[str, int] | None = None

    def describe(self, name: str) -> str:
        """Where the reference value of a site comes from."""
        meaning = self.meanings[name]
        return f"instrumented model, {meaning}" if meaning.transformer_lens else f"plain model, {meaning}"

    def values(self, ids: NDArray[np.uint32], n_copies: int = 1) -> dict[str, FloatRows | str]:
        """`(T, D)` values of every site for the `(T,)` tokens, or the reason why the model gives no values.

        With `n_copies`, those of the last of so many copies of the sequence in one batch: what differs from the values
        of the sequence alone is rounding.
        """
        found = self._run(ids, n_copies)
        if self._axes is None:
            self._axes = self._find_axes(ids, found)
        return {name: self._as_rows(name, value, len(ids)) for name, value in found.items()}

    def _find_axes(self, ids: NDArray[np.uint32], found: Mapping[str, Tensor | str]) -> dict[str, int]:
        """For each site, the first axis that is as long as the sequence at two different lengths."""
        other_ids = ids[:-1] if len(ids) > 1 else np.repeat(ids, 2)
        others, both = self._run(other_ids), (len(ids), len(other_ids))
        axes: dict[str, int] = {}
        for name, value in found.items():
            other = others[name]
            if isinstance(value, Tensor) and isinstance(other, Tensor) and value.ndim == other.ndim:
                sizes = list(zip(value.shape, other.shape, strict=True))
                axes |= {name: sizes.index(both)} if both in sizes else {}
        return axes

    def _as_rows(self, name: str, value: Tensor | str, n_tokens: int) -> FloatRows | str:
        if isinstance(value, str):
            return value
        axis = (self._axes or {}).get(name)
        if axis is None or axis >= value.ndim or value.shape[axis] != n_tokens:
            return f"its value has the shape {tuple(value.shape)} for {n_tokens} tokens: no axis follows the tokens"
        return value.movedim(axis, 0).reshape(n_tokens, -1).to("cpu", torch.float64).numpy()

    def _run(self, ids: NDArray[np.uint32], n_copies: int = 1) -> dict[str, Tensor | str]:
        tokens = torch.from_numpy(ids.astype(np.int64)).to(self.lm.device).repeat(n_copies, 1)
        hooks = {name: m for name, m in self.meanings.items() if m.transformer_lens}
        plain = {name: m for name, m in self.meanings.items() if not m.transformer_lens}
        is_plain = self.lm.kind != "transformer_lens"
        blocks = self._block_paths() if hooks and is_plain else {}
        found: dict[str, Tensor | str] = {}
        if plain or is_plain:
            output, watched = self._run_plain(tokens, [*plain.values(), *(Meaning(module=p) for p in blocks.values())])
            found |= {name: _value_of(watched, meaning, tokens) for name, meaning in plain.items()}
        if hooks:
            logits, cache = self._run_instrumented(tokens, hooks)
            problem = self._difference(output, watched, logits, cache, blocks) if is_plain else ""
            found |= dict.fromkeys(hooks, problem) if problem else self._of_hooks(hooks, cache)
        return {name: _last_copy(value, n_copies, len(ids)) for name, value in found.items()}

    # The plain model

    def _run_plain(self, tokens: Tensor, places: list[Meaning]) -> tuple[Any, _Watched]:
        module, watched = self.lm.module, _Watched()
        modules = dict(module.named_modules(remove_duplicate=False))
        with torch.no_grad(), self._cast(), ExitStack() as attached:
            with suppress(Exception):  # a model that does not take a single token has nothing to undo
                # Rotary frequencies that a long sequence has stretched stay stretched until a short one comes.
                module(tokens[:1, :1])
            for path, side in dict.fromkeys((place.module, place.side) for place in places):
                if path in modules:
                    attached.callback(_watch(modules[path], path, side, watched).remove)
            for embedding in module.modules():
                if isinstance(embedding, nn.Embedding):
                    attached.callback(embedding.register_forward_pre_hook(_lookup_watcher(watched)).remove)
            output = module(tokens)
        return output, watched

    @contextmanager
    def _cast(self) -> Iterator[None]:
        autocast = self.lm.autocast
        with torch.autocast(self.lm.device.type, autocast) if autocast else nullcontext():
            yield

    # The instrumented model

    def _run_instrumented(self, tokens: Tensor, hooks: Mapping[str, Meaning]) -> tuple[Any, Mapping[str, Tensor]]:
        bridge = self.lm.open_instrumented()
        n_blocks = len(getattr(bridge, "blocks", ()))
        wanted = {m.module for m in hooks.values()} | {_BLOCK.format(i) for i in range(n_blocks)}
        with torch.no_grad(), self._cast(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logits, cache = bridge.run_with_cache(tokens, names_filter=lambda name: name in wanted)
            return logits, {name: value.detach().clone() for name, value in dict(cache).items()}

    def _of_hooks(self, hooks: Mapping[str, Meaning], cache: Mapping[str, Tensor]) -> dict[str, Tensor | str]:
        missing = "transformer-lens has no value under this name"
        return {name: cache.get(meaning.module, missing) for name, meaning in hooks.items()}

    def _block_paths(self) -> dict[int, str]:
        """The path of the plain model's block that each block of the instrumented model wraps."""
        bridge = self.lm.open_instrumented()
        if self.lm.kind == "stories":
            return {i: f"blocks.{i}" for i in range(len(bridge.blocks))}
        theirs = {id(m): path.replace("._original_component", "") for path, m in bridge.original_model.named_modules()}
        ours = dict(self.lm.module.named_modules())
        found = {i: theirs.get(id(b.original_component), "") for i, b in enumerate(getattr(bridge, "blocks", ()))}
        bare = {i: path.partition(".")[2] for i, path in found.items()}  # a head was put around a bare model
        return {i: path if path in ours else bare[i] for i, path in found.items() if {path, bare[i]} & set(ours)}

    def _difference(
        self, output: Any, watched: _Watched, logits: Any, cache: Mapping[str, Tensor], blocks: Mapping[int, str]
    ) -> str:
        """Where the instrumented model first computes something else than the plain one; empty if they agree."""
        for i, path in blocks.items():
            ours, theirs = watched.values.get((path, "out"), [(0, None)])[-1][1], cache.get(_BLOCK.format(i))
            if isinstance(ours, Tensor) and isinstance(theirs, Tensor) and not self._equal(ours, theirs):
                return f"the instrumented model is not the plain one: block {i} puts out something else"
        ours = getattr(output, "logits", output[0] if isinstance(output, tuple) else output)
        if isinstance(ours, Tensor) and isinstance(logits, Tensor) and ours.shape == logits.shape:
            return "" if self._equal(ours, logits) else "the instrumented model is not the plain one: its logits differ"
        return "" if blocks else "the instrumented model has nothing that could be held against the plain one"

    def _equal(self, ours: Tensor, theirs: Tensor) -> bool:
        if ours.shape != theirs.shape:
            return False
        size, off = ours.double().norm(), (ours.double() - theirs.double()).norm()
        return bool(off <= _SAME_FUNCTION.get(self.lm.autocast or self.lm.dtype, _SAME_FUNCTION_16_BIT) * size)


def _watch(module: nn.Module, path: str, side: str, watched: _Watched) -> Any:
    def keep(value: Any) -> None:
        value = _first_tensor(value)
        value = value.detach().clone() if isinstance(value, Tensor) else value
        watched.values.setdefault((path, side), []).append((watched.moment(), value))

    if side == "out":
        return module.register_forward_hook(lambda _module, _args, output: keep(output))

    def keep_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = [name for name in inspect.signature(module.forward).parameters if name in kwargs]
        keep(args[0] if args else kwargs[names[0]] if names else None)

    return module.register_forward_pre_hook(keep_input, with_kwargs=True)


def _first_tensor(value: Any) -> Any:
    """The tensor in an output: itself, the first of a tuple, or of named fields `logits` or the first."""
    if isinstance(value, Mapping):
        tensors = {key: v for key, v in value.items() if isinstance(v, Tensor)}
        return tensors.get("logits", next(iter(tensors.values()), None))
    if isinstance(value, (tuple, list)):
        return value[0] if value else None
    return value


def _lookup_watcher(watched: _Watched) -> Any:
    def keep(module: nn.Embedding, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor) and not args[0].is_floating_point():
            watched.lookups.append((watched.moment(), module.num_embeddings, args[0].detach().clone()))

    return keep


def _value_of(watched: _Watched, meaning: Meaning, tokens: Tensor) -> Tensor | str:
    """The value that passed a place, or what is wrong with it."""
    calls = watched.values.get((meaning.module, meaning.side), [])
    if not calls:
        return "the model has no such module, or does not run it"
    if not meaning.call and len(calls) > 1:
        return f"the module runs {len(calls)} times in one forward pass, and the name does not say which run is meant"
    if meaning.call > len(calls):
        return f"the module runs {len(calls)} times in one forward pass"
    moment, value = calls[max(meaning.call, 1) - 1]
    if not isinstance(value, Tensor):
        return f"its value is a {type(value).__name__}, not a tensor"
    return _fed_otherwise(watched, moment, tokens) or value


def _last_copy(value: Tensor | str, n_copies: int, n_tokens: int) -> Tensor | str:
    """The last sequence's part of a batch's value; a value shared by all sequences as it is."""
    if isinstance(value, str) or n_copies == 1 or not value.ndim:
        return value
    if value.shape[0] == n_copies * n_tokens:
        return value[-n_tokens:]
    return value[-1:] if value.shape[0] == n_copies else value


def _fed_otherwise(watched: _Watched, moment: int, tokens: Tensor) -> str:
    """Whether, before this moment, the token table was last given tokens other than the sequence's, as in decoders.

    A table is a token table if one of its size is given the sequence itself; others hold positions or types.
    """
    ids = tokens.flatten()
    fed = [(size, given.flatten()) for when, size, given in watched.lookups if when < moment]
    sizes = {size for size, given in fed if torch.equal(given.long(), ids)}
    last = [given for size, given in fed if size in sizes and given.numel() == ids.numel()][-1:]
    if not last or torch.equal(last[0].long(), ids):
        return ""
    return f"the model makes other tokens out of the sequence and is fed those ({last[0][:4].tolist()}, ...)"
