"""The tokens that begin and end documents and sequences, beside those of the documents themselves."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

from actcache.errors import ConfigError
from actcache.source.kinds import Kind

BosPolicy = Literal["auto", "document", "sequence", "none"]

_PROBE = "Hello world"


@dataclass(frozen=True, slots=True)
class Marks:
    """Token ids before and after a document."""

    begin: tuple[int, ...] = ()
    end: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.begin) + len(self.end)

    def __str__(self) -> str:
        return f"{list(self.begin)} + ids + {list(self.end)}"


class Bos:
    """A policy, applied to a tokenizer; a token that the tokenizer lacks is an error only where it is needed."""

    def __init__(self, policy: BosPolicy, tokenizer: Any | None) -> None:
        if policy not in get_args(BosPolicy):
            raise ConfigError(f"bos must be one of {', '.join(get_args(BosPolicy))}, got {policy!r}")
        if tokenizer is None and policy in ("document", "sequence"):
            raise ConfigError(f"bos={policy!r} needs a tokenizer, whose BOS token it is; pass one, or bos='none'")
        self.policy = policy
        self._tokenizer = tokenizer

    def marks(self, kind: Kind) -> Marks:
        """What is put around a document of that kind.

        Raises:
            ConfigError: the tokenizer has no token that could begin a document.
        """
        if self.policy == "none" or (self.policy == "auto" and kind != "text"):
            return Marks()
        return self._text_marks if self.policy == "auto" else Marks(self._begin)

    def sequence(self) -> tuple[int, ...]:
        """The tokens that every sequence begins with, unless its document does already."""
        return self._begin if self.policy == "sequence" else ()

    def as_ever(self) -> bool:
        """Whether texts get one token at their beginning (BOS, or EOS in its place) and none at their end."""
        return self.marks("text") == Marks(_tokens_of(self._tokenizer)[:1])

    @cached_property
    def _own(self) -> Marks:
        return own_marks(self._tokenizer)

    @cached_property
    def _text_marks(self) -> Marks:
        return self._own if len(self._own) else Marks(self._begin)

    @cached_property
    def _begin(self) -> tuple[int, ...]:
        if self._own.begin:
            return self._own.begin
        if not (tokens := _tokens_of(self._tokenizer)):
            raise ConfigError(
                f"{type(self._tokenizer).__name__} has neither a BOS nor an EOS token to begin documents with; "
                "set bos_token, or pass bos='none' (--bos none)"
            )
        return tokens[:1]


def _tokens_of(tokenizer: Any) -> tuple[int, ...]:
    """Tokens that could begin a document, the likeliest first."""
    names = ("bos_token_id", "eos_token_id", "cls_token_id")
    found = (getattr(tokenizer, name, None) for name in names)
    return tuple(int(token) for token in found if token is not None)


def own_marks(tokenizer: Any) -> Marks:
    """The tokens that a tokenizer puts around a text by default; found by calling it."""
    bare = list(tokenizer(_PROBE, add_special_tokens=False, verbose=False)["input_ids"])
    whole = list(tokenizer(_PROBE, verbose=False)["input_ids"])
    for start in range(len(whole) - len(bare) + 1):
        if bare and whole[start : start + len(bare)] == bare:
            return Marks(tuple(whole[:start]), tuple(whole[start + len(bare) :]))
    return Marks()
