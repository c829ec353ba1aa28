"""Hugging Face models: a hub name, a folder or a GGUF file, opened as what it is.

In: where the weights are, and how to place them. Out: a `LanguageModel`. A checkpoint of a causal language model is
opened as one, a masked language model likewise, and anything else as the bare model, which ends in hidden states.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import nn

from actcache.errors import ActcacheError, ConfigError, ModelNotFoundError
from actcache.lm.diagnose import CONFIG, fault_in, fault_in_model, reason_of
from actcache.lm.inputs import takes_decoder_input
from actcache.lm.language_model import LanguageModel
from actcache.lm.tokenizers import load_tokenizer
from actcache.lm.trust import check_needs_no_code, named_class

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
        """Whether it is a folder on this machine."""
        return Path(self.place).exists()

    @property
    def name(self) -> str:
        """Name of the model, independent of where it lies: its hub name, or the name of its folder or file."""
        if self.gguf_file is not None:
            return Path(self.gguf_file).stem
        return Path(self.place).resolve().name if self.is_folder else self.place

    @property
    def address(self) -> str:
        """What `load_lm` finds it by, from any working directory."""
        place = str(Path(self.place).absolute()) if self.is_folder else self.place
        return place if self.gguf_file is None else f"{place}/{self.gguf_file}"


def find_source(name: str) -> Source:
    """What a name means: `FOLDER`, `FOLDER/FILE.gguf`, a folder with one GGUF file, or a name on the hub.

    Raises:
        ModelNotFoundError: it is a path where nothing exists. ConfigError: a folder with several GGUF files, or a file
        that is not one.
    """
    path = Path(name).expanduser()
    if not path.exists() and name.startswith(("/", ".", "~")):
        raise ModelNotFoundError(f"no model at {name!r}: there is no such {'file' if path.suffix else 'folder'}")
    if path.suffix == ".gguf" and not path.is_dir():
        return Source(place=str(path.parent), gguf_file=path.name)
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{name!r} is a file: name the folder of the model, or a GGUF file")
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
    trust_remote_code: bool,
) -> LanguageModel:
    """Open a model with all its weights; see `load_lm`."""
    options: dict[str, Any] = {"revision": revision or "main", "trust_remote_code": trust_remote_code}
    if source.gguf_file is not None:
        _needs("gguf", "a GGUF file")
        options["gguf_file"] = source.gguf_file
    placement = _placement(device_map, load_in_8bit)
    with _quiet(source.gguf_file is not None):
        try:
            module = _open(source, {"dtype": dtype or "auto", **options, **placement})
        except ActcacheError:
            raise
        except Exception as error:  # loaders pass on anything that their readers raise
            raise _loading_error(source, options["revision"], error) from error
        folder = Path(source.place) if source.is_folder else None
        tokenizer = tokenizer or load_tokenizer(source.place, folder, options)
    lm = huggingface_lm(module, tokenizer, source.name)
    lm.revision = None if source.is_folder else _commit_of(source, options["revision"])
    return lm


def huggingface_lm(module: nn.Module, tokenizer: Any | None, name: str) -> LanguageModel:
    """A `LanguageModel` of an open Hugging Face model, with the sizes that its config says."""
    config: Any = module.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    claims = (getattr(config, key, None) for key in _CONTEXT_NAMES)
    n_ctx = next((n for n in claims if isinstance(n, int) and n > 0), None)
    bos = getattr(tokenizer, "bos_token_id", None)
    lm = LanguageModel(
        module,
        name=name,
        kind="huggingface",
        tokenizer=tokenizer,
        n_ctx=n_ctx,
        d_vocab=getattr(config, "vocab_size", None),
        bos=getattr(config, "bos_token_id", None) if bos is None else bos,
    )
    lm.check_rows()
    return lm


def short_name(source: str) -> str:
    """Name of a model that says where it came from."""
    return Source(place=source).name


def _commit_of(source: Source, revision: str) -> str | None:
    """The commit of a hub model, according to the cache folder that it was read from."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(source.place, source.gguf_file or "config.json", revision=revision)
    return Path(found).parent.name if isinstance(found, str) else None


