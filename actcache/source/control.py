"""Control tokens that a document spells: `<|endoftext|>` in a text about tokenizers is six characters to its author."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from actcache.source.kinds import Ids

ControlTokens = Literal["token", "text"]


class Control:
    """The control tokens of a tokenizer: its special tokens, but for the one that stands for unknown text."""

    def __init__(self, tokenizer: Any | None) -> None:
        self.names = {} if tokenizer is None else _control_tokens(tokenizer)
        """Their texts by id."""

    def counts(self, encoded: Sequence[Ids]) -> list[int]:
        """How many control tokens each of the documents has."""
        flat = np.concatenate(encoded) if encoded else np.zeros(0, np.uint32)
        wanted = self._is_control
        if not flat.size or not wanted.size or not wanted[np.minimum(flat, wanted.size - 1)].any():
            return [0] * len(encoded)
        return [int(wanted[np.minimum(ids, wanted.size - 1)].sum()) for ids in encoded]

    def spelled_in(self, strings: Iterable[str]) -> list[str]:
        """The control tokens that the strings spell, with repetitions."""
        return [found for string in strings for found in self._spelled.findall(string)] if self.names else []

    @cached_property
    def _is_control(self) -> NDArray[np.bool_]:
        """By id; the last entry, for all larger ids, is false."""
        wanted = np.zeros(max(self.names, default=-2) + 2, dtype=bool)
        wanted[list(self.names)] = True
        return wanted

    @cached_property
    def _spelled(self) -> re.Pattern[str]:
        longest_first = sorted(self.names.values(), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)))


def _control_tokens(tokenizer: Any) -> dict[int, str]:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    names = {i: str(token) for i, token in added.items() if getattr(token, "special", True)}
    ids = getattr(tokenizer, "all_special_ids", ())
    names |= {i: str(name) for i, name in zip(ids, getattr(tokenizer, "all_special_tokens", ()), strict=False)}
    # GPT-2's token for unknown text, of which it has none, is its end-of-text token.
    others = {getattr(tokenizer, f"{role}_token_id", None) for role in ("bos", "eos", "pad", "cls", "sep", "mask")}
    unknown = {getattr(tokenizer, "unk_token_id", None)} - others
    return {int(i): name for i, name in names.items() if i is not None and i not in unknown and name}
