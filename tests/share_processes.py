"""A server and its consumers, each in a process of its own that does what it is told."""

from __future__ import annotations

import multiprocessing
import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from resume import content

from actcache.load import Loader
from actcache.share import ServedBatches, serve_batches
from actcache.store import open_store

TIMEOUT_S = 600
A_WHILE_S = 0.2
"""In which something that must not happen would have happened. Too short a while lets faults pass, never tests fail."""

_CONTEXT = multiprocessing.get_context("forkserver")
# Imported once, and not by every process anew.
_CONTEXT.set_forkserver_preload(["actcache.share", "actcache.kernels.loops", "actcache.store"])


def loader_of(store: str | Path, **changes: Any) -> Loader:
    settings = {"batch_rows": 20, "memory": 4000, "epochs": 2, "seed": 3, "threads": 1, "drop_last": False}
    return Loader(open_store(store), ["*"], **{**settings, **changes})


def serve(pipe: Connection, store: str, path: str, n: int, loader: dict[str, Any], options: dict[str, Any]) -> None:
    """Serve, and tell of everything that is said."""
    torch.set_num_threads(1)
    try:
        said = {"say": lambda sentence: pipe.send(sentence), "progress": lambda *amounts: pipe.send(amounts)}
        serve_batches(loader_of(store, **loader), path, n, **said, **options)
        pipe.send("served")
    except BaseException as error:
        pipe.send(error)


def consume(pipe: Connection, path: str, options: dict[str, Any]) -> None:
    """Connect, and do what is asked, one thing after another."""
    torch.set_num_threads(1)
    try:
        batches = ServedBatches(path, **options)
        pipe.send(batches.state_dict())
        while True:
            asked = pipe.recv()
            if asked == "next":
                pipe.send(numbers(content(next(batches))))
            elif asked == "all":
                pipe.send([numbers(content(batch)) for batch in batches])
            elif asked == "origin":
                batch = next(batches)
                names = ("rows", "tokens", "sequences", "positions", "documents")
                pipe.send({name: getattr(batch, name).numpy() for name in names})
            elif asked == "state":
                pipe.send(batches.state_dict())
            elif asked == "close":
                batches.close()
                pipe.send(None)
    except EOFError:  # the test is over
        return
    except BaseException as error:
        pipe.send(error)


def numbers(batch: Any) -> Any:
    """Tensors as arrays, which a pipe can carry."""
    rows, acts = batch
    return rows.numpy(), {site: values.numpy() for site, values in acts.items()}


def tensors(batch: Any) -> Any:
    """And back."""
    rows, acts = batch
    return torch.from_numpy(rows), {site: torch.from_numpy(values) for site, values in acts.items()}


class Process:
    """One of them."""

    def __init__(self, work: Any, *arguments: Any) -> None:
        self._pipe, theirs = _CONTEXT.Pipe()
        self._process = _CONTEXT.Process(target=work, args=(theirs, *arguments), daemon=True)
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def tell(self, what: str) -> None:
        self._pipe.send(what)

    def waits(self) -> bool:
        """Whether it says nothing for a while."""
        return not self._pipe.poll(A_WHILE_S)

    def hear(self) -> Any:
        """What it says next; an error is raised."""
        assert self._pipe.poll(TIMEOUT_S), "the process says nothing"
        said = self._pipe.recv()
        if isinstance(said, BaseException):
            raise said
        return said

    def ask(self, what: str) -> Any:
        self.tell(what)
        return self.hear()

    def hear_until(self, wanted: Any) -> list[Any]:
        """All that it says, up to something."""
        said = []
        while not said or said[-1] != wanted:
            said.append(self.hear())
        return said

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self._process.join(TIMEOUT_S)

    def end(self) -> None:
        self._pipe.close()
        self._process.kill()
        self._process.join(TIMEOUT_S)
