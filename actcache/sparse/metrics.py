"""What a run says about itself: `metrics.json` in the run directory, and the facts about versions and machine in it.

In: plain JSON-able dictionaries. Out: a file that is either the old one or the new one, never half of either.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from actcache.addresses import all_hidden
from actcache.errors import RunNotFoundError, StateError
from actcache.files import finite, own_partial, path_of, read_json, shown, write_whole
from actcache.sparse.schema import find_fault

_WAY_OUT = "delete it and run the command that made it again"


FORMAT = 1
"""Version of `metrics.json`; a reader refuses what is newer."""


def read_metrics(run: Path | str) -> dict[str, Any]:
    """The content of `RUN/metrics.json`.

    Raises:
        RunNotFoundError: there is no such file.
        StateError: it is not valid JSON, not what a run writes, or written by a newer version.
    """
    file = path_of(run, "run") / "metrics.json"
    try:
        metrics = read_json(file)
        metrics = finite(metrics)  # Python writes and reads NaN, which is no JSON
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
    return {name: value for name, value in metrics.items() if value is not None}


def write_metrics(run: Path | str, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Write `RUN/metrics.json` in one atomic step, and return what it holds now."""
    plain: dict[str, Any] = all_hidden(finite({"format": FORMAT, **metrics}))
    from actcache.store import refuse_inside_store

    file = path_of(run, "run") / "metrics.json"
    refuse_inside_store(file.parent)
    write_whole(file, json.dumps(plain, indent=1, allow_nan=False) + "\n", beside=own_partial(file))
    return plain
