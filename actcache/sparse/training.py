"""Training of a sparse MLP on shuffled activations: the loop, its schedule, its history, exact resume.

In: a `SparseMLP`, a loader and a `TrainConfig`. Out: the same MLP trained, in raw units, and a `TrainResult`. The loop
works on scaled activations (one constant per site, from the store's statistics) in a copy of the MLP; the constants are
folded back when weights leave it. Nothing waits for the device between two entries of the history.

Shapes: B rows of a batch, D width of a site, F latents.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor

from actcache.errors import ConfigError, SiteError, TrainingError
from actcache.files import shown
from actcache.memory import keep_freed_memory
from actcache.sparse.checkpoint import HISTORY, Checkpoint, checkpoint_in, restore_tensors, tensors_of
from actcache.sparse.model import Scaling, SparseMLP, fold_scaling, initialise
from actcache.sparse.objective import sparse_loss
from actcache.spec import Progress, check_callable, check_number, check_positive, integer

if TYPE_CHECKING:
    from actcache.load import Loader


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """How to train. The defaults are the demo's recipe: 1,200 steps of 2,048 rows.

    Examples:
        >>> config = ac.TrainConfig(l1=2.0**4, n_steps=100, warmup_steps=10)
        >>> config.learning_rate(0) < config.learning_rate(50) > config.learning_rate(99)
        True
    """

    l1: float = 2.0**6
    """Sparsity penalty, usually written `2**S`. It multiplies the mean over latents of a row's activations, each
    weighted by the norm of its decoder column, in units of the target's length (its root mean squared deviation from
    the mean, over rows). It is weighed against the fraction of variance unexplained. S = 1 is dense, 8 very sparse."""
    lr: float = 6e-3
    """Peak learning rate of Adam."""
    n_steps: int = 1200
    """Batches to train on."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises linearly from 0."""
    decay_fraction: float = 0.2
    """Last part of the steps, in which the learning rate falls linearly to 0."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's averaging constants."""
    clip: float | None = 1.0
    """Largest norm of the gradient; None for no limit."""
    decoder_norm: float = 0.1
    """Length of the decoder's columns at the start, in units of the target's standard deviation."""
    start: Literal["recipe", "given"] = "recipe"
    """Begin with the recipe's initial weights (from `seed` and the store's means), or with those of the given MLP."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the matrix products; weights and moments stay float32. `auto`: bfloat16 if the device has it natively."""
    dead_window_rows: int = 200_000
    """A latent counts as dead if it did not fire for any of this many recent rows."""
    record_every: int = 50
    """Steps between two entries of the history."""
    checkpoint_every: int = 200
    """Steps between two checkpoints."""
    seed: int = 0
    """Seed of the initial weights."""

    def __post_init__(self) -> None:
        names = ("n_steps", "dead_window_rows", "record_every", "checkpoint_every")
        check_positive("train config", **{name: getattr(self, name) for name in names})
        integer("train config", "seed", self.seed)
        limits: dict[str, tuple[float, float]] = {
            "l1": (0, math.inf),
            "lr": (0, math.inf),
            "warmup_steps": (0, self.n_steps),
            "decay_fraction": (0, 1),
            "decoder_norm": (0, math.inf),
            "clip": (0, math.inf),
        }
        for name, (low, high) in limits.items():
            if name != "clip" or self.clip is not None:
                check_number("train config", low, high, **{name: getattr(self, name)})
        betas: Any = self.betas
        if not isinstance(betas, tuple | list) or len(betas) != 2 or not all(map(_is_share, betas)):
            raise ConfigError(f"train config: betas must be two numbers from 0 to below 1, got {shown(betas)}")
        for name, choices in {"start": ("recipe", "given"), "precision": ("auto", "float32", "bfloat16")}.items():
            if getattr(self, name) not in choices:
                raise ConfigError(
                    f"train config: {name} must be one of {', '.join(choices)}, got {shown(getattr(self, name))}"
                )

    def learning_rate(self, step: int) -> float:
        """The rate of a step, counted from 0: linear warm-up, plateau, linear tail."""
        rising = (step + 1) / self.warmup_steps if self.warmup_steps else 1.0
        tail_steps = self.decay_fraction * self.n_steps
        falling = (self.n_steps - step) / tail_steps if tail_steps else 1.0
        return self.lr * min(1.0, rising, falling)


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainResult:
    """The outcome of a training run."""

    history: Mapping[str, list[float]]
    """Columns `step`, `loss` and `fvu` (means since the entry before), `l0` (of that batch), `dead` (fraction)."""
    n_steps: int
    """Steps trained, including those before a resume."""
    n_rows: int
    """Rows trained on."""
    seconds: float
    """Time in the loop, including that before a resume."""
    precision: str
    """Precision of the matrix products."""


