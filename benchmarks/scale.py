"""Extraction by several workers, to a store that answers late, and what large ones need.

    python benchmarks/scale.py --out docs/scale.md

Workers: the same tokens through `extract_on_cluster`, whose workers are there and have opened the model, against one
process with as many threads in all. Late: a store behind obstore, as a bucket is, on which every request waits 20 ms,
against the same store in a folder; one writer. Large: computed by `actcache.estimate` from a measurement on this
machine, under the assumptions that stand beside the table.
"""

from __future__ import annotations

import argparse
import datetime
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from activations import smollm2_file
from latency import DELAY_S, far_away
from measure import HEADER, Figure, compare, embedded, machine, rate

import actcache as ac
from actcache.cluster import extract_on_cluster
from actcache.cluster.connect import connected
from actcache.estimate import Plan, Terms, plan
from actcache.lm import LanguageModel
from actcache.spec import TokenBlocks
from actcache.store import Objects

TWO = ["blocks.2.mlp.hook_in", "blocks.2.hook_mlp_out"]
EIGHT = ["blocks.*.mlp.hook_in", "blocks.*.hook_mlp_out"]
SETTINGS: dict[str, Any] = {"sequences_per_shard": 128, "batch_sequences": 32}
TOKENS = {"1 G": 10**9, "100 G": 10**11, "10 T": 10**13}
WORKERS = {"1 G": 8, "100 G": 64, "10 T": 1024}
PRICE_PER_TB_MONTH = 20.0
PRICE_PER_HOUR = 0.05
"""Of a worker: a machine like this one (two cores), rented."""


def far_store(folder: Path) -> Objects:
    """A place for a store on which every request waits."""
    folder.mkdir()
    return far_away(folder, read_only=False)


def workers(lm: LanguageModel, blocks: TokenBlocks, n_workers: Sequence[int], pairs: int) -> list[Figure]:
    """One line for each number of workers and of sites: tokens a second by workers, and by one process."""
    found = []
    folder = Path(tempfile.mkdtemp(prefix="actcache-bench-"))
    path = folder / "acts.zarr"

    def timed(make: Callable[[], object]) -> float:
        shutil.rmtree(path, ignore_errors=True)
        return rate(blocks.ids.size, make)

    try:
        for n in n_workers:
            with connected(f"local:{n}", lambda sentence: None) as client:
                for sites in (TWO, EIGHT):

                    def by_workers(sites: list[str] = sites, client: Any = client) -> float:
                        return timed(lambda: extract_on_cluster(lm, blocks, sites, path, cluster=client, **SETTINGS))

                    def alone(sites: list[str] = sites) -> float:
                        return timed(lambda: ac.extract(lm, blocks, sites, path, **SETTINGS))

                    name = f"{len(lm.resolve(sites))} sites of `{lm.name}`, {n} worker{'s' * (n > 1)}"
                    found.append(compare(name, by_workers, alone, unit="tokens/s", goal=0.9, pairs=pairs))
    finally:
        shutil.rmtree(folder)
    return found


def late(lm: LanguageModel, blocks: TokenBlocks, pairs: int) -> list[Figure]:
    """Tokens a second to a store that answers late, and to a folder."""
    found = []
    folder = Path(tempfile.mkdtemp(prefix="actcache-bench-"))

    def to(place: Callable[[Path], Any], sites: list[str]) -> float:
        path = folder / "acts.zarr"
        shutil.rmtree(path, ignore_errors=True)
        target = place(path)
        return rate(blocks.ids.size, lambda: ac.extract(lm, blocks, sites, target, **SETTINGS))

    try:
        for sites in (TWO, EIGHT):

            def far(sites: list[str] = sites) -> float:
                return to(far_store, sites)

            def here(sites: list[str] = sites) -> float:
                return to(lambda path: path, sites)

            name = f"{len(lm.resolve(sites))} sites of `{lm.name}`, requests {1000 * DELAY_S:.0f} ms late"
            found.append(compare(name, far, here, unit="tokens/s", goal=0.9, pairs=pairs))
    finally:
        shutil.rmtree(folder)
    return found


def planned(lm: LanguageModel, blocks: TokenBlocks, sites: list[str], seconds: float) -> Plan:
    """Measured on this machine, for as many tokens as there are."""
    return plan(
        lm,
        blocks,
        sites,
        terms=Terms(price_per_tb_month=PRICE_PER_TB_MONTH, compute_price_per_hour=PRICE_PER_HOUR),
        time_budget_s=seconds,
    )


