"""Measure every codec on real activations and write `docs/codecs.md`.

    python benchmarks/chunk_codecs.py --out docs/codecs.md [--models FOLDER]

Takes about two minutes on two cores. What was tried and is not a preset is kept in the tables, which show why.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from activations import Activations, available
from measure import machine
from numpy.typing import NDArray

from actcache.kernels.bits import widen_bits
from actcache.store import codecs
from actcache.store.codecs.int8 import Int8, feature_exponents
from actcache.store.codecs.presets import offered, parse_codec

METHOD = """\
Each table is one site, in bfloat16, in chunks of 512 KiB with their rows in random order, as a store has them. "Of raw"
is the stored size, checksums and scales included, over two bytes a value. Speeds are GB/s of those two bytes a value,
in one thread, checksums included: the median of rounds in which the codecs took turns. Decoding goes into a buffer that
is reused; the lossless codecs decode to bfloat16 bits, int8 and fp8 to float32. "Unexplained variance" is what a
lossy codec adds: the squared error over the variance of the values about their mean; behind it, the median of the
same ratio over the features one by one, where a few large features cannot hide what becomes of the small ones.
Presets are in bold. Goals: at most 0.75 of raw on residual streams and 0.30 on ReLU activations without loss, and
for int8 at most 0.51 with an unexplained variance of at most 3e-4."""

FINDINGS = """\
- `lossless` is zstd behind a byte shuffle, with one Blosc block a chunk, and settings of zstd's under which it hardly
  looks for repeated sequences. With those of level 1, as numcodecs makes the same frames, it takes twice as long to
  encode and more than half as long again to decode, and is larger on most sites; it is smaller where rows repeat with
  the tokens, as in a model's first residual streams. With Blosc's own choice of 32 KiB blocks zstd compresses high and
  low bytes mixed: a larger result again, decoded a third as fast.
- lz4 behind a bit shuffle misses the goal on residual streams, most on models with outlier features. It encodes at 0.9
  to 1.6 of the speed of `lossless` and decodes at 0.9 to 1.1: hardly worth a sixth more bytes, so it is not a preset.
  Where time matters more than room, take `raw`.
- `sparse` is plain zstd-1. On ReLU activations level 6 saves nothing and encodes at a quarter of the speed, and any
  shuffle only breaks up the zeros. `auto` takes the smaller of `lossless` and `sparse`.
- Chunks turned to lie feature by feature save one percent at most of dense values and take longer both ways.
- int8 with one scale a row and nothing else loses the small features of a model with outlier features, whose size sets
  the scale of every row: it misses the goal on SmolLM2. So `int8` also has one power of two for each feature, fixed on
  the first rows of a site, and meets the goal on every residual stream, MLP input and ReLU site. What it misses are the
  gated SiLU activations of SmolLM2, and 0.51 of raw where a scale of two bytes is shared by as few as 64 values.
- fp8 (e4m3 with one scale a row) keeps more of SmolLM2's typical features than int8 with nothing but row scales, and
  less than `int8` on every site, for the same bytes; it meets the goal nowhere. So it is not a preset."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One way to store chunks of bfloat16 bits."""

    name: str
    encode: Callable[[NDArray[np.uint16]], tuple[Any, int]]
    """Chunk to something that `decode` takes, and its size in bytes."""
    decode: Callable[[Any, NDArray[Any]], object]
    lossy: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """What one trial reached on one site."""

    name: str
    of_raw: float
    """Stored bytes over raw bytes."""
    encode: float
    """GB/s of raw bytes."""
    decode: float
    """GB/s of raw bytes."""
    spread: float
    """Slowest over fastest round of decoding."""
    unexplained: tuple[float, float] | None
    """Of all values, and the median over features; None for what loses nothing."""

    def row(self) -> str:
        """A line of the table."""
        name = f"**{self.name}**" if self.name in codecs.PRESETS else self.name
        loss = "0" if self.unexplained is None else f"{self.unexplained[0]:.1e} ({self.unexplained[1]:.1e})"
        return (
            f"| {name} | {2 * self.of_raw:.2f} | {self.of_raw:.3f} | {self.encode:.2f} | {self.decode:.1f} | {loss} |"
        )


HEADER = (
    "| codec | bytes a value | of raw | encode, GB/s | decode, GB/s | unexplained variance (median feature) |\n"
    "|---|---|---|---|---|---|"
)


def _named(name: str, **configuration: Any) -> dict[str, Any]:
    return {"name": name, "configuration": configuration}


