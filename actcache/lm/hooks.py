"""One place in a model: hooking it, and the layout of what passes there.

Shapes: Q sequences, T positions, D width of a site; `*F` the feature axes that are flattened into D.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn

from actcache.errors import SiteError
from actcache.spec import Site

Side = Literal["in", "out"]
"""First argument of a module, or its output: of a tuple the first element, of named fields `logits` or the first."""

SIDES: tuple[Side, ...] = ("in", "out")

Layout = str
"""Axes as the model has them, separated by spaces: `Q` and `T`, each exactly once, or `QT` for both in one axis
(routers of experts); no `Q`, or `1` in its place, where all sequences share the value (positions); `F` a feature axis,
`K` the keys of attention patterns. The usual one is `Q T F`."""

PATTERN: Layout = "Q F T K"
"""Attention patterns, as wide as the sequence is long."""

Use = Callable[[Tensor], Tensor | None]
"""What a hook does with the value; a tensor that it returns takes the value's place."""

_PATTERNS = ("hook_pattern", "hook_attn_scores")


@dataclass(frozen=True)
class Spot:
    """The input or output of a module; `instrumented` when the module is a transformer-lens HookPoint."""

    module: nn.Module
    side: Side
    instrumented: bool = False
    call: int = 0
    """Which run, from 1 on, of a module that runs several times in one forward pass; 0 for one that runs once."""


@dataclass(frozen=True)
class ResolvedSite:
    """A site, and where in the model it is read."""

    site: Site
    module: nn.Module
    side: Side
    instrumented: bool
    """Whether it needs the instrumented model; `module` is then a transformer-lens HookPoint."""
    layout: Layout = "Q T F"
    """Axes of the value in the model."""
    overwritten: bool = False
    """Whether the model changes the value in place later in the same forward, so that it must be copied when read."""
    call: int = 0
    """Which run of its module, as in `Spot.call`."""

    @property
    def is_pattern(self) -> bool:
        """Whether a row is as wide as the sequence is long."""
        return self.layout == PATTERN

    @property
    def spot(self) -> Spot:
        """Where it is; names with equal spots are aliases of each other."""
        return Spot(self.module, self.side, self.instrumented, self.call)


class ForwardStopped(BaseException):
    """Leaves a forward pass from inside a hook; not an `Exception`, so that no model code catches it on the way."""


def attach(spot: Spot, use: Use, number_of_pass: Callable[[], int] = int) -> Callable[[], object]:
    """Hook a spot; returns the function that takes the hook away again.

    `number_of_pass` tells one forward pass from the next, for a spot that is one of several runs of its module; what is
    attached for a single pass does not need it.

    A HookPoint is hooked through its own method: it converts values to the layout that transformer-lens documents,
    and models ask it whether it has hooks.
    """
    if spot.call:
        use = partial(_on_call, use, spot.call, number_of_pass, [])
    if spot.instrumented:
        point: Any = spot.module
        level = id(use)
        point.add_hook(lambda value, hook: use(value), level=level)
        return partial(point.remove_hooks, "fwd", level=level)
    if spot.side == "in":
        return spot.module.register_forward_pre_hook(partial(_on_input, use), with_kwargs=True).remove
    return spot.module.register_forward_hook(partial(_on_output, use)).remove


def _on_call(use: Use, call: int, number_of_pass: Callable[[], int], seen: list[int], value: Tensor) -> Tensor | None:
    """Use the value of one of the module's runs; `seen` has an entry for each of its runs in this pass."""
    current = number_of_pass()
    if seen and seen[0] != current:
        seen.clear()
    seen.append(current)
    return use(value) if len(seen) == call else None


def _on_input(use: Use, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name = "" if args else _first_parameter(module, kwargs)
    new = use(args[0] if args else kwargs.get(name))  # type: ignore[arg-type]  # a survey looks at what is no tensor, too
    if new is None:
        return None
    return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, name: new})


def _first_parameter(module: nn.Module, kwargs: dict[str, Any]) -> str:
    """Name of the first parameter of `forward`, for models that call modules with keywords only."""
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


def is_pattern(name: str) -> bool:
    """Whether a hook of this name has attention patterns, or scores of the same shape."""
    return name.endswith(_PATTERNS)


