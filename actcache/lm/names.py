"""The names that one model answers to, and the place of each, in the plain or in the instrumented model.

In: a model and a way to run it. Out: places by name; transformer-lens is imported when only it knows.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

from torch import Tensor, nn

from actcache.errors import ConfigError
from actcache.lm.bridge import Opened, hf_bridge, hook_points, native_bridge
from actcache.lm.forward import Forward
from actcache.lm.hooks import ResolvedSite, Spot
from actcache.lm.identity import quantization_of
from actcache.lm.sites import Listed, Seen, agreeing, module_spots, stories_places, stories_spots, survey
from actcache.spec import Site, expand_names

Kind = Literal["stories", "huggingface", "transformer_lens", "module"]


class SiteNames:
    """What a model's hook names and patterns mean; found by running it on a few tokens, once, when first asked."""

    def __init__(
        self,
        module: nn.Module,
        kind: Kind,
        name: str,
        tokenizer: Any | None,
        run: Callable[[], Forward],
        ids: Callable[[], Tensor],
    ) -> None:
        self._module = module
        self._kind = kind
        self._name = name
        self._tokenizer = tokenizer
        self._run = run
        self._ids = ids

    @cached_property
    def places(self) -> dict[str, ResolvedSite | Site]:
        """Every name in order, and where it is; only the site of what the instrumented model knows, not opened yet."""
        match self._kind:
            case "stories":
                return stories_places(self._surveyed(stories_spots(self._module)), self._module)
            case "huggingface":
                return {**self._huggingface_places()}
            case "transformer_lens":
                return {**self._instrumented}
            case "module":
                return {**self._module_places()}

    @property
    def bridge(self) -> Any:
        """The instrumented model."""
        return self._opened.model

    @cached_property
    def instrumented_forward(self) -> Forward:
        """How the instrumented model is called."""
        return Forward(self.bridge, {"return_type": "logits"}, masks=True)

    def matching(self, patterns: Sequence[str]) -> list[str]:
        """Names that any pattern means, in order; a pattern takes each place once, a name that is written out stays.

        Raises:
            SiteError: a pattern matches nothing; the message names the nearest names.
        """
        patterns = [patterns] if isinstance(patterns, str) else patterns
        wanted = {name for pattern in patterns for name in self._matches(pattern)}
        return [name for name in self.places if name in wanted]

    def place(self, name: str) -> ResolvedSite:
        """Where a name is; opens the instrumented model if only that knows."""
        place = self.places[name]
        return place if isinstance(place, ResolvedSite) else self._instrumented[name]

    def one(self, pattern: str) -> ResolvedSite:
        """The only place that a pattern means."""
        names = expand_names([pattern], list(self.places))
        if len(names) > 1:
            raise ConfigError(f"one site is needed, but {pattern!r} matches {len(names)}: {', '.join(names[:4])}, ...")
        return self.place(names[0])

    def place_in(self, instrumented: bool, site: ResolvedSite) -> ResolvedSite:
        """The site's place in the model that runs."""
        if site.instrumented == instrumented:
            return site
        return replace(self._instrumented[site.site.name], site=site.site)

    def listed(self, name: str, length: int) -> Listed:
        """What a name offers, without opening the instrumented model."""
        place = self.places[name]
        if isinstance(place, Site):
            return Listed(replace(place, shape=(place.shape[0], length)), True)
        return Listed(sized(place, length).site, place.instrumented)

    def _matches(self, pattern: str) -> list[str]:
        names = expand_names([pattern], list(self.places))
        if not set(pattern) & set("*?["):
            return names
        once: dict[Any, str] = {}
        for name in names:
            place = self.places[name]
            once.setdefault(place.spot if isinstance(place, ResolvedSite) else name, name)
        return list(once.values())

    def _huggingface_places(self) -> Mapping[str, ResolvedSite]:
        """transformer-lens' names, on plain modules where values agree; module paths if it cannot run the model."""
        try:
            opened = self._opened
            instrumented = survey(self.instrumented_forward, opened.points, self._ids())
        except ConfigError as error:
            warnings.warn(f"sites of {self._name} are named module.path:in and module.path:out: {error}", stacklevel=2)
            return self._module_places()
        return agreeing(self._surveyed(opened.candidates), instrumented)

    def _module_places(self) -> dict[str, ResolvedSite]:
        return {name: s.place for name, s in self._surveyed(module_spots(self._module)).items()}

    @cached_property
    def _instrumented(self) -> dict[str, ResolvedSite]:
        """Every name of the instrumented model, at its HookPoint."""
        seen = survey(self.instrumented_forward, self._opened.points, self._ids())
        return {name: s.place for name, s in seen.items()}

    @cached_property
    def _opened(self) -> Opened:
        match self._kind:
            case "stories":
                return native_bridge(self._module, self._tokenizer)  # type: ignore[arg-type]  # kind says what it is
            case "huggingface":
                if quantization_of(self._module):
                    # Layers of bitsandbytes unpack their weights when they first run; copies of them then find none.
                    self._surveyed({})
                return hf_bridge(self._module, self._tokenizer, self._name)
            case "transformer_lens":
                return Opened(self._module, hook_points(self._module), {})
            case "module":
                raise ConfigError(f"transformer-lens cannot open {self._name}: it is a plain torch module")

    def _surveyed(self, spots: Mapping[str, Spot]) -> dict[str, Seen]:
        return survey(self._run(), spots, self._ids())


def sized(place: ResolvedSite, length: int | None) -> ResolvedSite:
    """An attention pattern's place with as many keys as sequences have tokens; every other as it is."""
    if place.layout != "Q F T K":
        return place
    n_heads = place.site.shape[0]
    if length is None:
        raise ConfigError(
            f"{place.site.name} holds {n_heads} heads x keys values a position, as many as the sequence is long: "
            "say resolve(..., length=tokens of a sequence)"
        )
    return replace(place, site=Site(name=place.site.name, shape=(n_heads, length)))
