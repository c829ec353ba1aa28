"""LanguageModel: hook names to places, and forward passes that read or replace what is there.

Shapes: Q sequences, T positions, V vocabulary, D width of a site.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from functools import cached_property
from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from actcache.errors import ConfigError, SiteError
from actcache.lm.bridge import is_bare
from actcache.lm.compiled import CompiledParts
from actcache.lm.context import TOO_LONG
from actcache.lm.forward import Forward, huggingface_forward, ignores_what_follows, logits_of, padding_mask
from actcache.lm.hooks import ForwardStopped, ResolvedSite, attach, from_rows, to_rows
from actcache.lm.identity import computation_of, is_same_model, quantization_of, tokenizer_digest, weights_digest
from actcache.lm.inputs import Inputs, may_make_input
from actcache.lm.names import Kind, SiteNames, sized
from actcache.lm.sites import Listed, id_table, survey_ids
from actcache.lm.tokenizers import Unreadable
from actcache.lm.trust import code_digest


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
        self.bos = bos
        self.revision: str | None = None
        """Commit of a model from the Hugging Face hub."""
        self.recipe: dict[str, Any] | None = None
        """What `load_lm(**recipe)` opens the same model with elsewhere; None if it was given as an object."""
        self._tokenizer = tokenizer
        self._d_vocab = d_vocab
        self._inputs = Inputs(self, n_ctx, self._run_plainly)
        self._autocast: torch.dtype | None = None
        self._compiled: CompiledParts | None = None
        self._ids_shape = (0, 0)
        self._splices: list[tuple[ResolvedSite, ResolvedSite]] = []

    def __repr__(self) -> str:
        # Of a plain module d_vocab is found by running it, which is not for looking at it.
        sizes = f"n_ctx={self._inputs.context.known}, d_vocab={self.__dict__.get('d_vocab', self._d_vocab)}"
        return f"LanguageModel({self.name!r}, {self.kind}, {sizes}, {self.dtype}, {self.device})"

    @property
    def tokenizer(self) -> Any | None:
        """The tokenizer; None if there is none.

        Raises:
            ConfigError: there are files of one, and they cannot be read. The model runs on token ids all the same.
        """
        if isinstance(self._tokenizer, Unreadable):
            raise self._tokenizer.error()
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any | None) -> None:
        self._tokenizer = tokenizer

    @property
    def tokenizer_if_readable(self) -> Any | None:
        """The tokenizer; None if there is none, or if it cannot be read."""
        return None if isinstance(self._tokenizer, Unreadable) else self._tokenizer

    @property
    def n_ctx(self) -> int | None:
        """Positions that the model has: those that its config claims, or fewer if fewer work; None for no limit.

        The claim is tried when this is first asked for, by running one sequence, unless that would be expensive;
        `check_length` tries any length.
        """
        return self._inputs.n_ctx

    @property
    def device(self) -> torch.device:
        """Where the model runs: the device of its first parameter that is in memory."""
        return next((p.device for p in self.module.parameters() if not p.is_meta), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """Element type of the weights: that of the first parameter."""
        return next((p.dtype for p in self.module.parameters()), torch.float32)

    @cached_property
    def d_vocab(self) -> int | None:
        """Number of tokens that the model knows; of a plain module, the size of the table that looks its ids up."""
        return self._id_table[0] if self.kind == "module" else self._d_vocab

    @cached_property
    def _id_table(self) -> tuple[int | None, int | None]:
        table = id_table(self._forward, self.module, self.device)
        self._inputs.check_not_moved(self._forward, survey_ids(*table, self.device))
        return table

    @property
    def quantization(self) -> str | None:
        """How the weights are stored, if not in a floating-point type: `bitsandbytes-8bit`, ..."""
        return quantization_of(self.module)

    @cached_property
    def takes_padding(self) -> bool:
        """Whether sequences of unequal length may be padded on the right without changing their own positions.

        So with causal models, and with those that take an attention mask; of a plain module nothing is known.
        """
        return self.kind != "module" and (self._forward.takes_mask or self._is_causal)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What decides the activations, JSON-able; the weights are read once for it, when it is first asked for."""
        tokenizer, code = self.tokenizer_if_readable, code_digest(self.module)
        said = {
            "revision": self.revision,
            "config": computation_of(self.module) if self.kind == "huggingface" else None,
            "trust_remote_code": True if code is not None else None,
            "code": code,
            "autocast": None if self._autocast is None else str(self._autocast).removeprefix("torch."),
            "compiled": True if self._compiled else None,
            "quantization": self.quantization,
        }
        return {
            "name": self.name,
            "class": type(self.module).__name__,
            "dtype": str(self.dtype).removeprefix("torch."),
            "weights": weights_digest(self.module),
            "tokenizer": None if tokenizer is None else tokenizer_digest(tokenizer),
            **{key: value for key, value in said.items() if value is not None},
        }

    def identity_for(self, known: Mapping[str, Any]) -> Mapping[str, Any]:
        """`known`, the identity in a store, if that is of this model, whatever it was called; otherwise `identity`."""
        return known if is_same_model(known, self.identity) else self.identity

    def check_length(self, length: int) -> None:
        """Try whether the model takes sequences of `length` tokens, by running one unless a longer one has run.

        Raises:
            ConfigError: it does not; the message says how many tokens it takes.

        Warns:
            UserWarning: it does, although its config claims fewer positions.
        """
        self._inputs.check_length(length)

    def check_ids(self, ids: ArrayLike) -> None:
        """Refuse `(Q, T)` token ids that the model does not know; memory-mapped ones are read piece by piece.

        Raises:
            ConfigError: there are such ids; the message names one, with its text if the tokenizer knows it.
        """
        self._inputs.check_ids(ids)

    def check_rows(self) -> None:
        """Refuse a Hugging Face model whose decoder does not read the ids that it is given.

        Raises:
            ConfigError: it needs an input of its own, or makes one that is moved by a position.
        """
        if self.kind == "huggingface" and may_make_input(self.module):
            self._inputs.check_not_moved(self._forward, self._survey_ids())

    def run_with(self, autocast: torch.dtype | None, compiled: bool) -> None:
        """Set how forward passes are run; `load_lm` does it, before the model is used.

        Raises:
            ConfigError: a transformer-lens model, in which hooks are everywhere, cannot be compiled.
        """
        if compiled and self.kind == "transformer_lens":
            raise ConfigError(
                f"{self.name} is a transformer-lens model, which is hooks throughout: torch.compile gains nothing; "
                "load the plain model"
            )
        self._autocast = autocast
        self._compiled = CompiledParts(self.module) if compiled else None

    @property
    def site_names(self) -> list[str]:
        """Every name that can be cached, aliases included, in the order of the forward pass."""
        return list(self._names.places)

    def resolve(self, patterns: Sequence[str], *, length: int | None = None) -> list[ResolvedSite]:
        """The sites that any of the names or glob patterns match, in the order of the forward pass.

        A pattern takes each place once, under its customary name; an alias written out is taken as it is written.
        `length` is needed for attention patterns only, whose width is heads x keys.

        Raises:
            SiteError: a pattern matches nothing; the message names the nearest names.
            ConfigError: an attention pattern without `length`.
        """
        return [sized(self._names.place(name), length) for name in self._names.matching(patterns)]

    def list_sites(self, patterns: Sequence[str] | None = None, *, length: int | None = None) -> list[Listed]:
        """What can be cached: the sites that the patterns mean, by default every name, aliases included.

        `length` gives attention patterns their width; by default the model's context, at most 256.
        """
        length = min(self.n_ctx or 256, 256) if length is None else length
        names = self._names.matching(patterns) if patterns else self.site_names
        return [self._names.listed(name, length) for name in names]

    def capture(
        self, ids: ArrayLike | Tensor, sites: Sequence[ResolvedSite], lengths: ArrayLike | Tensor | None = None
    ) -> dict[str, Tensor]:
        """Activations `{name: (Q, T, D)}` of `(Q, T)` token ids; the forward pass ends at the last site.

        What the model computes is handed out as it is, in the model's dtype and on its device, without a copy.
        `lengths` are the `(Q,)` tokens of each sequence, by default all; what is behind them holds anything.

        Raises:
            ConfigError: more positions than the model has, ids outside its vocabulary, unequal lengths for a model that
            does not take padding.
            SiteError: a site that this forward pass does not reach.
        """
        tokens = self._inputs.checked(ids, may_try=not self._splices)
        instrumented = self._choose(any(site.instrumented for site in sites))
        sites = [self._names.place_in(instrumented, site) for site in {site.site.name: site for site in sites}.values()]
        mask = self._mask(tokens, lengths)
        values: dict[str, Tensor] = {}
        with torch.no_grad(), ExitStack() as attached, suppress(ForwardStopped):
            for site in sites:
                attached.callback(attach(site.spot, _taker(site, values, n_wanted=len(sites))))
            if sites:
                self._run(tokens, instrumented, mask, sites)
        missing = [site.site.name for site in sites if site.site.name not in values]
        if missing:
            raise SiteError(f"the forward pass did not reach {', '.join(missing)}")
        return {s.site.name: to_rows(values[s.site.name], s.layout, self._ids_shape) for s in sites}

    def logits(self, ids: ArrayLike | Tensor, lengths: ArrayLike | Tensor | None = None) -> Tensor:
        """Logits (or log-probabilities) `(Q, T, V)` of `(Q, T)` token ids, with the splices that are in force.

        Raises:
            ConfigError: the model has none, as an encoder; otherwise as `capture`.
        """
        tokens = self._inputs.checked(ids, may_try=not self._splices)
        instrumented = self._choose(False)
        if instrumented and is_bare(self.module):
            raise ConfigError(f"{self.name} has no logits: it was loaded without a head; cache its sites")
        with torch.no_grad():
            return logits_of(self._run(tokens, instrumented, self._mask(tokens, lengths)), self.name)

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
        both = [s if isinstance(s, ResolvedSite) else self._names.one(s) for s in (site_in, site_out)]
        instrumented = self._choose(any(site.instrumented for site in both))
        source, target = (self._names.place_in(instrumented, site) for site in both)
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
            self._splices.append((source, target))
            undo.callback(self._splices.pop)
            undo.callback(attach(source.spot, read))
            undo.callback(attach(target.spot, write))
            yield

    def open_instrumented(self) -> Any:
        """The model as transformer-lens has it; see `open_bridge`."""
        return self._names.bridge

    # Running

    @cached_property
    def _forward(self) -> Forward:
        """How the model that was given is called."""
        match self.kind:
            case "huggingface":
                return huggingface_forward(self.module)
            case "transformer_lens":
                return self._names.instrumented_forward
            case _:
                return Forward(self.module, {}, masks=False)

    @cached_property
    def _names(self) -> SiteNames:
        return SiteNames(
            self.module, self.kind, self.name, self.tokenizer_if_readable, lambda: self._forward, self._survey_ids
        )

    def _survey_ids(self) -> Tensor:
        n_positions = self._id_table[1] if self.kind == "module" else self._inputs.context.known
        return survey_ids(self.d_vocab, n_positions, self.device)

    @cached_property
    def _is_causal(self) -> bool:
        """Whether no position of the output depends on later ones."""
        return self.kind == "stories" or ignores_what_follows(self._forward, self._survey_ids(), self.d_vocab or 2)

    def _mask(self, tokens: Tensor, lengths: ArrayLike | Tensor | None) -> Tensor | None:
        """The attention mask that sequences of these lengths need; causal models need none, and are faster without."""
        if lengths is None:
            return None
        lengths_Q = torch.as_tensor(lengths, dtype=torch.int64)
        low, top = (int(bound) for bound in lengths_Q.aminmax()) if lengths_Q.shape == tokens.shape[:1] else (0, 0)
        if low < 1 or top > tokens.shape[1]:
            raise ConfigError(
                f"lengths must be {tokens.shape[0]} numbers of 1 to {tokens.shape[1]} tokens, got {lengths_Q.tolist()}"
            )
        if low == tokens.shape[1]:
            return None
        if not self.takes_padding:
            raise ConfigError(
                f"sequences of {low} to {top} tokens in a batch of {tokens.shape[1]}, but padding may change what "
                f"{self.name} computes: give it sequences of equal length"
            )
        return None if self._is_causal else padding_mask(lengths_Q, tokens.shape[1]).to(self.device)

    def _choose(self, instrumented: bool) -> bool:
        """Whether the instrumented model must run: for a site that asks for it, or a splice that is in it."""
        in_force = [source.instrumented for source, _ in self._splices]
        if instrumented and not all(in_force):
            raise ConfigError("a splice of plain sites is in force: leave it before using instrumented sites")
        return instrumented or any(in_force) or self.kind == "transformer_lens"

    def _run(self, tokens: Tensor, instrumented: bool, mask: Tensor | None, sites: Sequence[ResolvedSite] = ()) -> Any:
        self._ids_shape = (tokens.shape[0], tokens.shape[1])
        try:
            return self._forward_pass(tokens, instrumented, mask, sites)
        except TOO_LONG as error:
            if not self._splices:  # their hooks would see the sequences that are tried
                self._inputs.check_failed(tokens.shape[1], error)
            raise

    def _forward_pass(
        self, tokens: Tensor, instrumented: bool, mask: Tensor | None, sites: Sequence[ResolvedSite]
    ) -> Any:
        cast = torch.autocast(self.device.type, self._autocast) if self._autocast else nullcontext()
        if instrumented:
            with cast:
                return self._names.instrumented_forward(tokens, mask)
        with cast, self._compiled_around(sites):
            return self._forward(tokens, mask)

    def _run_plainly(self, ids: Tensor) -> Any:
        """One forward pass of the model that was given, to try what it takes."""
        with torch.autocast(self.device.type, self._autocast) if self._autocast else nullcontext():
            return self._forward(ids)

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
