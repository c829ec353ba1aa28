"""SIGKILL at random moments: whatever a writer was doing, the same call goes on, and the store becomes the same bytes.

    python benchmarks/kill.py --seeds 200

A real process is killed again and again, at moments drawn from a seed, until one attempt finishes by itself. After
every kill the store is opened and read: what it shows as committed has to be sound and right. In the end every file
has to be the one of a store that was never interrupted. Prints what the killed processes left behind, and leaves
nothing on the disk; exit code 1 when something was wrong. The tests run the same with fewer seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from actcache.errors import SiteError, StoreNotFoundError
from actcache.spec import Site, StoreSpec, TokenBlocks
from actcache.store import Store, StoreWriter, delete_sites, export, open_store, verify

KINDS = ("write", "parts", "extend", "add site", "delete site", "export")
"""What is killed. All but `write`, `parts` (as one of several writers) and `export` change a store that is finished."""
MOST_KILLS = 60
"""After so many an attempt is left to finish."""
WIDTHS = {"blocks.0.hook_mlp_out": 12, "blocks.1.hook_resid_post": 10}
ADDED = Site(name="blocks.1.hook_mlp_out", shape=(7,), codec="int8")


def blocks() -> TokenBlocks:
    """26 sequences of 9 tokens."""
    rng = np.random.default_rng(0)
    ids, document = (rng.integers(0, 2048, (26, 9)).astype(np.uint32) for _ in range(2))
    return TokenBlocks(ids=ids, document=document, description={})


def spec_of(text: TokenBlocks, *more: Site) -> StoreSpec:
    """Shards of 4 sequences, the last one partial; one site lossless and one int8, and those that are named."""
    codecs = dict(zip(WIDTHS, ("lossless", "int8"), strict=True))
    return StoreSpec(
        sites=(*(Site(name=name, shape=(width,), codec=codecs[name]) for name, width in WIDTHS.items()), *more),
        n_sequences=text.n_sequences,
        sequence_length=text.sequence_length,
        sequences_per_shard=4,
        rows_per_chunk=8,
        text={"tokens": text.digest()},
    )


def values_of(site: Site, sequences: range, rows_per_sequence: int) -> NDArray[np.uint16]:
    """`(n, D)` bits of bfloat16 numbers, the same for the same site and sequences."""
    seeds = ([len(site.name), site.width, sequence] for sequence in sequences)
    parts = [np.random.default_rng(seed).standard_normal((rows_per_sequence, site.width), np.float32) for seed in seeds]
    return (np.concatenate(parts).view(np.uint32) >> 16).astype(np.uint16)


def write(path: Path, spec: StoreSpec, text: TokenBlocks) -> Store:
    """Make a store, or continue or grow the one that is there, through the real writer."""
    with StoreWriter(path, spec, text, grow=True) as writer:
        for shard in writer.pending():
            fill(writer, shard, text)
        return writer.finish()


def write_parts(path: Path, spec: StoreSpec, text: TokenBlocks) -> Store:
    """Make a store, or continue it, with a writer that lets others write too."""
    with StoreWriter(path, spec, text, shared=True) as writer:
        for shard in writer.pending():
            if writer.claim(shard):
                fill(writer, shard, text)
        return writer.finish()


def fill(writer: StoreWriter, shard: int, text: TokenBlocks) -> None:
    """Give a writer one shard."""
    buffers, sequences = writer.acquire(shard), writer.spec.shard_sequences(shard)
    for site in writer.sites:
        values = values_of(site, sequences, writer.spec.rows_per_sequence)
        buffers.rows[site.name][: len(values)] = values
    writer.submit(buffers, text.ids[sequences.start : sequences.stop])


def attempt(kind: str, path: Path, source: Path) -> None:
    """The call that is killed, and given again; `source` is a finished store that an export is made of."""
    text = blocks()
    if kind in ("write", "extend"):
        write(path, spec_of(text), text)
    elif kind == "parts":
        write_parts(path, spec_of(text), text)
    elif kind == "add site":
        write(path, spec_of(text, ADDED), text)
    elif kind == "delete site":
        with suppress(SiteError):  # it was killed when it had done everything
            delete_sites(path, [ADDED.name])
    else:
        export(open_store(source), path, codec={"*mlp*": "raw"}, sequences_per_shard=3, sequences=range(2, 25))


def serve(work: Callable[[str, Path, Path], None]) -> None:
    """Fork a process for every job on stdin, kill it after the seconds that the job says, and print how it ended.

    A fork of a process that has written a store begins its work at once, with all that is imported and compiled when
    it is first used. The only threads by then are event loops, which actcache and zarr start again in a fork.
    """
    with tempfile.TemporaryDirectory() as folder:
        work("write", Path(folder, "s.zarr"), Path())
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if not pid:
            try:
                work(job["kind"], Path(job["path"]), Path(job["source"]))
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        if job["wait"] is not None:
            time.sleep(job["wait"])
            os.kill(pid, signal.SIGKILL)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


@dataclass(slots=True)
class Outcome:
    """What became of the kills of some seeds."""

    kills: int = 0
    """Processes that were killed before they were done."""
    left: Counter[str] = field(default_factory=Counter)
    """What they left behind, and how often."""
    wrong: list[str] = field(default_factory=list)
    """What should not be."""


class Killer:
    """Kills one kind of work. Use as a context manager, which ends the process that the killed ones are forks of.

    Args:
        kind: one of `KINDS`, or any word that `work` knows.
        folder: an empty one, for the stores and those that they are compared with.
        work: what is killed, as `module.function`: it is given a kind, the path of the store that it makes or changes,
            and that of a finished store.
    """

    def __init__(self, kind: str, folder: Path, *, work: str = "kill.attempt") -> None:
        self.kind = kind
        module, function = work.split(".")
        self._server = subprocess.Popen(
            [sys.executable, "-c", f"import kill, {module}; kill.serve({module}.{function})"],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.source, self.before, self.path = folder / "source.zarr", folder / "before.zarr", folder / "s.zarr"
        if kind in KINDS:
            self._make_sources()
        self.after = folder / "after.zarr"
        self.duration = min(self._uninterrupted() for _ in range(4))  # the first one waits for the imports

    def __enter__(self) -> Killer:
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.communicate("")

    def _make_sources(self) -> None:
        text = blocks()
        write(self.source, spec_of(text), text)
        if self.kind == "extend":
            part = text.take(range(14))
            write(self.before, spec_of(part), part)
        elif self.kind == "add site":
            write(self.before, spec_of(text), text)
        elif self.kind == "delete site":
            write(self.before, spec_of(text, ADDED), text)

    @cached_property
    def references(self) -> list[Store]:
        """The store as it should be in the end, and as it was before."""
        return [open_store(path) for path in (self.after, self.before) if path.exists()]

    def run(self, seed: int, outcome: Outcome) -> None:
        """Kill until one attempt is through, look at what each leaves behind, and compare the end."""
        rng = np.random.default_rng(seed)
        shutil.rmtree(self.path, ignore_errors=True)
        self._begin_with_before(self.path)
        for kill in range(MOST_KILLS + 1):
            wait = None if kill == MOST_KILLS else float(rng.uniform(0, self.duration))
            where = f"{self.kind}, seed {seed}, after {kill + 1} attempts"
            if self._run(self.path, wait):
                outcome.wrong += [f"{where}: {wrong}" for wrong in self._compare()]
                return
            outcome.kills += 1
            state, wrong_parts = self._look()
            outcome.left[state] += 1
            outcome.wrong += [f"{where}, {state}: {wrong}" for wrong in wrong_parts]

    def _uninterrupted(self) -> float:
        """Make the store as it should be in the end; how long that took."""
        shutil.rmtree(self.after, ignore_errors=True)
        self._begin_with_before(self.after)
        began = time.perf_counter()
        self._run(self.after, None)
        return time.perf_counter() - began

    def _begin_with_before(self, path: Path) -> None:
        if self.before.exists():
            shutil.copytree(self.before, path)

    def _run(self, path: Path, wait: float | None) -> bool:
        """Let a process work, for so many seconds; whether it came to its end."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        job = {"kind": self.kind, "path": str(path), "source": str(self.source), "wait": wait}
        print(json.dumps(job), file=self._server.stdin, flush=True)
        ended = self._server.stdout.readline().strip()
        if ended not in ("0", str(-signal.SIGKILL)):
            raise RuntimeError(f"{self.kind} ended with {ended or 'an error'}, which is printed above")
        return ended == "0"

    def _look(self) -> tuple[str, list[str]]:
        """What a killed process left behind, in words, and what is wrong with it."""
        if not (self.path / "zarr.json").exists():
            return "nothing yet", []
        try:
            store = open_store(self.path)
        except StoreNotFoundError:
            return "creating", []
        wrong = [f"{fault.column}, shard {fault.shard}: {fault.reason}" for fault in verify(self.path)]
        reference = next((known for known in self.references if known.spec == store.spec), None)
        if reference is None:
            return "another spec", [*wrong, "the spec is neither that before nor that after"]
        ids = store.row_ids()
        for site in store.sites:
            if not np.array_equal(store.read_stored(site, ids), reference.read_stored(site, ids)):
                wrong.append(f"rows of {site} are others")
        return self._state(store, reference), wrong

    def _state(self, store: Store, reference: Store) -> str:
        if not store.sealed:
            whole = len(store.committed) == store.spec.n_shards
            return "open, all shards" if whole else f"open, {'some' if store.committed else 'no'} shards"
        if store.fingerprint != reference.fingerprint:
            return "sealed as another store"
        if reference is self.references[0]:
            return "sealed"
        return (
            "sealed as before" if contents(self.path) == contents(self.before) else "sealed as before, and more beneath"
        )

    def _compare(self) -> list[str]:
        """What differs from the store that was never interrupted."""
        found, wanted = contents(self.path), contents(self.after)
        return [key for key in sorted({*found, *wanted}) if found.get(key) != wanted.get(key)]


def contents(path: Path) -> dict[str, bytes]:
    """All files of a store."""
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def main() -> None:
    """Kill, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=200, help="for each kind of work")
    seeds = parser.parse_args().seeds
    wrong: list[str] = []
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            outcome, began = Outcome(), time.perf_counter()
            with Killer(kind, Path(folder)) as killer:
                for seed in range(seeds):
                    killer.run(seed, outcome)
        seconds = time.perf_counter() - began
        print(f"{kind}: {seeds} seeds, {outcome.kills} kills in {seconds:.0f} s; {len(outcome.wrong)} wrong")
        for state, count in outcome.left.most_common():
            print(f"  {count:5d} left: {state}")
        wrong += outcome.wrong
    print("\n".join(wrong) or "every store became the one that was never interrupted")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
