"""The verbs of the command line: each builds a config, calls the library, prints.

In: options, documented where they are defined. Out: a result on stdout (`--json`: one object), an exit code. Heavy
libraries are imported inside the verbs, so that `--help` answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console

from actcache.addresses import shown
from actcache.cli.options import Flag, Flat, ModelOptions, TextOptions
from actcache.cli.screen import Screen, paths_lines, results_table, stages_table
from actcache.demo import DemoConfig, run_demo


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
        Print one JSON object on stdout; events, one JSON object a line, go to stderr.
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
        Print one JSON object on stdout; events, one JSON object a line, go to stderr.
    """
    from actcache.sparse.metrics import read_metrics
    from actcache.sparse.runs import evaluate_run

    text = text or TextOptions()
    with Screen(json=json) as screen:
        read_metrics(run)
        lm = (model or ModelOptions()).load()
        blocks = text.blocks_for(lm, screen)
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
    """The command as it was typed, without the path of the program, and of URLs what may be seen."""
    import shlex

    return shlex.join(["actcache", *map(shown, sys.argv[1:])])
