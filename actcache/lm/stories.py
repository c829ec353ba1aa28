"""The embedded base model's architecture: a small plain-torch transformer with TransformerLens' module names.

In: token ids `(Q, T)`. Out: logits `(Q, T, V)`. Because every submodule is named as TransformerLens names its hooks
(`blocks.0.mlp`, `blocks.0.attn.q`, ...), a hook name is a module's input or output here and costs a plain forward
hook, and the state dict loads unchanged into `TransformerBridge.boot_native`.

The architecture is that of the TinyStories transcoder result that we reproduce: ReLU MLPs, no layer norm, learned
positions. `ln1`, `ln2` and `ln_final` are identities: they stand where the residual stream can be read.

Shapes: Q sequences, T positions, H heads, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actcache.lm.hooks import SIDES, ResolvedSite, Spot
from actcache.lm.survey import Seen
from actcache.spec import Site


@dataclass(frozen=True, kw_only=True, slots=True)
class StoriesConfig:
    """Sizes of a `StoriesLM`."""

    d_model: int = 128
    """Width of the residual stream."""
    d_mlp: int = 512
    """Neurons of each MLP."""
    n_layers: int = 4
    """Transformer blocks."""
    n_heads: int = 8
    """Attention heads; must divide d_model."""
    n_ctx: int = 256
    """Learned positions: the longest sequence, in tokens."""
    d_vocab: int = 2048
    """Vocabulary size."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"StoriesConfig.{name} must be a positive integer, got {value!r}")
        if self.d_model % self.n_heads:
            raise ValueError(f"n_heads ({self.n_heads}) must divide d_model ({self.d_model})")


class KeyValueCache:
    """Keys and values of the positions already seen by one attention layer, in buffers allocated once."""

    def __init__(self, config: StoriesConfig, n_sequences: int) -> None:
        shape = (n_sequences, config.n_heads, config.n_ctx, config.d_model // config.n_heads)
        self.keys, self.values, self.length = torch.empty(shape), torch.empty(shape), 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add `(Q, H, T, d_head)` keys and values; return those of every position so far."""
        start, self.length = self.length, self.length + k.shape[2]
        self.keys[:, :, start : self.length] = k
        self.values[:, :, start : self.length] = v
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]


class Attention(nn.Module):
    """Causal self-attention through torch's fused kernel."""

    def __init__(self, config: StoriesConfig) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.q = nn.Linear(config.d_model, config.d_model)
        self.k = nn.Linear(config.d_model, config.d_model)
        self.v = nn.Linear(config.d_model, config.d_model)
        self.o = nn.Linear(config.d_model, config.d_model)

    def forward(self, x: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """`(Q, T, d_model)` to the same shape; with a cache, T new positions after those that it holds."""
        q, k, v = (self._heads(project(x)) for project in (self.q, self.k, self.v))
        if cache is not None:
            k, v = cache.append(k, v)
        # A single new query sees every cached key; a block of queries (from position 0) sees its own past.
        z = F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1)
        out: Tensor = self.o(z.transpose(1, 2).flatten(2))
        return out

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.n_heads, -1).transpose(1, 2)


class MLP(nn.ModuleDict):
    """`out(relu(in(x)))`; the two halves carry TransformerLens' names `in` and `out`."""

    def __init__(self, config: StoriesConfig) -> None:
        super().__init__(
            {"in": nn.Linear(config.d_model, config.d_mlp), "out": nn.Linear(config.d_mlp, config.d_model)}
        )

    def forward(self, x: Tensor) -> Tensor:
        """`(Q, T, d_model)` to the same shape."""
        out: Tensor = self["out"](F.relu(self["in"](x)))
        return out


class Block(nn.Module):
    """Attention, then MLP, each added to the residual stream."""

    def __init__(self, config: StoriesConfig) -> None:
        super().__init__()
        self.ln1 = nn.Identity()
        self.attn = Attention(config)
        self.ln2 = nn.Identity()
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """The residual stream `(Q, T, d_model)`, with what this block adds to it."""
        x = x + self.attn(self.ln1(x), cache)
        out: Tensor = x + self.mlp(self.ln2(x))
        return out


