"""What `plan` says of an extraction against what it takes.

    python benchmarks/plan.py

Bytes and files are compared in the tests; this is about time, which only a quiet machine can tell. Plan and extraction
take turns, three times for each line.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from measure import embedded

import actcache as ac
from actcache.estimate import plan
from actcache.lm import LanguageModel
from actcache.spec import TokenBlocks

HEADER = "| sites of `stories-4l` | preset | planned, s | took, s | planned / took (range) |\n|---|---|---|---|---|"
SITES = {
    "2, MLP in and out of one layer": ["blocks.2.mlp.hook_in", "blocks.2.hook_mlp_out"],
    "8, MLP in and out of all layers": ["blocks.*.mlp.hook_in", "blocks.*.hook_mlp_out"],
    "4, ReLU activations of all layers": ["blocks.*.mlp.hook_post"],
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One extraction, planned and done."""

    sites: str
    preset: str
    planned_s: list[float]
    took_s: list[float]

    def row(self) -> str:
        """A line of the table in the docs."""
        ratios = [planned / took for planned, took in zip(self.planned_s, self.took_s, strict=True)]
        return (
            f"| {self.sites} | `{self.preset}` | {statistics.median(self.planned_s):.1f} | "
            f"{statistics.median(self.took_s):.1f} | **{statistics.median(ratios):.2f}** "
            f"({min(ratios):.2f} to {max(ratios):.2f}) |"
        )


def line(lm: LanguageModel, blocks: TokenBlocks, sites: str, preset: str, *, pairs: int, time_budget_s: float) -> Line:
    """Plan and extract in turn."""
    planned, took = [], []
    for _ in range(pairs):
        planned.append(plan(lm, blocks, SITES[sites], time_budget_s=time_budget_s).presets[preset].seconds)
        folder, began = Path(tempfile.mkdtemp(prefix="actcache-bench-")), perf_counter()
        try:
            ac.extract(lm, blocks, SITES[sites], folder / "acts.zarr", codec=preset)
            took.append(perf_counter() - began)
        finally:
            shutil.rmtree(folder)
    return Line(sites=sites, preset=preset, planned_s=planned, took_s=took)


def lines(n_sequences: int = 4096, pairs: int = 3, time_budget_s: float = 10.0) -> list[Line]:
    """All comparisons."""
    lm, blocks = embedded(n_sequences)
    return [
        line(lm, blocks, sites, preset, pairs=pairs, time_budget_s=time_budget_s)
        for sites in SITES
        for preset in ("raw", "lossless")
    ]


if __name__ == "__main__":
    print(HEADER, *(found.row() for found in lines()), sep="\n")
