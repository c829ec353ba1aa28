"""The verbs of the command line: each builds a config, calls the library, prints.

In: options, documented where they are defined. Out: a result on stdout (`--json`: one object), an exit code. Heavy
libraries are imported inside the verbs, so that `--help` answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich.console import Console

from actcache.cli.screen import Screen, paths_lines, results_table, stages_table
from actcache.demo import DemoConfig, run_demo
from actcache.spec import Dtype

Flat = Parameter(name="*")
"""A dataclass's fields are options of their own."""

Flag = Annotated[bool, Parameter(show_default=False)]
Strings = Annotated[list[str], Parameter(consume_multiple=True)]


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which base model, and how it runs."""

    model: str = "stories-4l"
    """Base model: `stories-4l` (embedded), a Hugging Face name or folder."""
    revision: str | None = None
    """Branch, tag or commit of a Hugging Face name."""
    model_dtype: Dtype | None = None
    """Element type in which the model computes; by default that of its weights."""
    device: str = "cpu"
    """Where the model runs: `cpu`, `cuda`, `mps`."""

    def load(self) -> Any:
        """The model."""
        from actcache.lm import load_lm

        return load_lm(self.model, dtype=self.model_dtype, device=self.device, revision=self.revision)


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """Which text, and how it is cut into sequences."""

    text: str = "stories-corpus"
    """Text: `stories-corpus` (embedded), a text, jsonl or parquet file, a folder of those, or a `datasets` name."""
    length: int = 256
    """Tokens of a sequence."""
    count: int | None = None
    """Sequences at most; by default all that the text gives."""
    split: str = "train"
    """Split of a `datasets` name."""
    column: str | None = None
    """Column of the text; by default the first of text, story, content."""
    skip_documents: int = 0
    """Documents left out at the beginning, for instance those that a store was already made from."""
    text_seed: int = 0
    """Seed of the order of sequences."""

    def blocks(self, tokenizer: Any, screen: Screen) -> Any:
        """The tokens."""
        from actcache.source import read_texts, token_blocks

        texts = islice(read_texts(self.text, split=self.split, column=self.column), self.skip_documents, None)
        progress = screen.stage("Tokenize text", "sequences")
        return token_blocks(
            texts, tokenizer, length=self.length, count=self.count, seed=self.text_seed, progress=progress
        )


def demo(
    *,
    config: Annotated[DemoConfig | None, Flat] = None,
    small: Flag = False,
    json: Flag = False,
) -> int:
    """Do everything once: text, activations, store, sparse MLPs, evaluation, report page.

    Parameters
    ----------
    small
        A few thousand rows and a few steps: done in seconds, to see that everything works.
    json
        Print one JSON object on stdout; progress stays on stderr.
    """
    config = config or DemoConfig()
    config = config.small() if small else config
    with Screen(json=json) as screen:
        metrics = run_demo(config, on_stage=screen.stage, say=screen.say, command=typed())
        screen.result(metrics, lambda out: _show_run(out, config.out, metrics))
    return 0


def evaluate(
    run: Path,
    /,
    *,
    model: Annotated[ModelOptions | None, Flat] = None,
    text: Annotated[TextOptions | None, Flat] = None,
    json: Flag = False,
) -> int:
    """Measure the sparse MLPs of a run on text that they were not trained on, and note it in its metrics.json.

    Parameters
    ----------
    run
        The run directory that "actcache train" or "actcache demo" wrote.
    json
        Print one JSON object on stdout; progress stays on stderr.
    """
    from actcache.report import read_metrics
    from actcache.runs import evaluate_run

    text = text or TextOptions()
    with Screen(json=json) as screen:
        read_metrics(run)
        lm = (model or ModelOptions()).load()
        blocks = text.blocks(lm.tokenizer, screen)
        metrics = evaluate_run(run, lm, blocks, on_stage=screen.stage)
        screen.result(metrics, lambda out: out.print(results_table(metrics["layers"])))
    return 0


def report(run: Path, /, *, json: Flag = False) -> int:
    """Write a run's report: one HTML page that needs nothing else.

    Parameters
    ----------
    run
        The run directory, with its metrics.json.
    json
        Print one JSON object on stdout.
    """
    from actcache.report import write_report

    with Screen(json=json) as screen:
        page = write_report(run)
        screen.result({"report": str(page)}, lambda out: out.print(str(page), highlight=False))
    return 0


def sites(
    patterns: list[str] | None = None,
    /,
    *,
    model: Annotated[ModelOptions | None, Flat] = None,
    length: int = 256,
    json: Flag = False,
) -> int:
    """List what can be cached of a model; given names or patterns, say which sites they mean, with their widths.

    Parameters
    ----------
    patterns
        Hook names or patterns, such as 'blocks.0.*'; without any, every name is listed.
    length
        Tokens of a sequence, which decide the width of attention patterns.
    json
        Print one JSON object on stdout.
    """
    with Screen(json=json) as screen:
        lm = (model or ModelOptions()).load()
        resolved = lm.resolve(patterns, length=length) if patterns else []
        named = [{"name": place.site.name, "shape": list(place.site.shape)} for place in resolved]
        found = named if patterns else [{"name": name} for name in lm.site_names]
        lines = "\n".join(_site_line(site) for site in found)
        screen.result({"model": lm.name, "sites": found}, lambda out: out.print(lines, markup=False, highlight=False))
    return 0


def _site_line(site: Mapping[str, Any]) -> str:
    return f"{site['name']}  {' x '.join(map(str, site['shape']))}" if "shape" in site else str(site["name"])


def _show_run(out: Console, run: Path, metrics: Mapping[str, Any]) -> None:
    store = metrics["store"]
    out.print(results_table(metrics["layers"]))
    out.print(stages_table(metrics["stages"]))
    out.print(
        f"{store['bytes_per_activation']:.2f} bytes per activation on disk, "
        f"{100 * store['compression_ratio']:.1f} % of raw {store['spec']['dtype']}\n",
        highlight=False,
    )
    paths = {"store": run / "acts.zarr", "metrics": run / "metrics.json", "report": run / "report.html"}
    out.print(paths_lines(paths), highlight=False)


def typed() -> str:
    """The command as it was typed, without the path of the program."""
    import shlex

    return shlex.join(["actcache", *sys.argv[1:]])