def layout_of(
    pattern: bool, shapes: Sequence[tuple[int, ...]], ids_shapes: Sequence[tuple[int, int]]
) -> tuple[Layout | None, str]:
    """The layout of a value, by its shapes for two batches of other Q and other T; or None, and why it has none.

    An axis belongs to sequences or positions only if it follows their number in both; equality in one is no proof.
    """
    if len({len(shape) for shape in shapes}) > 1:
        return None, f"has another number of axes for another batch ({_describe_shapes(shapes, ids_shapes)})"
    axes, one_position = [_role(sizes, ids_shapes) for sizes in zip(*shapes, strict=True)], ids_shapes[0][1] == 1
    if pattern:
        known = axes == ["Q", "F", "T", "T"] or (one_position and axes[0] == "Q" and shapes[0][2:] == (1, 1))
        return (PATTERN, "") if known else (None, f"is no attention pattern ({_describe_shapes(shapes, ids_shapes)})")
    if one_position:
        axes = _roles_of_one_position(axes, shapes[0])
    if "Q" not in axes and axes[:2] == ["F", "T"] and shapes[0][0] == 1:
        axes[0] = "1"
    layout = " ".join(axes)
    once = sorted(axis for axis in axes if axis != "F") == ["Q", "T"] and "F" in axes
    if once or re.fullmatch(r"(1 T|T|QT)( F)+", layout):
        return layout, ""
    return None, f"{_why_no_layout(axes)} ({_describe_shapes(shapes, ids_shapes)})"


def _role(sizes: tuple[int, ...], ids_shapes: Sequence[tuple[int, int]]) -> str:
    """What an axis follows, by its sizes for each batch; `?` for what is neither tokens nor constant."""
    sequences, positions = zip(*ids_shapes, strict=True)
    if len(set(sizes)) == 1:
        return "T" if sizes == positions and sizes[0] > 1 else "F"
    tokens = tuple(q * t for q, t in ids_shapes)
    return {tokens: "QT", sequences: "Q", positions: "T"}.get(sizes, "?")


def _roles_of_one_position(axes: list[str], shape: tuple[int, ...]) -> list[str]:
    """For a model of a single position, whose axes of size one are all alike: the first possible one."""
    ones = [i for i, n in enumerate(shape) if n == 1 and i >= min(1, len(shape) - 2)]
    if ones:
        return [*axes[: ones[0]], "T", *axes[ones[0] + 1 :]]
    return ["QT", *axes[1:]] if axes[0] == "Q" else axes


def _why_no_layout(axes: list[str]) -> str:
    if axes.count("T") > 1:
        return f"has {axes.count('T')} axes that are as long as the sequence"
    if "?" in axes and not {"T", "QT"} & set(axes):
        return "is given some of the tokens only, or pieces of them"
    if not {"T", "QT"} & set(axes):
        return "has no axis of positions"
    return "has no axis of features" if "Q" in axes else "has no axis of sequences"


def _describe_shapes(shapes: Sequence[tuple[int, ...]], ids_shapes: Sequence[tuple[int, int]]) -> str:
    both = zip(shapes, ids_shapes, strict=True)
    return ", ".join(f"shape {'x'.join(map(str, shape))} for {q}x{t} tokens" for shape, (q, t) in both)


def feature_axes(value: Tensor, layout: Layout) -> tuple[int, ...]:
    """Sizes of the feature axes; of an attention pattern, heads and keys."""
    return tuple(n for n, axis in zip(value.shape, layout.split(), strict=True) if axis in ("F", "K"))


def ids_shape_of(value: Tensor, layout: Layout) -> tuple[int, int] | None:
    """Q and T of the batch that a value belongs to, if it has an axis for each."""
    axes = layout.split()
    return (value.shape[axes.index("Q")], value.shape[axes.index("T")]) if "Q" in axes else None


def to_rows(value: Tensor, layout: Layout, ids_shape: tuple[int, int]) -> Tensor:
    """The value as `(Q, T, D)`: without a copy where possible (always, in the usual layout with one feature axis).

    Raises:
        SiteError: the value does not have these sequences and positions, so its rows cannot be assigned to tokens.
    """
    n_sequences, n_positions = ids_shape
    axes = layout.split()
    if axes[0] == "T" and value.ndim == len(axes) + 1:  # a spliced value has a row for each sequence
        axes = ["1", *axes]
    sizes = {"Q": n_sequences, "T": n_positions, "QT": n_sequences * n_positions}
    if len(axes) != value.ndim or any(sizes.get(axis, n) != n for axis, n in zip(axes, value.shape, strict=True)):
        raise SiteError(
            f"its value has shape {tuple(value.shape)} for {n_sequences} sequences of {n_positions} positions, where "
            f"the axes {layout} were expected: the model does not treat all batches alike"
        )
    if axes[0] == "QT":
        return value.reshape(*ids_shape, -1)
    if "Q" not in axes:
        return value.expand(*ids_shape, *feature_axes(value, " ".join(axes))).flatten(2)
    return value.movedim((axes.index("Q"), axes.index("T")), (0, 1)).flatten(2)


def from_rows(rows: Tensor, like: Tensor, layout: Layout) -> Tensor:
    """`(Q, T, D)` rows in the layout and dtype of the value that they replace."""
    axes, rows = layout.split(), rows.to(like.dtype)
    if axes[0] == "QT":
        return rows.reshape(like.shape)
    rows = rows.reshape(*rows.shape[:2], *feature_axes(like, layout))
    return rows.movedim((0, 1), (axes.index("Q"), axes.index("T"))) if "Q" in axes else rows