def _placement(device_map: DeviceMap | None, load_in_8bit: bool) -> dict[str, Any]:
    """Arguments of `from_pretrained` that say where the weights go, and in how many bits."""
    placement: dict[str, Any] = {}
    if device_map is not None:
        _needs("accelerate", "device_map")
        placement["device_map"] = device_map
    if load_in_8bit:
        _needs("accelerate", "load_in_8bit")
        _needs("bitsandbytes", "load_in_8bit")
        from transformers import BitsAndBytesConfig

        placement["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
        # It would warn for every matrix of every forward pass that it rounds its input to float16.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    return placement


def _needs(package: str, what: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"{what} needs {package}, which is not installed: 'pip install {package}'")


def _open(source: Source, options: Mapping[str, Any]) -> nn.Module:
    """The model in the first class whose weights are all in the checkpoint."""
    lacking = []
    for opener in _openers(source, options):
        module, report = _opened_by(opener, source, options)
        missing = sorted(report["missing_keys"])
        if missing and all(key.startswith("pooler.") for key in missing):
            # A model trained with another head lacks the pooler, which reads one position and feeds no site.
            module, report = _opened_by(opener, source, {**options, "add_pooling_layer": False})
            missing = sorted(report["missing_keys"])
        if not missing:
            _warn_of_unused_weights(source, module, report["unexpected_keys"])
            return module
        lacking.append(
            f"{source.name} lacks {len(missing)} of the weights of {type(module).__name__} "
            f"({missing[0]}, ...), which would be random numbers; it needs a complete checkpoint"
        )
    raise ConfigError(lacking[0])


def _opened_by(opener: Any, source: Source, options: Mapping[str, Any]) -> tuple[nn.Module, Mapping[str, Any]]:
    """The model, and what did not fit.

    Raises:
        ConfigError: weights of another shape than the config says.
    """
    module, report = opener.from_pretrained(
        source.place, output_loading_info=True, ignore_mismatched_sizes=True, **options
    )
    for name, found, expected in sorted(report.get("mismatched_keys", ())):
        raise ConfigError(
            f"the config and the weights of {source.address} disagree: config.json says {tuple(expected)} for {name}, "
            f"the weights have {tuple(found)}; one of them is of another model"
        )
    return module, report


def _warn_of_unused_weights(source: Source, module: nn.Module, unused: Iterable[str]) -> None:
    """Warn of weights inside the model's parts that its config leaves out; unopened heads do not count."""
    parts = {name for name, _ in module.named_children()}
    inside = sorted(key for key in unused if key.partition(".")[0] in parts)
    if inside:
        warnings.warn(
            f"config.json of {source.name} leaves out {len(inside)} of the weights that are there ({inside[0]}, ...): "
            f"{type(module).__name__} runs without them, which may not be the model that was trained",
            stacklevel=2,
        )


def _openers(source: Source, options: Mapping[str, Any]) -> list[Any]:
    """The classes that may fit the model: the one its config names, or else all that exist for its type.

    transformers would open an encoder as a decoder, with a head of random numbers.

    Raises:
        ConfigError: the model needs code of its own, an input for a decoder, or is an adapter for another one.
    """
    import transformers as hf

    if source.gguf_file is not None:
        return [hf.AutoModelForCausalLM]
    _check_no_adapter(source)
    trusted = bool(options["trust_remote_code"])
    plain, _ = hf.PretrainedConfig.get_config_dict(source.place, revision=options["revision"])
    if not trusted:
        check_needs_no_code(source.place, plain)
    own = plain.get("auto_map")
    if trusted and isinstance(own, Mapping):
        named_there = [name for name in ("AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModel") if name in own]
        if named_there:
            return [getattr(hf, name) for name in named_there]
    config = hf.AutoConfig.from_pretrained(
        source.place, revision=options["revision"], trust_remote_code=options["trust_remote_code"]
    )
    return _classes_for(source, config, named_class(plain))


def _classes_for(source: Source, config: Any, named: str | None) -> list[Any]:
    import transformers as hf

    known_class = getattr(hf, named, None) if named is not None else None
    found = []
    for opener, classes in (
        (hf.AutoModelForCausalLM, hf.MODEL_FOR_CAUSAL_LM_MAPPING),
        (hf.AutoModelForMaskedLM, hf.MODEL_FOR_MASKED_LM_MAPPING),
    ):
        known = classes.get(type(config), ())
        names = [c.__name__ for c in (known if isinstance(known, tuple) else (known,))]
        if names and (known_class is None or named in names):
            found.append(opener)
    bare = hf.MODEL_MAPPING.get(type(config), None)
    has_decoder = bare is not None and takes_decoder_input(bare)
    if has_decoder and (known_class is None or takes_decoder_input(known_class)):
        raise ConfigError(
            f"{source.name} ({config.model_type}) is not a causal language model, nor an encoder: it needs inputs for "
            "encoder and decoder, or makes the decoder's of the encoder's, moved by one position; give load_lm the one "
            "that is wanted as a module: load_lm(module.get_encoder(), tokenizer=...)"
        )
    if known_class is None:
        return [*found, hf.AutoModel]
    if found:
        return found
    # The bare model would include a decoder that nothing feeds.
    return [known_class] if bare is None or has_decoder else [hf.AutoModel, known_class]


def _check_no_adapter(source: Source) -> None:
    """Refuse what is only, or also, an adapter: without peft it would silently be left out."""
    adapter = Path(source.place) / "adapter_config.json"
    if source.is_folder and adapter.exists() and importlib.util.find_spec("peft") is None:
        raise ConfigError(
            f"{adapter} says that the folder has an adapter (LoRA, ...), which would be left out: merge it into the "
            "model (merge_and_unload of peft) and save that"
        )


def _loading_error(source: Source, revision: str, error: Exception) -> ActcacheError:
    """The error for a model that transformers cannot open: a fault of its files, or else what transformers says."""
    import transformers as hf

    found = reason_of(error).removeprefix("OSError: ").removeprefix("ValueError: ")
    if source.gguf_file is not None:
        fault = fault_in(Path(source.place) / source.gguf_file) if source.is_folder else None
        fault = f"{source.address} {fault}" if fault else found
        return ModelNotFoundError(f"no model in {source.address!r} that transformers can open: {fault}")
    folder = _folder_of(source, revision)
    if folder is None:
        return ModelNotFoundError(
            f"no model {source.place!r}: it is neither 'stories-4l', nor a folder or a GGUF file, "
            f"nor a Hugging Face name that can be loaded ({found})"
        )
    if not (folder / CONFIG).exists() and not (folder / CONFIG).is_symlink():
        return ModelNotFoundError(
            f"no model in folder {source.place!r}: {CONFIG} is missing; expected {CONFIG} and model.safetensors, "
            "or a GGUF file"
        )
    fault = fault_in_model(folder)
    if fault is not None:
        return ConfigError(f"{source.name} cannot be opened: {fault}")
    if not any(folder.glob("*.safetensors*")) and not any(folder.glob("*.bin*")):
        return ModelNotFoundError(
            f"no model in folder {source.place!r}: there are no weights; expected {CONFIG} and model.safetensors, "
            "or a GGUF file"
        )
    if "does not recognize this architecture" in str(error):
        return ConfigError(
            f"{folder / CONFIG} says a model_type that transformers {hf.__version__} does not know; "
            f"a newer version may know it ({found})"
        )
    if "for this kind of AutoModel" in str(error):
        return ConfigError(f"{source.name} is not a causal language model that transformers knows: {found}")
    return ConfigError(f"{source.name} cannot be opened from {folder}: {found}")


def _folder_of(source: Source, revision: str) -> Path | None:
    """Where the files of a model are on this machine; None if they are not there."""
    if source.is_folder:
        return Path(source.place)
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(source.place, CONFIG, revision=revision)
    return Path(found).parent if isinstance(found, str) else None


@contextmanager
def _quiet(gguf: bool) -> Iterator[None]:
    """While active, transformers draws no progress bar and logs no table: the library prints nothing."""
    from transformers.utils import logging as hf_logging

    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    # A table of missing and unused weights, for which this library has errors and warnings of its own.
    reports = logging.getLogger("transformers.modeling_utils")
    level = reports.level
    reports.setLevel(logging.ERROR)
    try:
        # The bar for a GGUF file is another one, which cannot be switched off.
        with redirect_stderr(StringIO()) if gguf else nullcontext():
            yield
    finally:
        reports.setLevel(level)
        if shown:
            hf_logging.enable_progress_bar()
