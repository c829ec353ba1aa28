"""Train the embedded base model `stories-4l` on texts, and write its weights, tokenizer and model card.

    python pipelines/train_base_lm.py --text stories.jsonl --text sampled.jsonl --out runs/base_lm --tokens 60e6

`--text` takes text, jsonl or parquet files, folders of them, or the name of a `datasets` dataset; the first source is
the *real* one: its last word is the held-out set, and `--real-fraction` of every batch comes from it. On one core of a
2026 server processor a million tokens take about 100 s; the run can be stopped at any time, and the same command goes
on from the last checkpoint. `OUT` receives `model.safetensors` (bfloat16), `config.json`, `tokenizer.json`,
`model_card.md`, `loss.svg` and the checkpoint.
"""

from __future__ import annotations

import json
import math
import os
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import cyclopts
import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F

from actcache.source import read_texts
from actcache.stories import StoriesConfig, StoriesLM

BOS = "<|bos|>"
HELD_OUT_STORIES = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How `stories-4l` is trained."""

    tokens: float = 60e6
    """Tokens to train on in all; may be raised when a run is continued."""
    batch_sequences: int = 32
    """Sequences of n_ctx tokens in a step."""
    muon_lr: float = 6e-3
    """Peak learning rate of the matrices inside blocks (Muon, its updates scaled to the size of AdamW's)."""
    adam_lr: float = 3e-3
    """Peak learning rate of embeddings, unembedding and biases (AdamW)."""
    warmup_steps: int = 200
    """Steps of linear warm-up."""
    decay_fraction: float = 0.4
    """The last part of the run, in which the learning rate falls linearly to zero."""
    real_fraction: float = 0.2
    """Share of each batch that comes from the first text source."""
    seed: int = 0
    """Seed of weights, batches and the held-out split."""


def split_held_out(texts: list[str], seed: int) -> tuple[list[str], list[str]]:
    """Training texts and the held-out ones, chosen by a seeded permutation."""
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(texts))
    held = set(order[:HELD_OUT_STORIES].tolist())
    return [t for i, t in enumerate(texts) if i not in held], [t for i, t in enumerate(texts) if i in held]


