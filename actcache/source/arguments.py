"""What may be given for documents, a tokenizer, a number or token blocks; anything else is refused in one sentence."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence, Set
from numbers import Integral
from pathlib import PurePath
from typing import Any

import numpy as np

from actcache.errors import ConfigError, TextError
from actcache.source.kinds import MOST_ID, Document, id_array, is_array, plain_array, uint32_ids
from actcache.spec import TokenBlocks


def as_documents(documents: Any) -> Iterable[Document]:
    """The argument of `token_blocks` as an iterable of documents: flat token ids are one document.

    Raises:
        TextError: something that holds no documents, or not in an order; an array that is neither flat nor `(Q, T)`.
    """
    if (refused := _no_documents(documents)) is not None:
        raise TextError(refused)
    if is_array(documents):
        array = plain_array(documents)
        if array.dtype.kind in "iu" and array.ndim > 2:
            raise TextError(f"token ids must be a (Q, T) or a flat array, got shape {array.shape}")
        return [array] if array.dtype.kind in "iu" and array.ndim == 1 else array
    if hasattr(documents, "to_pylist"):  # a column of Arrow
        documents = documents.to_pylist()
    if isinstance(documents, Sequence) and documents and isinstance(documents[0], int | np.integer):
        return [documents]
    return documents  # type: ignore[no-any-return]  # its elements are checked as they come


def _no_documents(found: Any) -> str | None:
    """Why something holds no documents; None if it may hold some."""
    kind = type(found).__name__
    if isinstance(found, str):
        return "texts is a single string; pass a list of texts, or read_texts(path) for a file"
    if isinstance(found, PurePath | os.PathLike):
        return f"texts is a path; pass what is in it: read_texts({str(found)!r}), or read_documents"
    if isinstance(found, bytes | bytearray):
        return "texts is bytes; decode them, and pass a list of texts"
    if isinstance(found, Mapping):
        names, first = ", ".join(map(repr, list(found)[:8])), next(iter(found), "text")
        return f"texts is a {kind} with {names or 'nothing in it'}; pass one column, such as texts[{first!r}]"
    if hasattr(found, "columns") and hasattr(found, "iloc"):
        return f"texts is a {kind}; pass one of its columns, such as texts[{str(next(iter(found.columns), 'text'))!r}]"
    if hasattr(found, "column_names") and hasattr(found, "to_pylist"):
        return f"texts is a {kind}; pass one of its columns, such as texts[{next(iter(found.column_names), 'text')!r}]"
    if isinstance(found, Set):
        return f"texts is a {kind}, whose order changes from run to run; pass a list"
    if isinstance(found, TokenBlocks):
        return "texts is TokenBlocks already; pass them to extract as they are"
    if not hasattr(found, "__iter__") and not hasattr(found, "__getitem__"):
        return f"texts is {kind}; pass a list (or any iterable) of texts, chats or token ids"
    if getattr(found, "ndim", 1) == 0:
        return f"texts is a {kind} of a single value; pass a (Q, T) or a flat array of token ids"
    return None


def as_tokenizer(tokenizer: Any) -> Any | None:
    """The argument as a tokenizer of transformers: given itself, by name or folder, or as a `tokenizers.Tokenizer`.

    Raises:
        ConfigError: nothing has that name, or it is something else.
    """
    if tokenizer is None:
        return None
    if isinstance(tokenizer, str | os.PathLike):
        from actcache.lm.load import EMBEDDED_MODEL, load_lm
        from actcache.lm.tokenizers import open_tokenizer

        name = os.fspath(tokenizer)
        return load_lm(name).tokenizer if name == EMBEDDED_MODEL else open_tokenizer(name, trust_remote_code=False)
    if type(tokenizer).__module__.split(".")[0] == "tokenizers" and hasattr(tokenizer, "to_str"):
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    if not isinstance(tokenizer, type) and callable(tokenizer) and hasattr(tokenizer, "get_vocab"):
        return tokenizer
    found = f"the class {tokenizer.__name__}" if isinstance(tokenizer, type) else type(tokenizer).__name__
    hint = "; pass its tokenizer: .tokenizer" if getattr(tokenizer, "tokenizer", None) is not None else ""
    raise ConfigError(
        "tokenizer must be a tokenizer of transformers, the name or folder of one, or None for token ids, "
        f"got {found}{hint}"
    )


def whole_number(name: str, value: Any, least: int) -> int:
    """A whole number of Python, numpy or torch as an `int`.

    Raises:
        ConfigError: it is not a whole number, or less than `least`.
    """
    if isinstance(value, Integral) and not isinstance(value, bool | np.bool_) and int(value) >= least:
        return int(value)
    what = "a positive integer" if least == 1 else "an integer" if least < 0 else f"an integer of at least {least}"
    raise ConfigError(f"token_blocks: {name} must be {what}, got {value!r}")


def as_token_blocks(blocks: Any) -> TokenBlocks:
    """The argument as token blocks: given themselves, or as `(Q, T)` ids in an array, a tensor or a list of lists.

    Ids are used as they are, in their order, each sequence a document of its own.

    Raises:
        ConfigError: ids of another shape or type, or something that holds no ids; the message says what makes blocks.
    """
    if isinstance(blocks, TokenBlocks):
        return blocks
    kind = type(blocks).__name__
    if hasattr(blocks, "token_blocks"):
        raise ConfigError(f"a {kind} is not token blocks, but has some: pass its token_blocks()")
    if not is_array(blocks) and not isinstance(blocks, list | tuple):
        what = "a mapping; pass its ids, such as batch['input_ids']" if isinstance(blocks, Mapping) else kind
        raise ConfigError(
            f"expected token blocks or a (Q, T) array of token ids, got {what}; of texts and chats "
            "token_blocks(texts, tokenizer, length=...) makes blocks"
        )
    if not is_array(blocks):
        _check_rows(blocks)
    return _blocks_of_ids(blocks)


def _check_rows(rows: Sequence[Any]) -> None:
    """Raise `ConfigError` unless all rows are lists of equal length."""
    other = next((row for row in rows if not is_array(row) and not isinstance(row, list | tuple)), None)
    if other is not None:
        found = "a flat list of ids" if isinstance(other, Integral) else f"a list of {type(other).__name__}"
        raise ConfigError(
            f"expected token blocks or (Q, T) token ids, got {found}: token_blocks(..., length=...) makes blocks of it"
        )
    if len({len(row) for row in rows}) > 1:
        raise ConfigError(
            "the rows of token ids are not equally long: token_blocks(rows, None, length=..., packing='documents') "
            "makes blocks of them"
        )


def _blocks_of_ids(values: Any) -> TokenBlocks:
    try:
        ids = plain_array(values) if is_array(values) else np.array([id_array(plain_array(row)) for row in values])
        if ids.ndim != 2 or 0 in ids.shape:
            raise TextError(f"they must be (Q, T), at least one sequence of one token, found shape {ids.shape}")
        if ids.dtype.kind not in "iu":
            raise TextError(f"they must be integers, found {ids.dtype}")
        flat = uint32_ids(ids.reshape(-1), MOST_ID)
    except TextError as error:
        raise ConfigError(f"these are no token ids to extract from: {error}") from error
    n_sequences, length = ids.shape
    document = np.broadcast_to(np.arange(n_sequences, dtype=np.uint32)[:, None], ids.shape)
    blocks = TokenBlocks(ids=flat.reshape(ids.shape), document=document, description={})
    description = {
        "length": length,
        "n_documents": n_sequences,
        "n_tokens": n_sequences * length,
        "tokens": blocks.digest(),
        "kinds": {"tokens": n_sequences},
        "order": "as given",
    }
    return TokenBlocks(ids=blocks.ids, document=document, description=description)
