"""LanguageModel: hook names to places, and forward passes that read or replace what is there.

Shapes: Q sequences, T positions, V vocabulary, D width of a site.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from actcache.errors import ConfigError, SiteError
from actcache.lm.bridge import hf_bridge, hook_points, native_bridge
from actcache.lm.hooks import ForwardStopped, ResolvedSite, Spot, attach, from_rows, to_rows
from actcache.lm.identity import tokenizer_digest, weights_digest
from actcache.lm.sites import (
    Run,
    Seen,
    agreeing,
    module_spots,
    stories_places,
    stories_spots,
    survey,
    survey_ids,
)
from actcache.spec import Site, expand_names

Kind = Literal["stories", "huggingface", "transformer_lens", "module"]


class LanguageModel:
    """A base model, its tokenizer, and its sites by transformer-lens hook name; made by `load_lm`.

    `resolve` turns names and patterns into sites, `capture` reads activations there, `splice` replaces them. All run
    without gradients, but not in inference mode: its tensors could not be trained on, and it is no faster (measured).
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        name: str,
        kind: Kind,
        tokenizer: Any | None = None,
        n_ctx: int | None = None,
        d_vocab: int | None = None,
        bos: int | None = None,
    ) -> None:
        self.module = module
        self.name = name
        self.kind = kind
        self.tokenizer = tokenizer
        self.n_ctx = n_ctx
        self.d_vocab = d_vocab
        self.bos = bos
        self._ids_shape = (0, 0)
        self._splices: list[bool] = []  # for each splice in force, whether it is in the instrumented model

    def __repr__(self) -> str:
        sizes = f"n_ctx={self.n_ctx}, d_vocab={self.d_vocab}"
        return f"LanguageModel({self.name!r}, {self.kind}, {sizes}, {self.dtype}, {self.device})"

    @property
    def device(self) -> torch.device:
        """Where the model runs: the device of its first parameter."""
        return next((p.device for p in self.module.parameters()), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """Element type of the weights: that of the first parameter."""
        return next((p.dtype for p in self.module.parameters()), torch.float32)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What decides the activations, JSON-able; the weights are read once for it, when it is first asked for."""
        return {
            "name": self.name,
            "class": type(self.module).__name__,
            "dtype": str(self.dtype).removeprefix("torch."),
            "weights": weights_digest(self.module),
            "tokenizer": None if self.tokenizer is None else tokenizer_digest(self.tokenizer),
        }

    @property
    def site_names(self) -> list[str]:
        """Every name that can be cached, aliases included, in the order of the forward pass."""
        return list(self._places)

    def resolve(self, patterns: Sequence[str], *, length: int | None = None) -> list[ResolvedSite]:
        """The sites that any of the names or glob patterns match, in the order of the forward pass.

        A pattern takes each place once, under its customary name; an alias written out is taken as it is written.
        `length` is needed for attention patterns only, whose width is heads x keys.

        Raises:
            SiteError: a pattern matches nothing; the message names the nearest names.
            ConfigError: an attention pattern without `length`.
        """
        patterns = [patterns] if isinstance(patterns, str) else patterns
        wanted = {name for pattern in patterns for name in self._matches(pattern)}
        return [self._sized(self._place(name), length) for name in self._places if name in wanted]

    def capture(self, ids: ArrayLike | Tensor, sites: Sequence[ResolvedSite]) -> dict[str, Tensor]:
        """Activations `{name: (Q, T, D)}` of `(Q, T)` token ids; the forward pass ends at the last site.

        What the model computes is handed out as it is, in the model's dtype and on its device, without a copy.

        Raises:
            ConfigError: more positions than the model has, ids outside its vocabulary.
            SiteError: a site that this forward pass does not reach.
        """
        tokens = self._checked(ids)
        instrumented = self._choose(any(site.instrumented for site in sites))
        sites = [self._in(instrumented, site) for site in {site.site.name: site for site in sites}.values()]
        values: dict[str, Tensor] = {}
        with torch.no_grad(), ExitStack() as attached, suppress(ForwardStopped):
            for site in sites:
                attached.callback(attach(site.spot, _taker(site, values, n_wanted=len(sites))))
            if sites:
                self._run(tokens, instrumented)
        missing = [site.site.name for site in sites if site.site.name not in values]
        if missing:
            raise SiteError(f"the forward pass did not reach {', '.join(missing)}")
        return {s.site.name: to_rows(values[s.site.name], s.layout, self._ids_shape) for s in sites}

    def logits(self, ids: ArrayLike | Tensor) -> Tensor:
        """Logits `(Q, T, V)` of `(Q, T)` token ids, with the splices that are in force."""
        tokens = self._checked(ids)
        with torch.no_grad():
            return self._run(tokens, self._choose(False))

    @contextmanager
    def splice(
        self, site_in: str | ResolvedSite, site_out: str | ResolvedSite, fn: Callable[[Tensor], Tensor]
    ) -> Iterator[None]:
        """While active, the value at `site_out` is `fn(value at site_in)`: `(Q, T, D_in)` to `(Q, T, D_out)`.

        Splices may be nested, and `site_in` may be `site_out`. The result is cast to the model's dtype.

        Raises:
            SiteError: (in the forward pass) `site_in` comes after `site_out`.
            ConfigError: (in the forward pass) the result has another shape than the value that it replaces.
        """
        both = [self._place(site) for site in (site_in, site_out)]
        instrumented = self._choose(any(site.instrumented for site in both))
        source, target = (self._in(instrumented, site) for site in both)
        held: list[Tensor] = []

        def read(value: Tensor) -> None:
            held[:] = [to_rows(value, source.layout, self._ids_shape)]

        def write(value: Tensor) -> Tensor:
            if not held:
                raise SiteError(f"cannot splice: {source.site.name} comes after {target.site.name} in the model")
            old, new = to_rows(value, target.layout, self._ids_shape), fn(held.pop())
            if new.shape != old.shape:
                raise ConfigError(
                    f"spliced function: {target.site.name} holds {tuple(old.shape)}, got {tuple(new.shape)}"
                )
            return from_rows(new, value, target.layout)

        with ExitStack() as undo:
            self._splices.append(instrumented)
            undo.callback(self._splices.pop)
            undo.callback(attach(source.spot, read))
            undo.callback(attach(target.spot, write))
            yield

    def open_instrumented(self) -> Any:
        """The model as transformer-lens has it; see `open_bridge`."""
        return self._opened[0]

    # Names and places

    @cached_property
    def _places(self) -> dict[str, ResolvedSite | None]:
        """Every name in order, and where it is; None for what only the instrumented model knows, not opened yet."""
        match self.kind:
            case "stories":
                seen = self._survey(self._run_plain, stories_spots(self.module))
                return stories_places(seen, self.module)
            case "huggingface":
                return {**self._huggingface_places()}
            case "transformer_lens":
                return {**self._instrumented}
            case "module":
                return {**self._module_places()}

    def _huggingface_places(self) -> Mapping[str, ResolvedSite]:
        """transformer-lens' names, on plain modules where values agree; module paths if it cannot run the model."""
        try:
            bridge, candidates = self._opened
            instrumented = self._survey(self._run_instrumented, hook_points(bridge))
        except ConfigError as error:
            warnings.warn(f"sites of {self.name} are named module.path:in and module.path:out: {error}", stacklevel=2)
            return self._module_places()
        return agreeing(self._survey(self._run_plain, candidates), instrumented)

    def _module_places(self) -> dict[str, ResolvedSite]:
        seen = self._survey(self._run_plain, module_spots(self.module))
        return {name: s.place for name, s in seen.items()}

    @cached_property
    def _instrumented(self) -> dict[str, ResolvedSite]:
        """Every name of the instrumented model, at its HookPoint."""
        seen = self._survey(self._run_instrumented, hook_points(self.open_instrumented()))
        return {name: s.place for name, s in seen.items()}

    @cached_property
    def _opened(self) -> tuple[Any, Mapping[str, Spot]]:
        """The instrumented model, and for its names the plain spots that may hold the same."""
        match self.kind:
            case "stories":
                return native_bridge(self.module, self.tokenizer), {}  # type: ignore[arg-type]  # kind says what it is
            case "huggingface":
                return hf_bridge(self.module, self.tokenizer, self.name)
            case "transformer_lens":
                return self.module, {}
            case "module":
                raise ConfigError(f"transformer-lens cannot open {self.name}: it is a plain torch module")

    def _survey(self, run: Run, spots: Mapping[str, Spot]) -> dict[str, Seen]:
        return survey(run, spots, survey_ids(self.d_vocab, self.n_ctx, self.device))

    def _matches(self, pattern: str) -> list[str]:
        names = expand_names([pattern], self.site_names)
        if not set(pattern) & set("*?["):
            return names
        once: dict[Any, str] = {}
        for name in names:
            place = self._places[name]
            once.setdefault(name if place is None else place.spot, name)
        return list(once.values())

    def _place(self, site: str | ResolvedSite) -> ResolvedSite:
        if isinstance(site, ResolvedSite):
            return site
        names = expand_names([site], self.site_names)
        if len(names) > 1:
            raise ConfigError(f"one site is needed, but {site!r} matches {len(names)}: {', '.join(names[:4])}, ...")
        return self._places[names[0]] or self._instrumented[names[0]]

    def _sized(self, place: ResolvedSite, length: int | None) -> ResolvedSite:
        if place.layout != "Q F T K":
            return place
        n_heads = place.site.shape[0]
        if length is None:
            raise ConfigError(
                f"{place.site.name} holds {n_heads} heads x keys values a position, as many as the sequence is long: "
                "say resolve(..., length=tokens of a sequence)"
            )
        return replace(place, site=Site(name=place.site.name, shape=(n_heads, length)))

    def _in(self, instrumented: bool, site: ResolvedSite) -> ResolvedSite:
        """The site's place in the model that runs."""
        if site.instrumented == instrumented:
            return site
        return replace(self._instrumented[site.site.name], site=site.site)

    # Running

    def _choose(self, instrumented: bool) -> bool:
        """Whether the instrumented model must run: for a site that asks for it, or a splice that is in it."""
        if instrumented and not all(self._splices):
            raise ConfigError("a splice of plain sites is in force: leave it before using instrumented sites")
        return instrumented or any(self._splices) or self.kind == "transformer_lens"

    def _run(self, tokens: Tensor, instrumented: bool) -> Tensor:
        self._ids_shape = (tokens.shape[0], tokens.shape[1])
        return self._run_instrumented(tokens) if instrumented else self._run_plain(tokens)

    def _run_plain(self, tokens: Tensor) -> Tensor:
        if self.kind == "huggingface":
            return self.module(tokens, use_cache=False).logits  # type: ignore[no-any-return]  # a model's own output class
        return _logits_of(self.module(tokens))

    def _run_instrumented(self, tokens: Tensor) -> Tensor:
        return self.open_instrumented()(tokens, return_type="logits")  # type: ignore[no-any-return]  # untyped library

    def _checked(self, ids: ArrayLike | Tensor) -> Tensor:
        """Token ids as the model wants them: int64, on its device."""
        tokens = ids.long() if isinstance(ids, Tensor) else torch.from_numpy(np.asarray(ids).astype(np.int64))
        if tokens.ndim != 2 or not tokens.numel():
            raise ConfigError(f"token ids must be a (sequences, positions) array, got shape {tuple(tokens.shape)}")
        if self.n_ctx is not None and tokens.shape[1] > self.n_ctx:
            raise ConfigError(
                f"sequences of {tokens.shape[1]} tokens, but {self.name} has {self.n_ctx} positions; "
                f"use a length of at most {self.n_ctx}"
            )
        low, top = (int(bound) for bound in tokens.aminmax())
        if low < 0 or (self.d_vocab is not None and top >= self.d_vocab):
            outside = low if low < 0 else top
            raise ConfigError(f"token id {outside}, but {self.name} knows {self.d_vocab} tokens; use its own tokenizer")
        return tokens.to(self.device)


def _taker(site: ResolvedSite, values: dict[str, Tensor], n_wanted: int) -> Callable[[Tensor], None]:
    """Keeps the first value that passes a site, and ends the forward pass with the last value wanted."""

    def take(value: Tensor) -> None:
        if site.site.name not in values:
            values[site.site.name] = value.clone() if site.overwritten else value
        if len(values) == n_wanted:
            raise ForwardStopped

    return take


def _logits_of(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    return output.logits if hasattr(output, "logits") else output[0]  # type: ignore[no-any-return]  # a model's own output class
