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
"""How error messages name a column of these."""

MOST_ID = (1 << 32) - 1
"""Largest token id that a store can hold."""


def kind_of(value: Any) -> Kind | None:
    """What kind of document a value is, by its outer form; None if it is not a document.

    An empty list counts as token ids; it gives no tokens in any case.
    """
    if isinstance(value, str):
        return "text"
    if isinstance(value, list | tuple):
        return "chat" if value and isinstance(value[0], Mapping) else "tokens"
    if not is_array(value):
        return None
    # pandas tables hold lists of messages as arrays.
    return "chat" if value.dtype == object and len(value) and isinstance(value[0], Mapping) else "tokens"


def is_message(value: Any) -> bool:
    """Whether a record is a message of a chat, in either form."""
    return isinstance(value, Mapping) and ("role" in value or ("from" in value and "value" in value))


def check_text(text: str) -> None:
    """Raise `TextError` if a text contains half a surrogate pair, for example because JSON escapes were cut apart."""
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
    """A numpy array from an array, or from a tensor on any device. Memory-mapped arrays stay memory-mapped."""
    return np.asanyarray(value.detach().cpu() if hasattr(value, "detach") else value)


def id_array(value: Any, where: str = "") -> Ids:
    """A list, array or tensor of token ids as a 1-D array of any integer type; their range is not checked.

    Raises:
        TextError: the values are not integers, or the array is not flat.
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
    """A copy of token ids in the type that a store has.

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
