"""The loader on a GPU: how fast it feeds one, and what a training loses by being fed from disk.

    python benchmarks/gpu_loader.py --out docs/gpu.md
    python benchmarks/gpu_loader.py --device cpu --small    # that it runs; nothing is measured

Data: two sites of width 768, the residual streams of six tokens of the embedded model in a row side by side: 408,000
rows, 1.25 GB of bfloat16. They lie on a local disk, in the page cache, in a store for each codec. Batches have 4,096
rows of both sites, as float32 if nothing else is said.

The loader alone: nothing is done with its batches. Figures are GB/s of bfloat16 payload; `int8` crosses the bus as half
of that. Baseline: copies of 256 MB of page-locked memory to the device, which is all that the bus allows. What keeps
the loader from it is decoding, on the cores that the machine has: there is no goal.

Training: forward, backward, clip and fused Adam of a sparse MLP, 768 to 12,288 to 768, in bfloat16. Ours: on batches of
the loader, of epochs without end, normalised (`center-rms`). Baseline: the same loop on one epoch of the same batches,
which were kept in the device's memory as they were delivered. The first batch is taken before the clock starts. Stalled
is the share of the time in which the loop's thread waited for a batch; while it does, the device may still have work.
"""

from __future__ import annotations

import argparse
import datetime
import inspect
import shutil
import statistics
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path

import torch
from loader_data import STREAMS, wide
from measure import HEADER, Figure, compare, machine, rate
from store import write_store
from torch import Tensor
from training import bare_loop

import actcache as ac
from actcache.store import Store

CODECS = ("raw", "lossless", "int8")
SITES = [*STREAMS]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """How much is done."""

    n_sequences: int = 1600
    batch_rows: int = 4096
    expansion: int = 16
    """Latents over the width of a site."""
    n_epochs: int = 6
    """Of the loader alone, each time."""
    n_steps: int = 600
    """Of training, each time."""
    copied_bytes: int = 256 << 20
    """Of each plain copy."""
    pairs: int = 3


SMALL = Sizes(n_sequences=24, batch_rows=256, expansion=1, n_epochs=1, n_steps=2, copied_bytes=1 << 20, pairs=1)
"""So that it runs anywhere."""


def wait_for(device: torch.device) -> None:
    """Until the device has done what it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def copy_rate(device: torch.device, n_bytes: int, gigabytes: float) -> float:
    """GB/s of plain copies to the device."""
    pinned = torch.empty(n_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda").fill_(1)
    target = torch.empty(n_bytes, dtype=torch.uint8, device=device)
    n_copies = max(1, round(gigabytes * 1e9 / n_bytes))

    def copies() -> None:
        for _ in range(n_copies):
            target.copy_(pinned, non_blocking=True)
        wait_for(device)

    return rate(n_copies * n_bytes / 1e9, copies)


def alone(store: Store, device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Figure:
    """The loader, nothing being done with its batches, against plain copies."""
    sites = [store.spec.site(name) for name in SITES]
    with ac.Loader(
        store, SITES, batch_rows=sizes.batch_rows, dtype=dtype, device=device, epochs=sizes.n_epochs
    ) as loader:
        n_rows = sizes.n_epochs * len(loader) * sizes.batch_rows
        gigabytes = n_rows * sum(site.width for site in sites) * 2 / 1e9

        def epochs() -> None:
            for _ in loader:
                pass
            wait_for(device)

        return compare(
            f"load `{sites[0].codec}` as {str(dtype).removeprefix('torch.')}",
            lambda: rate(gigabytes, epochs),
            lambda: copy_rate(device, sizes.copied_bytes, gigabytes),
            unit="GB/s",
            goal=None,
            pairs=sizes.pairs,
        )


def trained(batches: Iterable[tuple[Tensor, Tensor]], width: int, device: torch.device, sizes: Sizes) -> float:
    """Rows a second of the training loop."""
    mlp = ac.SparseMLP(d_in=width, d_out=width, n_latents=sizes.expansion * width).to(device)
    wait_for(device)

    def work() -> None:
        bare_loop(mlp, batches, sizes.n_steps)
        wait_for(device)

    return rate(sizes.n_steps * sizes.batch_rows, work)


def training(store: Store, device: torch.device, sizes: Sizes) -> Figure:
    """Training from disk against training from the device's memory."""
    name, width = f"train from `{store.spec.sites[0].codec}`", store.spec.sites[0].width
    stalled: list[float] = []

    def loader(epochs: int | None) -> ac.Loader:
        return ac.Loader(
            store, SITES, batch_rows=sizes.batch_rows, device=device, normalize="center-rms", epochs=epochs
        )

    def ours() -> float:
        with loader(epochs=None) as endless:
            batches = pairs_of(endless)
            next(batches)
            before = endless.stats()
            reached = trained(batches, width, device, sizes)
            after = endless.stats()
        stalled.append((after.wait_seconds - before.wait_seconds) / (after.seconds - before.seconds))
        return reached

    kept = list(pairs_of(loader(epochs=1)))
    found = compare(
        name, ours, lambda: trained(cycle(kept), width, device, sizes), unit="rows/s", goal=0.97, pairs=sizes.pairs
    )
    return replace(found, name=f"{name}, stalled {100 * statistics.median(stalled[1:]):.1f} % of the time")


