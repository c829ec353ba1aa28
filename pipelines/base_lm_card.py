"""What `train_base_lm.py` leaves behind: held-out loss, shipped weights, loss curve and model card.

Everything that the card says about the model is measured on what is shipped: the weights read back from the file, after
their rounding to bfloat16.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from actcache.lm import load_lm
from actcache.lm.stories import StoriesConfig, StoriesLM
from actcache.provenance import processor

BOS = "<|bos|>"
"""The token that begins every document."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Loss:
    """Next-token loss on texts that were never trained on."""

    nats_per_token: float
    """Mean over tokens, BOS not among them."""
    nats_per_char: float
    """Sum over tokens by the number of characters: comparable between tokenizers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A text source as the card describes it."""

    name: str
    """File, folder or dataset."""
    about: str
    """Origin and licence."""
    n_texts: int
    """Texts trained on."""
    n_characters: int
    """Characters trained on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What the card says beside what it measures."""

    sources: Sequence[Source]
    """The first one is the real one, of which texts were held out."""
    recipe: dict[str, object]
    """Options of the training run."""
    command: str
    """The command line that made the model."""
    first_run: str
    """How the run that this one started from was made; empty when it began with random weights."""
    tokens: int
    """Tokens seen."""
    seconds: float
    """Seconds spent."""
    history: Sequence[dict[str, float]]
    """Held-out losses on the way: `tokens`, `nats_per_token`, `nats_per_char`."""


def load_stories(folder: Path) -> tuple[StoriesLM, Tokenizer]:
    """The model and tokenizer that `train_base_lm.py` wrote, as `load_lm` opens them (in float32)."""
    lm = load_lm(str(folder))
    if not isinstance(lm.module, StoriesLM) or lm.tokenizer is None:
        raise ValueError(f"{folder} holds {type(lm.module).__name__}, not a StoriesLM with its tokenizer")
    return lm.module, lm.tokenizer.backend_tokenizer


def bos_of(tokenizer: Tokenizer) -> int:
    """The id of the token that begins every document."""
    bos = tokenizer.token_to_id(BOS)
    if bos is None:
        raise ValueError(f"the tokenizer has no {BOS} token: train_base_lm.py did not make it")
    return int(bos)


def held_out_loss(model: StoriesLM, tokenizer: Tokenizer, texts: Sequence[str], *, batch: int = 32) -> Loss:
    """Mean next-token loss of `texts`, each begun by BOS and read alone.

    Stories longer than the context are read in windows that overlap by half; each token is scored once, with at least
    half a context (or everything from the story's beginning) before it.
    """
    bos = bos_of(tokenizer)
    windows = [
        window for text in texts for window in windows_of([bos, *tokenizer.encode(text).ids], model.config.n_ctx)
    ]
    sums = [score(model, windows[i : i + batch]) for i in range(0, len(windows), batch)]
    total, n_tokens = sum(s for s, _ in sums), sum(n for _, n in sums)
    return Loss(nats_per_token=total / n_tokens, nats_per_char=total / sum(map(len, texts)))


def windows_of(ids: list[int], n_ctx: int) -> Iterator[tuple[list[int], int]]:
    """Windows of at most `n_ctx` ids that overlap by half, and the index of the first id that each of them scores."""
    half = n_ctx // 2
    for begin in range(0, max(len(ids) - half, 1), half):
        yield ids[begin : begin + n_ctx], half if begin else 1


@torch.inference_mode()
def score(model: StoriesLM, windows: Sequence[tuple[list[int], int]]) -> tuple[float, int]:
    """Summed loss of the ids that the windows score, and how many there are."""
    ids = torch.zeros((len(windows), max(len(window) for window, _ in windows)), dtype=torch.int64)
    targets = torch.full_like(ids, -100)
    for row, (window, first) in enumerate(windows):
        ids[row, : len(window)] = torch.tensor(window)
        targets[row, first : len(window)] = ids[row, first : len(window)]
    logits, targets = model(ids)[:, :-1], targets[:, 1:]
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
    return loss.item(), int((targets >= 0).sum())


@contextmanager
def zero_ablated(model: StoriesLM, layer: int) -> Iterator[None]:
    """While active, that layer's MLP writes zeros."""
    mlp = model.get_submodule(f"blocks.{layer}.mlp")
    hook = mlp.register_forward_hook(lambda _module, _inputs, output: torch.zeros_like(output))
    try:
        yield
    finally:
        hook.remove()


def write_outputs(folder: Path, model: StoriesLM, tokenizer: Path, held_out: Sequence[str], facts: Facts) -> None:
    """Write weights (bfloat16), config, tokenizer, loss curve and card; measure what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    # safetensors makes files that only their owner may read; these are meant to be shared.
    (folder / "model.safetensors").chmod(0o644)
    (folder / "config.json").write_text(json.dumps(asdict(model.config), indent=2) + "\n")
    if tokenizer.resolve() != (folder / "tokenizer.json").resolve():
        shutil.copyfile(tokenizer, folder / "tokenizer.json")
    write_loss_curve(folder / "loss.svg", facts.history)
    (folder / "model_card.md").write_text(model_card(folder, held_out, facts))


def write_loss_curve(path: Path, history: Sequence[dict[str, float]]) -> None:
    """Held-out loss against tokens seen."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot([h["tokens"] / 1e6 for h in history], [h["nats_per_char"] for h in history])
    axes.set(xlabel="million tokens seen", ylabel="held-out nats per character", ylim=(0.55, 1.1))
    axes.grid(alpha=0.3)
    figure.savefig(path)


