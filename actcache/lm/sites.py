"""Which names a model answers to, and where each of them is.

A candidate name becomes a site by being seen: one forward pass of a few tokens shows which places are reached, in which
order, and in which layout and width. Sizes are never guessed from a config.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from actcache.errors import ConfigError
from actcache.lm.hooks import SIDES, ResolvedSite, Spot, attach, feature_axes, layout_of, to_rows
from actcache.spec import Site

Run = Callable[[Tensor], object]
"""One forward pass of `(Q, T)` token ids."""

_Q, _T = 2, 11
"""Size of a survey: small, since every value is kept, with a T that no model has as its number of heads."""

_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
_TOLERANCE_16_BIT = 5e-2


@dataclass(frozen=True)
class Seen:
    """A site, and its value `(Q, T, D)` in the survey."""

    place: ResolvedSite
    rows: Tensor


@dataclass(frozen=True, slots=True)
class Listed:
    """A site that can be cached."""

    site: Site
    instrumented: bool
    """Whether reading it runs the instrumented model, which is slower."""


def id_table(run: Run, module: nn.Module, device: torch.device) -> tuple[int | None, int | None]:
    """How many tokens a module knows, and in how many positions it was run to see that (None: any).

    Tokens are the rows of the embedding that is given the ids; None if there is no such table. Ids are tried that every
    table of the module has, and if they are too many, as many as the smallest table has rows: it may be of positions.

    Raises:
        ConfigError: the model does not run on token ids.
    """
    tables = [m for m in module.modules() if isinstance(m, nn.Embedding)]
    smallest = min((m.num_embeddings for m in tables), default=None)
    try:
        return _size_of_table(run, tables, survey_ids(smallest, None, device)) or smallest, None
    except ConfigError:
        if smallest is None:
            raise
        return _size_of_table(run, tables, survey_ids(smallest, smallest, device)) or smallest, smallest


def _size_of_table(run: Run, tables: Sequence[nn.Embedding], ids: Tensor) -> int | None:
    """Rows of the first table that is given the ids themselves."""
    spots = {str(n): Spot(m, "in") for n, m in enumerate(tables)}
    given: dict[Spot, tuple[Any, Any]] = {}
    _run_and_keep(run, spots, ids, given)
    inputs = [given.get(spot, (None, None))[1] for spot in spots.values()]
    same = (isinstance(value, Tensor) and torch.equal(value, ids) for value in inputs)
    return next((m.num_embeddings for m, is_given in zip(tables, same, strict=True) if is_given), None)


def survey_ids(d_vocab: int | None, n_ctx: int | None, device: torch.device) -> Tensor:
    """Token ids `(Q, T)` for a survey, within the model's vocabulary and context."""
    shape = _Q, min(_T, n_ctx or _T)
    return (torch.arange(_Q * shape[1], device=device) * 7 + 5).remainder(d_vocab or 2).view(shape)


def survey(run: Run, spots: Mapping[str, Spot], ids: Tensor) -> dict[str, Seen]:
    """Run a few tokens and keep what passes at the spots; names come in the order of the forward pass.

    Raises:
        ConfigError: the model does not run on token ids.
    """
    values: dict[Spot, tuple[Any, Any]] = {}
    _run_and_keep(run, spots, ids, values)
    return {seen.place.site.name: seen for seen in _sites_seen(spots, values, (ids.shape[0], ids.shape[1]))}


def _run_and_keep(run: Run, spots: Mapping[str, Spot], ids: Tensor, values: dict[Spot, tuple[Any, Any]]) -> None:
    with torch.no_grad(), ExitStack() as attached:
        for spot in dict.fromkeys(spots.values()):
            attached.callback(attach(spot, _keeper(spot, values)))
        try:
            run(ids)
        except Exception as error:  # whatever the user's model raises
            raise ConfigError(f"the model does not run on token ids of shape {tuple(ids.shape)}: {error}") from error


def _keeper(spot: Spot, values: dict[Spot, tuple[Any, Any]]) -> Callable[[Any], None]:
    def keep(value: Any) -> None:
        if spot not in values:
            values[spot] = (value, value.clone() if isinstance(value, Tensor) else None)

    return keep


