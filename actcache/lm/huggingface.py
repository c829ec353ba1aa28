"""Hugging Face models: a hub name, a folder or a GGUF file, opened as what it is.

In: where the weights are, and how to place them. Out: a `LanguageModel`. A checkpoint of a causal language model is
opened as one, a masked language model likewise, and anything else as the bare model, which ends in hidden states.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import nn

from actcache.errors import ConfigError, ModelNotFoundError
from actcache.lm.model import LanguageModel

DeviceMap = str | Mapping[str, int | str]
"""Where the parts of a model go: `auto`, a device, or one for each module path."""

_CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Where a model comes from."""

    place: str
    """Folder, or name on the hub."""
    gguf_file: str | None = None
    """The file in it, if the weights are in one of llama.cpp's."""

    @property
    def is_folder(self) -> bool:
        """Whether it is on this machine."""
        return Path(self.place).exists()

    @property
    def name(self) -> str:
        """What the model is called, wherever it lies: its hub name, or the name of its folder or file."""
        if self.gguf_file is not None:
            return Path(self.gguf_file).stem
        return Path(self.place).resolve().name if self.is_folder else self.place

    @property
    def address(self) -> str:
        """What `load_lm` finds it by from any working directory."""
        place = str(Path(self.place).absolute()) if self.is_folder else self.place
        return place if self.gguf_file is None else f"{place}/{self.gguf_file}"


def find_source(name: str) -> Source:
    """What a name means: `FOLDER`, `FOLDER/FILE.gguf`, a folder with one GGUF file, or a name on the hub.

    Raises:
        ModelNotFoundError: it is a path, and there is nothing. ConfigError: a folder of several GGUF files.
    """
    path = Path(name).expanduser()
    if not path.exists() and name.startswith(("/", ".", "~")):
        raise ModelNotFoundError(f"no model at {name!r}: there is no such {'file' if path.suffix else 'folder'}")
    if path.suffix == ".gguf":
        return Source(place=str(path.parent), gguf_file=path.name)
    if not path.is_dir():
        return Source(place=name)
    found = [] if (path / "config.json").exists() else sorted(file.name for file in path.glob("*.gguf"))
    if len(found) > 1:
        raise ConfigError(f"folder {name!r} has {len(found)} GGUF files: name one, such as {path / found[0]}")
    return Source(place=str(path), gguf_file=found[0] if found else None)


def load_huggingface(
    source: Source,
    tokenizer: Any | None,
    dtype: torch.dtype | None,
    revision: str | None,
    device_map: DeviceMap | None,
    load_in_8bit: bool,
) -> LanguageModel:
    """Open a model with all its weights; see `load_lm`."""
    options: dict[str, Any] = {"revision": revision or "main"}
    if source.gguf_file is not None:
        _needs("gguf", "a GGUF file")
        options["gguf_file"] = source.gguf_file
    placement = _placement(device_map, load_in_8bit)
    with _no_progress_bars(source.gguf_file is not None):
        try:
            module = _open(source, {"dtype": dtype or "auto", **options, **placement})
        except (OSError, ValueError) as error:
            if isinstance(error, ConfigError):
                raise
            raise _not_loaded(source, error) from error
        tokenizer = tokenizer or _load_tokenizer(source.place, options)
    lm = huggingface_lm(module, tokenizer, source.name)
    lm.revision = None if source.is_folder else _commit_of(source, options["revision"])
    return lm


def huggingface_lm(module: nn.Module, tokenizer: Any | None, name: str) -> LanguageModel:
    """A `LanguageModel` of an open Hugging Face model, with the sizes that its config says."""
    config: Any = module.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    n_ctx = next((int(n) for key in _CONTEXT_NAMES if (n := getattr(config, key, None))), None)
    bos = getattr(tokenizer, "bos_token_id", None)
    return LanguageModel(
        module,
        name=name,
        kind="huggingface",
        tokenizer=tokenizer,
        n_ctx=n_ctx,
        d_vocab=config.vocab_size,
        bos=getattr(config, "bos_token_id", None) if bos is None else bos,
    )


def short_name(source: str) -> str:
    """What a model is called that says where it came from."""
    return Source(place=source).name


