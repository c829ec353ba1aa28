"""Write the measured tables into README.md: the demo's results, and the ratios of docs/benchmarks.md.

    make demo && make benchmarks && python pipelines/update_readme.py

Only what stands between `<!-- demo table -->` and `<!-- /demo table -->`, and the same for `benchmarks`, is replaced.
"""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Annotated

import cyclopts

from actcache.sparse.metrics import Metrics, read_metrics

ROOT = Path(__file__).resolve().parents[1]
HEADER = (
    "| layer | clean | zero-ablated | spliced | loss recovered | L0 | FVU | dead |\n|---|---|---|---|---|---|---|---|"
)

SHOWN = {
    "Extraction / ": ("extract, 8 sites",),
    "Loader / rows": ("`lossless` / annbatch, lz4", "`lossless` / in memory", "`raw` / in memory", "`raw` / np.memmap"),
    "Loader, page cache cold": ("`lossless`", "`raw` / reading"),
    "Training /": ("train",),
}
"""How the sections and rows of docs/benchmarks.md begin that the README shows, those that miss their goals included."""


def demo_table(metrics: Metrics) -> str:
    """The results table, with what it took and the machine that it was made on."""
    rows = [
        f"| {row['layer']} | {row['clean']:.3f} | {row['zero_ablated']:.3f} | {row['spliced']:.3f} | "
        f"**{100 * row['loss_recovered']:.1f} %** | {row['l0']:.0f} | {row['fvu']:.3f} | "
        f"{100 * row['dead_fraction']:.1f} % |"
        for row in metrics["layers"]
    ]
    extract, store, machine = metrics["stages"]["extract"], metrics["store"], metrics["machine"]
    width = metrics["layers"][0]["d_in"]
    facts = (
        f"`{metrics['command']}` took {metrics['seconds']:.0f} s on {machine['processor']}, {machine['cores']} cores: "
        f"{extract['tokens_per_s']:,.0f} tokens/s extracted at {len(store['sites'])} sites at once, "
        f"{store['n_rows']:,} rows stored at {store['bytes_per_activation']:.2f} bytes per activation "
        f"({100 * store['compression_ratio']:.0f} % of bfloat16). d_model is {width}; "
        f"losses are nats per token on held-out text."
    )
    return "\n".join([HEADER, *rows, "", textwrap.fill(facts, 120)])


def benchmark_table(text: str) -> str:
    """The rows of the shown sections of docs/benchmarks.md in one table, with its line about the machine."""
    header = re.search(r"\| what.*\n\|---.*\n", text)
    machine = re.search(r"Machine: .*", text)
    if not (header and machine):
        raise SystemExit("docs/benchmarks.md has no figures; run make benchmarks")
    lines = [header[0].strip()]
    for section in text.split("\n## ")[1:]:
        title, *rest = section.splitlines()
        for begin, rows in SHOWN.items():
            if title.startswith(begin):
                lines += [f"| *{title}* | | | | | |"]
                lines += [line for line in rest if line.removeprefix("| ").startswith(rows) and line.startswith("| ")]
    return "\n".join([*lines, "", machine[0]])


def replace_region(text: str, name: str, content: str) -> str:
    """The text with what stands between the region's two marks replaced."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if begin not in text or end not in text:
        raise SystemExit(f"README.md has no region {begin}")
    return text[: text.index(begin) + len(begin)] + "\n" + content + "\n" + text[text.index(end) :]


def main(*, run: Annotated[Path, cyclopts.Parameter(help="folder of the demo's run")] = ROOT / "runs" / "demo") -> None:
    """Rewrite both regions."""
    readme = ROOT / "README.md"
    text = replace_region(readme.read_text(), "demo table", demo_table(read_metrics(run)))
    benchmarks = (ROOT / "docs" / "benchmarks.md").read_text()
    readme.write_text(replace_region(text, "benchmarks", benchmark_table(benchmarks)))


if __name__ == "__main__":
    cyclopts.run(main)
