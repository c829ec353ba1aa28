"""Train the embedded base model `stories-4l` on texts, and write its weights, tokenizer and model card.

    python pipelines/train_base_lm.py --text stories.jsonl --text sampled.jsonl --out runs/base_lm

`--text` takes text, jsonl or parquet files, folders of them, or the name of a `datasets` dataset. The first source is
the *real* one: 200 of its texts are held out, and `--real-fraction` of every batch comes from it. For the embedded
model it was 4,042 TinyStories (CDLA-Sharing-1.0, https://huggingface.co/datasets/roneneldan/TinyStories). The other
sources stretch it; for the embedded model they were stories sampled from stories260K (MIT,
https://huggingface.co/karpathy/tinyllamas) as `sample_stories.py` does it: ancestral sampling at temperature 1, texts
of over 100 characters.

On one core of a 2026 server processor a million tokens take about 90 s. The run can be stopped at any time: the same
command goes on from the last checkpoint, and on a finished run it only writes the outputs again. `OUT` receives
`model.safetensors` (bfloat16), `config.json`, `tokenizer.json`, `model_card.md`, `loss.svg` and the checkpoint;
`--export-to FOLDER` writes the same, without training, from the checkpoint as it stands. Needs torch 2.9 (Muon).

ReLU neurons die at high learning rates where no layer norm holds their inputs in place. `--start-from OUT` begins a run
with the weights of another one and gives the dead neurons new weights; `stories-4l` was trained so, in two runs (its
card gives both commands).
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import cyclopts
import numpy as np
import torch
from base_lm_card import BOS, Facts, Source, bos_of, held_out_loss, write_outputs
from numpy.typing import NDArray
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import Linear
from torch.nn import functional as F

from actcache.lm.stories import MLP, StoriesConfig, StoriesLM
from actcache.source import read_texts

HELD_OUT_STORIES = 200
TEXTS_FOR_TOKENIZER = 20_000


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

    def __post_init__(self) -> None:
        for name in ("tokens", "batch_sequences", "muon_lr", "adam_lr", "warmup_steps"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("decay_fraction", "real_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")


DEFAULT_RECIPE, DEFAULT_SIZES = Recipe(), StoriesConfig()


class Run:
    """A training run: the model, its optimizers, and how far they have come."""

    def __init__(self, config: StoriesConfig, recipe: Recipe) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe = recipe
        self.model = StoriesLM(config)
        initialise(self.model)
        self.optimizers = optimizers_of(self.model, recipe)
        self.peak_rates = [optimizer.param_groups[0]["lr"] for optimizer in self.optimizers]
        self.tokens_per_step = recipe.batch_sequences * config.n_ctx
        self.n_steps = int(recipe.tokens / self.tokens_per_step)
        self.step, self.seconds, self.tokens_before = 0, 0.0, 0
        self.history: list[dict[str, float]] = []

    def learn(self, ids: Tensor) -> float:
        """One step on `(batch_sequences, n_ctx + 1)` ids; returns the loss before it, in nats per token."""
        for optimizer, rate in zip(self.optimizers, self.peak_rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * learning_rate_factor(self.step, self.n_steps, self.recipe)
        total = 0.0
        # Halves keep the logits' memory within the cache of a small machine; the sum of gradients is the same.
        for half in ids.chunk(2):
            with torch.autocast("cpu", torch.bfloat16):
                logits = self.model(half[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1).float(), half[:, 1:].flatten()) * (len(half) / len(ids))
            torch.autograd.backward(loss)
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        return total

    def start_from(self, path: Path, ids: Tensor) -> None:
        """Begin with the weights of another run's checkpoint, with new weights for its dead MLP neurons."""
        saved: dict[str, Any] = torch.load(path, weights_only=True)
        self.model.load_state_dict(saved["model"])
        self.tokens_before, self.seconds, self.history = tokens_of(saved), saved["seconds"], saved["history"]
        revive_dead_neurons(self.model, ids, self.recipe.seed)

    def save(self, path: Path) -> None:
        """Weights, optimizer tensors and progress in one atomic rename."""
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "recipe": asdict(self.recipe),
            "step": self.step,
            "history": self.history,
            "seconds": self.seconds,
            "tokens_before": self.tokens_before,
        }
        temporary = path.with_suffix(".tmp")
        torch.save(state, temporary)
        os.replace(temporary, path)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint; refuses one of another recipe (only `tokens` may differ)."""
        saved: dict[str, Any] = torch.load(path, weights_only=True)
        for name, value in saved.get("recipe", {}).items():
            if name != "tokens" and value != (asked := getattr(self.recipe, name)):
                raise ValueError(
                    f"the run in {path.parent} was begun with {name} {value}, not {asked}; use another --out"
                )
        self.model.load_state_dict(saved["model"])
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.step, self.history, self.seconds = saved["step"], saved["history"], saved["seconds"]
        self.tokens_before = saved.get("tokens_before", 0)

    @property
    def tokens(self) -> int:
        """Tokens seen, those of the run that this one started from included."""
        return self.tokens_before + self.step * self.tokens_per_step


def tokens_of(saved: dict[str, Any]) -> int:
    """Tokens that a checkpoint's run had seen."""
    return int(saved["history"][-1]["tokens"]) if saved["history"] else 0