def _commit_of(source: Source, revision: str) -> str | None:
    """The commit of a hub model, by the folder of the cache that it was read from."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(source.place, source.gguf_file or "config.json", revision=revision)
    return Path(found).parent.name if isinstance(found, str) else None


def _placement(device_map: DeviceMap | None, load_in_8bit: bool) -> dict[str, Any]:
    """How `from_pretrained` is told where the weights go, and in how many bits."""
    placement: dict[str, Any] = {}
    if device_map is not None:
        _needs("accelerate", "device_map")
        placement["device_map"] = device_map
    if load_in_8bit:
        _needs("accelerate", "load_in_8bit")
        _needs("bitsandbytes", "load_in_8bit")
        from transformers import BitsAndBytesConfig

        placement["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
        # It would say for every matrix of every forward pass that it rounds its input to float16.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    return placement


def _needs(package: str, what: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"{what} needs {package}, which is not installed: 'pip install {package}'")


def _open(source: Source, options: Mapping[str, Any]) -> nn.Module:
    """The first class that the checkpoint has all weights of."""
    lacking = []
    for opener in _openers(source, options):
        module, missing = _opened_by(opener, source, options)
        if missing and all(key.startswith("pooler.") for key in missing):
            # Trained with another head, it has no pooler; that reads one position and is read by none.
            module, missing = _opened_by(opener, source, {**options, "add_pooling_layer": False})
        if not missing:
            return module
        lacking.append(
            f"{source.name} lacks {len(missing)} of the weights of {type(module).__name__} "
            f"({missing[0]}, ...), which would be random numbers; it needs a complete checkpoint"
        )
    raise ConfigError(lacking[0])


def _opened_by(opener: Any, source: Source, options: Mapping[str, Any]) -> tuple[nn.Module, list[str]]:
    module, report = opener.from_pretrained(source.place, output_loading_info=True, **options)
    return module, sorted(report["missing_keys"])


def _openers(source: Source, options: Mapping[str, Any]) -> list[Any]:
    """The classes that the model may be of: the one its config names, else every one that there is for its type.

    transformers would open an encoder as a decoder, with a head of random numbers.
    """
    import transformers as hf

    if source.gguf_file is not None:
        return [hf.AutoModelForCausalLM]
    config = hf.AutoConfig.from_pretrained(source.place, revision=options["revision"])
    named = (getattr(config, "architectures", None) or [None])[0]
    anything = named is None or not hasattr(hf, named)
    found = []
    for opener, classes in (
        (hf.AutoModelForCausalLM, hf.MODEL_FOR_CAUSAL_LM_MAPPING),
        (hf.AutoModelForMaskedLM, hf.MODEL_FOR_MASKED_LM_MAPPING),
    ):
        known = classes.get(type(config), ())
        names = [c.__name__ for c in (known if isinstance(known, tuple) else (known,))]
        if names and (anything or named in names):
            found.append(opener)
    if getattr(config, "is_encoder_decoder", False) and not found:
        raise ConfigError(
            f"{source.name} ({config.model_type}) is not a causal language model, nor an encoder: it needs inputs for "
            "encoder and decoder; give load_lm the one that is wanted as a module"
        )
    return [*found, hf.AutoModel] if anything or not found else found


def _not_loaded(source: Source, error: Exception) -> Exception:
    """What to tell a user whose model transformers cannot open."""
    found = str(error).strip().splitlines()[0]
    if "for this kind of AutoModel" in found:
        return ConfigError(f"{source.name} is not a causal language model that transformers knows: {found}")
    if source.gguf_file is not None:
        return ModelNotFoundError(f"no model in {source.address!r} that transformers can open: {found}")
    if source.is_folder:
        return ModelNotFoundError(
            f"no model in folder {source.place!r}: {found} Expected config.json and model.safetensors, or a GGUF file"
        )
    return ModelNotFoundError(
        f"no model {source.place!r}: it is neither 'stories-4l', nor a folder or a GGUF file, "
        f"nor a Hugging Face name that can be loaded ({found})"
    )


def _load_tokenizer(place: str, options: Mapping[str, Any]) -> Any | None:
    """The model's tokenizer; None if it comes without one (token ids are all that a model needs)."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(place, **options)
    except (OSError, ValueError):
        return None


@contextmanager
def _no_progress_bars(gguf: bool) -> Iterator[None]:
    """transformers draws a bar over each loading, even of a small model; the library prints nothing."""
    from transformers.utils import logging as hf_logging

    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        # The bar over a GGUF file is of another kind, which cannot be switched off.
        with redirect_stderr(StringIO()) if gguf else nullcontext():
            yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()
