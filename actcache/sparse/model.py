"""The sparse MLP: what a trainer trains, in raw units of the activations; its initial weights, saving and loading.

In: activations `(B, D_in)`. Out: their sparse code `(B, F)` and the prediction `(B, D_out)`. A transcoder predicts an
MLP's output from its input; a sparse autoencoder is the case in which input and target are the same site.

Shapes: B rows of a batch, D_in and D_out widths of the two sites, F latents.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actcache.errors import ConfigError, ModelNotFoundError, StateError
from actcache.files import path_of, read_json, shown, why_not_tensors, write_whole
from actcache.spec import check_positive, digest_of

VERSION = 1
CONFIG, WEIGHTS = "config.json", "weights.safetensors"
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": torch.relu_}
"""By name, what turns the encoder's output `(B, F)` into latents; in place, if it likes."""


class SparseMLP(nn.Module):
    """`Linear -> ReLU -> Linear`, with both biases and untied weights; takes and gives raw activations.

    Examples:
        >>> mlp = ac.SparseMLP(d_in=128, d_out=128, n_latents=512)
        >>> x = store.read(site_in, slice(0, 4)).float()  # (4, 128)
        >>> mlp.encode(x).shape, mlp(x).shape
        (torch.Size([4, 512]), torch.Size([4, 128]))
        >>> mlp.save("untrained")
        >>> torch.equal(ac.SparseMLP.load("untrained")(x), mlp(x))
        True
    """

    def __init__(self, *, d_in: int, d_out: int, n_latents: int, activation: str = "relu") -> None:
        super().__init__()
        check_positive("sparse MLP", d_in=d_in, d_out=d_out, n_latents=n_latents)
        if not isinstance(activation, str) or activation not in ACTIVATIONS:
            known = " or ".join(map(repr, ACTIVATIONS))
            raise ConfigError(f"sparse MLP: activation must be {known}, got {shown(activation)}")
        self.d_in = d_in
        self.d_out = d_out
        self.n_latents = n_latents
        self.activation = activation
        self.about: dict[str, Any] = {}
        """What the weights were trained on (sites, store, config): JSON-able, saved with them."""
        try:
            self.encoder = nn.Linear(d_in, n_latents)
            self.decoder = nn.Linear(n_latents, d_out)
        except (RuntimeError, TypeError, OverflowError) as error:
            sizes = f"d_in={shown(d_in)}, d_out={shown(d_out)}, n_latents={shown(n_latents)}"
            raise ConfigError(f"sparse MLP: not enough memory for {sizes}; take fewer latents") from error

    def encode(self, x_BD: Tensor) -> Tensor:
        """`(B, D_in)` activations -> `(B, F)` latents, zero or positive."""
        return ACTIVATIONS[self.activation](self.encoder(x_BD))

    def decode(self, a_BF: Tensor) -> Tensor:
        """`(B, F)` latents -> `(B, D_out)` prediction."""
        prediction: Tensor = self.decoder(a_BF)
        return prediction

    def forward(self, x_BD: Tensor) -> Tensor:
        """`(B, D_in)` activations -> `(B, D_out)` prediction."""
        return self.decode(self.encode(x_BD))

    @property
    def sizes(self) -> dict[str, Any]:
        """The arguments that make an MLP of this shape."""
        return {"d_in": self.d_in, "d_out": self.d_out, "n_latents": self.n_latents, "activation": self.activation}

    def save(self, folder: str | Path) -> None:
        """Write `weights.safetensors`, then `config.json` with its digest; each replaces an older file as a whole."""
        from safetensors.torch import save

        from actcache.store import refuse_inside_store

        folder = path_of(folder, "sparse MLP: the folder")
        refuse_inside_store(folder)
        weights = save({name: w.detach().cpu().contiguous() for name, w in self.state_dict().items()})
        config = {
            "format": "actcache sparse MLP",
            "version": VERSION,
            **self.sizes,
            "weights_sha256": hashlib.sha256(weights).hexdigest(),
            "about": self.about,
        }
        config["config_sha256"] = digest_of(config)
        write_whole(folder / WEIGHTS, weights)
        write_whole(folder / CONFIG, json.dumps(config, indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> SparseMLP:
        """The MLP that `save` wrote.

        Raises:
            ModelNotFoundError: no sparse MLP in that folder.
            StateError: the files are of another version, damaged, or do not belong together.
        """
        folder = path_of(folder, "sparse MLP: the folder")
        config, weights = _read_saved(folder)
        sizes = {name: config[name] for name in ("d_in", "d_out", "n_latents", "activation")}
        try:
            with torch.device("meta"):  # wrong sizes must not be allocated
                shapes = {name: tuple(w.shape) for name, w in cls(**sizes).state_dict().items()}
        except (ConfigError, RuntimeError) as error:
            raise StateError(f"sparse MLP in {folder}: {CONFIG} does not describe one: {error}") from error
        found = {name: tuple(w.shape) for name, w in weights.items()}
        if found != shapes:
            raise StateError(f"sparse MLP in {folder}: weights and {CONFIG} do not fit: {found}, not {shapes}")
        if config.pop("config_sha256", None) not in (None, digest_of(config)):
            raise StateError(f"sparse MLP in {folder}: {CONFIG} does not match its digest; save or train it again")
        mlp = cls(**sizes)
        mlp.about = config["about"]
        mlp.load_state_dict(weights)
        return mlp


_FIELDS = {"format", "version", "d_in", "d_out", "n_latents", "activation", "weights_sha256", "about"}


def _read_saved(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `config.json` says, and the tensors that belong to it."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        config = read_json(folder / CONFIG)
        data = (folder / WEIGHTS).read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ModelNotFoundError(f"no sparse MLP in {folder}: {Path(error.filename).name} is missing") from error
    except OSError as error:
        raise StateError(f"sparse MLP in {folder}: {error.filename} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise StateError(f"sparse MLP in {folder}: {CONFIG} {error}") from error
    # Files of the first versions have no digest of the config itself.
    if not isinstance(config, dict) or config.keys() - {"config_sha256"} != _FIELDS or config["version"] != VERSION:
        found = f"version {shown(config.get('version'))}" if isinstance(config, dict) else type(config).__name__
        raise StateError(f"sparse MLP in {folder}: {CONFIG} must be a saved MLP of version {VERSION}, found {found}")
    if hashlib.sha256(data).hexdigest() != config["weights_sha256"]:
        raise StateError(f"sparse MLP in {folder}: {WEIGHTS} does not match its digest; save or train it again")
    try:
        return config, load(data)
    except (SafetensorError, ValueError) as error:
        reason = why_not_tensors(folder / WEIGHTS, error)
        raise StateError(f"sparse MLP in {folder}: {WEIGHTS} {reason}") from error


@dataclass(frozen=True, kw_only=True, slots=True)
class Scaling:
    """Constants that bring raw activations to scale: `x * scale_in`, `y * scale_out`."""

    scale_in: float
    """One over the standard deviation of the input, pooled over its dimensions."""
    scale_out: float
    """The same for the target."""

    def inverse(self) -> Scaling:
        """The scaling that undoes this one."""
        return Scaling(scale_in=1 / self.scale_in, scale_out=1 / self.scale_out)


@torch.no_grad()
def fold_scaling(source: SparseMLP, target: SparseMLP, scaling: Scaling) -> None:
    """Set `target` to the MLP that does on raw activations what `source` does on scaled ones.

    `target(x) = source(x * scale_in) / scale_out`, with the same latents. The inverse scaling goes the other way.
    """
    target.encoder.weight.copy_(source.encoder.weight * scaling.scale_in)
    target.encoder.bias.copy_(source.encoder.bias)
    target.decoder.weight.copy_(source.decoder.weight / scaling.scale_out)
    target.decoder.bias.copy_(source.decoder.bias / scaling.scale_out)


@torch.no_grad()
def initialise(mlp: SparseMLP, mean_in_D: Tensor, mean_out_D: Tensor, *, decoder_norm: float, seed: int) -> None:
    """Set the initial weights: random decoder directions, an encoder that is their transpose, both sides centred.

    The decoder is short (`decoder_norm`) with its bias at the mean target, so that training starts from the best
    constant prediction; encoder rows are unit vectors, and their bias puts the mean input at zero. If `D_in != D_out`,
    the encoder gets other directions. Drawn on the CPU, so a seed means the same weights on every device.
    """
    generator = torch.Generator().manual_seed(seed)
    directions_FD = F.normalize(torch.randn(mlp.n_latents, mlp.d_out, generator=generator), dim=1)
    mlp.decoder.weight.copy_(directions_FD.T * decoder_norm)
    if mlp.d_in != mlp.d_out:
        directions_FD = F.normalize(torch.randn(mlp.n_latents, mlp.d_in, generator=generator), dim=1)
    mlp.encoder.weight.copy_(directions_FD)
    mlp.encoder.bias.copy_(-(mlp.encoder.weight @ mean_in_D.to(mlp.encoder.weight)))
    mlp.decoder.bias.copy_(mean_out_D)
