"""transformer-lens: instrumented models, and what their hook names stand for in the plain model.

`import transformer_lens` takes six seconds and more, so everything here imports it only when called.
"""

from __future__ import annotations

import copy
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from actcache.errors import ConfigError
from actcache.lm.forward import is_bare
from actcache.lm.hooks import Spot
from actcache.lm.processes import no_processes
from actcache.lm.stories import StoriesLM


@dataclass(frozen=True)
class Opened:
    """A model in its instrumented form."""

    model: Any
    points: dict[str, Spot]
    """Its names, at their HookPoints."""
    candidates: dict[str, Spot]
    """Names that may stand for the input or output of a module of the plain model, and of which."""


def native_bridge(module: StoriesLM, tokenizer: Any) -> Opened:
    """A `TransformerBridge.boot_native` of the embedded architecture with equal weights."""
    with _guard_opening("the embedded architecture"):
        return _native_bridge(module, tokenizer)


def _native_bridge(module: StoriesLM, tokenizer: Any) -> Opened:
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge import TransformerBridge

    c, weight = module.config, module.embed.weight
    config = TransformerBridgeConfig(
        d_model=c.d_model,
        d_head=c.d_model // c.n_heads,
        n_heads=c.n_heads,
        n_layers=c.n_layers,
        n_ctx=c.n_ctx,
        d_mlp=c.d_mlp,
        d_vocab=c.d_vocab,
        act_fn="relu",
        normalization_type=None,
        positional_embedding_type="standard",
    )
    bridge = TransformerBridge.boot_native(
        config, tokenizer=_bridge_tokenizer(tokenizer), device=str(weight.device), dtype=weight.dtype
    )
    bridge.load_state_dict(module.state_dict())
    return Opened(bridge.eval(), hook_points(bridge), {})


def hf_bridge(module: nn.Module, tokenizer: Any, name: str) -> Opened:
    """A bridge around a Hugging Face model's weights, and for its hook names the modules that they may stand for.

    A bridge rewires the model that it is given, so it gets a copy of the modules that shares their parameters: the
    plain model stays as it was, and no weight is held twice (but for joint projections, which a bridge splits).
    A bridge also needs a head. A model without one is given one of zeros, whose names are left out.

    Raises:
        ConfigError: transformer-lens cannot open the model, for any reason.
    """
    with _guard_opening(f"{type(module).__name__} ({name})"):
        return _hf_bridge(module, tokenizer, name)


def _hf_bridge(module: nn.Module, tokenizer: Any, name: str) -> Opened:
    from transformer_lens.model_bridge import TransformerBridge

    shell = copy.deepcopy(module, _weights_by_id(module))
    originals = {id(s): m for s, m in zip(shell.modules(), module.modules(), strict=True)}
    shell = _with_head(shell) if is_bare(module) else shell
    head = {id(m) for m in shell.modules() if id(m) not in originals}
    weight = next(module.parameters())
    # A model made from a config does not name its architecture.
    config: Any = shell.config
    config.architectures = config.architectures or [type(shell).__name__]
    bridge = TransformerBridge.boot_transformers(
        name,
        hf_model=shell,
        tokenizer=_bridge_tokenizer(tokenizer),
        device=str(weight.device),
        dtype=weight.dtype,
    )
    return _name_places(bridge, originals, head)


def _weights_by_id(module: nn.Module) -> dict[int, Any]:
    """What a copy of a model shares with it: parameters, and their packed form that bitsandbytes makes in a forward."""
    packed = [vars(m.state) for m in module.modules() if hasattr(getattr(m, "state", None), "CB")]
    tensors = [value for state in packed for value in state.values() if isinstance(value, torch.Tensor)]
    return {id(tensor): tensor for tensor in (*module.parameters(), *tensors)}


