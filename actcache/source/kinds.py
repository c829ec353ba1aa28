"""What a document can be: a text, a chat, or token ids that were made elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from actcache.errors import TextError, first_line

Kind = Literal["text", "chat", "tokens"]
Chat = Sequence[Mapping[str, Any]]
"""Messages in order, each `{"role": ..., "content": ...}` or, as ShareGPT has them, `{"from": ..., "value": ...}`."""
Ids = NDArray[np.integer[Any]]
Document = str | Chat | Sequence[int] | Ids

NAMES: dict[Kind, str] = {"text": "text", "chat": "chat", "tokens": "token"}
"""How error messages call a column of these."""

MOST_ID = (1 << 32) - 1
"""Largest token id that a store has room for."""


def kind_of(value: Any) -> Kind | None:
    """What a value is, by its outer form; None if it can be none of these.

    An empty list says nothing, and has no tokens either way: it counts as token ids.
    """
    if isinstance(value, str):
        return "text"
    if isinstance(value, list | tuple):
        return "chat" if value and isinstance(value[0], Mapping) else "tokens"
    if not is_array(value):
        return None
    # Tables of pandas have lists of messages as arrays.
    return "chat" if value.dtype == object and len(value) and isinstance(value[0], Mapping) else "tokens"


def is_message(value: Any) -> bool:
    """Whether a record is a message of a chat, in either form."""
    return isinstance(value, Mapping) and ("role" in value or ("from" in value and "value" in value))


def check_text(text: str) -> None:
    """Raise `TextError` if a text has half a character, as a text has that was cut between two escapes of JSON."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise TextError(
            f"character {error.start + 1:,} is U+{code:04X}, half of a pair (half an emoji, say) and no character"
        ) from error


def is_array(value: Any) -> bool:
    """Whether a value is an array of numpy, torch or the like; no library is imported to find out."""
    return hasattr(value, "__array__") and hasattr(value, "dtype") and getattr(value, "ndim", 0) > 0


def plain_array(value: Any) -> NDArray[Any]:
    """A numpy array of an array or tensor, from whatever device that is on. Memory-mapped ones stay so."""
    return np.asanyarray(value.detach().cpu() if hasattr(value, "detach") else value)


def id_array(value: Any, where: str = "") -> Ids:
    """A list, array or tensor of token ids as a 1-D array of integers of whatever type; their range is not looked at.

    Raises:
        TextError: something else than integers, or an array that is not flat.
    """
    where = f"{where}: " if where else ""
    try:
        ids = plain_array(value) if is_array(value) else np.array(value)
    except (ValueError, OverflowError, TypeError) as error:
        raise TextError(f"{where}these are no token ids ({first_line(error)})") from error
    if not ids.size:
        return np.zeros(0, dtype=np.int64)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise TextError(
            f"{where}expected a flat list of token ids, which are integers, found {ids.dtype} of shape {ids.shape}"
        )
    return ids


def uint32_ids(ids: Ids, most: int) -> NDArray[np.uint32]:
    """A copy of token ids as a store has them.

    Args:
        ids: Integers of any type.
        most: Largest id that is allowed.

    Raises:
        TextError: an id that is negative or larger than `most`.
    """
    if ids.size and (np.iinfo(ids.dtype).min < 0 or np.iinfo(ids.dtype).max > most):
        wrong = (ids < 0) | (ids > most)
        if wrong.any():
            place = int(wrong.argmax())
            raise TextError(
                f"token id {int(ids[place])} is outside 0 to {most:,}; ids must be those of the model's own tokenizer"
            )
    return ids.astype(np.uint32)
