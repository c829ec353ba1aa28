"""What `plan` says of an extraction's speed against what it then is.

    python benchmarks/plan.py

Ours is what `plan` expects after measuring for ten seconds; the baseline is the extraction itself, in turn with it on
the same text. Tests compare bytes, files and memory with real stores.
"""

from __future__ import annotations

import shutil
import tempfile
from functools import partial
from pathlib import Path

from measure import HEADER, Figure, compare, embedded, rate

import actcache as ac
from actcache.estimate import plan

SITES = {
    "2 sites": ["blocks.2.mlp.hook_in", "blocks.2.hook_mlp_out"],
    "8 sites": ["blocks.*.mlp.hook_in", "blocks.*.hook_mlp_out"],
}


def figures(n_sequences: int = 1024, pairs: int = 2, time_budget_s: float = 10.0) -> list[Figure]:
    """All comparisons."""
    lm, blocks = embedded(n_sequences)

    def planned(sites: list[str], codec: str) -> float:
        return plan(lm, blocks, sites, time_budget_s=time_budget_s).presets[codec].tokens_per_s

    def done(sites: list[str], codec: str) -> float:
        folder = Path(tempfile.mkdtemp(prefix="actcache-bench-"))
        try:
            return rate(blocks.ids.size, lambda: ac.extract(lm, blocks, sites, folder / "acts.zarr", codec=codec))
        finally:
            shutil.rmtree(folder)

    return [
        compare(
            f"plan of extracting {name}, `{codec}`",
            partial(planned, sites, codec),
            partial(done, sites, codec),
            unit="tokens/s",
            goal=1.0,
            pairs=pairs,
        )
        for name, sites in SITES.items()
        for codec in ("raw", "lossless")
    ]


if __name__ == "__main__":
    print(HEADER, *(figure.row() for figure in figures()), sep="\n")
