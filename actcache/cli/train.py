"""The verb `train`, in a file of its own because its options are the trainer's, and the trainer needs torch.

In: options, documented where they are defined. Out: a result on stdout (`--json`: one object), an exit code.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from actcache.cli.learn import typed_command
from actcache.cli.options import BatchRows, Flat, Json
from actcache.cli.screen import Screen, paths_lines, results_table
from actcache.sparse.runs import Pair, train_run
from actcache.sparse.training import TrainConfig
from actcache.store import open_store


def train(
    store: str,
    /,
    *,
    site_in: str,
    site_out: str,
    out: Path,
    expansion: int = 8,
    device: str = "cpu",
    batch_rows: BatchRows = 2048,
    config: Annotated[TrainConfig | None, Flat] = None,
    json: Json = False,
) -> int:
    """Train a sparse MLP that predicts one site of a store from another. Run again to continue where it stopped.

    Parameters
    ----------
    store
        A finished store, a folder or a URL.
    site_in
        Site of the input.
    site_out
        Site of the target; the same as the input for an autoencoder.
    out
        Run directory; it may hold the sparse MLPs of many pairs of sites.
    expansion
        Latents, as a multiple of the input's width.
    device
        Where to train: `cpu`, `cuda`, `mps`.
    """
    with Screen(json=json) as screen:
        opened, pair = open_store(store), Pair(site_in=site_in, site_out=site_out)
        opened.check_site(site_in)
        metrics = train_run(
            out,
            opened,
            pair,
            config or TrainConfig(),
            n_latents=expansion * opened.spec.site(site_in).width,
            batch_rows=batch_rows,
            device=device,
            progress=screen.stage(f"Train {pair.layer}", "steps"),
            command=typed_command(),
        )
        paths = {"weights": out / "sparse" / pair.name, "metrics": out / "metrics.json"}
        row = next(r for r in metrics["layers"] if (r["site_in"], r["site_out"]) == (site_in, site_out))
        last = {"l0": row["history"]["l0"][-1], "fvu": row["history"]["fvu"][-1]}
        screen.result(
            metrics, lambda out: out.print(results_table([{**last, **row}]), paths_lines(paths), highlight=False)
        )
    return 0
