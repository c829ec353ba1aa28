"""The embedded base model's architecture: a small plain-torch transformer with TransformerLens' module names.

In: token ids `(Q, T)`. Out: logits `(Q, T, V)`. Because every submodule is named as TransformerLens names its hooks
(`blocks.0.mlp`, `blocks.0.attn.q`, ...), a hook name is a module's input or output here and costs a plain forward
hook, and the state dict loads unchanged into `TransformerBridge.boot_native`.

The architecture is that of the TinyStories transcoder result that we reproduce: ReLU MLPs, no layer norm, learned
positions. `ln1`, `ln2` and `ln_final` are identities: they stand where the residual stream can be read.

Shapes: Q sequences, T positions, H heads, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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
