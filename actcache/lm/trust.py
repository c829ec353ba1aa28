"""Code that comes with a model: seen in its config, and never run unless `trust_remote_code` is given.

In: a model's `config.json` as a dictionary. Out: nothing, or an error that names what would run.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from actcache.errors import ConfigError

WAY_OUT = "read it, and if you trust it say trust_remote_code=True (--trust-remote-code)"
_LOADED_IN = "transformers_modules."
"""The package in which transformers imports code that came with a model."""


def check_needs_no_code(place: str, config: Mapping[str, Any]) -> None:
    """Refuse a model that would compute something else without its own code.

    Where transformers has a class of the same name, that one is taken, with a warning. Where the class has another
    name, transformers would silently open its own class for that model type, which computes something else.

    Raises:
        ConfigError: the model needs code of its own, or code from the hub (attention kernels).
    """
    import transformers as hf

    kernels = sorted(set(_kernels(config)))
    if kernels:
        raise ConfigError(
            f"config.json of {place} asks for code from the hub ({', '.join(kernels)}), which is not run: "
            f"take the entry out of config.json, or {WAY_OUT}"
        )
    files = code_files(config)
    if not files:
        return
    named = named_class(config)
    if config.get("model_type") in hf.CONFIG_MAPPING and named is not None and hasattr(hf, named):
        warnings.warn(
            f"{place} brings code of its own ({', '.join(files)}), which is not run: opened with transformers' own "
            f"{named}",
            stacklevel=2,
        )
        return
    raise ConfigError(
        f"{place} is a model with code of its own ({', '.join(files)}), which would run on this machine; it is not "
        f"run: {WAY_OUT}"
    )


def named_class(config: Mapping[str, Any]) -> str | None:
    """The class of the weights according to a model's config."""
    return next(_texts(config.get("architectures")), None)


def code_files(config: Mapping[str, Any]) -> list[str]:
    """The files that `auto_map` of a config (of a model or a tokenizer) names; `REPOSITORY: FILE` of another one."""
    files = []
    for reference in _texts(config.get("auto_map")):
        repository, dashes, rest = reference.rpartition("--")
        module = rest.rpartition(".")[0].replace(".", "/") + ".py"
        files.append(f"{repository}: {module}" if dashes else module)
    return sorted(set(files))


def code_digest(module: nn.Module) -> str | None:
    """sha256 (hex) of the source files that came with a model and made its modules; None if there are none."""
    names = {c.__module__ for m in module.modules() for c in type(m).__mro__ if c.__module__.startswith(_LOADED_IN)}
    if not names:
        return None
    digest = hashlib.sha256()
    for source in sorted(inspect.getsource(sys.modules[name]) for name in names):
        digest.update(source.encode() + b"\0")
    return digest.hexdigest()


def _texts(value: Any) -> Iterator[str]:
    """Every string in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _texts(inner)


def _kernels(config: Any) -> Iterator[str]:
    """Implementations (of attention, of experts) that are names on the hub, in the config or a part of it."""
    if not isinstance(config, Mapping):
        return
    for key, value in config.items():
        if key.endswith(("attn_implementation", "experts_implementation")):
            yield from (text for text in _texts(value) if "/" in text)
        yield from _kernels(value)
