"""A run directory: sparse MLPs are trained into it and evaluated in it, and `metrics.json` records the results.

In: a sealed store; for evaluation also the base model, and tokens that were not trained on. Out: `RUN/sparse/NAME/`
(weights, checkpoint) for each pair of sites, and a row for it in `RUN/metrics.json`, which the report page shows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from actcache.errors import RunNotFoundError, StateError
from actcache.files import path_of
from actcache.provenance import machine, versions
from actcache.sparse.held_out import training_store, warn_of_overlap
from actcache.sparse.metrics import DensityHistogram, LayerRow, Metrics, Stage, read_metrics, write_metrics
from actcache.spec import Progress, Site

if TYPE_CHECKING:
    from actcache.lm import LanguageModel
    from actcache.sparse.model import SparseMLP
    from actcache.sparse.training import TrainConfig, TrainResult
    from actcache.spec import TokenBlocks
    from actcache.store import Store

OnStage = Callable[[str, str], Progress]
"""`on_stage(title, unit)`: called when a long step begins; returns the step's progress callback."""

_LOADER_BYTES = 256 << 20
_BINS_PER_DECADE = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """The two sites of a sparse MLP: what it reads and what it predicts (equal for an autoencoder)."""

    site_in: str
    """Site of the input."""
    site_out: str
    """Site of the target."""

    @property
    def layer(self) -> int | str:
        """The block's number if the target's name has one, otherwise the name."""
        found = re.search(r"\.(\d+)\.", self.site_out)
        return int(found[1]) if found else self.site_out

    @property
    def sites(self) -> list[str]:
        """Both names; one name for an autoencoder."""
        return list(dict.fromkeys([self.site_in, self.site_out]))

    @property
    def name(self) -> str:
        """The pair as a file name."""
        return re.sub(r"[^\w.-]", "_", "-to-".join(self.sites))


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """A sparse MLP that a run has trained, or found already trained."""

    pair: Pair
    """Its sites."""
    mlp: SparseMLP
    """The MLP, in raw units."""
    result: TrainResult
    """History, rows and seconds, including those before a resume."""
    reused: bool
    """Whether every step had been done before."""
    folder: Path
    """Where it is saved."""

    def row(self) -> LayerRow:
        """Its row in `metrics.json`, as far as training fills it."""
        return {
            "layer": self.pair.layer,
            "site_in": self.pair.site_in,
            "site_out": self.pair.site_out,
            "d_in": self.mlp.d_in,
            "d_out": self.mlp.d_out,
            "n_latents": self.mlp.n_latents,
            "path": str(self.folder),
            "seconds": self.result.seconds,
            "n_rows": self.result.n_rows,
            "reused": self.reused,
            "history": {name: list(values) for name, values in self.result.history.items()},
        }


