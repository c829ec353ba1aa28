"""What passes at given places of a model: one forward pass of a few tokens shows which are reached, and in which order,
layout and width. Sizes are never guessed from a config.

In: a way to run a model, and places under candidate names. Out: the sites that were seen; two models compared by the
values at their sites. Which names a model has, and what patterns mean, is decided in `names.py`.

Sites are found by agreement of values. transformer-lens knows what its hook names mean; which module of the plain model
has that value as its input or output depends on the architecture. One forward pass of a few tokens through both models
shows it. A name for which no module gives the same values is read from the instrumented model, as long as its blocks'
outputs and logits equal those of the plain model.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from actcache.errors import ConfigError
from actcache.lm.hooks import SIDES, Layout, ResolvedSite, Spot, attach, feature_axes, is_pattern, layout_of, to_rows
from actcache.spec import Site

Run = Callable[[Tensor], object]
"""One forward pass of `(Q, T)` token ids."""


_Kept = TypeVar("_Kept")


_Q, _T = 2, 11
"""Size of a survey: small, since every value is kept."""


_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}


_TOLERANCE_16_BIT = 5e-2


@dataclass(frozen=True)
class Seen:
    """A site, and its value `(Q, T, D)` in the first batch of the survey."""

    place: ResolvedSite
    rows: Tensor


@dataclass(frozen=True)
class Survey:
    """What passes where, in the order of the forward pass."""

    seen: dict[str, Seen]
    refused: dict[str, str]
    """Names where activations pass that cannot be stored as rows of tokens, and why (as in "streams:out has ...")."""
    idle: dict[str, str]
    """Names where no activations pass, and what is there instead."""


@dataclass(frozen=True, slots=True)
class Listed:
    """A site that can be cached."""

    site: Site
    instrumented: bool
    """Whether reading it runs the instrumented model, which is slower."""


def id_table(run: Run, module: nn.Module, device: torch.device) -> tuple[int | None, int | None]:
    """How many tokens a module knows, and with how many positions it had to be run to find out (None: any).

    Tokens are the rows of the embedding that is given the ids; None if there is no such table. The ids tried are in
    every table of the module; if that fails, only as many positions are run as the smallest table has rows, because it
    may hold positions.

    Raises:
        ConfigError: the model does not run on token ids.
    """
    tables = [m for m in module.modules() if isinstance(m, nn.Embedding)]
    smallest = min((m.num_embeddings for m in tables), default=None)
    try:
        return _size_of_table(run, tables, survey_ids(smallest, None, device)[0]) or smallest, None
    except ConfigError:
        if smallest is None:
            raise
        return _size_of_table(run, tables, survey_ids(smallest, smallest, device)[0]) or smallest, smallest


def _size_of_table(run: Run, tables: Sequence[nn.Embedding], ids: Tensor) -> int | None:
    """Rows of the first table that is given the ids themselves."""
    spots = {Spot(m, "in"): m.num_embeddings for m in tables}
    given = _record(run, spots, ids, lambda _, value: isinstance(value, Tensor) and torch.equal(value, ids))
    return next((spots[spot] for spot, _ in given if given[spot, 1]), None)


def survey_ids(d_vocab: int | None, n_ctx: int | None, device: torch.device, length: int = _T) -> list[Tensor]:
    """Three batches `(Q, T)` of token ids, within the model's vocabulary and context.

    The second has more sequences of fewer tokens, so that axes of sequences and positions cannot be confused. The
    third is the first with another first sequence.
    """
    n_positions = min(length, n_ctx or length)
    shapes = (_Q, n_positions), (_Q + 1, max(1, n_positions - 4))
    first, second = ((torch.arange(q * t, device=device) * 7 + 5).remainder(d_vocab or 2).view(q, t) for q, t in shapes)
    third = first.clone()
    third[0] = (third[0] + 1).remainder(d_vocab or 2)
    return [first, second, third]


def survey(run: Run, spots: Mapping[str, Spot], batches: Sequence[Tensor], tolerance: float | None = None) -> Survey:
    """Run a few tokens and record what passes at the spots; names come in the order of the forward pass.

    A module that runs several times in one pass has a name for each of its runs: `path:out@2`. `tolerance` is how much
    of a value may change (relative) with the other sequences of its batch, by default as much as rounding explains.

    Raises:
        ConfigError: the model does not run on token ids.
    """
    names: dict[Spot, list[str]] = {}
    for name, spot in spots.items():
        names.setdefault(spot, []).append(name)
    first = _record(run, names, batches[0], lambda _, value: (value, _copy(value)))
    second = _record(run, names, batches[1], lambda _, value: _shape(value))
    ids_shapes = [(ids.shape[0], ids.shape[1]) for ids in batches[:2]]
    layouts: dict[_Pass, tuple[Layout | None, str]] = {}
    for passed, (_, copy) in first.items():
        shapes = [_shape(copy), second.get(passed)]
        if None not in shapes:
            layouts[passed] = layout_of(any(map(is_pattern, names[passed[0]])), shapes, ids_shapes)  # type: ignore[arg-type]

    def depends_on_the_batch(passed: _Pass, value: Any) -> bool:
        layout = layouts.get(passed, (None, ""))[0]
        if layout is None or _shape(value) != _shape(first[passed][1]):
            return False
        before, after = (to_rows(v, layout, ids_shapes[0])[1:] for v in (first[passed][1], value))
        return not torch.equal(after, before) and not equal(after.nan_to_num(), before.nan_to_num(), tolerance)

    third = _record(run, names, batches[2], depends_on_the_batch)
    calls = [Counter(spot for spot, _ in passing) for passing in (first, second, third)]
    found = Survey({}, {}, {})
    for spot in names:
        n_calls = [counted[spot] for counted in calls]
        if n_calls[0] == 0 or n_calls.count(n_calls[0]) < len(n_calls) or n_calls[0] > 1:
            # Each run is offered if all batches ran it equally often: only the bare name is unknown.
            active = (
                n_calls.count(n_calls[0]) < len(n_calls) and _shape(first.get((spot, 1), (None, None))[1]) is not None
            )
            where = found.refused if active else found.idle
            where |= {name: _why_not_by_this_name(name, n_calls) for name in names[spot]}
    for (spot, call), (value, copy) in first.items():
        n_calls = [counted[spot] for counted in calls]
        if n_calls.count(n_calls[0]) < len(n_calls):
            continue
        one = replace(spot, call=call if n_calls[0] > 1 else 0)
        for name in names[spot]:
            called = f"{name}@{call}" if one.call else name
            layout, why = layouts.get((spot, call), (None, ""))
            if _shape(copy) is None:
                found.idle[called] = f"is {_kind(copy)}, no activations"
            elif layout is None:
                found.refused[called] = why or "is something else for another batch"
            elif third[spot, call]:
                found.refused[called] = "changes with the other sequences of its batch (or from one run to the next)"
            else:
                found.seen[called] = _make_seen(called, one, value, copy, layout, ids_shapes[0])
    return found


def values_at(run: Run, places: Mapping[str, ResolvedSite], ids: Tensor) -> dict[str, Seen]:
    """Values at places that are already known, for one batch."""
    spots = {place.spot: name for name, place in places.items()}
    values = _record(run, spots, ids, lambda _, value: value.clone())
    shape = ids.shape[0], ids.shape[1]
    found = {spots[spot]: value for (spot, _), value in values.items()}
    return {name: Seen(places[name], to_rows(value, places[name].layout, shape)) for name, value in found.items()}


_Pass = tuple[Spot, int]
"""A spot, and which of its values in one forward pass, from 1 on."""


def _record(run: Run, spots: Iterable[Spot], ids: Tensor, keep: Callable[[_Pass, Any], _Kept]) -> dict[_Pass, _Kept]:
    """What `keep` makes of every value that passes, in order."""
    kept: dict[_Pass, _Kept] = {}
    n_calls: Counter[Spot] = Counter()

    def keeper(spot: Spot) -> Callable[[Any], None]:
        def take(value: Any) -> None:
            n_calls[spot] += 1
            kept[spot, n_calls[spot]] = keep((spot, n_calls[spot]), value)

        return take

    with torch.no_grad(), ExitStack() as attached:
        for spot in spots:
            attached.callback(attach(spot, keeper(spot)))
        try:
            run(ids)
        except Exception as error:  # a model may raise anything
            raise ConfigError(f"the model does not run on token ids of shape {tuple(ids.shape)}: {error}") from error
    return kept


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _shape(value: Any) -> tuple[int, ...] | None:
    """The shape of what may be activations; None for ids, masks and caches."""
    known = isinstance(value, Tensor) and value.is_floating_point() and value.ndim >= 2
    return tuple(value.shape) if known else None


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {str(value.dtype).removeprefix('torch.')} with {value.ndim} axes"
    return "nothing" if value is None else f"a {type(value).__name__}"


def _why_not_by_this_name(name: str, n_calls: Sequence[int]) -> str:
    if not any(n_calls):
        return "takes no part in a forward pass of token ids"
    if n_calls.count(n_calls[0]) < len(n_calls):
        return f"runs {' or '.join(map(str, sorted(set(n_calls))))} times in one forward pass, depending on the tokens"
    return f"runs {n_calls[0]} times in one forward pass: say which, {name}@1 to {name}@{n_calls[0]}"


def _make_seen(name: str, spot: Spot, value: Tensor, copy: Tensor, layout: Layout, ids_shape: tuple[int, int]) -> Seen:
    site = Site(name=name, shape=feature_axes(copy, layout))
    overwritten = not torch.equal(value, copy) and not torch.equal(value.nan_to_num(), copy.nan_to_num())
    place = ResolvedSite(site, spot.module, spot.side, spot.instrumented, layout, overwritten, spot.call)
    return Seen(place, to_rows(copy, layout, ids_shape))


def module_spots(module: nn.Module) -> dict[str, Spot]:
    """`module.path:in` and `module.path:out` of every submodule of any model (the model itself has the empty path).

    A module that is in several places has a name for each of them.
    """
    return {f"{path}:{side}": Spot(m, side) for path, m in _paths(module, "", ()) for side in SIDES}


def _paths(module: nn.Module, path: str, above: tuple[nn.Module, ...]) -> Iterator[tuple[str, nn.Module]]:
    yield path, module
    for name, child in module._modules.items():  # named_children() leaves out what it has seen
        if child is not None and child is not module and child not in above:
            yield from _paths(child, f"{path}.{name}" if path else name, (*above, module))


def choose_places(plain: Mapping[str, Seen], instrumented: Mapping[str, Seen]) -> dict[str, ResolvedSite]:
    """Where to read each of the instrumented model's names: at a plain module if that gave the same values.

    Values, not rules, decide: architectures differ in what they do between a module and the hook of the same name.
    The tolerance allows for another attention kernel, but not for another tensor.
    """
    places: dict[str, ResolvedSite] = {}
    for name, seen in instrumented.items():
        there = plain.get(name)
        places[name] = seen.place
        if there is not None and equal(there.rows, seen.rows):
            places[name] = replace(there.place, site=seen.place.site)
    return places


OUTPUT = ":out"
"""Name of the output of a whole model."""


_BLOCK_OUTPUT = re.compile(r"(^|[._])blocks\.\d+\.hook_out(@\d+)?$")


@dataclass(frozen=True)
class Comparison:
    """Whether the instrumented model computes what the plain one does: every block's output, and the model's."""

    first: str = ""
    """Name of the first output that differs; empty if none does."""
    error: float = 0.0
    """Its relative error."""
    trusted: frozenset[str] = frozenset()
    """Names up to the last output that agrees before it; all, if none differs."""
    before: frozenset[str] = frozenset()
    """Names before the first output that differs; all, if none does."""


def outputs_of(plain: Mapping[str, Seen], instrumented: Mapping[str, Seen]) -> list[str]:
    """Names of the outputs of blocks, and of the model, that both models have, in the order of the forward pass."""
    return [name for name in instrumented if name in plain and (name == OUTPUT or _BLOCK_OUTPUT.search(name))]


def compare(plain: Mapping[str, Seen], instrumented: Mapping[str, Seen]) -> Comparison:
    """Compare the outputs that both models have, in the order of the forward pass."""
    names, n_trusted = list(instrumented), 0
    for name in outputs_of(plain, instrumented):
        both = instrumented[name].rows, plain[name].rows
        if not equal(*both):
            before = names[: names.index(name)]
            return Comparison(name, off_by(*both), frozenset(names[:n_trusted]), frozenset(before))
        n_trusted = names.index(name) + 1
    return Comparison(trusted=frozenset(names), before=frozenset(names))


def off_by(a: Tensor, b: Tensor) -> float:
    """The relative difference of two values; infinite where shapes differ or values are not finite."""
    if a.shape != b.shape or not a.numel():
        return math.inf
    difference, size = (float(v.norm()) for v in (a.double() - b.double(), b.double()))
    found = difference / size if size else (math.inf if difference else 0.0)
    return found if math.isfinite(found) else math.inf


def equal(a: Tensor, b: Tensor, tolerance: float | None = None) -> bool:
    """Whether two computations of a value agree, up to the rounding of their dtype; NaN and infinities never agree."""
    return off_by(a, b) <= (_TOLERANCE.get(a.dtype, _TOLERANCE_16_BIT) if tolerance is None else tolerance)
