"""The names of a model's sites, and what patterns of them mean.

In: a model, and the surveys of it and of its instrumented form (`survey.py`). Out: for each name the place where it is
read, in the plain model where both agree. transformer-lens is imported only for names that need it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import cached_property
from importlib.metadata import version
from typing import Any, Literal

from torch import Tensor, nn

from actcache.errors import ConfigError, SiteError
from actcache.lm.bridge import Opened, hf_bridge, hook_points, native_bridge
from actcache.lm.forward import Forward, is_bare
from actcache.lm.hooks import ResolvedSite, Spot
from actcache.lm.identity import quantization_of
from actcache.lm.stories import stories_places, stories_spots
from actcache.lm.survey import (
    OUTPUT,
    Comparison,
    Listed,
    Survey,
    choose_places,
    compare,
    module_spots,
    outputs_of,
    survey,
    values_at,
)
from actcache.spec import Meaning, Site, expand_names

Kind = Literal["stories", "huggingface", "transformer_lens", "module"]
Places = dict[str, ResolvedSite | Site]

_QUANTISED = 5e-2
"""How much a value may depend on its batch in 8 bits, where outliers of the whole batch are computed apart."""


class SiteNames:
    """What a model's hook names and patterns mean: found by running a few tokens, once, when first needed."""

    def __init__(
        self,
        module: nn.Module,
        kind: Kind,
        name: str,
        tokenizer: Any | None,
        run: Callable[[], Forward],
        batches: Callable[[int | None], list[Tensor]],
    ) -> None:
        """`batches(length)`: the batches of a survey; None for the usual, short length."""
        self._module = module
        self._kind = kind
        self._name = name
        self._tokenizer = tokenizer
        self._run = run
        self._batches = batches
        self._compared_at: dict[int, Comparison] = {}

    @property
    def places(self) -> Places:
        """Every name in order, and its place; a name that only the unopened instrumented model has comes as a site."""
        return self._found[0]

    @property
    def refused(self) -> dict[str, str]:
        """Names that are not offered although activations pass there, and why."""
        return self._found[1].refused

    @property
    def bridge(self) -> Any:
        """The instrumented model."""
        return self._opened.model

    @property
    def disagreement(self) -> str:
        """Where the instrumented model, if it is used, computes something else than the plain one; or empty."""
        if self._kind == "huggingface":
            self.places  # noqa: B018  # which compares the two
        return str(self.__dict__.get("_disagreement", ""))  # of the cached property: looking opens nothing

    @cached_property
    def instrumented_forward(self) -> Forward:
        """How the instrumented model is called."""
        return Forward(self.bridge, {"return_type": "logits"}, masks=True)

    def match(self, patterns: Sequence[str]) -> list[str]:
        """Names that any of the patterns mean; a glob takes each place once, a name written out is kept.

        Hook names come first, then module paths, each in the order of the forward pass.

        Raises:
            SiteError: a pattern matches nothing; the message says why not, or names the nearest names.
        """
        patterns = [patterns] if isinstance(patterns, str) else patterns
        wanted = {name for pattern in patterns for name in self._matches(pattern)}
        found = [name for name in self.places if name in wanted]
        return (
            found if len(found) == len(wanted) else found + [n for n in self._module_places if n in wanted - {*found}]
        )

    def place(self, name: str) -> ResolvedSite:
        """The place of a name; opens the instrumented model if only that has it.

        Raises:
            SiteError: only the instrumented model has it, and computes something else than the plain one.
        """
        place = self.places.get(name) or self._module_places[name]
        if isinstance(place, ResolvedSite):
            return place
        if self._disagreement and name not in self._compared.trusted:
            raise SiteError(f"{name} cannot be cached: {self._disagreement}")
        return self._instrumented_places[name]

    def single(self, pattern: str) -> ResolvedSite:
        """The only place that a pattern means."""
        names = self._matches(pattern)
        if len(names) > 1:
            raise ConfigError(f"one site is needed, but {pattern!r} matches {len(names)}: {', '.join(names[:4])}, ...")
        return self.place(names[0])

    def in_instrumented(self, site: ResolvedSite) -> ResolvedSite:
        """The site's place in the instrumented model."""
        if site.instrumented:
            return site
        if site.site.name not in self._instrumented_places:
            raise ConfigError(f"{site.site.name} is not in the instrumented model, in which a splice is in force")
        return replace(self._instrumented_places[site.site.name], site=site.site)

    def check_instrumented(self, names: Sequence[str], length: int) -> None:
        """Compare the instrumented model with the plain one at a length: attention windows show only in long sequences.

        Raises:
            SiteError: it computes something else there, before or at one of these names.
        """
        if self._kind == "transformer_lens":
            return
        order = list(self._instrumented.seen)
        if length not in self._compared_at:
            self._compared_at[length] = self._compare_at(length)
        found = self._compared_at[length]
        n_trusted = max((order.index(name) + 1 for name in found.trusted), default=0)
        behind = [name for name in names if found.first and order.index(name) >= n_trusted]
        if behind:
            raise SiteError(f"{behind[0]} cannot be cached for sequences of {length} tokens: {self._describe(found)}")

    def _compare_at(self, length: int) -> Comparison:
        ids, plain, instrumented = self._batches(length)[0][:1], self._candidates.seen, self._instrumented.seen
        both = outputs_of(plain, instrumented)
        return compare(
            values_at(self._run(), {name: plain[name].place for name in both}, ids),
            values_at(self.instrumented_forward, {name: instrumented[name].place for name in both}, ids),
        )

    def list_site(self, name: str, length: int) -> Listed:
        """What a name offers, without opening the instrumented model."""
        place = self.places.get(name) or self._module_places[name]
        if isinstance(place, Site):
            meaning = Meaning(module=name, transformer_lens=version("transformer-lens"))
            return Listed(replace(place, shape=(place.shape[0], length), meaning=meaning), True)
        return Listed(with_length(place, length).site, place.instrumented)

    # Patterns

    def _matches(self, pattern: str) -> list[str]:
        """Names that a pattern means: hook names if there are any, otherwise module paths."""
        is_glob = bool(set(pattern) & set("*?["))
        found = _choose(pattern, self.places, is_glob)
        could_be_path = (is_glob or ":" in pattern) and self._kind != "transformer_lens"
        if not found and could_be_path:
            found = _choose(pattern, self._module_places, is_glob)
        if not found:
            self._raise_refused(pattern, could_be_path)
            return expand_names([pattern], [*self.places, *(self._module_places if could_be_path else ())])
        return found

    def _raise_refused(self, pattern: str, could_be_path: bool) -> None:
        """Raise `SiteError` if what the pattern names is there, but not offered."""
        surveys = [self._found[1], *([self._modules] if could_be_path else [])]
        reasons = {name: why for s in surveys for name, why in (*s.refused.items(), *s.idle.items())}
        names = [name for name in reasons if fnmatchcase(name, pattern)]
        if names:
            more = f", and {len(names) - 1} more" if len(names) > 1 else ""
            raise SiteError(f"no site matches {pattern!r}: {names[0]} {reasons[names[0]]}{more}")

    # Surveys

    @cached_property
    def _found(self) -> tuple[Places, Survey]:
        """The places that are listed, and the survey that found them, with what it refused."""
        match self._kind:
            case "stories":
                seen = {name: s for name, s in self._candidates.seen.items() if name != OUTPUT}
                return {**self._with_meanings(stories_places(seen, self._module))}, self._candidates
            case "huggingface":
                return self._huggingface()
            case "transformer_lens":
                return {**self._instrumented_places}, self._instrumented
            case "module":
                return {**self._module_places}, self._modules

    def _huggingface(self) -> tuple[Places, Survey]:
        """transformer-lens' names, on plain modules where values agree; module paths where it cannot run the model, or
        computes something else."""
        try:
            instrumented = self._instrumented
        except ConfigError as error:
            warnings.warn(f"sites of {self._name} are named module.path:in and module.path:out: {error}", stacklevel=2)
            return {**self._module_places}, self._modules
        found, compared = choose_places(self._candidates.seen, instrumented.seen), self._compared
        places = {
            n: p for n, p in found.items() if n in compared.trusted or (n in compared.before and not p.instrumented)
        }
        places.pop(OUTPUT, None)
        if not self._disagreement:
            return {**self._with_meanings(places)}, instrumented
        warnings.warn(
            f"{self._disagreement}: sites behind that are named module.path:in and module.path:out", stacklevel=2
        )
        dropped = {name: self._why_dropped(name) for name in found if name not in places and name != OUTPUT}
        refused = {**instrumented.refused, **dropped, **self._modules.refused}
        return {**self._with_meanings(places), **self._module_places}, replace(instrumented, refused=refused)

    def _why_dropped(self, name: str) -> str:
        spot = self._candidate_spots.get(name)
        stands_for = f"; it may stand for {self._paths[spot.module]}:{spot.side}" if spot else ""
        return f"is of unknown meaning: {self._disagreement}{stands_for}"

    @cached_property
    def _modules(self) -> Survey:
        return self._survey(module_spots(self._module))

    @cached_property
    def _module_places(self) -> dict[str, ResolvedSite]:
        if self._kind == "transformer_lens":
            return {}
        return self._with_meanings({name: s.place for name, s in self._modules.seen.items()})

    @cached_property
    def _candidates(self) -> Survey:
        """What the plain model has under the names that may stand for its modules, and what it puts out."""
        return self._survey({**self._candidate_spots, OUTPUT: Spot(self._module, "out")})

    @property
    def _candidate_spots(self) -> dict[str, Spot]:
        return stories_spots(self._module) if self._kind == "stories" else self._opened.candidates

    @cached_property
    def _instrumented(self) -> Survey:
        """Every name of the instrumented model, at its HookPoint, and what it puts out."""
        return survey(self.instrumented_forward, self._instrumented_spots, self._batches(None), self._tolerance)

    @property
    def _instrumented_spots(self) -> dict[str, Spot]:
        """Its hook points; with the model's output only if there is a plain model, with a head, to compare it with."""
        with_output = self._kind != "transformer_lens" and not is_bare(self._module)
        output = {OUTPUT: Spot(self.bridge, "out")} if with_output else {}
        return {**self._opened.points, **output}

    @cached_property
    def _instrumented_places(self) -> dict[str, ResolvedSite]:
        return self._with_meanings({name: s.place for name, s in self._instrumented.seen.items() if name != OUTPUT})

    @cached_property
    def _compared(self) -> Comparison:
        return compare(self._candidates.seen, self._instrumented.seen)

    @cached_property
    def _disagreement(self) -> str:
        return self._describe(self._compared) if self._compared.first else ""

    def _describe(self, found: Comparison) -> str:
        what = "what it puts out" if found.first == OUTPUT else found.first
        return (
            f"transformer-lens {version('transformer-lens')} does not compute what {self._name} does from {what} on "
            f"(off by {found.error:.1%})"
        )

    def _with_meanings(self, places: Mapping[str, Any]) -> dict[str, Any]:
        """The places, with the meaning of each name in its site."""
        return {
            name: replace(place, site=replace(place.site, meaning=self._meaning(name, place)))
            if isinstance(place, ResolvedSite)
            else place
            for name, place in places.items()
        }

    def _meaning(self, name: str, place: ResolvedSite) -> Meaning:
        if not place.instrumented:
            return Meaning(module=self._paths[place.module], side=place.side, call=place.call)
        # The HookPoint's own name, because aliases change between versions.
        hook = getattr(place.module, "name", None) or name.split("@")[0]
        return Meaning(module=hook, call=place.call, transformer_lens=version("transformer-lens"))

    @cached_property
    def _paths(self) -> dict[nn.Module, str]:
        return {m: path for path, m in self._module.named_modules()}

    @cached_property
    def _opened(self) -> Opened:
        match self._kind:
            case "stories":
                return native_bridge(self._module, self._tokenizer)  # type: ignore[arg-type]  # kind says what it is
            case "huggingface":
                if quantization_of(self._module):
                    # Layers of bitsandbytes unpack their weights when they first run; copies of them then find none.
                    self._survey({})
                return hf_bridge(self._module, self._tokenizer, self._name)
            case "transformer_lens":
                return Opened(self._module, hook_points(self._module), {})
            case "module":
                raise ConfigError(f"transformer-lens cannot open {self._name}: it is a plain torch module")

    def _survey(self, spots: Mapping[str, Spot]) -> Survey:
        return survey(self._run(), spots, self._batches(None), self._tolerance)

    @property
    def _tolerance(self) -> float | None:
        return _QUANTISED if quantization_of(self._module) else None


def _choose(pattern: str, places: Mapping[str, ResolvedSite | Site], is_glob: bool) -> list[str]:
    """Names that match; if a glob matches several names of one place, the first of them."""
    once: dict[Any, str] = {}
    for name in places:
        if fnmatchcase(name, pattern):
            place = places[name]
            once.setdefault(place.spot if is_glob and isinstance(place, ResolvedSite) else name, name)
    return list(once.values())


def with_length(place: ResolvedSite, length: int | None) -> ResolvedSite:
    """An attention pattern's place with as many keys as sequences have tokens; every other as it is."""
    if not place.is_pattern:
        return place
    n_heads = place.site.shape[0]
    if length is None:
        raise ConfigError(
            f"{place.site.name} holds {n_heads} heads x keys values a position, as many as the sequence is long: "
            "say resolve(..., length=tokens of a sequence)"
        )
    return replace(place, site=replace(place.site, shape=(n_heads, length)))
