"""One place in a model: hooking it, and the layout of what passes there.

Shapes: Q sequences, T positions, D width of a site; `*F` the feature axes that are flattened into D.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn

from actcache.spec import Site

Side = Literal["in", "out"]
"""First argument of a module, or its output: of a tuple the first element, of named fields `logits` or the first."""

SIDES: tuple[Side, ...] = ("in", "out")

Layout = Literal["Q T *F", "1 T *F", "T F", "QT F", "Q F T F", "Q F T K"]
"""Axes as the model has them: the usual; shared by the sequences (positions), with or without an axis of length one;
sequences and positions in one axis (routers of experts); heads before positions; attention patterns (`K` keys)."""

Use = Callable[[Tensor], Tensor | None]
"""What a hook does with the value; a tensor that it returns takes the value's place."""

_HEADS_FIRST = ("Q F T F", "Q F T K")
_PATTERNS = ("hook_pattern", "hook_attn_scores")


@dataclass(frozen=True)
class Spot:
    """The input or output of a module; `instrumented` when the module is a transformer-lens HookPoint."""

    module: nn.Module
    side: Side
    instrumented: bool = False


@dataclass(frozen=True)
class ResolvedSite:
    """A site, and where in the model it is read."""

    site: Site
    module: nn.Module
    side: Side
    instrumented: bool
    """Whether it needs the instrumented model; `module` is then a transformer-lens HookPoint."""
    layout: Layout = "Q T *F"
    """Axes of the value in the model."""
    overwritten: bool = False
    """Whether the model changes the value in place later in the same forward, so that it must be copied when read."""

    @property
    def spot(self) -> Spot:
        """Where it is; names with equal spots are aliases of each other."""
        return Spot(self.module, self.side, self.instrumented)


class ForwardStopped(BaseException):
    """Leaves a forward pass from inside a hook; no `Exception`, so that no model code catches it on the way out."""


def attach(spot: Spot, use: Use) -> Callable[[], object]:
    """Hook a spot; returns the function that takes the hook away again.

    A HookPoint is hooked through its own method: it converts values to the layout that transformer-lens documents,
    and models ask it whether anybody listens.
    """
    if spot.instrumented:
        point: Any = spot.module
        level = id(use)
        point.add_hook(lambda value, hook: use(value), level=level)
        return partial(point.remove_hooks, "fwd", level=level)
    if spot.side == "in":
        return spot.module.register_forward_pre_hook(partial(_on_input, use), with_kwargs=True).remove
    return spot.module.register_forward_hook(partial(_on_output, use)).remove


def _on_input(use: Use, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name = "" if args else _first_parameter(module, kwargs)
    new = use(args[0] if args else kwargs.get(name))  # type: ignore[arg-type]  # a survey looks at what is no tensor, too
    if new is None:
        return None
    return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, name: new})


def _first_parameter(module: nn.Module, kwargs: dict[str, Any]) -> str:
    """Name of the first parameter of `forward`, for models that call their modules with keywords only."""
    first = next(iter(inspect.signature(module.forward).parameters), "")
    return first if first in kwargs else next(iter(kwargs), "")


def _on_output(use: Use, _module: nn.Module, _args: Any, output: Any) -> Any:
    if isinstance(output, Tensor):
        return use(output)
    if isinstance(output, (tuple, list)):
        new = use(output[0]) if output else None
        make = getattr(output, "_make", type(output))
        return None if new is None else make((new, *output[1:]))
    if isinstance(output, Mapping):
        return _on_fields(use, output)
    return use(output)


def _on_fields(use: Use, output: Mapping[str, Any]) -> Any:
    """Of an output with named fields: its logits, or the first tensor."""
    tensors = [name for name, value in output.items() if isinstance(value, Tensor)]
    if not tensors:
        return None
    name = "logits" if "logits" in tensors else tensors[0]
    new = use(output[name])
    if new is None:
        return None
    changed: Any = copy(output)
    changed[name] = new
    return changed


def layout_of(name: str, value: Any, n_sequences: int, n_positions: int) -> Layout | None:
    """The layout of a value seen under a hook name; None when it is no activation (ids, masks, caches)."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.ndim < 2:
        return None
    if name.endswith(_PATTERNS):
        return "Q F T K" if value.ndim == 4 else None
    layouts: dict[tuple[int, ...], Layout]
    if value.ndim == 2:
        layouts = {(n_positions,): "T F", (n_sequences * n_positions,): "QT F"}
        return layouts.get(value.shape[:1])
    layouts = {(n_sequences, n_positions): "Q T *F", (1, n_positions): "1 T *F"}
    heads_first = value.ndim == 4 and value.shape[::2] == (n_sequences, n_positions)
    return layouts.get(value.shape[:2], "Q F T F" if heads_first else None)


def feature_axes(value: Tensor, layout: Layout) -> tuple[int, ...]:
    """`*F`; of an attention pattern, heads and keys."""
    if layout in _HEADS_FIRST:
        return value.shape[1], value.shape[3]
    return tuple(value.shape[1:] if layout in ("T F", "QT F") else value.shape[2:])


def to_rows(value: Tensor, layout: Layout, ids_shape: tuple[int, int]) -> Tensor:
    """The value as `(Q, T, D)`: without a copy where possible (always, in the usual layout with one feature axis)."""
    match layout:
        case "Q T *F":
            return value.flatten(2)
        case "Q F T F" | "Q F T K":
            return value.transpose(1, 2).flatten(2)
        case "QT F":
            return value.view(*ids_shape, -1)
        case _:
            return value.expand(*ids_shape, *feature_axes(value, layout)).flatten(2)


def from_rows(rows: Tensor, like: Tensor, layout: Layout) -> Tensor:
    """`(Q, T, D)` rows in the layout and dtype of the value that they replace."""
    rows = rows.to(like.dtype)
    match layout:
        case "Q F T F" | "Q F T K":
            return rows.reshape(*rows.shape[:2], like.shape[1], like.shape[3]).transpose(1, 2)
        case "QT F":
            return rows.flatten(0, 1)
        case "T F":
            return rows
        case _:
            return rows.reshape(*rows.shape[:2], *like.shape[2:])
