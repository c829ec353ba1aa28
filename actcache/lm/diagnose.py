"""Why the files of a model cannot be used: a sentence about the file that tells what to do.

In: a folder, or a file in it, and what a loader raised over them. Out: a sentence. Only beginnings, lengths and JSON
are looked at; nothing here knows the libraries that load models.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from actcache.errors import ConfigError

CONFIG = "config.json"
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""In the order in which transformers looks for them; the first one that is there is read."""
_POINTER = b"version https://git-lfs"
_PAGES = (b"<!doctype", b"<html", b"<?xml")
_MOST_HEADER_BYTES = 100_000_000
"""Largest header of a safetensors file that the library reads."""
_SIZES = ("_size", "_layers", "_heads", "_layer", "_head", "_embd", "d_model", "d_ff", "n_positions", "head_dim")
"""Endings of the names of numbers that must be positive."""


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ConfigError: it cannot be read, or is something else.
    """
    reason = fault_in(path)
    if reason is not None:
        raise ConfigError(f"{path} {reason}")
    found: dict[str, Any] = json.loads(path.read_bytes())
    return found


def fault_in(path: Path) -> str | None:
    """What is wrong with a file, as a sentence without its subject; None if no fault is found."""
    try:
        if path.is_symlink() and not path.exists():
            return "is a link to a file that is missing"
        if path.is_dir():
            return "is a folder, but should be a file"
        n_bytes = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(1024)
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    if n_bytes == 0:
        return "is empty"
    if head.startswith(_POINTER):
        return f"is a git-lfs pointer, not {_kind(path)}: run 'git lfs pull' in its folder"
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(_PAGES):
        return f"is a web page, not {_kind(path)}: the download went wrong, get the file again"
    match path.suffix:
        case ".json":
            return _fault_in_json(path)
        case ".safetensors":
            return _fault_in_safetensors(path, n_bytes)
        case ".bin":
            return _fault_in_pickle(path, head)
        case ".gguf":
            return None if head.startswith(b"GGUF") else "is no GGUF file: it does not begin like one"
    return None


def fault_in_model(folder: Path) -> str | None:
    """What is wrong with the config or the weights in a folder, as a whole sentence; None if no fault is found."""
    for path in (folder / CONFIG, *_weight_files(folder)):
        reason = fault_in(path)
        if reason is not None:
            return f"{path} {reason}"
    config = read_json(folder / CONFIG)
    for key, value in config.items():
        if key.endswith(_SIZES) and value is not None and (type(value) is not int or value < 1):
            return f"{folder / CONFIG} says {key}: {value!r}, which should be a positive integer"
    if not isinstance(config.get("auto_map", {}), dict):
        return f"{folder / CONFIG} says auto_map: {config['auto_map']!r}, which should be an object"
    return None


def reason_of(error: BaseException) -> str:
    """What another library's error says, shortened to one line."""
    said = " ".join(str(error).split())
    said = said if len(said) <= 300 else f"{said[:300]}..."
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def _kind(path: Path) -> str:
    if path.suffix in (".safetensors", ".bin", ".gguf"):
        return "the weights"
    return "the file itself"


def _weight_files(folder: Path) -> Iterator[Path]:
    """The files that weights are read from, shards after the index that names them."""
    found = next((folder / name for name in _WEIGHTS if (folder / name).exists() or (folder / name).is_symlink()), None)
    if found is None:
        return
    yield found
    if found.suffix == ".json" and fault_in(found) is None:
        shards = read_json(found).get("weight_map", {})
        names = shards.values() if isinstance(shards, Mapping) else ()
        yield from (folder / name for name in sorted({str(name) for name in names}))


def _fault_in_json(path: Path) -> str | None:
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        return f"is not JSON, or is cut short: {reason_of(error)}"
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    if not isinstance(found, dict):
        return f"is JSON, but a {type(found).__name__} where an object is needed"
    if path.name.endswith(".index.json") and not isinstance(found.get("weight_map"), dict):
        return "is an index of weights without a weight_map"
    return None


def _fault_in_safetensors(path: Path, n_bytes: int) -> str | None:
    """By its header, which lists where the last tensor ends."""
    with path.open("rb") as file:
        n_header = int.from_bytes(file.read(8), "little")
        if n_bytes < 8 or n_header > _MOST_HEADER_BYTES:
            return "is not a safetensors file: it does not begin like one"
        if 8 + n_header > n_bytes:
            return f"is cut short: its header alone has {8 + n_header:,} bytes, the file {n_bytes:,}"
        try:
            header = json.loads(file.read(n_header))
            ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
            n_expected = 8 + n_header + max(ends, default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
            return "has a damaged header: get the file again"
    if n_expected > n_bytes:
        return f"is cut short: {n_bytes:,} of {n_expected:,} bytes are there; get the file again"
    return f"has {n_bytes - n_expected:,} bytes behind its last tensor" if n_expected < n_bytes else None


def _fault_in_pickle(path: Path, head: bytes) -> str | None:
    if head.startswith(b"PK") and not zipfile.is_zipfile(path):
        return "is cut short or damaged: it begins as an archive that torch.save wrote, and does not end as one"
    if not head.startswith((b"PK", b"\x80")):
        return "is not a file that torch.save wrote"
    return None
