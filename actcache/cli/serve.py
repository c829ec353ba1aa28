"""The verb `serve`: one process reads and decodes for several trainers.

In: options, documented where they are defined. Out: what the loader did on stdout (`--json`: one object), an exit code.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from actcache.cli.options import Flag, Strings
from actcache.cli.screen import Screen

_WAY_ON = "trainers go on where they stopped with ServedBatches(path, state=...)"


def serve(
    store: str,
    /,
    *,
    sites: Strings,
    batch_rows: int,
    consumers: int,
    socket: Path,
    seed: int = 0,
    epochs: int = 1,
    normalize: Literal["rms", "center", "center-rms"] | None = None,
    memory: str = "1GiB",
    threads: int | None = None,
    batches_ahead: int = 4,
    json: Flag = False,
) -> int:
    """Read and decode a store once for several trainers, which take the batches with `ServedBatches(socket)`.

    Ends when all have taken the last batch, or have left. Trainers that go on from a checkpoint bring their state.

    Parameters
    ----------
    store
        A finished store.
    sites
        Hook names or patterns; each trainer takes those of them that it wants.
    batch_rows
        Rows of a batch.
    consumers
        How many trainers to wait for, so that all get the same batches from the first one.
    socket
        Where trainers connect: the path of a socket that only this user may use.
    seed
        Decides the order.
    epochs
        How many to serve; 0 for ever.
    normalize
        As for `Loader`; by default the values are served as they are.
    memory
        For the windows of decoded chunks; larger ones shuffle better.
    threads
        That decode; by default one per core.
    batches_ahead
        Batches that are held for the slower trainers.
    json
        Print one JSON object on stdout; events, one JSON object a line, go to stderr.
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
        result: dict[str, Any] = {"store": opened.path, **asdict(stats), "rows_per_s": stats.rows_per_s}
        screen.result(result, lambda out: _show(out, str(stats)))
    return 0


def _show(out: Console, stats: str) -> None:
    out.print(f"to each trainer: {stats}", markup=False, highlight=False)
