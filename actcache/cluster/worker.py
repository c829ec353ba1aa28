"""What runs in the workers: open the model once in a process, make the shards of a task, report how far it is."""

from __future__ import annotations

import json
import signal
import threading
import uuid
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from time import monotonic
from typing import TYPE_CHECKING, Any

from actcache.errors import ActcacheError, ClusterError
from actcache.extraction import fill
from actcache.status import Status

if TYPE_CHECKING:
    from distributed import Worker

    from actcache.lm import LanguageModel

Report = dict[str, Any]
"""Progress of an attempt at a task: plain numbers, made by `report_of`."""

_REPORT_EVERY_S = 0.5
_MODELS: dict[str, LanguageModel] = {}
_ONE_AT_A_TIME = threading.Lock()
"""A model runs for one task at a time, because hooks change it; the forward pass uses all threads anyway."""


class TaskCancelledError(Exception):
    """The driver has cancelled this task."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """Some shards for a worker to make."""

    shards: tuple[int, ...]
    """Numbers of neighbouring shards."""
    path: str = field(repr=False)  # it may hold a password
    """The store's folder or URL, the same for all workers."""
    recipe: Mapping[str, Any]
    """Arguments of `load_lm`."""
    topic: str
    """Where reports go."""
    batch_sequences: int | None
    """Sequences in one forward pass; None for what the store was begun with."""
    threads: int | None
    """Encoding threads; None for the worker's share of its machine."""
    durable: bool
    """Whether what is written is flushed."""
    model_threads: int | None
    """Threads of the forward pass; None for as many as the worker was started with."""
    workers_per_machine: int
    """Most worker processes that share a machine."""
    audit: bool
    """Whether the worker that seals the store audits it first."""


def make_shards(task: Task) -> Report:
    """Make the shards of the task that are missing and that no other process is making.

    Raises:
        ActcacheError: an error of `fill`; errors of other libraries become a `ClusterError`. The message says where.
    """
    from distributed import get_worker

    worker = get_worker()
    reporter = Reporter(worker, task.topic)
    with _ONE_AT_A_TIME, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            _fill(task, worker, reporter)
        except ActcacheError as error:
            *others, message = error.args
            raise type(error)(*others, f"{where(task, worker.address)}: {message}") from error
        except (MemoryError, OSError, RuntimeError, TypeError, ValueError) as error:
            raise ClusterError(f"{where(task, worker.address)}: {type(error).__name__}: {error}") from error
    said = [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]
    return {**reporter.last, "warnings": said}


def where(task: Task, address: str = "") -> str:
    """Shards and worker of a task, for messages."""
    first, last = task.shards[0], task.shards[-1]
    shards = f"shard {first}" if first == last else f"shards {first} to {last}"
    return f"{shards} on worker {address}" if address else shards


def dask_setup(worker: Worker) -> None:
    """Called by dask in a worker that is started on this machine: Ctrl-C is for the driver, which ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _fill(task: Task, worker: Worker, reporter: Reporter) -> None:
    import torch
    from dask.system import CPU_COUNT

    torch.set_num_threads(task.model_threads or max(torch.get_num_threads(), worker.state.nthreads))
    fill(
        _model(task.recipe),
        task.path,
        task.shards,
        batch_sequences=task.batch_sequences,
        threads=task.threads or max(1, CPU_COUNT // task.workers_per_machine),
        audit=task.audit,
        durable=task.durable,
        watch=reporter,
    )


def _model(recipe: Mapping[str, Any]) -> LanguageModel:
    """The model of the recipe, kept from task to task; only one at a time, because models are large."""
    from actcache.lm import load_lm

    key = json.dumps(recipe, sort_keys=True)
    if key not in _MODELS:
        _MODELS.clear()
        _MODELS[key] = load_lm(**recipe)
    return _MODELS[key]


class Reporter:
    """A `watch` that sends what it is told to the driver, now and then; `last` is the newest of it."""

    def __init__(self, worker: Worker, topic: str) -> None:
        self._worker, self._topic, self._key = worker, topic, worker.get_current_task()
        self._attempt, self._next_s = uuid.uuid4().hex, 0.0
        self.last: Report = {"attempt": self._attempt}

    def __call__(self, status: Status) -> None:
        """Take in the status, and send it if the last one was sent a while ago.

        Raises:
            TaskCancelledError: the task was cancelled; its shards are free for other processes.
        """
        self.last = {"attempt": self._attempt, **report_of(status)}
        if monotonic() < self._next_s:
            return
        self._next_s = monotonic() + _REPORT_EVERY_S
        known = self._worker.state.tasks.get(self._key)
        if known is None or known.state == "cancelled":
            raise TaskCancelledError
        self._worker.log_event(self._topic, self.last)


def report_of(status: Status) -> Report:
    """The part of a worker's status that the driver adds up."""
    return {
        "n_sequences": status.n_sequences_here,
        "n_tokens": status.n_tokens,
        "n_bytes": status.n_bytes,
        "queue": status.queue,
        "queue_size": status.queue_size,
        "sites": {name: asdict(site) for name, site in status.sites.items()},
    }