@torch.no_grad()
def revive_dead_neurons(model: StoriesLM, ids: Tensor, seed: int) -> list[int]:
    """Give neurons that fire for less than one token in 10,000 new input weights; how many there were in each layer.

    The bias is set so that a neuron fires for about half of the tokens; its output weights become zero, so the model
    computes what it did before and the neuron finds its use from there.
    """
    inputs: dict[int, Tensor] = {}
    handles = [
        cast(MLP, block.mlp).register_forward_pre_hook(lambda _m, args, layer=layer: inputs.update({layer: args[0]}))
        for layer, block in enumerate(model.blocks)
    ]
    model(ids)
    for handle in handles:
        handle.remove()
    generator, counts = torch.Generator().manual_seed(seed), []
    for layer, block in enumerate(model.blocks):
        mlp, x = cast(MLP, block.mlp), inputs[layer].flatten(0, 1)
        first, second = cast(Linear, mlp["in"]), cast(Linear, mlp["out"])
        dead = ((first(x) > 0).float().mean(0) < 1e-4).nonzero()[:, 0]
        weights = torch.randn(len(dead), x.shape[1], generator=generator) / math.sqrt(x.shape[1])
        first.weight[dead], first.bias[dead] = weights, -(weights @ x.mean(0))
        second.weight[:, dead] = 0
        counts.append(len(dead))
    return counts


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