def pairs_of(batches: Iterable[ac.Batch]) -> Iterator[tuple[Tensor, Tensor]]:
    """Input and target of each batch."""
    for batch in batches:
        yield batch[SITES[0]], batch[SITES[1]]


def figures(device: torch.device, sizes: Sizes, where: Path | None = None) -> Iterator[tuple[str, Figure]]:
    """Each comparison, with the section that it belongs to."""
    data = wide(sizes.n_sequences, STREAMS)
    folder = Path(tempfile.mkdtemp(prefix="actcache-bench-", dir=where))
    try:
        stores = [write_store(data, data.spec(codec), folder / f"{codec}.zarr") for codec in CODECS]
        for store in stores:
            for dtype in (torch.float32, torch.bfloat16):
                yield "The loader alone / plain copies", alone(store, device, dtype, sizes)
        for store in stores:
            yield "Training from disk / from the device's memory", training(store, device, sizes)
    finally:
        shutil.rmtree(folder)


def sections(device: torch.device, sizes: Sizes) -> Iterator[str]:
    """The page, piece by piece as it is measured."""
    yield "# The loader on a GPU"
    today = datetime.datetime.now(tz=datetime.UTC).date()
    yield f"Written by `python benchmarks/gpu_loader.py --out docs/gpu.md` on {today}."
    on = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU"
    yield f"Machine: {on}, {machine()}."
    yield inspect.cleandoc(__doc__ or "").split("\n\n", 2)[2]
    title = ""
    for section, figure in figures(device, sizes):
        yield figure.row() if section == title else f"## {section}\n\n{HEADER}\n{figure.row()}"
        title = section


def main() -> None:
    """Measure and print; write the page."""
    parser = argparse.ArgumentParser(description="The loader on a GPU.")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"), help="cuda, cuda:1, cpu")
    parser.add_argument("--small", action="store_true", help="run everything at sizes that say nothing of speed")
    parser.add_argument("--out", type=Path, help="page to write, such as docs/gpu.md")
    options = parser.parse_args()
    if options.small and options.out:
        parser.error("--small measures nothing that belongs on a page; leave out one of the two")
    if options.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here; --device cpu --small shows that it runs")
    page = ""
    for section in sections(options.device, SMALL if options.small else Sizes()):
        between = "\n" if section.startswith("|") else "\n\n"
        print(section, flush=True)
        page += (between if page else "") + section
    if options.out:
        options.out.write_text(page + "\n")


if __name__ == "__main__":
    main()