class Trainer:
    """Trains one sparse MLP: `Trainer(mlp, loader, config).fit()`.

    `checkpoint` is a folder: the run saves itself there and, started again with the same arguments, ends with the same
    bits as if it had never stopped. The MLP may be on any device; batches are brought to it.

    Examples:
        >>> mlp = ac.SparseMLP(d_in=128, d_out=128, n_latents=256)
        >>> config = ac.TrainConfig(l1=2.0**4, n_steps=20, warmup_steps=5, record_every=10)
        >>> with ac.Loader(store, [site_in, site_out], batch_rows=256, epochs=None) as loader:
        ...     result = ac.Trainer(mlp, loader, config, site_in=site_in, site_out=site_out).fit()
        >>> result.n_rows, result.history["step"]
        (5120, [10, 20])
    """

    def __init__(
        self,
        mlp: SparseMLP,
        loader: Loader,
        config: TrainConfig | None = None,
        *,
        site_in: str | None = None,
        site_out: str | None = None,
        checkpoint: str | Path | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.mlp = mlp
        self.loader = loader
        self.config = TrainConfig() if config is None else config
        if not isinstance(self.config, TrainConfig):
            raise ConfigError(f"trainer: config must be a TrainConfig, got {shown(config)}")
        check_callable("trainer", progress=progress)
        self.site_in, self.site_out = choose_sites(loader, mlp, site_in, site_out)
        self.checkpoint = None if checkpoint is None else checkpoint_in(checkpoint)
        self.step, self.seconds = 0, 0.0
        self.history: dict[str, list[float]] = {name: [] for name in HISTORY}
        self._progress = progress
        self._device = mlp.encoder.weight.device
        self._dtype = resolve_precision(self.config.precision, self._device)
        self.scaling = Scaling(scale_in=_scale_of(loader, self.site_in), scale_out=_scale_of(loader, self.site_out))
        self._scaled = self._initial()
        self._parameters = list(self._scaled.parameters())
        self._optimizer = torch.optim.Adam(self._parameters, betas=self.config.betas, fused=True)
        self._last_fired_F = torch.zeros(mlp.n_latents, dtype=torch.int64, device=self._device)
        self._l0 = torch.zeros((), device=self._device)
        self._loss_and_error = torch.zeros(2, device=self._device)

    def fit(self) -> TrainResult:
        """Train to the last step, and put the trained weights into the MLP.

        Raises:
            StateError: the checkpoint is damaged or belongs to another run.
            TrainingError: the loss is no longer finite.
            ConfigError: the loader ended before the last step.
        """
        if self.step == 0 and self.checkpoint is not None and self.checkpoint.exists():
            self._resume(self.checkpoint)
        keep_freed_memory()
        batches, began, before = iter(self.loader), perf_counter(), self.seconds
        while self.step < self.config.n_steps:
            self._train_on(self._next(batches))
            self.seconds = before + perf_counter() - began
            self._record_and_save()
            if self._progress is not None:
                self._progress(self.step, self.config.n_steps)
        self.fold()
        n_rows = self.step * self.loader.batch_rows
        precision = str(self._dtype).removeprefix("torch.")
        return TrainResult(
            history=self.history, n_steps=self.step, n_rows=n_rows, seconds=self.seconds, precision=precision
        )

    def fold(self) -> None:
        """Put the present weights into the MLP, in raw units."""
        fold_scaling(self._scaled, self.mlp, self.scaling)
        self.mlp.about = {"site_in": self.site_in, "site_out": self.site_out, "step": self.step, **self._identity()}

    def _initial(self) -> SparseMLP:
        scaled = SparseMLP(**self.mlp.sizes).to(self._device)
        if self.config.start == "given":
            fold_scaling(self.mlp, scaled, self.scaling.inverse())
            return scaled
        stats_in, stats_out = self.loader.site_stats(self.site_in), self.loader.site_stats(self.site_out)
        mean_in_D = torch.as_tensor(stats_in.mean * self.scaling.scale_in, dtype=torch.float32)
        mean_out_D = torch.as_tensor(stats_out.mean * self.scaling.scale_out, dtype=torch.float32)
        initialise(scaled, mean_in_D, mean_out_D, decoder_norm=self.config.decoder_norm, seed=self.config.seed)
        return scaled

    def _next(self, batches: Iterator[Any]) -> Any:
        batch = next(batches, None)
        if batch is None:
            raise ConfigError(
                f"training needs {self.config.n_steps} batches, the loader ended after {self.step}; "
                "give it epochs=None, or lower n_steps"
            )
        return batch

    def _train_on(self, batch: Any) -> None:
        x_BD, y_BD = self._scaled_rows(batch)
        loss, error, a_BF = sparse_loss(self._scaled, x_BD, y_BD, self.config.l1, self._dtype)
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch has no annotation there
        # The gradient of a latent's bias is nonzero exactly if the latent fired: no pass over the (B, F) latents.
        gradient_F = cast(Tensor, self._scaled.encoder.bias.grad)
        self._last_fired_F.masked_fill_(torch.ne(gradient_F, 0), self.step + 1)
        if self.config.clip is not None:
            torch.nn.utils.clip_grad_norm_(self._parameters, self.config.clip)
        self._optimizer.param_groups[0]["lr"] = self.config.learning_rate(self.step)
        self._optimizer.step()
        self._loss_and_error += torch.stack([loss.detach(), error.detach()])
        self.step += 1
        if self._records():
            self._l0 = a_BF.count_nonzero() / len(a_BF)

    def _scaled_rows(self, batch: Any) -> tuple[Tensor, Tensor]:
        # In place, since a batch is ours to change. An autoencoder's target is its input and must not be scaled twice.
        x_BD = batch[self.site_in].to(self._device, torch.float32).mul_(self.scaling.scale_in)
        if self.site_in == self.site_out:
            return x_BD, x_BD
        return x_BD, batch[self.site_out].to(self._device, torch.float32).mul_(self.scaling.scale_out)

    def _record_and_save(self) -> None:
        if self._records():
            self._record()
        if self.checkpoint is not None and self._due(self.config.checkpoint_every):
            self._check_finite()
            self._save(self.checkpoint)

    def _records(self) -> bool:
        return self._due(self.config.record_every)

    def _due(self, interval: int) -> bool:
        return self.step % interval == 0 or self.step == self.config.n_steps

    def _record(self) -> None:
        self._check_finite()
        n_steps = self.step - int(self.history["step"][-1]) if self.history["step"] else self.step
        loss, error = (self._loss_and_error / n_steps).tolist()
        window_steps = math.ceil(self.config.dead_window_rows / self.loader.batch_rows)
        entry = {
            "step": self.step,
            "loss": loss,
            "fvu": error / self.mlp.d_out,
            "l0": self._l0.item(),
            "dead": (self._last_fired_F <= self.step - window_steps).float().mean().item(),
        }
        for name, value in entry.items():
            self.history[name].append(value)
        self._loss_and_error.zero_()

    def _check_finite(self) -> None:
        if not bool(self._loss_and_error.isfinite().all()):
            counts = [(site, self.loader.site_stats(site)) for site in (self.site_in, self.site_out)]
            unsound = ", ".join(f"{site}: {stats.n_nan} NaN and {stats.n_inf} Inf" for site, stats in counts)
            raise TrainingError(
                f"the training loss is not finite at step {self.step} (activations of {unsound}); "
                f"if those counts are 0, lower lr (now {self.config.lr:g})"
            )

    def _identity(self) -> dict[str, Any]:
        """Everything that decides the run's bits; only a run of equal identity continues a checkpoint."""
        config = asdict(self.config)
        del config["checkpoint_every"]
        identity = {
            "config": {**config, "precision": str(self._dtype).removeprefix("torch.")},
            "mlp": self.mlp.sizes,
            "sites": [self.site_in, self.site_out],
            "store": self.loader.store.fingerprint,
            "batch_rows": self.loader.batch_rows,
        }
        return json.loads(json.dumps(identity))  # type: ignore[no-any-return]  # loads is untyped

    def _tensors(self) -> dict[str, Tensor]:
        counters = {"last_fired": self._last_fired_F, "loss_and_error": self._loss_and_error}
        return {**tensors_of(self._scaled, self._optimizer), **counters}

    def _save(self, path: Path) -> None:
        Checkpoint(
            step=self.step,
            seconds=self.seconds,
            identity=self._identity(),
            loader=self.loader.state_dict(),
            history=self.history,
            tensors=self._tensors(),
        ).write(path)

    @torch.no_grad()
    def _resume(self, path: Path) -> None:
        """Continue from a checkpoint. If it is refused, nothing of this run has changed."""
        found = Checkpoint.read(path, identity=self._identity(), tensors=self._tensors())
        self.loader.load_state_dict(found.loader)
        self.step, self.seconds, self.history = found.step, found.seconds, found.history
        self._last_fired_F.copy_(found.tensors["last_fired"])
        self._loss_and_error.copy_(found.tensors["loss_and_error"])
        restore_tensors(self._scaled, self._optimizer, found.tensors)


def choose_sites(loader: Loader, mlp: SparseMLP, site_in: str | None, site_out: str | None) -> tuple[str, str]:
    """Input and target site: as asked for, or the loader's first and last; checked against loader and MLP."""
    if not isinstance(mlp, SparseMLP):
        raise ConfigError(f"mlp must be a SparseMLP, got {shown(mlp)}")
    if not hasattr(loader, "site_stats"):  # other people's loaders need not be a `Loader`
        raise ConfigError(f"loader must be a Loader, got {shown(loader)}")
    sites = list(loader.sites)
    chosen = (sites[0] if site_in is None else site_in, sites[-1] if site_out is None else site_out)
    for name, site, width in zip(("site_in", "site_out"), chosen, (mlp.d_in, mlp.d_out), strict=True):
        if site not in sites:
            raise SiteError(f"{name} {shown(site)} is not among the loader's sites: {', '.join(sites)}")
        found = len(loader.site_stats(site).mean)
        if found != width:
            raise ConfigError(
                f"{name} {site} is {found} wide, but the sparse MLP takes {mlp.d_in} and gives {mlp.d_out}"
            )
    return chosen


def _scale_of(loader: Loader, site: str) -> float:
    stats = loader.site_stats(site)
    deviation = math.sqrt(float(stats.variance.mean())) if stats.count else math.nan
    if not (math.isfinite(deviation) and deviation > 0):
        found = f"the standard deviation of its activations is {deviation}" if stats.count else "no row of it is finite"
        counts = f" (NaN: {stats.n_nan:,}, Inf: {stats.n_inf:,})" if stats.n_nan or stats.n_inf else ""
        raise ConfigError(f"site {site} cannot be scaled: {found}{counts}; train on another site")
    return 1 / deviation


def resolve_precision(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of a precision; `auto` is bfloat16 if the device multiplies it natively, about three times as fast."""
    if precision != "auto":
        return torch.bfloat16 if precision == "bfloat16" else torch.float32
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device)[0] >= 8
    else:
        # Older versions of torch cannot tell; they get float32.
        capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
        native = bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return torch.bfloat16 if native else torch.float32