def optimizers_of(model: StoriesLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon (https://kellerjordan.github.io/posts/muon/) for the blocks' matrices, AdamW for everything else."""
    matrices = [p for n, p in model.named_parameters() if n.startswith("blocks") and p.ndim == 2]
    others = [p for n, p in model.named_parameters() if not (n.startswith("blocks") and p.ndim == 2)]
    return [
        torch.optim.Muon(matrices, lr=recipe.muon_lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=recipe.adam_lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def learning_rate_factor(step: int, n_steps: int, recipe: Recipe) -> float:
    """Warm-up, a plateau, then a linear tail to zero."""
    tail = max(recipe.decay_fraction * n_steps, 1.0)
    return min(1.0, (step + 1) / recipe.warmup_steps, max(0.0, (n_steps - step) / tail))


def split_held_out(texts: Sequence[str], seed: int) -> tuple[list[str], list[str]]:
    """Training texts and the held-out ones, chosen by a seeded permutation."""
    if len(texts) <= HELD_OUT_STORIES:
        raise ValueError(
            f"the first text source has {len(texts)} texts, but {HELD_OUT_STORIES} are to be held out of it"
        )
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(texts))
    held = set(order[:HELD_OUT_STORIES].tolist())
    return [t for i, t in enumerate(texts) if i not in held], [t for i, t in enumerate(texts) if i in held]


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> Tokenizer:
    """A byte-level BPE tokenizer with one special token, which begins every document."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[BOS], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> NDArray[np.uint16]:
    """All texts in one stream of token ids, each begun by BOS."""
    bos = bos_of(tokenizer)
    return np.concatenate([np.array([bos, *e.ids], dtype=np.uint16) for e in tokenizer.encode_batch_fast(texts)])


def batch_of(streams: Sequence[NDArray[np.uint16]], recipe: Recipe, step: int, n_ctx: int) -> Tensor:
    """The `(batch_sequences, n_ctx + 1)` ids of a step: a function of seed and step, so a resumed run is exact."""
    rng = np.random.Generator(np.random.PCG64([recipe.seed, step]))
    n_real = round(recipe.batch_sequences * recipe.real_fraction) if len(streams) > 1 else recipe.batch_sequences
    rows = []
    for i in range(recipe.batch_sequences):
        stream = streams[0 if i < n_real else 1]
        begin = rng.integers(0, len(stream) - n_ctx - 1)
        rows.append(stream[begin : begin + n_ctx + 1])
    return torch.from_numpy(np.stack(rows).astype(np.int64))


def train(
    run: Run,
    tokenizer: Tokenizer,
    texts: Sequence[Sequence[str]],
    held_out: Sequence[str],
    checkpoint: Path,
    every: int,
) -> None:
    """Train to the last step; every so many steps, and at the end, measure the held-out loss and save a checkpoint."""
    streams = [encode(tokenizer, part) for part in texts if part]
    columns = (TextColumn("train"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("loss {task.fields[loss]:.3f}"), refresh_per_second=1) as progress:
        task = progress.add_task("train", total=run.n_steps, completed=run.step, loss=math.nan)
        while run.step < run.n_steps:
            start = time.monotonic()
            loss = run.learn(batch_of(streams, run.recipe, run.step, run.model.config.n_ctx))
            progress.update(task, completed=run.step, loss=loss)
            due = run.step % every == 0 or run.step == run.n_steps
            if due:
                measured = asdict(held_out_loss(run.model, tokenizer, held_out))
                run.history.append({"tokens": run.tokens, **measured, "train": loss})
            run.seconds += time.monotonic() - start
            if due:
                run.save(checkpoint)
                progress.console.print(progress_line(run))


def progress_line(run: Run) -> str:
    """The last measurement, for the terminal and the log."""
    last = run.history[-1]
    return (
        f"{last['tokens'] / 1e6:7.2f} M tokens  train {last['train']:.3f}  held-out {last['nats_per_token']:.4f} "
        f"nats/token  {last['nats_per_char']:.4f} nats/char  {run.seconds:.0f} s"
    )


def facts_of(
    run: Run, text: Sequence[str], about: Sequence[str], texts: Sequence[Sequence[str]], first_run: str
) -> Facts:
    """What the model card says of data, recipe and command; of files only their names."""
    names = [Path(source).name for source in text]
    notes = [*about, *["not stated"] * (len(text) - len(about))]
    sources = [
        Source(name=name, about=note, n_texts=len(part), n_characters=sum(map(len, part)))
        for name, note, part in zip(names, notes, texts, strict=True)
    ]
    options = [f"--text {name}" for name in names]
    options += [
        f"--{key.replace('_', '-')} {value}"
        for chosen, default in ((run.recipe, DEFAULT_RECIPE), (run.model.config, DEFAULT_SIZES))
        for key, value in asdict(chosen).items()
        if value != getattr(default, key)
    ]
    if run.tokens_before:
        options.append("--start-from FIRST")
        first_run = f"FIRST is the folder of a run of {run.tokens_before / 1e6:.1f} M tokens. {first_run}".strip()
    return Facts(
        sources=sources,
        recipe=asdict(run.recipe),
        command=f"python pipelines/train_base_lm.py {' '.join(options)} --out OUT",
        first_run=first_run,
        tokens=run.tokens,
        seconds=run.seconds,
        history=run.history,
    )


def main(
    *,
    text: Annotated[list[str], cyclopts.Parameter(help="text sources; the first one is the real one")],
    out: Annotated[Path, cyclopts.Parameter(help="folder for the model and its checkpoint")],
    about: Annotated[Sequence[str], cyclopts.Parameter(help="for the card: origin and licence of each source")] = (),
    recipe: Annotated[Recipe, cyclopts.Parameter(name="*")] = DEFAULT_RECIPE,
    config: Annotated[StoriesConfig, cyclopts.Parameter(name="*")] = DEFAULT_SIZES,
    threads: Annotated[int, cyclopts.Parameter(help="torch threads; 0 leaves torch's choice")] = 0,
    evaluate_every: Annotated[int, cyclopts.Parameter(help="steps between held-out losses and checkpoints")] = 250,
    first_run: Annotated[str, cyclopts.Parameter(help="for the card: how the run of --start-from was made")] = "",
    start_from: Annotated[Path | None, cyclopts.Parameter(help="OUT of a run to begin with the weights of")] = None,
    export_to: Annotated[Path | None, cyclopts.Parameter(help="only write the outputs, here, as things stand")] = None,
) -> None:
    """Train `stories-4l`, or go on with a run that was stopped."""
    if threads:
        torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    real, *others = [list(read_texts(source)) for source in text]
    real, held_out = split_held_out(real, recipe.seed)
    sampled = [story for other in others for story in other]
    if start_from is not None and not (out / "tokenizer.json").exists():
        shutil.copy(start_from / "tokenizer.json", out)
    if not (out / "tokenizer.json").exists():
        train_tokenizer(real + sampled[:TEXTS_FOR_TOKENIZER], config.d_vocab).save(str(out / "tokenizer.json"))
    run, checkpoint = Run(config, recipe), out / "checkpoint.pt"
    if checkpoint.exists():
        run.load(checkpoint)
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    if start_from is not None and not checkpoint.exists():
        some = batch_of([encode(tokenizer, real)], recipe, 0, config.n_ctx)[:, :-1]
        run.start_from(start_from / "checkpoint.pt", some)
    if export_to is None:
        train(run, tokenizer, (real, sampled), held_out, checkpoint, evaluate_every)
    facts = facts_of(run, text, about, (real, *others), first_run)
    write_outputs(export_to or out, run.model, out / "tokenizer.json", held_out, facts)


if __name__ == "__main__":
    cyclopts.run(main)
