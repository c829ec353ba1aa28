"""`metrics.json`: what a run directory says about itself.

In: a `Metrics` record, filled by the demo, by training and by evaluation. Out: a file that is either the old one or the
new one, never half of either; and the record again, for the report page and the verbs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict, cast

from actcache.addresses import all_hidden
from actcache.errors import RunNotFoundError, StateError
from actcache.files import finite, own_partial, path_of, read_json, shown, write_whole
from actcache.sparse.schema import find_fault

FORMAT = 1
"""Version of `metrics.json`; a reader refuses newer ones."""
_WAY_OUT = "delete it and run the command that made it again"


class DensityHistogram(TypedDict):
    """Latents by the share of rows on which they fire."""

    log10_edges: list[float]
    """Borders of the bins, as powers of ten."""
    counts: list[int]
    """Latents in each bin."""
    n_never: int
    """Latents that never fired."""


class LayerRow(TypedDict, total=False):
    """One sparse MLP: training fills the first part, evaluation on held-out text the second."""

    layer: int | str
    site_in: str
    site_out: str
    d_in: int
    d_out: int
    n_latents: int
    path: str
    seconds: float
    n_rows: int
    reused: bool
    history: dict[str, list[float]]

    clean: float
    zero_ablated: float
    mean_ablated: float | None
    spliced: float
    n_tokens: int
    loss_recovered: float
    fvu: float
    l0: float
    dead_fraction: float
    n_rows_evaluated: int
    density_histogram: DensityHistogram


class Stage(TypedDict, total=False):
    """A step of a run: its time, and the speeds that it measured."""

    seconds: float
    reused: bool
    """Whether its result was found and not made again."""
    made_in_s: float
    """How long it took to make what was reused."""
    tokens: int
    tokens_per_s: float
    rows_per_s: float
    bytes_per_s: float


class Metrics(TypedDict, total=False):
    """The content of `metrics.json`. A part that a run has not produced is missing."""

    format: int
    created: str
    """When, in ISO 8601 and UTC."""
    versions: dict[str, str]
    machine: dict[str, Any]
    command: str
    """What was typed."""
    seconds: float
    """From the first stage to the last."""
    config: dict[str, Any]
    """Settings of the demo."""
    model: Mapping[str, Any]
    """Identity of the base model."""
    text: Mapping[str, Any]
    training: dict[str, Any]
    """Settings of the training."""
    store: dict[str, Any]
    """`Store.info()`, and `bytes_per_activation`."""
    layers: list[LayerRow]
    stages: dict[str, Stage]


def read_metrics(run: Path | str) -> Metrics:
    """The content of `RUN/metrics.json`.

    Raises:
        RunNotFoundError: there is no such file.
        StateError: it is not valid JSON, not what a run writes, or written by a newer version.
    """
    file = path_of(run, "run") / "metrics.json"
    try:
        metrics = finite(read_json(file))  # Python reads NaN, which is not JSON
    except (FileNotFoundError, NotADirectoryError):
        raise RunNotFoundError(
            f'no run at {run}: expected the file {file}; make one with "actcache demo" or "actcache train"'
        ) from None
    except RecursionError:
        raise StateError(f"{file} is nested too deep; {_WAY_OUT}") from None
    except OSError as error:
        raise StateError(f"{file} cannot be read ({error.strerror}); {_WAY_OUT}") from error
    except ValueError as error:
        raise StateError(f"{file} {error}; {_WAY_OUT}") from error
    if not isinstance(metrics, dict):
        raise StateError(f"{file} should be a JSON object, and is {shown(metrics)}; {_WAY_OUT}")
    found = metrics.get("format", FORMAT)
    if type(found) is not int or found < 1:
        raise StateError(f"{file} has {shown(found)} for its format, which should be a number from 1 on; {_WAY_OUT}")
    if found > FORMAT:
        raise StateError(
            f"{file} was written by a newer actcache (format {shown(found)}, and {FORMAT} is the newest known here); "
            "upgrade actcache"
        )
    fault = find_fault(metrics)
    if fault is not None:
        raise StateError(f"{file} is damaged: {fault}; {_WAY_OUT}")
    return cast(Metrics, {name: value for name, value in metrics.items() if value is not None})


def write_metrics(run: Path | str, metrics: Metrics) -> Metrics:
    """Write `RUN/metrics.json` in one atomic step, and return its content."""
    from actcache.store import refuse_inside_store

    plain: Metrics = all_hidden(finite({"format": FORMAT, **metrics}))

    file = path_of(run, "run") / "metrics.json"
    refuse_inside_store(file.parent)
    write_whole(file, json.dumps(plain, indent=1, allow_nan=False) + "\n", beside=own_partial(file))
    return plain
