"""Everything in one call: text -> activations -> store -> sparse MLPs -> evaluation -> report page.

In: a `DemoConfig`. Out: `OUT/{acts.zarr, held_out.zarr, sparse/layer_i/, metrics.json, report.html}`. Every stage keeps
its result on disk and reuses it, so an interrupted demo continues and a second one is quick.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, cast

from actcache.errors import ActcacheError, ConfigError, SiteError, StateError
from actcache.sparse.checkpoint import CHECKPOINT
from actcache.sparse.metrics import LayerRow, Metrics, Stage, read_metrics, write_metrics
from actcache.sparse.runs import OnStage, Pair, Trained, evaluate_pair, provenance, store_facts, train_pair
from actcache.spec import check_positive
from actcache.status import Say, ignore

if TYPE_CHECKING:
    from actcache.lm import LanguageModel
    from actcache.sparse.training import TrainConfig
    from actcache.spec import TokenBlocks
    from actcache.store import Store

PATTERNS = ("blocks.*.mlp.hook_in", "blocks.*.hook_mlp_out")


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoConfig:
    """What the demo does; the defaults take about four minutes on two cores."""

    out: Path = Path("runs/demo")
    """Folder that everything is written to."""
    model: str = "stories-4l"
    """Base model: the embedded one, or a Hugging Face name or folder."""
    text: str = "stories-corpus"
    """Text: the embedded corpus, a file, a folder, or a `datasets` name."""
    length: int = 256
    """Tokens of a sequence."""
    n_sequences: int = 3072
    """Sequences to extract; fewer if the text ends before."""
    n_held_out: int = 96
    """Sequences to evaluate on, from documents that are never used for training; fewer if the text ends before."""
    held_out_every: int = 16
    """Every n-th document is held out."""
    codec: str = "lossless"
    """Compression preset of the store."""
    expansion: int = 8
    """Latents of each sparse MLP, as a multiple of its input's width."""
    n_steps: int = 1200
    """Training steps for each layer."""
    batch_rows: int = 2048
    """Rows of a training batch."""
    l1: tuple[float, ...] = field(default=(64.0,))
    """Sparsity penalty of each layer; the last one holds for all further layers."""
    lr: float = 6e-3
    """Peak learning rate."""
    seed: int = 0
    """Seed of the order of sequences, rows, batches, and of the initial weights."""

    def __post_init__(self) -> None:
        names = ("length", "n_sequences", "n_held_out", "held_out_every", "expansion", "n_steps", "batch_rows")
        check_positive("demo", **{name: getattr(self, name) for name in names})
        if self.held_out_every < 2:
            raise ConfigError("demo: held_out_every must be at least 2, or no document is left to train on")
        if not self.l1:
            raise ConfigError("demo: l1 must have at least one number")

    def small(self) -> DemoConfig:
        """The same with a few thousand rows and a few steps: takes seconds, for tests and for trying things out."""
        return replace(self, length=128, n_sequences=64, n_held_out=24, expansion=2, n_steps=80, batch_rows=512)

    def train_config(self, layer: int) -> TrainConfig:
        """The recipe of one layer, counted from 0."""
        from actcache.sparse.training import TrainConfig

        return TrainConfig(
            l1=self.l1[min(layer, len(self.l1) - 1)],
            lr=self.lr,
            n_steps=self.n_steps,
            warmup_steps=min(100, self.n_steps // 4),
            record_every=max(1, self.n_steps // 48),
            seed=self.seed,
        )


def run_demo(
    config: DemoConfig,
    *,
    on_stage: OnStage | None = None,
    say: Say | None = None,
    command: str = "actcache demo",
) -> Metrics:
    """Run all stages and return the content of `metrics.json`.

    Args:
        config: what to do.
        on_stage: called with (title, unit) at the beginning of each long step; returns the step's progress callback.
        say: called with a sentence now and then, for instance when something is reused.
        command: the command as the report shows it.
    """
    return _Demo(config, on_stage or (lambda _title, _unit: ignore), say or ignore).run(command)


def pairs_of(sites: Sequence[str]) -> list[Pair]:
    """Input and output site of each layer's MLP, in the order of the layers.

    Raises:
        SiteError: a layer has one but not the other.
    """
    inputs, outputs = ({name.split(".")[1]: name for name in sites if name.endswith(p[9:])} for p in PATTERNS)
    if inputs.keys() != outputs.keys():
        odd = ", ".join(sorted(inputs.keys() ^ outputs.keys()))
        raise SiteError(f"the model has only one of {' and '.join(PATTERNS)} in layers {odd}")
    return [Pair(site_in=inputs[layer], site_out=outputs[layer]) for layer in inputs]


class _Demo:
    """One run: its settings, its listeners, and the stages done so far."""

    def __init__(self, config: DemoConfig, on_stage: OnStage, say: Say) -> None:
        self.config = config
        self.on_stage = on_stage
        self.say = say
        self.stages: dict[str, Stage] = {}

    def run(self, command: str) -> Metrics:
        from actcache.lm import load_lm

        began = perf_counter()
        with self._stage("load model"):
            lm = load_lm(self.config.model)
        blocks, held_out = self._text(lm)
        store = self._extract(lm, blocks, "acts.zarr", "extract")
        held_out_store = self._extract(lm, held_out, "held_out.zarr", "extract held-out")
        trained = self._train(store)
        rows = self._evaluate(lm, store, trained, held_out, held_out_store)
        metrics = self._write(command, lm, blocks, held_out, store, rows, perf_counter() - began)
        from actcache.report import write_report  # with matplotlib, which the other stages do without

        write_report(self.config.out)
        return metrics

    @contextmanager
    def _stage(self, name: str) -> Iterator[Stage]:
        """Time a stage; the caller adds to the entry what is known only afterwards."""
        entry: Stage = {"seconds": 0.0, "reused": False}
        self.stages[name] = entry
        began = perf_counter()
        yield entry
        entry["seconds"] = perf_counter() - began

    def _text(self, lm: LanguageModel) -> tuple[TokenBlocks, TokenBlocks]:
        """Sequences to train on and sequences to evaluate on, from different documents."""
        config = self.config
        with self._stage("tokenize") as entry:
            blocks = self._blocks(lm, "Tokenize text", config.n_sequences, lambda i: i % config.held_out_every != 0)
            held_out = self._blocks(
                lm, "Tokenize held-out text", config.n_held_out, lambda i: i % config.held_out_every == 0
            )
        entry["tokens"] = blocks.ids.size + held_out.ids.size
        entry["tokens_per_s"] = entry["tokens"] / entry["seconds"]
        return blocks, held_out

    def _blocks(self, lm: LanguageModel, title: str, count: int, wanted: Callable[[int], bool]) -> TokenBlocks:
        from actcache.source import read_texts, token_blocks

        config = self.config
        texts = (text for number, text in enumerate(read_texts(config.text)) if wanted(number))
        progress = self.on_stage(title, "sequences")
        return token_blocks(texts, lm.tokenizer, length=config.length, count=count, seed=config.seed, progress=progress)

    def _extract(self, lm: LanguageModel, blocks: TokenBlocks, name: str, stage: str) -> Store:
        """Activations of the blocks in `OUT/name`: made, completed, or reused."""
        from actcache.extraction import extract

        path = self.config.out / name
        n_before, progress = _rows_in(path), self.on_stage(stage.capitalize(), "sequences")
        with self._stage(stage) as entry:
            store = extract(
                lm, blocks, PATTERNS, path, codec=self.config.codec, seed=self.config.seed, progress=progress
            )
        n_new, raw_bytes = store.n_rows - n_before, store.info()["raw_bytes"]
        if n_new:
            entry["tokens"] = n_new // store.spec.rows_per_sequence * store.spec.sequence_length
            entry["tokens_per_s"] = entry["tokens"] / entry["seconds"]
            entry["bytes_per_s"] = raw_bytes * n_new / store.n_rows / entry["seconds"]
        else:
            self.say(f"Found {path} with {store.n_rows:,} rows of the same model, text and settings: reusing it.")
            entry |= self._earlier(stage)
            entry["reused"] = True
        return store

    def _earlier(self, stage: str) -> Stage:
        """What an earlier run measured when it made what is now reused."""
        try:
            found = read_metrics(self.config.out)["stages"][stage]
        except (ActcacheError, KeyError):
            return {}
        kept = cast(Stage, {name: value for name, value in found.items() if name.endswith("_per_s")})
        kept["made_in_s"] = found.get("made_in_s", found["seconds"])
        return kept

    def _train(self, store: Store) -> list[Trained]:
        with self._stage("train") as entry:
            trained = [self._train_layer(store, i, pair) for i, pair in enumerate(pairs_of(store.sites))]
        in_loop_s = sum(one.result.seconds for one in trained)
        entry["rows_per_s"] = sum(one.result.n_rows for one in trained) / in_loop_s
        if all(one.reused for one in trained):
            entry |= {"reused": True, "made_in_s": in_loop_s}
        return trained

    def _train_layer(self, store: Store, layer: int, pair: Pair) -> Trained:
        folder = self.config.out / "sparse" / f"layer_{pair.layer}"
        train = partial(
            train_pair,
            store,
            pair,
            folder,
            self.config.train_config(layer),
            n_latents=self.config.expansion * store.spec.site(pair.site_in).width,
            batch_rows=self.config.batch_rows,
            progress=self.on_stage(f"Train layer {pair.layer}", "steps"),
        )
        try:
            trained = train()
        except StateError as error:
            # The checkpoint has other settings. It belongs to the demo, and is cheap to make again.
            self.say(f"Training layer {pair.layer} again: {error}")
            (folder / CHECKPOINT).unlink(missing_ok=True)
            trained = train()
        if trained.reused:
            self.say(f"Found the sparse MLP of layer {pair.layer}, trained with the same settings: reusing it.")
        return trained

    def _evaluate(
        self,
        lm: LanguageModel,
        store: Store,
        trained: Sequence[Trained],
        held_out: TokenBlocks,
        held_out_store: Store,
    ) -> list[LayerRow]:
        rows: list[LayerRow] = []
        with self._stage("evaluate") as entry:
            for one in trained:
                progress = self.on_stage(f"Evaluate layer {one.pair.layer}", "sequences")
                mean = store.stats(one.pair.site_out).mean
                measured = evaluate_pair(lm, one.mlp, one.pair, held_out, held_out_store, mean=mean, progress=progress)
                rows.append({**one.row(), **measured})
        entry["tokens"] = len(rows) * held_out.ids.size
        entry["tokens_per_s"] = entry["tokens"] / entry["seconds"]
        return rows

    def _write(
        self,
        command: str,
        lm: LanguageModel,
        blocks: TokenBlocks,
        held_out: TokenBlocks,
        store: Store,
        rows: list[LayerRow],
        seconds: float,
    ) -> Metrics:
        config = self.config
        recipe = {name: getattr(config, name) for name in ("n_steps", "batch_rows", "l1", "lr", "expansion", "seed")}
        text = {"source": config.text, **blocks.description, "held out": f"{held_out.n_sequences} sequences"}
        metrics: Metrics = {
            **provenance(),
            "command": command,
            "seconds": seconds,
            "config": {**asdict(config), "out": str(config.out)},
            "model": lm.identity,
            "text": text,
            "training": recipe,
            "store": store_facts(store),
            "layers": rows,
            "stages": self.stages,
        }
        return write_metrics(config.out, metrics)


def _rows_in(path: Path) -> int:
    """Rows that a store already has; 0 if it is missing or cannot be opened (the writer says what is wrong)."""
    from actcache.store import open_store

    try:
        return open_store(path).n_rows
    except ActcacheError:
        return 0