TRIED: dict[str, list[dict[str, Any]]] = {
    "blosc lz4-5, bit shuffle": [_named("blosc", cname="lz4", clevel=5, shuffle="bitshuffle")],
    "blosc zstd-1, byte shuffle, one block": [_named("blosc", cname="zstd", clevel=1, blocksize=1 << 19)],
    "blosc zstd-1, byte shuffle, 32 KiB blocks": [_named("blosc", cname="zstd", clevel=1, blocksize=1 << 15)],
    "blosc zstd-1, bit shuffle, one block": [
        _named("blosc", cname="zstd", clevel=1, shuffle="bitshuffle", blocksize=1 << 19)
    ],
    "blosc lz4-5, no shuffle": [_named("blosc", cname="lz4", clevel=5, shuffle="noshuffle")],
    "zstd-6": [_named("zstd", level=6)],
    "gzip-1": [_named("gzip", level=1)],
    "transposed, then blosc zstd-1, one block": [
        _named("transpose", order=[1, 0]),
        _named("blosc", cname="zstd", clevel=1, blocksize=1 << 19),
    ],
}


def trials(activations: Activations) -> list[Trial]:
    """The presets, and what else was tried."""
    found = [_lossless(preset.name, preset.name) for preset in offered() if preset.lossless]
    found += [_lossless(name, parse_codec(listed)) for name, listed in TRIED.items()]
    # Of other rows than those that are measured, as in a store, where they come from the first shard.
    exponents = feature_exponents(activations.values[-len(activations.values) // 3 :], "bfloat16")
    return [*found, _int8("int8", exponents), _int8("int8, row scales only", None), _fp8()]


def _lossless(name: str, codec: str) -> Trial:
    chain = codecs.stored_arrays(codec, "bfloat16", 1)[0].chain

    def encode(chunk: NDArray[np.uint16]) -> tuple[Any, int]:
        payload, crc = chain.encode(chunk)
        return (payload, crc), len(payload) + codecs.CRC_BYTES

    def decode(stored: memoryview, out: NDArray[np.uint16]) -> None:
        problem = chain.decode_into(stored, out)
        if problem:
            raise RuntimeError(f"{name}: the chunk {problem}")

    return Trial(name=name, encode=encode, decode=decode)


def _int8(name: str, exponents: NDArray[np.int8] | None) -> Trial:
    """One scale a row and, when given, one exponent a feature."""
    quantiser, powers = Int8(), None if exponents is None else np.ldexp(np.float32(1), exponents.astype(np.int32))

    def encode(chunk: NDArray[np.uint16]) -> tuple[Any, int]:
        q, scale = np.empty(chunk.shape, np.int8), np.empty(len(chunk), np.uint16)
        quantiser.encode(chunk, "bfloat16", powers, (q, scale))
        return (q, scale, codecs.RAW.encode(q)[1]), q.nbytes + scale.nbytes + 2 * codecs.CRC_BYTES

    def decode(stored: Any, out: NDArray[np.float32]) -> None:
        q, scale, crc = stored
        if not codecs.matches(q.reshape(-1).view(np.uint8).data, crc):
            raise RuntimeError("the codes do not match their checksum")
        codecs.decode_rows(quantiser, (q, scale), powers, out)

    return Trial(name=name, encode=encode, decode=decode, lossy=True)


def _fp8() -> Trial:
    """e4m3 with one scale a row, by torch; its largest number is 448."""

    def encode(chunk: NDArray[np.uint16]) -> tuple[Any, int]:
        values = torch.from_numpy(chunk.view(np.int16)).view(torch.bfloat16).float()
        scale = (values.abs().amax(1, keepdim=True) / 448).clamp_min(1e-30)
        codes = (values / scale).to(torch.float8_e4m3fn)
        return (codes, scale), codes.nbytes + 2 * len(chunk) + 2 * codecs.CRC_BYTES

    def decode(stored: Any, out: NDArray[np.float32]) -> None:
        codes, scale = stored
        torch.mul(codes.float(), scale, out=torch.from_numpy(out))

    return Trial(name="fp8 e4m3, one scale a row", encode=encode, decode=decode, lossy=True)


def figures(activations: Activations, *, n_chunks: int = 12, rounds: int = 5) -> list[Figure]:
    """What every trial reaches on a site; the rounds take the trials in turn."""
    chunks = activations.chunks()[:n_chunks]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _figures(activations, chunks, rounds)
    finally:
        torch.set_num_threads(threads)


def _figures(activations: Activations, chunks: Sequence[NDArray[np.uint16]], rounds: int) -> list[Figure]:
    raw_bytes = sum(chunk.nbytes for chunk in chunks)
    tried = trials(activations)
    seconds: dict[str, tuple[list[float], list[float]]] = {trial.name: ([], []) for trial in tried}
    sizes: dict[str, int] = {}
    losses: dict[str, tuple[float, float] | None] = {}
    for turn in range(rounds + 1):
        for trial in tried:
            spent, (sizes[trial.name], back) = _timed(trial, chunks)
            if turn == 0:  # warms caches and memory, and is where the values are looked at
                losses[trial.name] = _unexplained(chunks, back) if trial.lossy else _no_loss(chunks, back)
                continue
            for kept, new in zip(seconds[trial.name], spent, strict=True):
                kept.append(new)
    return [
        Figure(
            name=trial.name,
            of_raw=sizes[trial.name] / raw_bytes,
            encode=raw_bytes / statistics.median(seconds[trial.name][0]) / 1e9,
            decode=raw_bytes / statistics.median(seconds[trial.name][1]) / 1e9,
            spread=max(seconds[trial.name][1]) / min(seconds[trial.name][1]),
            unexplained=losses[trial.name],
        )
        for trial in tried
    ]


def _timed(
    trial: Trial, chunks: Sequence[NDArray[np.uint16]]
) -> tuple[tuple[float, float], tuple[int, list[NDArray[Any]]]]:
    """Seconds of encoding and decoding all chunks; their size, and what they decode to."""
    began = perf_counter()
    encoded = [trial.encode(chunk) for chunk in chunks]
    encoding = perf_counter() - began
    stored: list[Any] = [whole for whole, _ in encoded]
    if not trial.lossy:
        stored = [memoryview(bytes(payload) + codecs.crc_bytes(crc)) for payload, crc in stored]
    out = np.empty(chunks[0].shape, np.float32 if trial.lossy else np.uint16)
    began = perf_counter()
    for whole in stored:
        trial.decode(whole, out)
    decoding = perf_counter() - began
    back = []
    for whole in stored:
        trial.decode(whole, out)
        back.append(out.copy())
    return (encoding, decoding), (sum(size for _, size in encoded), back)


def _no_loss(chunks: Sequence[NDArray[np.uint16]], back: Sequence[NDArray[Any]]) -> tuple[float, float] | None:
    if not all(np.array_equal(chunk, found) for chunk, found in zip(chunks, back, strict=True)):
        raise RuntimeError("a lossless codec lost something")
    return None


def _unexplained(chunks: Sequence[NDArray[np.uint16]], back: Sequence[NDArray[Any]]) -> tuple[float, float]:
    values = widen_bits(np.concatenate(chunks)).astype(np.float64)
    errors = ((np.concatenate(back) - values) ** 2).sum(axis=0)
    variances = ((values - values.mean(axis=0)) ** 2).sum(axis=0)
    alive = variances > 0
    return float(errors.sum() / variances.sum()), float(np.median(errors[alive] / variances[alive]))


def document(models: Path | None, *, n_tokens: int, rounds: int) -> list[str]:
    """The parts of `docs/codecs.md`."""
    today = datetime.datetime.now(tz=datetime.UTC).date()
    parts = [
        "# Codecs",
        f"Written by `python benchmarks/chunk_codecs.py --out docs/codecs.md` on {today}.",
        f"Machine: {machine()}.",
        "## How it is measured",
        METHOD,
        "## What follows from it",
        FINDINGS,
    ]
    model = ""
    spreads: list[float] = []
    for found in available(n_tokens, models):
        if isinstance(found, str):
            parts.append(f"Not measured here: {found}.")
            continue
        if found.model != model:
            model = found.model
            parts.append(f"## {model}")
        rows = figures(found, rounds=rounds)
        spreads += [figure.spread for figure in rows]
        zeros = float((found.values & 0x7FFF == 0).mean())
        _, why = codecs.choose_codec(found.chunks()[:12])
        about = f"{found.kind}, {found.values.shape[1]} features, {zeros:.1%} zeros. `auto` says: {why}."
        parts += [f"### `{found.site}`", about, HEADER + "\n" + "\n".join(figure.row() for figure in rows)]
        print("\n\n".join(parts[-3:]), flush=True)
    if spreads:
        half, most = np.quantile(spreads, [0.5, 0.9])
        parts.insert(
            5, f"Slowest over fastest round of one decoding: {half:.2f} (median), {most:.2f} (nine in ten below)."
        )
    return parts


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "docs" / "codecs.md")
    parser.add_argument("--models", type=Path, default=None, help="folder that holds stories260K")
    parser.add_argument("--tokens", type=int, default=40_000, help="tokens a model; SmolLM2 gets a quarter")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    parts = document(options.models, n_tokens=options.tokens, rounds=options.rounds)
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