def train_pair(
    store: Store,
    pair: Pair,
    folder: Path,
    config: TrainConfig,
    *,
    n_latents: int,
    batch_rows: int,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Trained:
    """Train a sparse MLP on a pair of sites and save it; what the folder already has is continued or reused.

    Raises:
        SiteError: the store has no such site. ConfigError: batch_rows is larger than the store.
        StateError: the folder holds the checkpoint of another store or setting.
    """
    from actcache.load import Loader
    from actcache.sparse.model import SparseMLP
    from actcache.sparse.training import Trainer

    for site in pair.sites:
        store.check_site(site)
    d_in, d_out = store.spec.site(pair.site_in).width, store.spec.site(pair.site_out).width
    mlp = SparseMLP(d_in=d_in, d_out=d_out, n_latents=n_latents).to(device)
    steps_done: list[int] = []

    def on_step(done: int, total: int) -> None:
        steps_done.append(done)
        if progress:
            progress(done, total)

    with Loader(
        store,
        pair.sites,
        batch_rows=batch_rows,
        seed=config.seed,
        epochs=None,
        device=device,
        memory=_LOADER_BYTES,
    ) as loader:
        trainer = Trainer(
            mlp,
            loader,
            config,
            site_in=pair.site_in,
            site_out=pair.site_out,
            checkpoint=folder,
            progress=on_step,
        )
        result = trainer.fit()
    mlp.save(folder)
    return Trained(pair=pair, mlp=mlp, result=result, reused=not steps_done, folder=folder)


def evaluate_pair(
    lm: LanguageModel,
    mlp: SparseMLP,
    pair: Pair,
    blocks: TokenBlocks,
    held_out: Store,
    *,
    mean: NDArray[np.float64],
    batch_rows: int = 2048,
    progress: Progress | None = None,
) -> LayerRow:
    """Reconstruction on the rows of `held_out` (the activations of `blocks`), and spliced loss on `blocks`.

    `mean` is the target's mean, for mean ablation. The first positions, which the store does not keep (`skip_first`),
    keep the model's own values, since the sparse MLP has never seen such positions.
    """
    from actcache.load import Loader
    from actcache.sparse.evaluation import reconstruction, spliced_loss

    rows = min(batch_rows, held_out.n_rows)
    with Loader(held_out, pair.sites, batch_rows=rows, drop_last=False, memory=_LOADER_BYTES) as loader:
        rebuilt = reconstruction(mlp, loader, site_in=pair.site_in, site_out=pair.site_out)
    loss = spliced_loss(
        lm,
        mlp,
        blocks,
        site_in=pair.site_in,
        site_out=pair.site_out,
        mean=mean,
        skip_first=held_out.spec.skip_first,
        progress=progress,
    )
    return {
        "clean": loss.clean,
        "zero_ablated": loss.zero_ablated,
        "mean_ablated": loss.mean_ablated,
        "spliced": loss.spliced,
        "n_tokens": loss.n_tokens,
        "loss_recovered": loss.loss_recovered,
        "fvu": rebuilt.fvu,
        "l0": rebuilt.l0,
        "dead_fraction": rebuilt.dead_fraction,
        "n_rows_evaluated": rebuilt.n_rows,
        "density_histogram": density_histogram(rebuilt.density, rebuilt.n_rows),
    }


def density_histogram(density_F: NDArray[np.float64], n_rows: int) -> DensityHistogram:
    """Latents by the share of rows on which they fire, in quarters of a decade; those that never fired are separate."""
    lowest = -int(np.ceil(np.log10(max(10, n_rows))))
    edges = np.linspace(lowest, 0, -lowest * _BINS_PER_DECADE + 1)
    fired = density_F[density_F > 0]
    counts, _ = np.histogram(np.log10(fired), edges)
    return {
        "log10_edges": edges.tolist(),
        "counts": counts.tolist(),
        "n_never": int(len(density_F) - len(fired)),
    }


def store_facts(store: Store) -> dict[str, Any]:
    """What `metrics.json` says of a store: its `info()`, and bytes per activation over all sites."""
    info = store.info()
    n_values = store.n_rows * sum(site.width for site in store.spec.sites)
    stored = sum(site["bytes"] for site in info["sites"].values())
    return {**info, "bytes_per_activation": stored / max(1, n_values)}


def provenance() -> Metrics:
    """When, with which versions and on which machine: part of every `metrics.json`."""
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "machine": machine(),
    }


def train_run(
    run: Path,
    store: Store,
    pair: Pair,
    config: TrainConfig,
    *,
    n_latents: int,
    batch_rows: int,
    device: str = "cpu",
    progress: Progress | None = None,
    command: str = "actcache train",
) -> Metrics:
    """Train one sparse MLP into a run directory and record it in `metrics.json`, whose content is returned.

    A run directory may hold any number of sparse MLPs, all trained on the same store.

    Raises:
        StateError: the run belongs to another store, or the MLP's folder has a checkpoint of other settings.
        SiteError, ConfigError: as `train_pair`.
    """
    from actcache.store import refuse_inside_store

    run = path_of(run, "run")
    refuse_inside_store(run)  # now, and not after hours of training
    facts = store_facts(store)
    metrics = _metrics_of_store(run, facts)
    folder = run / "sparse" / pair.name
    trained = train_pair(
        store,
        pair,
        folder,
        config,
        n_latents=n_latents,
        batch_rows=batch_rows,
        device=device,
        progress=progress,
    )
    rate = trained.result.n_rows / trained.result.seconds
    stage: Stage = {"seconds": trained.result.seconds, "rows_per_s": rate, "reused": trained.reused}
    metrics |= {
        **provenance(),
        "command": command,
        "store": facts,
        "training": {"batch_rows": batch_rows, **asdict(config)},
        "layers": _with_row(metrics.get("layers", []), trained.row()),
        "stages": {**metrics.get("stages", {}), f"train {pair.layer}": stage},
    }
    return write_metrics(run, metrics)