def _sites_seen(
    spots: Mapping[str, Spot], values: Mapping[Spot, tuple[Any, Any]], ids_shape: tuple[int, int]
) -> Iterator[Seen]:
    names: dict[Spot, list[str]] = {}
    for name, spot in spots.items():
        names.setdefault(spot, []).append(name)
    for spot, (value, copy) in values.items():
        for name in names[spot]:
            layout = layout_of(name, copy, *ids_shape)
            if layout is None:
                continue
            site = Site(name=name, shape=feature_axes(copy, layout))
            overwritten = not torch.equal(value.nan_to_num(), copy.nan_to_num())
            place = ResolvedSite(site, spot.module, spot.side, spot.instrumented, layout, overwritten)
            yield Seen(place, to_rows(copy, layout, ids_shape))


def module_spots(module: nn.Module) -> dict[str, Spot]:
    """`module.path:in` and `module.path:out` of every submodule of any model (the model itself has the empty path)."""
    return {f"{path}:{side}": Spot(m, side) for path, m in module.named_modules() for side in SIDES}


_STORIES_ALIASES = {
    "embed.hook_out": "hook_embed",
    "pos_embed.hook_out": "hook_pos_embed",
    "unembed.hook_out": "hook_unembed",
    "hook_in": "hook_resid_pre",
    "ln2.hook_in": "hook_resid_mid",
    "hook_out": "hook_resid_post",
    "attn.hook_out": "hook_attn_out",
    "mlp.hook_out": "hook_mlp_out",
    "attn.q.hook_out": "attn.hook_q",
    "attn.k.hook_out": "attn.hook_k",
    "attn.v.hook_out": "attn.hook_v",
    "attn.o.hook_in": "attn.hook_z",
    "mlp.in.hook_out": "mlp.hook_pre",
    "mlp.out.hook_in": "mlp.hook_post",
}
_WITH_HEADS = {name for pair in _STORIES_ALIASES.items() if pair[1][-2:] in ("_q", "_k", "_v", "_z") for name in pair}
STORIES_INSTRUMENTED = ("attn.hook_attn_scores", "attn.hook_pattern")
"""Names below each block of `StoriesLM` that no module has as input or output (a test holds the list complete)."""


def stories_spots(module: nn.Module) -> dict[str, Spot]:
    """The transformer-lens names of `StoriesLM`, whose modules are named like its components; aliases first."""
    spots: dict[str, Spot] = {}
    for path, m in module.named_modules():
        if path in ("", "blocks"):
            continue
        block = _block(path)
        for side in SIDES:
            name = f"{path}.hook_{side}"
            alias = _STORIES_ALIASES.get(name.removeprefix(block), name)
            spots |= {block + alias.removeprefix(block): Spot(m, side), name: Spot(m, side)}
    return spots


def stories_places(seen: Mapping[str, Seen], module: nn.Module) -> dict[str, ResolvedSite | Site]:
    """The embedded model's places, with heads in the shapes that have them.

    A name that no module has is only a site; it comes where the value is computed, before the heads' outputs `z`.
    """
    config: Any = module.config
    places: dict[str, ResolvedSite | Site] = {}
    for name, s in seen.items():
        block = _block(name)
        below = name.removeprefix(block)
        if below == "attn.hook_z":
            places |= {
                block + late: Site(name=block + late, shape=(config.n_heads, 1)) for late in STORIES_INSTRUMENTED
            }
        shape = s.place.site.shape
        shape = (config.n_heads, shape[0] // config.n_heads) if below in _WITH_HEADS else shape
        places[name] = replace(s.place, site=Site(name=name, shape=shape))
    return places


def _block(path: str) -> str:
    """`blocks.0.` of a path below it, otherwise nothing."""
    return ".".join(path.split(".")[:2]) + "." if path.startswith("blocks.") else ""


def agreeing(plain: Mapping[str, Seen], instrumented: Mapping[str, Seen]) -> dict[str, ResolvedSite]:
    """Where to read each of the instrumented model's names: at a plain module if that gave the same values.

    Values, not rules, decide: architectures differ in what they do between a module and the hook of the same name.
    The tolerance leaves room for another attention kernel, and none for another tensor.
    """
    places: dict[str, ResolvedSite] = {}
    for name, seen in instrumented.items():
        there = plain.get(name)
        places[name] = seen.place
        if there is not None and _equal(there.rows, seen.rows):
            p = there.place
            places[name] = ResolvedSite(seen.place.site, p.module, p.side, False, p.layout, p.overwritten)
    return places


def _equal(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or not a.numel():
        return False
    difference, size = (a.double() - b.double()).norm(), b.double().norm()
    return bool(difference <= _TOLERANCE.get(a.dtype, _TOLERANCE_16_BIT) * size)
