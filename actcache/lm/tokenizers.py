"""The tokenizer of a model: readable, missing, or unreadable, which is an error only where it is needed.

In: a folder or a name on the hub. Out: the tokenizer, None if it has no files, or an `Unreadable`.
transformers makes an empty tokenizer out of no files at all, so files and vocabulary are looked at here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actcache.errors import ConfigError
from actcache.lm.diagnose import fault_in, reason_of
from actcache.lm.trust import WAY_OUT, code_files

_FILES = ("tokenizer*", "vocab*", "merges.txt", "*.tiktoken", "tekken.json", "spiece.model", "*.bpe.model", "*.spm")
"""Names of files that tokenizers are made from, `tokenizer_config.json` among them."""
_BESIDE = ("special_tokens_map.json", "added_tokens.json")
"""Read with them, but not a tokenizer on their own."""


@dataclass(frozen=True)
class Unreadable:
    """A tokenizer that exists but cannot be used."""

    reason: str
    cause: BaseException | None = None

    def error(self) -> ConfigError:
        """The error to raise where the tokenizer is needed."""
        error = ConfigError(self.reason)
        error.__cause__ = self.cause
        return error


def load_tokenizer(place: str, folder: Path | None, options: Mapping[str, Any]) -> Any | Unreadable | None:
    """The tokenizer of a model.

    Args:
        place: folder, or name on the hub.
        folder: where its files are on this machine, if that is known already.
        options: `trust_remote_code`, and what else `from_pretrained` is given (`revision`, `gguf_file`).
    """
    from transformers import AutoTokenizer

    in_gguf = "gguf_file" in options
    if folder is not None and not in_gguf:
        if not any(_files(folder)):
            return None
        fault = _fault(folder, trusted=bool(options["trust_remote_code"]))
        if fault is not None:
            return Unreadable(fault)
    found: Any = None
    error: Exception | None = None
    try:
        found = AutoTokenizer.from_pretrained(place, **options)
    except Exception as raised:  # tokenizers raise bare exceptions and whatever their readers do
        error = raised
    if folder is None and not in_gguf:
        folder = _in_cache(place, options.get("revision"))
        if folder is None or not any(_files(folder)):
            return None
    if error is not None:
        return _unreadable(place, folder, error)
    if _has_words(found):
        return found
    return None if in_gguf else Unreadable(f"the tokenizer in {folder} has no vocabulary: get its files")


def _in_cache(name: str, revision: str | None) -> Path | None:
    """Where the files of a hub repository are on this machine; None if it has none of those looked for."""
    from huggingface_hub import try_to_load_from_cache

    for file in (
        "tokenizer_config.json",
        "tokenizer.json",
        "config.json",
        "vocab.txt",
        "vocab.json",
        "tokenizer.model",
    ):
        with suppress(ValueError):  # not a repository name
            found = try_to_load_from_cache(name, file, revision=revision or "main")
            if isinstance(found, str):
                return Path(found).parent
    return None


def open_tokenizer(tokenizer: Any, trust_remote_code: bool) -> Any:
    """What `load_lm` was given as a tokenizer: an object as it is; a name or a folder is opened.

    Raises:
        ConfigError: there is no tokenizer by that name, or it cannot be read.
    """
    if not isinstance(tokenizer, (str, Path)):
        return tokenizer
    path = Path(tokenizer).expanduser()
    folder = path if path.is_dir() else None
    place = str(path) if folder is not None else str(tokenizer)
    found = load_tokenizer(place, folder, {"trust_remote_code": trust_remote_code})
    if isinstance(found, Unreadable):
        raise found.error()
    if found is None:
        raise ConfigError(
            f"no tokenizer {str(tokenizer)!r}: give a tokenizer, a folder that has one (tokenizer.json, ...), "
            "or a Hugging Face name"
        )
    return found


def open_tokenizer_file(file: Path, **special: str) -> Any | Unreadable | None:
    """The tokenizer in a `tokenizer.json` without other files; None if there is no such file."""
    from transformers import PreTrainedTokenizerFast

    if not file.exists() and not file.is_symlink():
        return None
    fault = fault_in(file)
    if fault is not None:
        return Unreadable(f"the tokenizer cannot be read: {file} {fault}")
    try:
        return PreTrainedTokenizerFast(tokenizer_file=str(file), **special)
    except Exception as error:  # the tokenizers library raises bare exceptions
        return Unreadable(f"the tokenizer in {file} cannot be read: {reason_of(error)}", error)


def _files(folder: Path) -> Iterator[Path]:
    for pattern in _FILES:
        yield from folder.glob(pattern)


def _fault(folder: Path, *, trusted: bool) -> str | None:
    """What is wrong with a tokenizer's files, if that can be told from the files alone."""
    for path in sorted({*_files(folder), *(folder / name for name in _BESIDE)}):
        if path.name in _BESIDE and not path.exists():
            continue
        # A folder named like a tokenizer file is unrelated, unless it takes that file's place.
        if path.is_dir() and not path.suffix:
            continue
        fault = fault_in(path)
        if fault is not None:
            return f"the tokenizer cannot be read: {path} {fault}"
    config = folder / "tokenizer_config.json"
    files = code_files(json.loads(config.read_bytes())) if config.exists() else []
    if files and not trusted and not (folder / "tokenizer.json").exists():
        return f"the tokenizer in {folder} is code of its own ({', '.join(files)}), which is not run: {WAY_OUT}"
    return None


def _unreadable(place: str, folder: Path | None, error: Exception) -> Unreadable:
    said = f"the tokenizer {'in' if folder else 'of'} {folder or place} cannot be read"
    if "trust_remote_code" in str(error):
        return Unreadable(f"{said}: it is code of its own, which is not run; {WAY_OUT}", error)
    return Unreadable(f"{said}: {reason_of(error)}", error)


def _has_words(tokenizer: Any) -> bool:
    """Whether there is more in its vocabulary than special tokens."""
    with suppress(NotImplementedError, AttributeError):
        special = {*tokenizer.all_special_tokens, *getattr(tokenizer, "added_tokens_encoder", ())}
        return any(token not in special for token in tokenizer.get_vocab())
    return True