def evaluate_run(
    run: Path, lm: LanguageModel, blocks: TokenBlocks, *, on_stage: OnStage, command: str = "actcache evaluate"
) -> Metrics:
    """Evaluate every sparse MLP of a run on held-out text and record it in `metrics.json`, whose content is returned.

    The activations of the text are extracted into the run directory, and reused the next time. If the store that the
    MLPs were trained on still exists, mean ablation takes its means (otherwise those of the held-out text), and a
    warning says if much of the text is also in that store: such text is not held out.

    Raises:
        RunNotFoundError: no run there. StateError: it has no sparse MLP, or was made with another base model.
    """
    from actcache.extraction import extract
    from actcache.sparse.model import SparseMLP

    run = path_of(run, "run")
    metrics = read_metrics(run)
    rows, spec = metrics.get("layers", []), metrics.get("store", {}).get("spec", {})
    if not rows:
        raise StateError(f"{run} has no sparse MLP to evaluate; train one with 'actcache train'")
    said = {**spec, **{f"path of layer {row['layer']}": row.get("path") for row in rows}}
    for name in ("dtype", "skip_first", "model", *(f"path of layer {row['layer']}" for row in rows)):
        if said.get(name) is None:
            raise StateError(f"{run / 'metrics.json'} does not say the {name}; train the run again")
    _check_model(run, lm, spec["model"])
    trained_on = training_store(metrics["store"])
    if trained_on is not None:
        warn_of_overlap(trained_on, blocks)
    began, tokens = perf_counter(), blocks.digest()
    path = run / f"held_out-{tokens[:8]}.zarr"
    sites = list(dict.fromkeys(row[side] for row in rows for side in ("site_in", "site_out")))
    _check_meanings(run, lm, [Site.from_dict(site) for site in spec["sites"] if site["name"] in sites], blocks)
    same = {name: spec[name] for name in ("dtype", "skip_first")}
    progress = on_stage("Extract held-out activations", "sequences")
    held_out = extract(lm, blocks, sites, path, **same, progress=progress)
    for row in rows:
        pair = Pair(site_in=row["site_in"], site_out=row["site_out"])
        mlp = SparseMLP.load(run / "sparse" / Path(row["path"]).name)
        progress = on_stage(f"Evaluate {pair.name}", "sequences")
        mean = (trained_on or held_out).stats(pair.site_out).mean
        row |= evaluate_pair(lm, mlp, pair, blocks, held_out, mean=mean, progress=progress)
    seconds = perf_counter() - began
    stage: Stage = {"seconds": seconds, "tokens_per_s": len(rows) * blocks.ids.size / seconds, "reused": False}
    stages = {**metrics.get("stages", {}), "evaluate": stage}
    held = {"held-out sequences": blocks.n_sequences, "held-out tokens": tokens}
    text = {**spec.get("text", {}), **held}
    return write_metrics(run, {**metrics, **provenance(), "layers": rows, "stages": stages, "text": text})


def _metrics_of_store(run: Path, facts: Mapping[str, Any]) -> Metrics:
    """What the run has recorded so far, which must be about this store."""
    try:
        metrics = read_metrics(run)
    except RunNotFoundError:
        return {}
    known = metrics.get("store", {})
    fingerprint = str(known.get("fingerprint"))
    if known and fingerprint != facts["fingerprint"]:
        raise StateError(
            f"{run} is the run of another store: {known['path']} with fingerprint {fingerprint[:12]}, "
            f"not {facts['path']} with {facts['fingerprint'][:12]}; give another folder"
        )
    return metrics


def _with_row(known: Sequence[LayerRow], new: LayerRow) -> list[LayerRow]:
    """Rows in the order of the layers; the new one replaces a known one with the same sites."""
    rows = {(row["site_in"], row["site_out"]): row for row in [*known, new]}
    return sorted(rows.values(), key=lambda row: (isinstance(row["layer"], str), row["layer"]))


def _check_model(run: Path, lm: LanguageModel, known: Mapping[str, Any]) -> None:
    if known.get("weights") != lm.identity["weights"]:
        raise StateError(
            f"{run} was made with the base model {known.get('name')!r} (weights {str(known.get('weights'))[:12]}), "
            f"not {lm.name!r} (weights {lm.identity['weights'][:12]}); name it with --model"
        )


def _check_meanings(run: Path, lm: LanguageModel, sites: Sequence[Site], blocks: TokenBlocks) -> None:
    """Raise `StateError` if a site's name no longer means what it meant when the MLPs were trained."""
    for site in sites:
        (found,) = lm.resolve([site.name], length=blocks.sequence_length)
        if site.meaning not in (None, found.site.meaning):
            raise StateError(
                f"{run} was trained on {site.name} when that was {site.meaning}, and in {lm.name} it is "
                f"{found.site.meaning}; evaluate it with the version of transformer-lens that the store was made with"
            )
