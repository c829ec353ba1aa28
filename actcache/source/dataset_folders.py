"""The files of a folder, and the splits that their names, or the folder's README, divide them into."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from actcache.errors import ConfigError, TextError
from actcache.source.columns import Wanted
from actcache.source.text_files import ARRAY_SUFFIXES, TABLE_SUFFIXES, TEXT_SUFFIXES, suffix_of

ALL = "all"
"""In place of the name of a split: all files."""

_KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLITS = {keyword: split for split, keywords in _KEYWORDS.items() for keyword in keywords}
_SHARD = re.compile(r"^(\w+)-\d{5}-of-\d{5}")
_WORD = re.compile(rf"(?:^|[-_. ])({'|'.join(_SPLITS)})(?=[-_. \d]|$)")
_ABOUT_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
"""What `datasets` writes beside the data."""
_MOST_README_BYTES = 1 << 20


def files_of(folder: Path, wanted: Wanted, split: str | None, config: str | None = None) -> list[Path]:
    """The files to read from a folder, in the order of their names.

    Args:
        folder: Files and subfolders whose names begin with a dot are skipped, and what macOS leaves in `__MACOSX`.
        wanted: What is read from them, which decides what kinds of files.
        split: Name of a split, or `ALL`; None for "train" where there are several.
        config: Name of a configuration in its README.

    Raises:
        ConfigError: there is no such split or configuration, or one must be named. TextError: there is nothing to read.
    """
    there = [path for path in sorted(folder.rglob("*")) if not _is_hidden(path.relative_to(folder)) and _is_there(path)]
    files = _readable(there, wanted)
    if not files:
        raise TextError(_nothing_found(folder, there, wanted))
    splits = _of_readme(folder, files, config)
    is_whole = splits is not None  # otherwise names count only if all of them name a split
    if splits is None:
        names = {path: split_of(path.relative_to(folder)) for path in files}
        is_whole = all(names.values())
        splits = {name: [p for p in files if names[p] == name] for name in dict.fromkeys(names.values()) if name}
    if split is None:
        return _default(folder, files, splits) if is_whole else files
    return files if split == ALL else _choose(folder, splits, split)


def check_file_split(path: Path, split: str | None) -> None:
    """Raise `ConfigError` if a file does not belong to the split that is asked for."""
    name = split_of(Path(path.name))
    if split not in (None, ALL, name) and _SPLITS.get(str(split), split) != name:
        raise ConfigError(f"{path} is a single file and has no split {split!r}: leave split (--split) out")


def split_of(path: Path) -> str | None:
    """The split that a file belongs to by its path: `train-00000-of-00002.parquet`, `data/test/a.jsonl`, `dev.csv`."""
    stem = path.name.split(".")[0] if _SHARD.match(path.name) else path.name.removesuffix("".join(path.suffixes[-1:]))
    if found := _SHARD.match(stem):
        return _SPLITS.get(found[1], found[1])
    words = _WORD.findall(stem.lower())
    folders = [part.lower() for part in path.parts[:-1] if part.lower() in _SPLITS]
    found_here = {_SPLITS[word] for word in words} or {_SPLITS[part] for part in folders[-1:]}
    return found_here.pop() if len(found_here) == 1 else None


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in path.parts)


def _is_there(path: Path) -> bool:
    if path.is_symlink() and not path.exists():
        raise TextError(f"{path} is a link to nothing ({path.readlink()}): part of the data is missing")
    return path.is_file()


def _readable(there: Iterable[Path], wanted: Wanted) -> list[Path]:
    suffixes = (*TEXT_SUFFIXES, *TABLE_SUFFIXES) if "text" in wanted.kinds else TABLE_SUFFIXES
    arrays = ARRAY_SUFFIXES if "tokens" in wanted.kinds else ()
    known = [path for path in there if suffix_of(path) in (*suffixes, *arrays) and path.name not in _ABOUT_DATA]
    # If texts and arrays are both wanted, arrays beside texts are not tokens but masks, labels or embeddings.
    texts = [path for path in known if suffix_of(path) in suffixes] if "text" in wanted.kinds else []
    return texts or known


def _nothing_found(folder: Path, there: Sequence[Path], wanted: Wanted) -> str:
    suffixes = (*TEXT_SUFFIXES, *TABLE_SUFFIXES) if "text" in wanted.kinds else TABLE_SUFFIXES
    suffixes = (*suffixes, *ARRAY_SUFFIXES) if "tokens" in wanted.kinds else suffixes
    counts = Counter(path.suffix or "without a suffix" for path in there).most_common(6)
    found = ", ".join(f"{n} {suffix}" for suffix, n in counts) or "no file"
    script = next((path.name for path in there if path.name == f"{folder.resolve().name}.py"), None)
    hint = f"; {script} is a script that loads the data, and code of a dataset is never run" if script else ""
    return f"folder {folder} holds no text: expected files ending in {', '.join(suffixes)}, found {found}{hint}"


def _default(folder: Path, files: list[Path], splits: Mapping[str, list[Path]]) -> list[Path]:
    """The files to read if no split is named."""
    if len(splits) < 2:
        return next(iter(splits.values()), files)
    if "train" not in splits:
        raise ConfigError(f"{folder} has the splits {', '.join(splits)}: choose one with split (--split)")
    warnings.warn(
        f"{folder} has the splits {', '.join(splits)}; train is read. Choose with split (--split), where {ALL!r} takes "
        "every file",
        stacklevel=2,
    )
    return splits["train"]


def _choose(folder: Path, splits: Mapping[str, list[Path]], split: str) -> list[Path]:
    chosen = splits.get(split) or splits.get(_SPLITS.get(split, split))
    if chosen:
        return chosen
    if splits:
        raise ConfigError(f"{folder} has the splits {', '.join(splits)}, not {split!r}; choose one with --split")
    raise ConfigError(
        f"{folder} has no splits, so that {split!r} cannot be chosen: neither its README.md nor the names of its files "
        "tell of any; leave split (--split) out"
    )


def _of_readme(folder: Path, files: Sequence[Path], config: str | None) -> dict[str, list[Path]] | None:
    """The files of each split, as the README of a dataset lists them; None if it does not."""
    configs = _configs(folder / "README.md")
    if config is not None and config not in configs:
        known = f"has the configurations {', '.join(configs)}" if configs else "has no configurations"
        raise ConfigError(f"{folder} {known}, not {config!r}")
    if not configs:
        return None
    if config is None:
        config = next((name for name, entry in configs.items() if entry.get("default") is True), None)
        config = config or ("default" if "default" in configs else next(iter(configs)) if len(configs) == 1 else None)
    if config is None:
        some = next(iter(configs))
        raise ConfigError(f"{folder} has the configurations {', '.join(configs)}: choose one, as in {folder}:{some}")
    patterns = _patterns(configs[config]["data_files"])
    found = {split: _match(folder, files, some) for split, some in patterns.items()}
    if empty := [split for split, paths in found.items() if not paths]:
        listed = f"{', '.join(map(str, patterns[empty[0]]))} for the split {empty[0]!r}"
        raise TextError(f"{folder / 'README.md'} lists {listed}, but no file that can be read matches")
    return found


def _configs(readme: Path) -> dict[str, dict[str, Any]]:
    """The configurations in the head of a README that list files, by name."""
    import yaml  # type: ignore[import-untyped]

    if not readme.is_file():
        return {}
    with readme.open("rb") as file:
        text = file.read(_MOST_README_BYTES).decode(errors="replace").removeprefix("\ufeff")
    head = re.match(r"---\s*\n(.*?)\n---\s*(?:\n|$)", text, re.DOTALL)
    try:
        about = yaml.safe_load(head[1]) if head else {}
    except yaml.YAMLError as error:
        raise TextError(f"the head of {readme} is not valid YAML: {' '.join(str(error).split())}") from error
    entries = about.get("configs") if isinstance(about, dict) else None
    entries = [entry for entry in entries or [] if isinstance(entry, dict) and entry.get("data_files")]
    return {str(entry.get("config_name", "default")): entry for entry in entries}


def _patterns(data_files: Any) -> dict[str, list[str]]:
    """`data_files` in any of its forms, as patterns by split; without a split they belong to train."""
    if isinstance(data_files, Mapping):
        return {str(split): _as_list(some) for split, some in data_files.items()}
    entries = _as_list(data_files)
    found: dict[str, list[str]] = {}
    for entry in entries:
        split = str(entry.get("split", "train")) if isinstance(entry, Mapping) else "train"
        found.setdefault(split, []).extend(_as_list(entry.get("path") if isinstance(entry, Mapping) else entry))
    return found


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _match(folder: Path, files: Sequence[Path], patterns: Iterable[Any]) -> list[Path]:
    """The files that match; never anything outside the folder, or hidden."""
    matching: set[Path] = set()
    for pattern in map(str, patterns):
        if pattern and not pattern.startswith("/") and ".." not in Path(pattern).parts:
            matching |= {path for path in folder.glob(pattern) if path.is_file()}
            matching |= {path for path in folder.glob(f"{pattern}/**/*") if path.is_file()}  # a folder
    return [path for path in files if path in matching]