def large_rows(measured: Plan, presets: Sequence[str] = ("lossless", "int8")) -> list[str]:
    """The table: what so many tokens need, for each preset."""
    rows = [
        "| tokens | preset | bytes | objects | stores | workers | hours | compute | storage a month |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, n_tokens in TOKENS.items():
        scaled = measured.scaled(n_tokens=n_tokens, workers=WORKERS[name])
        for preset in presets:
            costs = scaled.presets[preset]
            rows.append(
                f"| {name} | `{preset}` | {_size(costs.bytes + costs.other_bytes)} | {costs.n_objects:,} | "
                f"{scaled.amounts.n_stores:,} | {scaled.workers:,} | {costs.seconds / 3600:,.0f} | "
                f"{_dollars(costs.compute_cost or 0.0)} | {_dollars(costs.cost_per_month)} |"
            )
    return rows


def large_words(measured: Plan) -> str:
    """What the table comes from."""
    lossless = measured.presets["lossless"]
    asked = measured.asked
    fits = lossless.tokens_per_s * 3600 * 24 * 30
    return (
        f"Computed from {measured.measured.n_tokens:,} tokens of `{measured.model}` on this machine "
        f"({lossless.tokens_per_s:,.0f} tokens/s a worker with `lossless`, {lossless.bytes_per_activation:.2f} bytes "
        f"an activation), for {len(asked.sites)} sites of {sum(asked.sites.values()):,} values together, sequences "
        f"of {asked.sequence_length} tokens, the first {asked.options.skip_first} not kept. A worker is a machine like "
        f"this one at ${PRICE_PER_HOUR:.2f} an hour; storage is ${PRICE_PER_TB_MONTH:.0f} a terabyte and month. Bytes "
        "and objects are right if the sample is like the text. Hours assume that workers are as fast as this machine "
        "and wait neither for each other nor for the storage; the tables above show how far that holds. One worker "
        f"makes {fits / 1e9:,.1f} G tokens a month. A GPU changes the hours and not the bytes: divide by what the "
        "forward pass gains, until encoding is the bottleneck. `actcache plan MODEL TEXT SITES --tokens N --workers N` "
        "says the same for your model, machine and prices."
    )


def smollm2() -> tuple[LanguageModel, list[str]]:
    """SmolLM2-135M from its GGUF file, and two sites of its middle layer."""
    return ac.load_lm(str(smollm2_file())), ["blocks.15.hook_resid_post", "blocks.15.hook_mlp_out"]


def _size(n_bytes: float) -> str:
    unit, size = next(((u, s) for u, s in (("PB", 1e15), ("TB", 1e12)) if n_bytes >= s), ("GB", 1e9))
    number = n_bytes / size
    return f"{number:,.0f} {unit}" if number >= 100 else f"{number:.3g} {unit}"


def _dollars(amount: float) -> str:
    digits = max(0, math.floor(math.log10(amount)) - 1) if amount >= 1 else 0
    return f"${round(amount, -digits):,.0f}" if amount >= 1 else f"${amount:.2f}"


def page(*, n_sequences: int, pairs: int, seconds: float, model: str | None = None) -> str:
    """All of it, as the page in the docs."""
    lm, blocks = embedded(n_sequences)
    today = datetime.datetime.now(tz=datetime.UTC).date()
    cores = len(os.sched_getaffinity(0))
    by_workers = workers(lm, blocks, [n for n in (1, 2) if n <= cores], pairs)
    far = late(lm, blocks, pairs)
    large, sites = smollm2() if model is None else (lm, TWO)
    if model is None:
        texts = ac.read_texts("stories-corpus")
        blocks = ac.token_blocks(texts, large.tokenizer, length=256, count=512, seed=0)
    measured = planned(large, blocks, sites, seconds)
    table = [HEADER, *(figure.row() for figure in by_workers)]
    far_table = [HEADER, *(figure.row() for figure in far)]
    return "\n\n".join(
        [
            "# Scale",
            f"Written by `python benchmarks/scale.py --sequences {n_sequences} --pairs {pairs} --seconds {seconds:g} "
            f"--out docs/scale.md` on {today}.",
            f"Machine: {machine()}, distributed {version('distributed')}.",
            "## Workers on one machine / one process",
            f"Ours: {n_sequences:,} sequences of 256 tokens by workers of `--dask local:N`, which share this machine's "
            f"{cores} cores ({cores} threads with one worker, one each with {cores}). They run and have opened the "
            "model before, because that takes a few seconds once. Baseline: `extract` in one process. Several workers "
            "gain because they need not wait for each other's forward passes and encoding. They lose because a task "
            "begins and ends with an empty queue, which matters more in shorter runs: here one has "
            f"{-(-n_sequences // SETTINGS['sequences_per_shard'])} shards. `lossless`.",
            "\n".join(table),
            "## Requests 20 ms late / a folder",
            "One writer, defaults. Data, row table and commit record of every shard are put one after the other, by "
            "the threads that encode; the forward pass waits only when all buffers do.",
            "\n".join(far_table),
            "## What large extractions need",
            "\n".join(large_rows(measured)),
            large_words(measured),
        ]
    )


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=2048, help="of 256 tokens")
    parser.add_argument("--pairs", type=int, default=2, help="how often each comparison is made")
    parser.add_argument("--seconds", type=float, default=30.0, help="about how long the plan may measure")
    parser.add_argument("--model", choices=["stories-4l"], help="plan for the embedded model instead of SmolLM2-135M")
    parser.add_argument("--out", type=Path, help="the page to write; otherwise it is printed")
    options = parser.parse_args()
    text = page(n_sequences=options.sequences, pairs=options.pairs, seconds=options.seconds, model=options.model)
    if options.out is None:
        print(text)
    else:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
