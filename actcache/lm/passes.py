"""Forward passes of one model, plain or instrumented: what is captured in them, what is spliced, cast and compiled.

In: token ids that were checked, sites. Out: values at the sites, or what the model puts out.

Shapes: Q sequences, T positions, D width of a site.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn

from actcache.errors import ConfigError, SiteError
from actcache.lm.compiled import CompiledParts
from actcache.lm.context_length import TOO_LONG
from actcache.lm.forward import Forward, device_of
from actcache.lm.hooks import ForwardStopped, ResolvedSite, attach, from_rows, ids_shape_of, to_rows
from actcache.lm.names import SiteNames


class Passes:
    """Runs a model.

    Args:
        module: the model that was given.
        forward: how that is called; asked when it is first run.
        names: where its sites are, in both models; asked when they are first needed.
        check_failed: called with the length of the sequences and the error when a pass fails, to say why.
        is_instrumented: whether the model that was given is the instrumented one already.
    """

    def __init__(
        self,
        module: nn.Module,
        forward: Callable[[], Forward],
        names: Callable[[], SiteNames],
        check_failed: Callable[[int, Exception], None],
        is_instrumented: bool,
    ) -> None:
        self._module = module
        self._forward = forward
        self._names = names
        self._check_failed = check_failed
        self._is_instrumented = is_instrumented
        self.autocast: torch.dtype | None = None
        """The type that forward passes are cast to on the fly."""
        self._compiled: CompiledParts | None = None
        self._ids_shape = (0, 0)
        self._splices: list[tuple[ResolvedSite, ResolvedSite]] = []
        self._n_passes = 0
        self._looking = False

    @property
    def compiled(self) -> bool:
        """Whether what lies between sites is compiled."""
        return self._compiled is not None

    @property
    def spliced(self) -> bool:
        """Whether a splice is in force."""
        return bool(self._splices)

    def compile(self) -> None:
        """Compile the plain model; what lies around the sites of a pass runs as it is."""
        self._compiled = CompiledParts(self._module)

    def needs_instrumented(self, asked: bool = False) -> bool:
        """Whether the instrumented model must run: for a site that asks for it, or a splice that is in it.

        Raises:
            ConfigError: it is asked for while a splice of the plain model is in force.
        """
        in_force = [source.instrumented for source, _ in self._splices]
        if asked and not all(in_force):
            raise ConfigError("a splice of plain sites is in force: leave it before using instrumented sites")
        return asked or any(in_force) or self._is_instrumented

    def capture(self, tokens: Tensor, wanted: Sequence[ResolvedSite], mask: Tensor | None) -> dict[str, Tensor]:
        """Values `(Q, T, D)` by name: of plain sites in the plain model, of others in the instrumented one.

        Where a splice is in the instrumented model, all are read there.
        """
        in_one = self.needs_instrumented(any(site.instrumented for site in wanted)) and bool(self._splices)
        places = [self._names().in_instrumented(site) if in_one else site for site in wanted]
        values: dict[str, Tensor] = {}
        for instrumented in (False, True):
            sites = [site for site in places if site.instrumented == instrumented]
            if not sites:
                continue
            n_wanted = len(values) + len(sites)
            self._forward_of(instrumented)  # before there are hooks: when it is made, the model runs
            with torch.no_grad(), ExitStack() as attached, suppress(ForwardStopped):
                for site in sites:
                    attached.callback(attach(site.spot, _taker(site, values, n_wanted)))
                self.run(tokens, mask, instrumented, sites)
        missing = [site.site.name for site in wanted if site.site.name not in values]
        if missing:
            raise SiteError(f"the forward pass did not reach {', '.join(missing)}")
        return {site.site.name: self._rows(site, values[site.site.name]) for site in places}

    def run(self, tokens: Tensor, mask: Tensor | None, instrumented: bool, sites: Sequence[ResolvedSite] = ()) -> Any:
        """One forward pass, with the splices that are in force; `sites` are those with hooks, which are not compiled.

        Raises:
            ConfigError: it failed because the sequences are too long.
        """
        self._ids_shape = (tokens.shape[0], tokens.shape[1])
        self._n_passes += 1
        around = nullcontext() if instrumented else self._compiled_around(sites)
        try:
            with self._cast(), around:
                return self._forward_of(instrumented)(tokens, mask)
        except TOO_LONG as error:
            if not self._splices:  # their hooks would see the sequences that are tried
                self._check_failed(tokens.shape[1], error)
            raise

    def run_plainly(self, ids: Tensor) -> Any:
        """One forward pass of the model that was given, to try what it takes."""
        with self._cast():
            return self._forward()(ids)

    @contextmanager
    def unspliced(self) -> Iterator[None]:
        """While active, splices leave everything as it is: what is run is run to find something out."""
        before, self._looking = self._looking, True
        try:
            yield
        finally:
            self._looking = before

    @contextmanager
    def splice(self, site_in: ResolvedSite, site_out: ResolvedSite, fn: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """While active, the value at `site_out` is `fn(value at site_in)`; see `LanguageModel.splice`."""
        source, target = self._in_one_model(site_in, site_out)
        held: list[Tensor] = []

        def read(value: Tensor) -> None:
            if not self._looking:
                held[:] = [self._spliced_rows(value, source)]

        def write(value: Tensor) -> Tensor | None:
            if self._looking:
                return None
            if not held:
                raise SiteError(f"cannot splice: {source.site.name} comes after {target.site.name} in the model")
            old = self._spliced_rows(value, target)
            new = fn(held.pop())
            if new.shape != old.shape:
                raise ConfigError(
                    f"spliced function: {target.site.name} holds {tuple(old.shape)}, got {tuple(new.shape)}"
                )
            return from_rows(new, value, target.layout)

        with ExitStack() as undo:
            self._splices.append((source, target))
            undo.callback(self._splices.pop)
            undo.callback(attach(source.spot, read, lambda: self._n_passes))
            undo.callback(attach(target.spot, write, lambda: self._n_passes))
            yield

    def _in_one_model(self, *sites: ResolvedSite) -> list[ResolvedSite]:
        """The sites in the instrumented model if one of them needs it, otherwise in the plain one."""
        instrumented = self.needs_instrumented(any(site.instrumented for site in sites))
        self._forward_of(instrumented)
        if instrumented and self._names().disagreement:
            raise ConfigError(f"cannot splice sites of the instrumented model: {self._names().disagreement}")
        return [self._names().in_instrumented(site) if instrumented else site for site in sites]

    def _spliced_rows(self, value: Tensor, site: ResolvedSite) -> Tensor:
        """Rows by the value's own shape if it tells: the module is spliced wherever it is run, here or elsewhere."""
        return to_rows(value, site.layout, ids_shape_of(value, site.layout) or self._ids_shape)

    def _rows(self, site: ResolvedSite, value: Tensor) -> Tensor:
        try:
            return to_rows(value, site.layout, self._ids_shape)
        except SiteError as error:
            raise SiteError(f"{site.site.name}: {error}") from error

    def _forward_of(self, instrumented: bool) -> Forward:
        return self._names().instrumented_forward if instrumented else self._forward()

    def _cast(self) -> AbstractContextManager[object]:
        return torch.autocast(device_of(self._module).type, self.autocast) if self.autocast else nullcontext()

    def _compiled_around(self, sites: Sequence[ResolvedSite]) -> AbstractContextManager[None]:
        if self._compiled is None:
            return nullcontext()
        hooked = [site.module for site in (*sites, *(site for both in self._splices for site in both))]
        return self._compiled.outside(hooked)


def _taker(site: ResolvedSite, values: dict[str, Tensor], n_wanted: int) -> Callable[[Tensor], None]:
    """Keeps the first value that passes a site, and ends the forward pass with the last value wanted."""

    def take(value: Tensor) -> None:
        if site.site.name not in values:
            values[site.site.name] = value.clone() if site.overwritten else value
        if len(values) == n_wanted:
            raise ForwardStopped

    return take