def _with_head(shell: Any) -> Any:
    """A bare model in the class that transformers has for it with a language model's head, of zeros.

    Raises:
        ConfigError: there is no such class.
    """
    import transformers as hf

    config = copy.deepcopy(shell.config)
    kinds = (hf.MODEL_FOR_MASKED_LM_MAPPING, hf.MODEL_FOR_CAUSAL_LM_MAPPING)
    found = next((kind[type(config)] for kind in kinds if type(config) in kind), None)
    if found is None:
        raise ConfigError(f"transformer-lens cannot open {type(shell).__name__}: there is no such model with a head")
    config.architectures = [found.__name__]
    with torch.device("meta"):
        whole = found(config)
    setattr(whole, whole.base_model_prefix, shell)
    weight = next(shell.parameters())
    for part in whole.children():
        if part is not shell:
            part.to_empty(device=weight.device).to(weight.dtype)
            for tensor in part.parameters():
                tensor.requires_grad_(False).zero_()
    return whole.eval()


def _name_places(bridge: Any, originals: dict[int, nn.Module], head: set[int]) -> Opened:
    """The names of a bridge but for those in a head, and candidates for those that are a component's input or output.

    They are only candidates: a component may compute something between its hooks and its module, so values must agree.
    """
    from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

    spots: dict[int, Spot] = {}
    not_there: set[int] = set()
    for component in bridge.modules():
        if not isinstance(component, GeneralizedComponent):
            continue
        if id(component.original_component) in head and component.original_component is not bridge.original_model:
            not_there |= {id(m) for m in component.modules()}
        module = originals.get(id(component.original_component))
        if module is not None:
            spots[id(component.hook_in)] = Spot(module, "in")
            spots[id(component.hook_out)] = Spot(module, "out")
    points = {name: spot for name, spot in hook_points(bridge).items() if id(spot.module) not in not_there}
    return Opened(bridge, points, {name: spots[id(s.module)] for name, s in points.items() if id(s.module) in spots})


def hook_points(model: Any) -> dict[str, Spot]:
    """Every hook name of a transformer-lens model; for each HookPoint its aliases (the customary names) come first."""
    points = model.hook_dict.items()
    names = sorted((name == point.name, name) for name, point in points)
    there = dict(points)
    return {name: Spot(there[name], "out", instrumented=True) for _, name in names}


def is_transformer_lens(module: nn.Module) -> bool:
    """Whether it is a model of transformer-lens, found without importing it."""
    origins = (c.__module__ for c in type(module).__mro__)
    return hasattr(module, "hook_dict") and any(origin.startswith("transformer_lens") for origin in origins)


def _bridge_tokenizer(tokenizer: Any | None) -> Any:
    """A copy of the tokenizer for a bridge, which adds special tokens to it.

    A bridge requires a tokenizer, so a model without one gets a stand-in. A bridge would also load the tokenizer again
    from its origin, unless told that it adds BOS; it adds BOS itself in that case.
    """
    tokenizer = _stand_in_tokenizer() if tokenizer is None else copy.deepcopy(tokenizer)
    tokenizer.init_kwargs |= {"name_or_path": tokenizer.name_or_path, "add_bos_token": True}
    return tokenizer


def _stand_in_tokenizer() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    unknown = "<unk>"
    words = Tokenizer(WordLevel({unknown: 0, "a": 1}, unk_token=unknown))
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token=unknown, bos_token=unknown, eos_token=unknown)


@contextmanager
def _guard_opening(what: str) -> Iterator[None]:
    """While a bridge is opened, no process is started, and any error of an adapter means that it cannot be opened.

    There are some hundred adapters, each with its own assumptions, so no list of exceptions is complete.
    transformer-lens warns of aliases that an architecture has no hook for; here a missing name is an error when it is
    asked for.
    """
    try:
        with warnings.catch_warnings(), no_processes():
            warnings.simplefilter("ignore")
            yield
    except (Exception, SystemExit) as error:
        said = str(error) or type(error).__name__
        reason = said if isinstance(error, ConfigError) else f"transformer-lens cannot open {what}: {said}"
        raise ConfigError(textwrap.shorten(reason, 240, placeholder="...")) from error
