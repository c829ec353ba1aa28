"""Processes that fill a store together, for tests: forks of one that has everything imported and compiled.

So they begin at the same moment, and can be killed at any.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from actcache.store import StoreWriter
from actcache.store.writing import writer as writer_module

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import kill

N_SHARDS = kill.spec_of(kill.blocks()).n_shards
TIMEOUT_S = 600


def work(job: dict[str, Any]) -> dict[str, Any]:
    """What one process does: the shards that it is told, in that order, some of which others may be told too."""
    text, seals = kill.blocks(), []
    really_seal = writer_module.seal

    def seal(*given: Any) -> None:
        if job.get("dies when it seals"):
            os.kill(os.getpid(), signal.SIGKILL)
        seals.append(1)
        really_seal(*given)

    writer_module.seal = seal
    with StoreWriter(job["path"], kill.spec_of(text), text, shared=True) as writer:
        for shard in job["shards"]:
            if writer.claim(shard):
                Path(job["claimed"]).touch()
                time.sleep(job.get("claim_s", 0.0))
                kill.fill(writer, shard, text)
            time.sleep(job.get("pause_s", 0.0))
        writer.wait()
        if "meet" in job:
            Path(job["meet"], str(os.getpid())).touch()
            while len(list(Path(job["meet"]).iterdir())) < job["n"]:
                time.sleep(0.0005)
        return {"sealed": writer.finish().sealed, "made": writer.written.n_shards, "seals": len(seals)}


def serve() -> None:
    """Fork a process for every job on stdin, and print its number; or wait for one, and print how it ended."""
    with tempfile.TemporaryDirectory() as folder:
        kill.write(Path(folder, "s.zarr"), kill.spec_of(kill.blocks()), kill.blocks())
    for line in sys.stdin:
        job = json.loads(line)
        if "wait" in job:
            print(os.waitstatus_to_exitcode(os.waitpid(job["wait"], 0)[1]), flush=True)
            continue
        pid = os.fork()
        if not pid:
            try:
                os.environ.update(job["environment"])
                Path(job["result"]).write_text(json.dumps(work(job)))
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        print(pid, flush=True)


class Process:
    """One of those that fill a store."""

    def __init__(self, processes: Processes, job: dict[str, Any]) -> None:
        self._processes, self.job = processes, job
        self.pid = processes.ask(job)
        self._ended: int | None = None

    def wait(self) -> int:
        """How it ended."""
        if self._ended is None:
            self._ended = self._processes.ask({"wait": self.pid})
        return self._ended

    def result(self) -> dict[str, Any]:
        """What it came to, if it was not killed."""
        assert self.wait() == 0
        return json.loads(Path(self.job["result"]).read_text())

    def kill(self) -> None:
        if self._ended is None:
            os.kill(self.pid, signal.SIGKILL)
            assert self.wait() in (0, -signal.SIGKILL)

    def wait_for_claim(self) -> None:
        until = time.monotonic() + TIMEOUT_S
        while not Path(self.job["claimed"]).exists():
            assert time.monotonic() < until
            time.sleep(0.002)


class Processes:
    """Begins them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._n = folder, 0
        self._server = subprocess.Popen(
            [sys.executable, "-c", "import part_processes; part_processes.serve()"],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, job: dict[str, Any]) -> int:
        print(json.dumps(job), file=self._server.stdin, flush=True)
        return int(self._server.stdout.readline())

    def begin(self, path: Any, shards: Any, **more: Any) -> Process:
        self._n += 1
        environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
        files = {name: str(self.folder / f"{name}-{self._n}") for name in ("result", "claimed")}
        return Process(self, {"path": str(path), "shards": list(shards), "environment": environment, **files, **more})

    def end(self) -> None:
        self._server.kill()
        self._server.communicate()
