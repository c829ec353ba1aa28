"""load_lm: from a name, a folder or a module to a LanguageModel on its device, in its dtype, with its tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import nn

from actcache.errors import ConfigError, ModelNotFoundError
from actcache.lm.bridge import is_transformer_lens
from actcache.lm.model import Kind, LanguageModel
from actcache.spec import DTYPES
from actcache.stories import StoriesConfig, StoriesLM

EMBEDDED_MODEL = "stories-4l"
"""Name of the model that comes with the package."""

BOS = "<|bos|>"
"""The token that begins each document of the embedded model; its tokenizer file has no place to say so."""

_CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")


def load_lm(
    model: str | nn.Module,
    *,
    tokenizer: Any | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
) -> LanguageModel:
    """Open a base language model, ready to run (`eval` mode).

    Args:
        model: `stories-4l`, the embedded model; a folder or name of a Hugging Face causal language model (or a folder
            that `pipelines/train_base_lm.py` wrote); a transformer-lens model; or any module that maps `(Q, T)` token
            ids to logits, whose sites are then `module.path:in` and `module.path:out`.
        tokenizer: In place of the model's own.
        dtype: `bfloat16`, `float16` or `float32`; by default float32 for the embedded model, and otherwise the
            dtype that the weights have. A module that is given is converted in place.
        device: By default the CPU for a model that is loaded, and where it is for a module that is given.
        revision: Branch, tag or commit of a Hugging Face name.

    Raises:
        ModelNotFoundError: there is no model by that name or in that folder.
        ConfigError: no such dtype or device, or what is there is not a causal language model with all its weights.
    """
    wanted_dtype, wanted_device = _parse_dtype(dtype), _parse_device(device)
    if isinstance(model, nn.Module):
        lm = _from_module(model, tokenizer)
    else:
        folder = _stories_folder(model)
        if folder is not None:
            lm = _load_stories(folder, tokenizer, wanted_dtype or torch.float32)
        else:
            lm = _load_huggingface(model, tokenizer, wanted_dtype, revision)
    if wanted_dtype is not None or wanted_device is not None:
        lm.module.to(device=wanted_device or lm.device, dtype=wanted_dtype or lm.dtype)
    lm.module.eval()
    return lm


def _parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None:
        return None
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    known: torch.dtype = getattr(torch, name)
    return known


def _parse_device(device: str | torch.device | None) -> torch.device | None:
    if device is None:
        return None
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        found = str(error).splitlines()[0]
        raise ConfigError(f"device {str(device)!r} cannot be used here ({found}); try 'cpu'") from error
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
        return _huggingface_lm(module, tokenizer, _short_name(getattr(module, "name_or_path", "") or name))
    d_vocab = min((m.num_embeddings for m in module.modules() if isinstance(m, nn.Embedding)), default=None)
    return LanguageModel(module, name=name, kind="module", tokenizer=tokenizer, d_vocab=d_vocab)


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
    config = folder / "config.json"
    if not config.is_file():
        return None
    return folder if _stories_config(config) is not None else None


def _stories_config(path: Path) -> StoriesConfig | None:
    """The sizes in a config file of the embedded architecture, or None if it is another's."""
    try:
        plain = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    sizes = {k: plain[k] for k in StoriesConfig.__slots__ if k in plain}
    if "model_type" in plain or len(sizes) < len(StoriesConfig.__slots__):
        return None
    return StoriesConfig(**sizes)


def _load_stories(folder: Path, tokenizer: Any | None, dtype: torch.dtype) -> LanguageModel:
    from safetensors.torch import load_file

    config = _stories_config(folder / "config.json")
    if config is None:
        raise ConfigError(f"{folder / 'config.json'} does not describe a model of the embedded architecture")
    module = StoriesLM(config).to(dtype)
    module.load_state_dict(load_file(folder / "model.safetensors"))
    if tokenizer is None and (folder / "tokenizer.json").exists():
        from transformers import PreTrainedTokenizerFast

        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), bos_token=BOS)
    return _stories_lm(module, tokenizer, folder.name)


def _stories_lm(module: StoriesLM, tokenizer: Any | None, name: str) -> LanguageModel:
    return _with_sizes(module, "stories", name, tokenizer, module.config.n_ctx, module.config.d_vocab)


def _load_huggingface(
    name: str, tokenizer: Any | None, dtype: torch.dtype | None, revision: str | None
) -> LanguageModel:
    from transformers import AutoModelForCausalLM

    folder = Path(name).expanduser()
    if not folder.exists() and name.startswith(("/", ".", "~")):
        raise ModelNotFoundError(f"no model at {name!r}: there is no such folder")
    source = str(folder) if folder.exists() else name
    with _no_progress_bars():
        try:
            module, report = AutoModelForCausalLM.from_pretrained(
                source, revision=revision or "main", dtype=dtype or "auto", output_loading_info=True
            )
        except (OSError, ValueError) as error:
            raise _not_loaded(name, folder.exists(), error) from error
        if report["missing_keys"]:
            raise ConfigError(
                f"{name} lacks {len(report['missing_keys'])} of the weights of {type(module).__name__} "
                f"({min(report['missing_keys'])}, ...), which would be random numbers; it needs a complete checkpoint"
            )
        tokenizer = tokenizer or _load_tokenizer(source, revision)
    return _huggingface_lm(module, tokenizer, _short_name(name))


def _short_name(source: str) -> str:
    """What a model is called: its Hugging Face name, or its folder's, wherever the folder lies."""
    folder = Path(source).expanduser()
    return folder.resolve().name if folder.exists() else source


def _not_loaded(name: str, is_folder: bool, error: Exception) -> Exception:
    """What to tell a user whose model transformers cannot open."""
    found = str(error).strip().splitlines()[0]
    if "for this kind of AutoModel" in found:
        return ConfigError(f"{name} is not a causal language model that transformers knows: {found}")
    if is_folder:
        return ModelNotFoundError(f"no model in folder {name!r}: {found} Expected config.json and model.safetensors")
    return ModelNotFoundError(
        f"no model {name!r}: it is neither {EMBEDDED_MODEL!r}, nor a folder, "
        f"nor a Hugging Face name that can be loaded ({found})"
    )


def _load_tokenizer(source: str, revision: str | None) -> Any | None:
    """The model's tokenizer; None if it comes without one (token ids are all that a model needs)."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, revision=revision or "main")
    except (OSError, ValueError):
        return None


def _huggingface_lm(module: nn.Module, tokenizer: Any | None, name: str) -> LanguageModel:
    config: Any = module.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    n_ctx = next((int(n) for key in _CONTEXT_NAMES if (n := getattr(config, key, None))), None)
    lm = _with_sizes(module, "huggingface", name, tokenizer, n_ctx, config.vocab_size)
    if lm.bos is None:
        lm.bos = getattr(config, "bos_token_id", None)
    return lm


def _with_sizes(
    module: nn.Module, kind: Kind, name: str, tokenizer: Any | None, n_ctx: int | None, d_vocab: int | None
) -> LanguageModel:
    bos = getattr(tokenizer, "bos_token_id", None)
    return LanguageModel(module, name=name, kind=kind, tokenizer=tokenizer, n_ctx=n_ctx, d_vocab=d_vocab, bos=bos)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """transformers draws a bar over each loading, even of a small model; the library prints nothing."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