def train_tokenizer(texts: list[str], vocabulary: int) -> Tokenizer:
    """A byte-level BPE tokenizer with one special token, which begins every document."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[BOS], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """All texts in one stream of token ids, each begun by BOS."""
    bos = tokenizer.token_to_id(BOS)
    parts = (np.array([bos, *e.ids], dtype=np.uint16) for e in tokenizer.encode_batch_fast(texts))
    return np.concatenate(list(parts))


def initialise(model: StoriesLM) -> None:
    """Without layer norm the residual stream must start small: the writing matrices are shrunk by depth."""
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.zeros_(p)
        elif "embed" in name and "unembed" not in name:
            torch.nn.init.normal_(p, std=0.5 if name.startswith("embed") else 0.1)
        elif name.startswith("unembed"):
            torch.nn.init.normal_(p, std=0.02)
        else:
            scale = 1 / math.sqrt(2 * model.config.n_layers) if name.split(".")[-2] in ("o", "out") else 1.0
            torch.nn.init.normal_(p, std=scale / math.sqrt(p.shape[1]))


@torch.inference_mode()
def held_out_loss(model: StoriesLM, tokenizer: Tokenizer, texts: list[str], *, ablate: int | None = None) -> tuple[float, float]:
    """Mean next-token loss in nats per token and per character.

    Stories longer than the context are read in windows that overlap by half, each token scored once, with at least
    half a context before it (or the story's beginning). With `ablate`, that layer's MLP writes zeros.
    """
    bos, n_ctx = tokenizer.token_to_id(BOS), model.config.n_ctx
    windows, starts = [], []
    for text in texts:
        ids = [bos, *tokenizer.encode(text).ids]
        for begin in range(0, max(len(ids) - n_ctx // 2, 1), n_ctx // 2):
            windows.append(ids[begin : begin + n_ctx])
            starts.append(0 if begin == 0 else n_ctx // 2 - 1)
    total, count = 0.0, 0
    hook = None
    if ablate is not None:
        hook = model.blocks[ablate].mlp.register_forward_hook(lambda _m, _a, out: torch.zeros_like(out))
    for i in range(0, len(windows), 32):
        batch = windows[i : i + 32]
        ids = torch.full((len(batch), max(map(len, batch))), -100)
        for row, window in zip(ids, batch, strict=True):
            row[: len(window)] = torch.tensor(window)
        logits = model(ids.clamp(min=0))[:, :-1]
        targets = ids[:, 1:].clone()
        for row, start in zip(targets, starts[i : i + 32], strict=True):
            row[:start] = -100
        total += F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum").item()
        count += int((targets >= 0).sum())
    if hook is not None:
        hook.remove()
    return total / count, total / sum(map(len, texts))


def batch_of(streams: list[np.ndarray], recipe: Recipe, step: int, n_ctx: int) -> Tensor:
    """The `(batch_sequences, n_ctx + 1)` token ids of a step: a function of seed and step, so a resumed run goes on exactly."""
    rng = np.random.Generator(np.random.PCG64([recipe.seed, step]))
    n_real = round(recipe.batch_sequences * recipe.real_fraction) if len(streams) > 1 else recipe.batch_sequences
    rows = []
    for i in range(recipe.batch_sequences):
        stream = streams[0 if i < n_real else 1]
        begin = rng.integers(0, len(stream) - n_ctx - 1)
        rows.append(stream[begin : begin + n_ctx + 1])
    return torch.from_numpy(np.stack(rows).astype(np.int64))


def learning_rate_factor(step: int, n_steps: int, recipe: Recipe) -> float:
    """Warm-up, a plateau, then a linear tail to zero."""
    tail = recipe.decay_fraction * n_steps
    return min(1.0, (step + 1) / recipe.warmup_steps, max(0.0, (n_steps - step) / tail))


def optimizers_of(model: StoriesLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon (https://kellerjordan.github.io/posts/muon/) for the blocks' matrices, AdamW for everything else."""
    matrices = [p for n, p in model.named_parameters() if n.startswith("blocks") and p.ndim == 2]
    others = [p for n, p in model.named_parameters() if not (n.startswith("blocks") and p.ndim == 2)]
    return [
        torch.optim.Muon(matrices, lr=recipe.muon_lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=recipe.adam_lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def save_checkpoint(path: Path, model: StoriesLM, optimizers: list[torch.optim.Optimizer], state: dict[str, Any]) -> None:
    """Weights, optimizer tensors and progress in one atomic rename."""
    temporary = path.with_suffix(".tmp")
    torch.save({"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers], **state}, temporary)
    os.replace(temporary, path)


def write_loss_curve(path: Path, history: list[dict[str, float]]) -> None:
    """Held-out loss against tokens seen."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot([h["tokens"] / 1e6 for h in history], [h["nats_per_char"] for h in history])
    axes.set(xlabel="million tokens seen", ylabel="held-out nats per character", ylim=(0.55, 1.1))
    axes.grid(alpha=0.3)
    figure.savefig(path)


def main(
    *,
    text: Annotated[list[str], cyclopts.Parameter(help="text sources; the first one is the real one")],
    out: Annotated[Path, cyclopts.Parameter(help="folder for the model and its checkpoint")],
    recipe: Annotated[Recipe, cyclopts.Parameter(name="*")] = Recipe(),
    threads: Annotated[int, cyclopts.Parameter(help="torch threads; 0 leaves torch's choice")] = 0,
    evaluate_every: Annotated[int, cyclopts.Parameter(help="steps between held-out losses and checkpoints")] = 250,
) -> None:
    """Train `stories-4l`, or go on with a run that was stopped."""
    if threads:
        torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    config, checkpoint = StoriesConfig(), out / "checkpoint.pt"
    sources = [list(read_texts(source)) for source in text]
    train_real, held_out = split_held_out(sources[0], recipe.seed)
    sampled = [t for s in sources[1:] for t in s]

    if not (out / "tokenizer.json").exists():
        train_tokenizer(train_real + sampled[:20_000], config.d_vocab).save(str(out / "tokenizer.json"))
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    streams = [encode(tokenizer, texts) for texts in (train_real, sampled) if texts]

    torch.manual_seed(recipe.seed)
    model = StoriesLM(config)
    initialise(model)
    optimizers = optimizers_of(model, recipe)
    base_rates = [o.param_groups[0]["lr"] for o in optimizers]
    step, history, seconds = 0, [], 0.0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        step, history, seconds = saved["step"], saved["history"], saved["seconds"]
    tokens_per_step = recipe.batch_sequences * config.n_ctx
    n_steps = int(recipe.tokens / tokens_per_step)

    columns = (TextColumn("train"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[loss]}"))
    clock = time.monotonic()
    with Progress(*columns, refresh_per_second=1) as progress:
        task = progress.add_task("train", total=n_steps, completed=step, loss="")
        while step < n_steps:
            factor = learning_rate_factor(step, n_steps, recipe)
            for optimizer, rate in zip(optimizers, base_rates, strict=True):
                optimizer.param_groups[0]["lr"] = rate * factor
            ids = batch_of(streams, recipe, step, config.n_ctx)
            # Halves keep the logits' memory within the cache of a small machine; the sum of gradients is the same.
            for half in ids.chunk(2):
                with torch.autocast("cpu", torch.bfloat16):
                    logits = model(half[:, :-1])
                loss = F.cross_entropy(logits.flatten(0, 1).float(), half[:, 1:].flatten()) / 2
                loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            step += 1
            if step % evaluate_every == 0 or step == n_steps:
                per_token, per_char = held_out_loss(model, tokenizer, held_out)
                history.append({"tokens": step * tokens_per_step, "nats_per_token": per_token, "nats_per_char": per_char, "train": 2 * loss.item()})
                spent = seconds + time.monotonic() - clock
                save_checkpoint(checkpoint, model, optimizers, {"step": step, "history": history, "seconds": spent})
                progress.console.print(f"{step * tokens_per_step / 1e6:7.2f} M tokens  train {2 * loss.item():.3f}  held-out {per_token:.4f} nats/token  {per_char:.4f} nats/char  {spent:.0f} s")
            progress.update(task, completed=step, loss=f"loss {2 * loss.item():.3f}")
    finish(out, model, tokenizer, held_out, recipe, history, seconds + time.monotonic() - clock, streams, text)


if __name__ == "__main__":
    cyclopts.run(main)