def model_card(folder: Path, held_out: Sequence[str], facts: Facts) -> str:
    """The card, in Markdown; the losses are measured on the model in `folder`."""
    model, tokenizer = load_stories(folder)
    n_parameters = sum(p.numel() for p in model.parameters())
    return CARD.format(
        architecture=describe(model.config, n_parameters),
        n_held_out=len(held_out),
        sources="\n".join(f"| {s.name} | {s.n_texts:,} | {s.n_characters:,} | {s.about} |" for s in facts.sources),
        tokens=facts.tokens / 1e6,
        losses=loss_table(model, tokenizer, held_out),
        neurons=neuron_table(model, tokenizer, held_out),
        recipe="\n".join(f"| `{name}` | {value} |" for name, value in facts.recipe.items()),
        seconds=facts.seconds,
        machine=machine(),
        versions=", ".join(f"{name} {version(name)}" for name in ("torch", "tokenizers", "numpy")),
        python=platform.python_version(),
        command=facts.command,
        first_run=f"\n{facts.first_run}\n" if facts.first_run else "",
    )


def describe(config: StoriesConfig, n_parameters: int) -> str:
    """The architecture in one line."""
    return (
        f"{config.n_layers} layers, d_model {config.d_model}, ReLU MLPs of {config.d_mlp} neurons, {config.n_heads} "
        f"attention heads, no layer norm, learned positions, context {config.n_ctx}, byte-level BPE of "
        f"{config.d_vocab:,} tokens; {n_parameters:,} parameters"
    )


def loss_table(model: StoriesLM, tokenizer: Tokenizer, held_out: Sequence[str]) -> str:
    """Rows for the model as it is, and with each MLP's output replaced by zeros."""
    losses = {"unchanged": held_out_loss(model, tokenizer, held_out)}
    for layer in range(model.config.n_layers):
        with zero_ablated(model, layer):
            losses[f"MLP {layer} writes zeros"] = held_out_loss(model, tokenizer, held_out)
    return "\n".join(f"| {name} | {x.nats_per_token:.4f} | {x.nats_per_char:.4f} |" for name, x in losses.items())


def neuron_table(model: StoriesLM, tokenizer: Tokenizer, texts: Sequence[str]) -> str:
    """Per layer: neurons that no token turns on, and how many a token turns on in the mean."""
    counts, n_tokens = firing_counts(model, tokenizer, texts)
    rows = enumerate(zip((counts == 0).sum(1).tolist(), (counts.sum(1) / n_tokens).tolist(), strict=True))
    return "\n".join(f"| {layer} | {dead} of {counts.shape[1]} | {on:.1f} |" for layer, (dead, on) in rows)


@torch.inference_mode()
def firing_counts(model: StoriesLM, tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[Tensor, int]:
    """How many tokens turn each `(layer, neuron)` on, of how many; texts are cut at the context's end."""
    counts, n_tokens = torch.zeros(model.config.n_layers, model.config.d_mlp), 0

    def count(layer: int) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            counts[layer] += (output > 0).sum((0, 1))

        return hook

    modules = [model.get_submodule(f"blocks.{layer}.mlp.in") for layer in range(model.config.n_layers)]
    hooks = [module.register_forward_hook(count(layer)) for layer, module in enumerate(modules)]
    for text in texts:
        ids = [bos_of(tokenizer), *tokenizer.encode(text).ids][: model.config.n_ctx]
        model(torch.tensor([ids]))
        n_tokens += len(ids)
    for hook in hooks:
        hook.remove()
    return counts, n_tokens


def machine() -> str:
    """Processor and cores, without the machine's name."""
    return f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads"


CARD = """\
# stories-4l

A small language model of children's stories, the base model that actcache ships so that everything can be tried without
a network. It writes grammatical sentences and loses the plot: it is there to be looked into, not to be read.

{architecture}. Weights in bfloat16. Module names are TransformerLens component names.

## Data

| source | texts | characters | origin and licence |
|---|---|---|---|
{sources}

{n_held_out} texts of the first source were held out, by a seeded permutation. Tokens seen in training: {tokens:.1f} M.
No training text is part of this folder.

## Held-out loss

On the {n_held_out} texts held out, measured on the weights in this folder (bfloat16, computed in float32); each text
begins with BOS and is read alone, each token has at least half a context before it.

| model | nats per token | nats per character |
|---|---|---|
{losses}

Neurons of the MLPs on the same texts (dead: never above zero):

| layer | dead | neurons above zero per token |
|---|---|---|
{neurons}

![held-out loss against tokens seen](loss.svg)

## Recipe

Muon (https://kellerjordan.github.io/posts/muon/) for the matrices inside blocks, AdamW for everything else, linear
warm-up and a linear tail, bfloat16 autocast, gradients clipped to norm 1.

| option | value |
|---|---|
{recipe}

{seconds:,.0f} s on {machine}; Python {python}, {versions}.

    {command}
{first_run}"""
