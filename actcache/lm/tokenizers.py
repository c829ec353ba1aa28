"""A tokenizer by its name or folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from actcache.errors import ConfigError


def open_tokenizer(tokenizer: Any, trust_remote_code: bool) -> Any:
    """What was given as a tokenizer: an object as it is; a name or a folder is opened.

    Raises:
        ConfigError: there is no tokenizer by that name, or it cannot be read.
    """
    from transformers import AutoTokenizer

    if not isinstance(tokenizer, (str, Path)):
        return tokenizer
    path = Path(tokenizer).expanduser()
    place = str(path) if path.is_dir() else str(tokenizer)
    try:
        found = AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers raise bare exceptions and whatever their readers do
        raise ConfigError(f"no tokenizer {place!r} can be opened: {(str(error).splitlines() or [''])[0]}") from error
    if set(found.get_vocab()) <= {*found.all_special_tokens, *found.added_tokens_encoder}:
        raise ConfigError(f"no tokenizer {place!r}: there are no files of one")
    return found