class StoriesLM(nn.Module):
    """The whole model: `forward(ids (Q, T)) -> logits (Q, T, V)`."""

    def __init__(self, config: StoriesConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.d_vocab, config.d_model)
        self.pos_embed = nn.Embedding(config.n_ctx, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.ln_final = nn.Identity()
        self.unembed = nn.Linear(config.d_model, config.d_vocab)

    def forward(self, ids: Tensor, caches: list[KeyValueCache] | None = None) -> Tensor:
        """Next-token logits; with caches (one a layer), of T new tokens after those that they hold."""
        start = caches[0].length if caches else 0
        stop = start + ids.shape[1]
        if stop > self.config.n_ctx:
            raise ValueError(f"sequences of {stop} tokens, but the model has {self.config.n_ctx} positions")
        x = self.embed(ids) + self.pos_embed(torch.arange(start, stop, device=ids.device))
        for layer, block in enumerate(self.blocks):
            x = block(x, caches[layer] if caches else None)
        logits: Tensor = self.unembed(self.ln_final(x))
        return logits

    @torch.inference_mode()
    def sample(self, n_sequences: int, *, bos: int, max_tokens: int, generator: torch.Generator) -> Iterator[Tensor]:
        """Ancestral sampling at temperature 1, one `(Q,)` tensor of token ids a step, each sequence begun by `bos`.

        A full context is halved: the last `n_ctx // 2` tokens become the new context, so texts may be longer than it.
        """
        ids = torch.full((n_sequences, 1), bos)
        caches: list[KeyValueCache] = []
        context, new = ids, ids
        for _ in range(max_tokens):
            if not caches or caches[0].length + 1 > self.config.n_ctx:
                caches = [KeyValueCache(self.config, n_sequences) for _ in range(self.config.n_layers)]
                context = context[:, -(self.config.n_ctx // 2) :]
                new = context
            probabilities = self(new, caches)[:, -1].softmax(-1)
            # The exponential race: argmax(p / e) with e ~ Exp(1) draws from p without a cumulative sum.
            race = torch.empty_like(probabilities).exponential_(generator=generator)
            new = (probabilities / race).argmax(-1, keepdim=True)
            context = torch.cat([context, new], dim=1)
            yield new[:, 0]


_STORIES_ALIASES = {
    "embed.hook_out": "hook_embed",
    "pos_embed.hook_out": "hook_pos_embed",
    "unembed.hook_out": "hook_unembed",
    "hook_in": "hook_resid_pre",
    "ln2.hook_in": "hook_resid_mid",
    "hook_out": "hook_resid_post",
    "attn.hook_out": "hook_attn_out",
    "mlp.hook_out": "hook_mlp_out",
    "attn.q.hook_out": "attn.hook_q",
    "attn.k.hook_out": "attn.hook_k",
    "attn.v.hook_out": "attn.hook_v",
    "attn.o.hook_in": "attn.hook_z",
    "mlp.in.hook_out": "mlp.hook_pre",
    "mlp.out.hook_in": "mlp.hook_post",
}


_WITH_HEADS = {name for pair in _STORIES_ALIASES.items() if pair[1][-2:] in ("_q", "_k", "_v", "_z") for name in pair}


STORIES_INSTRUMENTED = ("attn.hook_attn_scores", "attn.hook_pattern")
"""Names below each block of `StoriesLM` that are not the input or output of a module (a test checks the list)."""


def stories_spots(module: nn.Module) -> dict[str, Spot]:
    """The transformer-lens names of `StoriesLM`, whose modules are named like its components; aliases first."""
    spots: dict[str, Spot] = {}
    for path, m in module.named_modules():
        if path in ("", "blocks"):
            continue
        block = _block(path)
        for side in SIDES:
            name = f"{path}.hook_{side}"
            alias = _STORIES_ALIASES.get(name.removeprefix(block), name)
            spots |= {block + alias.removeprefix(block): Spot(m, side), name: Spot(m, side)}
    return spots


def stories_places(seen: Mapping[str, Seen], module: nn.Module) -> dict[str, ResolvedSite | Site]:
    """The embedded model's places, with heads in the shapes that have them.

    A name without a module is a site of the instrumented model only; it is listed where its value is computed, before
    the heads' outputs `z`.
    """
    config: Any = module.config
    places: dict[str, ResolvedSite | Site] = {}
    for name, s in seen.items():
        block = _block(name)
        below = name.removeprefix(block)
        if below == "attn.hook_z":
            places |= {
                block + late: Site(name=block + late, shape=(config.n_heads, 1)) for late in STORIES_INSTRUMENTED
            }
        shape = s.place.site.shape
        shape = (config.n_heads, shape[0] // config.n_heads) if below in _WITH_HEADS else shape
        places[name] = replace(s.place, site=Site(name=name, shape=shape))
    return places


def _block(path: str) -> str:
    """`blocks.0.` for a path below block 0, ...; empty for other paths."""
    return ".".join(path.split(".")[:2]) + "." if path.startswith("blocks.") else ""
