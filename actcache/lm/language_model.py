"""LanguageModel: hook names to places, and forward passes that read or replace what is there.

Shapes: Q sequences, T positions, V vocabulary, D width of a site.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from actcache.errors import ConfigError
from actcache.lm.forward import (
    Forward,
    device_of,
    first_tensor,
    huggingface_forward,
    ignores_what_follows,
    is_bare,
    logits_of,
    padding_mask,
)
from actcache.lm.hooks import ResolvedSite
from actcache.lm.identity import computation_of, is_same_model, quantization_of, tokenizer_digest, weights_digest
from actcache.lm.inputs import Inputs, may_make_input
from actcache.lm.names import Kind, SiteNames, with_length
from actcache.lm.padding import Padding
from actcache.lm.passes import Passes
from actcache.lm.survey import OUTPUT, Listed, id_table, survey_ids
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
        self._inputs = Inputs(self, n_ctx, lambda ids: self._passes.run_plainly(ids))
        self._padding = Padding(self._run_padded, lambda length: self._survey_ids(length)[0][:1])

    def __repr__(self) -> str:
        # Of a plain module d_vocab is found by running it, which is not for looking at it.
        sizes = f"n_ctx={self._inputs.context.known}, d_vocab={self.__dict__.get('d_vocab', self._d_vocab)}"
        return f"LanguageModel({self.name!r}, {self.kind}, {sizes}, {self.dtype}, {self.device})"

    @property
    def tokenizer(self) -> Any | None:
        """The tokenizer, or None.

        Raises:
            ConfigError: its files cannot be read. The model still runs on token ids.
        """
        if isinstance(self._tokenizer, Unreadable):
            raise self._tokenizer.error()
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any | None) -> None:
        self._tokenizer = tokenizer

    @property
    def tokenizer_if_readable(self) -> Any | None:
        """The tokenizer; None if it is missing or cannot be read."""
        return None if isinstance(self._tokenizer, Unreadable) else self._tokenizer

    @property
    def n_ctx(self) -> int | None:
        """Positions that the model has: as many as its config claims, or fewer if fewer work; None for no limit.

        The claim is tried when this is first asked for, by running one sequence, unless that would be expensive;
        `check_length` tries any length.
        """
        return self._inputs.n_ctx

    @property
    def device(self) -> torch.device:
        """Where the model runs: the device of its first parameter that is in memory."""
        return device_of(self.module)

    @property
    def dtype(self) -> torch.dtype:
        """Element type of the weights: that of the first parameter."""
        return next((p.dtype for p in self.module.parameters()), torch.float32)

    @cached_property
    def d_vocab(self) -> int | None:
        """Number of tokens that the model knows; for a plain module, the rows of the table that is given its ids."""
        return self._id_table[0] if self.kind == "module" else self._d_vocab

    @cached_property
    def _id_table(self) -> tuple[int | None, int | None]:
        table = id_table(self._forward, self.module, self.device)
        self._inputs.check_not_moved(self._forward, survey_ids(*table, self.device)[0])
        return table

    @property
    def autocast(self) -> torch.dtype | None:
        """The type that forward passes are cast to on the fly, if they are."""
        return self._passes.autocast

    @property
    def spliced(self) -> bool:
        """Whether a splice is in force."""
        return self._passes.spliced

    @property
    def quantization(self) -> str | None:
        """How the weights are stored, if not in a floating-point type: `bitsandbytes-8bit`, ..."""
        return quantization_of(self.module)

    @cached_property
    def takes_padding(self) -> bool:
        """Whether right padding of unequal sequences may leave their own positions unchanged.

        That is so for causal models and for those that take an attention mask; for a plain module it is unknown.
        Whether it holds at a given length is tried by `takes_padding_to`.
        """
        return self.kind != "module" and (self._forward.takes_mask or self._is_causal)

    def takes_padding_to(self, length: int, sites: Sequence[ResolvedSite] = ()) -> bool:
        """Whether sequences may be padded to that many tokens without changing their own positions at these sites.

        It is tried once for each length: some models treat a short sequence differently in a batch with a long one.
        Without sites, the model's output is compared.
        """
        return self.takes_padding and self._padding.is_harmless(length, sites)

    @property
    def refused_sites(self) -> dict[str, str]:
        """Names whose activations are not rows of tokens, or whose meaning is unknown; and the reasons."""
        return self._names.refused

    @property
    def disagreement(self) -> str:
        """Where transformer-lens' model, if it is used, computes something else than this one; empty if it agrees.

        Names from that point on are not taken from it.
        """
        return self._names.disagreement

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What decides the activations, JSON-able. The weights are read for it once, when it is first asked for."""
        tokenizer, code = self.tokenizer_if_readable, code_digest(self.module)
        said = {
            "revision": self.revision,
            "config": computation_of(self.module) if self.kind == "huggingface" else None,
            "trust_remote_code": True if code is not None else None,
            "code": code,
            "autocast": None if self.autocast is None else str(self.autocast).removeprefix("torch."),
            "compiled": True if self._passes.compiled else None,
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
        """`known`, the identity in a store, if it belongs to this model under any name; otherwise `identity`."""
        return known if is_same_model(known, self.identity) else self.identity

    def check_length(self, length: int) -> None:
        """Check that the model takes sequences of `length` tokens, by running one unless a longer one has run.

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
            self._inputs.check_not_moved(self._forward, self._survey_ids()[0])

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
        self._passes.autocast = autocast
        if compiled:
            self._passes.compile()

    @property
    def site_names(self) -> list[str]:
        """Every name that can be cached, aliases included, in the order of the forward pass."""
        return list(self._names.places)

    def resolve(self, patterns: Sequence[str], *, length: int | None = None) -> list[ResolvedSite]:
        """The sites that any of the names or glob patterns match, in the order of the forward pass.

        A pattern takes each place once, under its customary name; an alias written out is taken as it is written. Hook
        names come before module paths, which are names of every model: `model.layers.3.mlp:out`, and where a module
        runs several times in one pass `...:out@2`. `length` is needed for attention patterns, whose width is heads x
        keys; the instrumented model, where one is needed, is also compared with the plain one at that length.

        Raises:
            SiteError: a pattern matches nothing; the message says why, or names the nearest names. The instrumented
            model computes something else. ConfigError: an attention pattern without `length`.
        """
        with self._passes.unspliced():
            found = [with_length(self._names.place(name), length) for name in self._names.match(patterns)]
            instrumented = [site.site.name for site in found if site.instrumented]
            if length is not None and instrumented:
                self._names.check_instrumented(instrumented, length)
        return found

    def list_sites(self, patterns: Sequence[str] | None = None, *, length: int | None = None) -> list[Listed]:
        """What can be cached: the sites that the patterns mean, by default every name, aliases included.

        `length` gives attention patterns their width; by default the model's context, at most 256.
        """
        length = min(self.n_ctx or 256, 256) if length is None else length
        with self._passes.unspliced():
            names = self._names.match(patterns) if patterns else self.site_names
        return [self._names.list_site(name, length) for name in names]

    def capture(
        self, ids: ArrayLike | Tensor, sites: Sequence[ResolvedSite], lengths: ArrayLike | Tensor | None = None
    ) -> dict[str, Tensor]:
        """Activations `{name: (Q, T, D)}` of `(Q, T)` token ids; the forward pass ends at the last site.

        Values are handed out in the model's dtype and on its device, without a copy. `lengths` are the `(Q,)` tokens of
        each sequence, by default all; values after the end of a sequence are arbitrary.

        Raises:
            ConfigError: more positions than the model has, ids outside its vocabulary, unequal lengths for a model that
            does not take padding.
            SiteError: a site that this forward pass does not reach.
        """
        tokens = self._inputs.as_tokens(ids, may_try=not self.spliced)
        wanted = list({site.site.name: site for site in sites}.values())
        return self._passes.capture(tokens, wanted, self._mask(tokens, lengths, wanted))

    def logits(self, ids: ArrayLike | Tensor, lengths: ArrayLike | Tensor | None = None) -> Tensor:
        """Logits (or log-probabilities) `(Q, T, V)` of `(Q, T)` token ids, with the splices that are in force.

        Raises:
            ConfigError: the model has none, as an encoder; otherwise as `capture`.
        """
        tokens = self._inputs.as_tokens(ids, may_try=not self.spliced)
        instrumented = self._passes.needs_instrumented()
        if instrumented and is_bare(self.module):
            raise ConfigError(f"{self.name} has no logits: it was loaded without a head; cache its sites")
        with torch.no_grad():
            return logits_of(self._passes.run(tokens, self._mask(tokens, lengths, ()), instrumented), self.name)

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
        with self._passes.unspliced():
            source, target = (s if isinstance(s, ResolvedSite) else self._names.single(s) for s in (site_in, site_out))
        with self._passes.splice(source, target, fn):
            yield

    def open_instrumented(self) -> Any:
        """The model as a `TransformerBridge` with every hook, computing what the plain model computes.

        The embedded model opens through `boot_native` with a copy of its weights; a Hugging Face model is bridged
        around its own weights, unprocessed; a transformer-lens model is returned as it is.

        Raises:
            ConfigError: transformer-lens has no architecture for the model.
        """
        return self._names.bridge

    @cached_property
    def _passes(self) -> Passes:
        is_instrumented, check_failed = self.kind == "transformer_lens", self._inputs.check_failed
        return Passes(self.module, lambda: self._forward, lambda: self._names, check_failed, is_instrumented)

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

    def _survey_ids(self, length: int | None = None) -> list[Tensor]:
        """Batches for a survey: of a few tokens, or of the given length."""
        if length is not None:
            return survey_ids(self.d_vocab, length, self.device, length)
        n_positions = self._id_table[1] if self.kind == "module" else self._inputs.context.known
        return survey_ids(self.d_vocab, n_positions, self.device)

    @cached_property
    def _is_causal(self) -> bool:
        """Whether no position of the output depends on later ones."""
        return self.kind == "stories" or ignores_what_follows(self._forward, self._survey_ids()[0], self.d_vocab or 2)

    def _mask(self, tokens: Tensor, lengths: ArrayLike | Tensor | None, sites: Sequence[ResolvedSite]) -> Tensor | None:
        """The attention mask for sequences of these lengths; causal models need none, and are faster without."""
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
        if not self.takes_padding_to(tokens.shape[1], sites):
            raise ConfigError(
                f"sequences of {low} to {top} tokens in a batch of {tokens.shape[1]}, but padding may change what "
                f"{self.name} computes: give it sequences of equal length"
            )
        return self._padding_mask(lengths_Q, tokens.shape[1])

    def _padding_mask(self, lengths_Q: Tensor, n_positions: int) -> Tensor | None:
        return None if self._is_causal else padding_mask(lengths_Q, n_positions).to(self.device)

    def _run_padded(self, tokens: Tensor, lengths: Tensor | None, sites: Sequence[ResolvedSite]) -> dict[str, Tensor]:
        """Values of a padded batch, without a check whether padding is harmless; without sites, the model's output."""
        mask = None if lengths is None else self._padding_mask(lengths, tokens.shape[1])
        if sites:
            with self._passes.unspliced():
                return self._passes.capture(tokens, sites, mask)
        with torch.no_grad(), self._passes.unspliced():
            found = first_tensor(self._passes.run(tokens, mask, self._passes.needs_instrumented()))
        return {} if found is None else {OUTPUT: found}
