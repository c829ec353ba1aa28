"""What a model takes: sequence lengths, and token ids that it uses as they are given.

Encoder-decoders without an input for the decoder make one of the ids, moved by a position, so that rows of the decoder
belong to the token before the one that a row table names. There is no list of such architectures: what the embeddings
are given shows it.

Shapes: Q sequences, T positions.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from actcache.errors import ConfigError
from actcache.lm.context_length import Context
from actcache.lm.names import Kind
from actcache.memory import is_out_of_memory

_IDS_AT_A_TIME = 1 << 22
_SPECIAL = ("pad", "bos", "eos", "sep", "cls", "mask", "unk")


class Model(Protocol):
    """The part of a model that the checks look at."""

    module: nn.Module
    name: str
    kind: Kind

    @property
    def device(self) -> torch.device:
        """Where it runs."""

    @property
    def d_vocab(self) -> int | None:
        """Tokens that it knows."""

    @property
    def tokenizer_if_readable(self) -> Any | None:
        """Its tokenizer."""


class Inputs:
    """Checks of what a model is given.

    Args:
        lm: the model.
        claimed: positions according to its config.
        run: one forward pass of `(Q, T)` token ids.
    """

    def __init__(self, lm: Model, claimed: int | None, run: Callable[[Tensor], Any]) -> None:
        self._lm = lm
        self.context = Context(claimed, run, self._plain_ids, lambda: sum(p.numel() for p in lm.module.parameters()))

    @property
    def n_ctx(self) -> int | None:
        """Positions as `LanguageModel.n_ctx` gives them; the config of the embedded architecture is always right."""
        return self.context.claimed if self._lm.kind == "stories" else self.context.longest

    def check_length(self, length: int) -> None:
        """See `LanguageModel.check_length`."""
        self._refuse(length, self._limit_below(length))
        claimed = self.context.claimed
        if claimed is not None and length > claimed:
            warnings.warn(
                f"sequences of {length} tokens run through {self._lm.name}, but its config claims {claimed} positions: "
                "it may not have been trained on so many",
                stacklevel=3,
            )

    def check_failed(self, length: int, error: Exception) -> None:
        """Raise `ConfigError` if a forward pass over sequences of this length failed because of the length."""
        if not is_out_of_memory(error):
            self._refuse(length, self._limit_below(length), error)

    def check_ids(self, ids: ArrayLike) -> None:
        """See `LanguageModel.check_ids`."""
        table = ids if isinstance(ids, np.ndarray) else np.asarray(ids)
        per_piece = max(1, _IDS_AT_A_TIME // max(1, table[:1].size))
        for start in range(0, len(table), per_piece):
            piece = table[start : start + per_piece]
            self._check_bounds(int(piece.min()), int(piece.max()))

    def as_tokens(self, ids: ArrayLike | Tensor, *, may_try: bool) -> Tensor:
        """Token ids as the model wants them: int64, on its device.

        A length that was never tried may fail when it runs. On a GPU an index out of bounds ends the process, so a new
        length is tried there first, if `may_try`.
        """
        tokens = ids.long() if isinstance(ids, Tensor) else torch.from_numpy(np.asarray(ids).astype(np.int64))
        if tokens.ndim != 2 or not tokens.numel():
            raise ConfigError(f"token ids must be a (sequences, positions) array, got shape {tuple(tokens.shape)}")
        length, on_cpu = tokens.shape[1], self._lm.device.type == "cpu"
        is_tried = self._lm.kind == "stories" or (may_try and not on_cpu)
        self._refuse(length, self._limit_below(length) if is_tried else self.context.limit_known_below(length))
        self._check_bounds(*(int(bound) for bound in tokens.aminmax()))
        return tokens.to(self._lm.device)

    def check_not_moved(self, run: Callable[[Tensor], Any], ids: Tensor) -> None:
        """Raise `ConfigError` if the model feeds a decoder with the `(Q, T)` ids moved, or cannot run on ids alone."""
        module, cause = self._lm.module, None
        try:
            moved = embeds_moved_ids(run, ids)
        except Exception as error:  # a model that lacks an input may raise anything
            moved, cause = may_make_input(module), error
        if moved:
            raise ConfigError(
                f"{self._lm.name} ({type(module).__name__}) is not a causal language model, nor an encoder: its "
                "decoder needs an input of its own, or makes one of the ids moved by one position, so that rows of the "
                "decoder would belong to other tokens; give load_lm its encoder as a module: "
                "load_lm(module.get_encoder(), tokenizer=...)"
            ) from cause

    def _limit_below(self, length: int) -> int | None:
        if self._lm.kind != "stories":
            return self.context.limit_below(length)
        claimed = self.context.claimed
        return claimed if claimed is not None and length > claimed else None

    def _refuse(self, length: int, limit: int | None, cause: Exception | None = None) -> None:
        if limit is not None:
            raise ConfigError(
                f"sequences of {length} tokens, but {self._lm.name} has a context of {limit} positions; "
                f"use a length of at most {limit}"
            ) from (cause or self.context.why)

    def _check_bounds(self, low: int, top: int) -> None:
        d_vocab = self._lm.d_vocab
        if low >= 0 and (d_vocab is None or top < d_vocab):
            return
        outside, text = (low if low < 0 else top), ""
        with suppress(Exception):  # tokenizers raise various errors for an unknown id
            said = self._lm.tokenizer_if_readable.convert_ids_to_tokens(outside)  # type: ignore[union-attr]
            text = f" ({said!r} in its tokenizer)" if isinstance(said, str) else ""
        raise ConfigError(
            f"token id {outside}{text}, but {self._lm.name} knows {d_vocab} tokens; use its own tokenizer"
        )

    def _plain_ids(self, length: int) -> Tensor:
        """`(1, T)` ids, all of the same ordinary token."""
        config = getattr(self._lm.module, "config", None)
        special = {getattr(config, f"{name}_token_id", None) for name in _SPECIAL}
        d_vocab = self._lm.d_vocab or 2
        token = next((n for n in range(d_vocab // 2, d_vocab) if n not in special), 0)
        return torch.full((1, length), token, device=self._lm.device)


def takes_decoder_input(model: Any) -> bool:
    """Whether the forward pass of a module, or of a class, has an input for a decoder."""
    return "decoder_input_ids" in inspect.signature(model.forward).parameters


def may_make_input(module: nn.Module) -> bool:
    """Whether a Hugging Face model has a decoder beside an encoder, and so may make an input for it."""
    return takes_decoder_input(module) or bool(getattr(getattr(module, "config", None), "is_encoder_decoder", False))


def embeds_moved_ids(run: Callable[[Tensor], Any], ids: Tensor) -> bool:
    """Whether any table of embeddings is given the `(Q, T)` ids moved by some positions; runs one forward pass."""
    n_positions = ids.shape[1]
    moves = range(1, n_positions // 2 + 1)
    looked_up = [given for given in _lookups(run, ids) if given.shape == ids.shape and not torch.equal(given, ids)]
    return any(
        torch.equal(given[:, move:], ids[:, : n_positions - move])
        or torch.equal(given[:, : n_positions - move], ids[:, move:])
        for given in looked_up
        for move in moves
    )


def _lookups(run: Callable[[Tensor], Any], ids: Tensor) -> list[Tensor]:
    """The indices of every lookup in a table of embeddings, in order."""
    found: list[Tensor] = []

    class Listening(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if getattr(func, "overloadpacket", None) is torch.ops.aten.embedding:
                found.append(args[1].detach().clone())
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Listening():  # type: ignore[no-untyped-call]
        run(ids)
    return found
