"""The verbs that learn from a store: `demo`, `evaluate`, `serve` (`train` is in `train.py`).

In: options, documented where they are defined. Out: a result on stdout (`--json`: one object), an exit code.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter
from rich.console import Console

from actcache.addresses import shown
from actcache.cli.options import (
    BatchRows,
    Flag,
    Flat,
    FlatRun,
    FlatText,
    Json,
    ModelName,
    RunOptions,
    Sites,
    TextOptions,
)
from actcache.cli.screen import Screen, paths_lines, results_table, stages_table
from actcache.demo import DemoConfig, run_demo

_WAY_ON = "trainers go on where they stopped with ServedBatches(path, state=...)"


@dataclass(frozen=True, kw_only=True)
class _DemoOptions(DemoConfig):
    """The demo's options; sequences are counted by the option that other verbs have for it."""

    n_sequences: Annotated[int, Parameter(name=["--count", "--n-sequences"])] = DemoConfig().n_sequences
    """Most sequences to take; fewer when the text ends before."""


def demo(
    *,
    config: Annotated[_DemoOptions | None, Flat] = None,
    small: Flag = False,
    json: Json = False,
) -> int:
    """Do everything once: text, activations, store, sparse MLPs, evaluation, report page.

    Parameters
    ----------
    small
        A few thousand rows and a few steps: done in seconds, to see that everything works.
    """
    settings = config or DemoConfig()
    settings = settings.small() if small else settings
    with Screen(json=json) as screen:
        metrics = run_demo(settings, on_stage=screen.stage, say=screen.say, command=typed_command())
        screen.result(metrics, lambda out: _show_run(out, settings.out, metrics))
    return 0


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


def typed_command() -> str:
    """The command as it was typed, without the path of the program and the secrets in URLs."""
    return shlex.join(["actcache", *map(shown, sys.argv[1:])])


def evaluate(
    run: Path,
    /,
    *,
    model: ModelName = "stories-4l",
    settings: FlatRun = None,
    text: FlatText = None,
    json: Json = False,
) -> int:
    """Measure the sparse MLPs of a run on text that they were not trained on, and note it in its metrics.json.

    Parameters
    ----------
    run
        The run directory that "actcache train" or "actcache demo" wrote.
    """
    from actcache.sparse.metrics import read_metrics
    from actcache.sparse.runs import evaluate_run

    text = text or TextOptions()
    with Screen(json=json) as screen:
        read_metrics(run)  # a missing run is reported before the text is read
        lm = (settings or RunOptions()).open(model)
        metrics = evaluate_run(run, lm, text.blocks_for(lm, screen), on_stage=screen.stage)
        screen.result(metrics, lambda out: out.print(results_table(metrics["layers"])))
    return 0


def serve(
    store: str,
    /,
    *,
    sites: Sites,
    socket: Path,
    consumers: int,
    batch_rows: BatchRows,
    seed: int = 0,
    epochs: int = 1,
    normalize: Literal["rms", "center", "center-rms"] | None = None,
    memory: str = "1GiB",
    threads: int | None = None,
    batches_ahead: int = 4,
    json: Json = False,
) -> int:
    """Read and decode a store once for several trainers, which take the batches with `ServedBatches(socket)`.

    Ends when every trainer has taken the last batch or has left. A trainer that continues from a checkpoint brings its
    state.

    Parameters
    ----------
    store
        A finished store.
    socket
        Path of the socket where trainers connect; only this user may use it.
    consumers
        How many trainers to wait for, so that all get the same batches from the first one on.
    seed
        Seed of the order of rows.
    epochs
        How many to serve; 0 for no end.
    normalize
        As for `Loader`; by default values are served as they are.
    memory
        Memory for the windows of decoded chunks; larger ones shuffle better.
    threads
        Threads that decode; by default one for each core.
    batches_ahead
        Batches that are kept for the slower trainers.
    """
    from actcache.load import Loader
    from actcache.share import exact_dtype, serve_batches
    from actcache.store import open_store

    with Screen(json=json) as screen:
        opened = open_store(store)
        loader = Loader(
            opened,
            sites,
            batch_rows=batch_rows,
            seed=seed,
            epochs=epochs or None,
            dtype=exact_dtype(opened, sites, normalize),
            memory=memory,
            threads=threads,
            normalize=normalize,
        )
        count = screen.stage("Serve", "rows")
        try:
            serve_batches(
                loader,
                socket,
                consumers,
                batches_ahead=batches_ahead,
                progress=lambda done, total: count(done * batch_rows, total * batch_rows),
                say=screen.say,
            )
        except KeyboardInterrupt as interrupt:
            interrupt.add_note(_WAY_ON)
            raise
        stats = loader.stats()
        said = f"to each trainer: {stats}"
        result: dict[str, Any] = {"store": opened.path, **asdict(stats), "rows_per_s": stats.rows_per_s}
        screen.result(result, lambda out: out.print(said, markup=False, highlight=False))
    return 0
