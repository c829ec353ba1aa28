"""How the benchmarks measure: two ways of doing the same work in turn, ratios pair by pair, the machine beside them."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from time import perf_counter

import actcache as ac
from actcache.lm import LanguageModel
from actcache.provenance import cores, processor
from actcache.spec import TokenBlocks


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One measured comparison: ours against a baseline that was run in turn with it."""

    name: str
    """What was done."""
    ours: float
    """Median rate of our way."""
    baseline: float
    """Median rate of the baseline."""
    unit: str
    """Unit of the rates."""
    ratio: float
    """Median of the ratios ours / baseline, pair by pair: machines drift, pairs drift together."""
    low: float
    """Smallest ratio of a pair."""
    high: float
    """Largest ratio of a pair."""
    goal: float | None
    """What the ratio should reach; None where the baseline is a ceiling that something else keeps it from."""

    def row(self) -> str:
        """A line of the table in the docs."""
        ours, baseline = (f"{rate:,.0f}" if rate >= 100 else f"{rate:.2f}" for rate in (self.ours, self.baseline))
        goal = "-" if self.goal is None else f"{self.goal:.2f}"
        return (
            f"| {self.name} | {ours} | {baseline} | {self.unit} | "
            f"**{self.ratio:.2f}** ({self.low:.2f} to {self.high:.2f}) | {goal} |"
        )


HEADER = "| what | ours | baseline | unit | ratio (range of pairs) | goal |\n|---|---|---|---|---|---|"


def compare(
    name: str,
    ours: Callable[[], float],
    baseline: Callable[[], float],
    *,
    unit: str,
    goal: float | None,
    pairs: int = 3,
) -> Figure:
    """Run both in turn; each returns the rate that it reached. One pair before the counted ones warms caches."""
    return figure_of(name, [(ours(), baseline()) for _ in range(pairs + 1)][1:], unit=unit, goal=goal)


def figure_of(name: str, rates: list[tuple[float, float]], *, unit: str, goal: float | None) -> Figure:
    """The medians of pairs of rates, ours and the baseline's, and of their ratios."""
    ratios = [a / b for a, b in rates]
    return Figure(
        name=name,
        ours=statistics.median(a for a, _ in rates),
        baseline=statistics.median(b for _, b in rates),
        unit=unit,
        ratio=statistics.median(ratios),
        low=min(ratios),
        high=max(ratios),
        goal=goal,
    )


def rate(amount: float, work: Callable[[], object]) -> float:
    """Amount of work per second."""
    began = perf_counter()
    work()
    return amount / (perf_counter() - began)


def machine() -> str:
    """Processor, cores and versions, in one line."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "zarr", "numcodecs", "numpy"))
    return f"{processor()}, {cores()} cores, {platform.system()}, Python {platform.python_version()}, {versions}"


def embedded(n_sequences: int) -> tuple[LanguageModel, TokenBlocks]:
    """The embedded model, and sequences of the embedded corpus."""
    lm = ac.load_lm("stories-4l")
    texts = ac.read_texts("stories-corpus")
    return lm, ac.token_blocks(texts, lm.tokenizer, length=256, count=n_sequences, seed=0)
