"""load_lm: from a name, a folder or a module to a LanguageModel on its device, in its dtype, with its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import nn

from actcache.errors import ActcacheError, ConfigError, ModelNotFoundError, first_line
from actcache.lm.bridge import is_transformer_lens
from actcache.lm.diagnose import CONFIG, fault_in, read_json, reason_of
from actcache.lm.huggingface import DeviceMap, find_source, huggingface_lm, load_huggingface, short_name
from actcache.lm.language_model import LanguageModel
from actcache.lm.names import Kind
from actcache.lm.stories import StoriesConfig, StoriesLM
from actcache.lm.tokenizers import open_tokenizer, open_tokenizer_file
from actcache.spec import DTYPES

EMBEDDED_MODEL = "stories-4l"
"""Name of the model that comes with the package."""

BOS = "<|bos|>"
"""The token that begins each document of the embedded model; its tokenizer file has no place to say so."""

_AUTOCAST = ("bfloat16", "float16")


def load_lm(
    model: str | Path | nn.Module,
    *,
    tokenizer: Any | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
    autocast: str | torch.dtype | None = None,
    compile: bool = False,  # noqa: A002  # what torch calls it
    device_map: DeviceMap | None = None,
    load_in_8bit: bool = False,
    trust_remote_code: bool = False,
) -> LanguageModel:
    """Open a base language model, ready to run (`eval` mode).

    Args:
        model: `stories-4l`, the embedded model; a folder or name of a Hugging Face model, causal or encoder; a GGUF
            file, or a folder that has one; a folder that `pipelines/train_base_lm.py` wrote; a transformer-lens
            model; or any module that maps `(Q, T)` token ids to logits, whose sites are then `module.path:in` and
            `module.path:out`.
        tokenizer: In place of the model's own: a tokenizer, or the name or folder of one.
        dtype: `bfloat16`, `float16` or `float32`; by default float32 for the embedded model, and otherwise the
            dtype that the weights have. A module that is given is converted in place.
        device: By default the CPU for a model that is loaded, and where it is for a module that is given.
        revision: Branch, tag or commit of a Hugging Face name.
        autocast: `bfloat16` or `float16`: run under `torch.autocast` of that type.
        compile: Compile with `torch.compile` what lies between the sites that are asked for. The first forward passes
            take long; sites of the instrumented model are read without.
        device_map: Where the parts of a Hugging Face model go: `auto`, or a device for each module path (accelerate).
        load_in_8bit: Open a Hugging Face model in 8 bits (bitsandbytes).
        trust_remote_code: Run the Python files that come with a model or its tokenizer. Without it none ever runs, and
            nothing is ever asked.

    Raises:
        ModelNotFoundError: there is no model by that name or in that folder.
        ConfigError: no such dtype or device, options that do not go together, a package that is needed is not there,
        what is there is not a causal language model or an encoder with all its weights, needs code of its own, or has
        damaged files. A tokenizer that is damaged is said when `lm.tokenizer` is asked for.

    Warns:
        UserWarning: code that comes with the model is passed over for a class of transformers of the same name; or
        weights that are there are left out by its config.

    Examples:
        >>> lm = ac.load_lm("stories-4l")
        >>> lm.name, lm.n_ctx, "blocks.3.hook_mlp_out" in lm.site_names
        ('stories-4l', 256, True)
    """
    if isinstance(model, Path):
        model = str(model)
    if not isinstance(model, (str, nn.Module)):
        raise ConfigError(f"model must be a name, a folder or a module, got {type(model).__name__}")
    wanted_dtype, wanted_device = _parse_dtype("dtype", dtype, DTYPES), _parse_device(device)
    wanted_autocast = _parse_dtype("autocast", autocast, _AUTOCAST)
    _check_placement(model, device, device_map, load_in_8bit)
    named_tokenizer = _address_of(tokenizer)
    tokenizer = open_tokenizer(tokenizer, trust_remote_code)
    if isinstance(model, nn.Module):
        lm, address = _from_module(model, tokenizer), None
    elif (folder := _stories_folder(model)) is not None:
        _only_huggingface(model, device_map, load_in_8bit)
        lm = _load_stories(folder, tokenizer, wanted_dtype or torch.float32)
        address = model if model == EMBEDDED_MODEL else str(folder.absolute())
    else:
        source = find_source(model)
        # Quantised weights are put where they belong when they are read.
        placed = {"": str(wanted_device)} if load_in_8bit and wanted_device is not None else device_map
        lm = load_huggingface(source, tokenizer, wanted_dtype, revision, placed, load_in_8bit, trust_remote_code)
        address = source.address
    if (wanted_dtype is not None or wanted_device is not None) and device_map is None and not lm.quantization:
        lm.module.to(device=wanted_device or lm.device, dtype=wanted_dtype or lm.dtype)
    lm.module.eval()
    lm.run_with(wanted_autocast, compile)
    if address is not None and (tokenizer is None or named_tokenizer is not None):
        lm.recipe = _recipe(
            model=address,
            tokenizer=named_tokenizer,
            dtype=_name_of(wanted_dtype),
            device=_name_of(wanted_device),
            revision=lm.revision or revision,
            autocast=_name_of(wanted_autocast),
            compile=compile,
            device_map=device_map,
            load_in_8bit=load_in_8bit,
            trust_remote_code=trust_remote_code,
        )
    return lm


def _address_of(tokenizer: Any) -> str | None:
    """What finds a tokenizer that was named from any working directory; None for an object."""
    if not isinstance(tokenizer, (str, Path)):
        return None
    path = Path(tokenizer).expanduser()
    return str(path.absolute()) if path.is_dir() else str(tokenizer)


def _recipe(**options: Any) -> dict[str, Any]:
    """What was asked for, without what was not; JSON-able."""
    device_map = options["device_map"]
    if isinstance(device_map, Mapping):
        options["device_map"] = {k: v if isinstance(v, int) else str(v) for k, v in device_map.items()}
    return {key: value for key, value in options.items() if value not in (None, False)}


def _name_of(value: torch.dtype | torch.device | None) -> str | None:
    return None if value is None else str(value).removeprefix("torch.")


def _check_placement(model: Any, device: Any, device_map: Any, load_in_8bit: bool) -> None:
    if device_map is not None and device is not None:
        raise ConfigError(
            f"device={str(device)!r} and device_map={device_map!r} both say where the model goes: say one"
        )
    if not isinstance(model, str):
        _only_huggingface(type(model).__name__, device_map, load_in_8bit)


def _only_huggingface(name: str, device_map: Any, load_in_8bit: bool) -> None:
    if device_map is not None or load_in_8bit:
        option = "load_in_8bit" if load_in_8bit else "device_map"
        raise ConfigError(f"{option} is for models that are loaded from Hugging Face files, which {name} is not")


def _parse_dtype(option: str, dtype: str | torch.dtype | None, known: tuple[str, ...]) -> torch.dtype | None:
    if dtype is None:
        return None
    name = str(dtype).removeprefix("torch.")
    if name not in known:
        raise ConfigError(f"{option} must be one of {', '.join(known)}, got {dtype!r}")
    found: torch.dtype = getattr(torch, name)
    return found


def _parse_device(device: str | torch.device | None) -> torch.device | None:
    if device is None:
        return None
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {str(device)!r} cannot be used here ({first_line(error)}); try 'cpu'") from error
    return torch.device(device)


def _from_module(module: nn.Module, tokenizer: Any | None) -> LanguageModel:
    name = type(module).__name__
    if isinstance(module, StoriesLM):
        return _stories_lm(module, tokenizer, EMBEDDED_MODEL)
    if is_transformer_lens(module):
        config: Any = module.cfg
        tokenizer = tokenizer or getattr(module, "tokenizer", None)
        name = str(getattr(config, "model_name", None) or name)
        return _with_sizes(module, "transformer_lens", name, tokenizer, config.n_ctx, config.d_vocab)
    if any(c.__name__ == "PreTrainedModel" for c in type(module).__mro__):
        return huggingface_lm(module, tokenizer, short_name(getattr(module, "name_or_path", "") or name))
    return _with_sizes(module, "module", name, tokenizer, None, None)


def _stories_folder(name: str) -> Path | None:
    """The folder of a model of the embedded architecture, or None if the name means something else."""
    if name == EMBEDDED_MODEL:
        folder = Path(str(files("actcache"))) / "assets" / EMBEDDED_MODEL
        if not (folder / "model.safetensors").exists():
            raise ModelNotFoundError(
                f"the embedded model {name!r} is not in this installation (nothing at {folder}); "
                "make it with pipelines/train_base_lm.py"
            )
        return folder
    folder = Path(name).expanduser()
    return folder if (folder / CONFIG).is_file() and _is_stories(read_json(folder / CONFIG)) else None


def _is_stories(config: Mapping[str, Any]) -> bool:
    """Whether a config is of the embedded architecture."""
    return "model_type" not in config and all(name in config for name in StoriesConfig.__slots__)


def _load_stories(folder: Path, tokenizer: Any | None, dtype: torch.dtype) -> LanguageModel:
    from safetensors.torch import load_file

    config, weights = read_json(folder / CONFIG), folder / "model.safetensors"
    try:
        module = StoriesLM(StoriesConfig(**{name: config[name] for name in StoriesConfig.__slots__})).to(dtype)
        state = load_file(weights)
        _check_shapes(folder, module, state)
        module.load_state_dict(state)
    except ActcacheError:
        raise
    except Exception as error:  # what safetensors and torch raise over a file
        fault = fault_in(weights)
        said = f"{weights} {fault}" if fault is not None else f"{folder}: {reason_of(error)}"
        raise (ModelNotFoundError if fault == "is missing" else ConfigError)(
            f"no model can be opened: {said}"
        ) from error
    tokenizer = tokenizer or open_tokenizer_file(folder / "tokenizer.json", bos_token=BOS)
    return _stories_lm(module, tokenizer, folder.name)


def _check_shapes(folder: Path, module: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Refuse weights that are not those that the config describes, all of them and no others."""
    wanted = module.state_dict()
    lacking, left = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    if lacking or left:
        what = (
            f"lack {len(lacking)} that the config describes ({lacking[0]}, ...)"
            if lacking
            else f"have {left[0]} besides"
        )
        raise ConfigError(f"the config and the weights of {folder} disagree: the weights {what}")
    for name, tensor in wanted.items():
        if tensor.shape != state[name].shape:
            raise ConfigError(
                f"the config and the weights of {folder} disagree: config.json says {tuple(tensor.shape)} for {name}, "
                f"the weights have {tuple(state[name].shape)}; one of them is of another model"
            )


def _stories_lm(module: StoriesLM, tokenizer: Any | None, name: str) -> LanguageModel:
    return _with_sizes(module, "stories", name, tokenizer, module.config.n_ctx, module.config.d_vocab)


def _with_sizes(
    module: nn.Module, kind: Kind, name: str, tokenizer: Any | None, n_ctx: int | None, d_vocab: int | None
) -> LanguageModel:
    bos = getattr(tokenizer, "bos_token_id", None)
    return LanguageModel(module, name=name, kind=kind, tokenizer=tokenizer, n_ctx=n_ctx, d_vocab=d_vocab, bos=bos)
