"""How a store is shown: state, shards, origin, and a line for each site.

In: a store. Out: lines and tables on the terminal, or the store's `info` as JSON.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise, starmap
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from actcache import formats
from actcache.cli.screen import Metrics, Screen, empty_table, labelled_lines

if TYPE_CHECKING:
    from actcache.store import Store

COMMITTED, PARTLY, BEGUN, MISSING = "█▓▒░"
_PLAIN = dict(zip("█▓▒░", "#=+.", strict=True))
"""The same blocks where the terminal's encoding lacks them."""
_BLOCKS = {"committed": COMMITTED, "begun": BEGUN, "missing": MISSING}
_STYLES = {COMMITTED: "green", PARTLY: "green", BEGUN: "yellow", MISSING: "dim"}
_MOST_BLOCKS = 100
_MOST_RANGES = 8


def show_store(screen: Screen, store: Store) -> None:
    """Print what a store is and how far it is; as JSON its `info`."""
    info = store.info()

    def show(out: Console) -> None:
        from actcache.store import begun_shards

        out.print(store_lines(info, Shards(info["n_shards_expected"], store.committed, begun_shards(store))))
        out.print(sites_table(info["sites"], info["spec"]["dtype"]))
        for name, site in info["sites"].items():
            if site["codec_reason"]:
                out.print(Text(f"{name}: {site['codec_reason']}", style="dim"))

    screen.result(info, show)


@dataclass(frozen=True)
class Shards:
    """How far each shard of a store is; shows as a strip of blocks on a terminal, and as numbers in a pipe."""

    n_shards: int
    committed: Collection[int]
    begun: Collection[int] = ()

    def strip(self, n_blocks: int) -> tuple[str, int]:
        """At most so many blocks, and for how many shards each of them stands."""
        per_block = max(1, -(-self.n_shards // max(1, n_blocks)))
        committed = Counter(shard // per_block for shard in self.committed)
        begun = {shard // per_block for shard in self.begun}
        drawn = ""
        for block in range(-(-self.n_shards // per_block)):
            n_shards = min(per_block, self.n_shards - block * per_block)
            if committed[block]:
                drawn += COMMITTED if committed[block] == n_shards else PARTLY
            else:
                drawn += BEGUN if block in begun else MISSING
        return drawn, per_block

    def by_progress(self) -> dict[str, Collection[int]]:
        """The shards that are committed, begun and missing, as far as there are any."""
        missing = set(range(self.n_shards)).difference(self.committed, self.begun)
        found = {"committed": self.committed, "begun": self.begun, "missing": missing}
        return {progress: shards for progress, shards in found.items() if shards}

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement.get(console, options, self._text(console, options))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self._text(console, options)

    def _text(self, console: Console, options: ConsoleOptions) -> Text:
        if not console.is_terminal:
            return Text(", ".join(starmap(_numbers, self.by_progress().items())))
        letters = {block: block if options.encoding.startswith("utf") else _PLAIN[block] for block in _PLAIN}
        drawn, per_block = self.strip(min(_MOST_BLOCKS, options.max_width))
        strip, legend = Text(), Text()
        for block, same in groupby(drawn):
            strip.append(letters[block] * len(list(same)), style=_STYLES[block])
        for progress, shards in self.by_progress().items():
            block = _BLOCKS[progress]
            legend.append(letters[block], style=_STYLES[block]).append(f" {len(shards):,} {progress}  ")
        if per_block > 1:
            legend.append(f"({per_block:,} shards in a block; ").append(letters[PARTLY], style=_STYLES[PARTLY])
            legend.append(" committed in part)")
        legend.rstrip()
        fits = len(strip) + 2 + len(legend) <= options.max_width
        return Text.assemble(strip, "  " if fits else "\n", legend)


def _numbers(progress: str, shards: Collection[int]) -> str:
    """`3 missing (5-6, 9)`; of committed ones only how many."""
    which = "" if progress == "committed" else f" ({_ranges(sorted(shards))})"
    return f"{len(shards):,} {progress}{which}"


def _ranges(shards: Sequence[int]) -> str:
    """`0-4, 7, 9-12`, cut off after some ranges."""
    edges = [i for i, (left, right) in enumerate(pairwise(shards), 1) if right != left + 1]
    found = [(shards[i], shards[j - 1]) for i, j in pairwise([0, *edges, len(shards)])]
    shown = [f"{first}" if first == last else f"{first}-{last}" for first, last in found[:_MOST_RANGES]]
    more = len(found) - len(shown)
    return ", ".join(shown) + (f" and {more:,} more ranges" if more else "")


def store_lines(info: Metrics, shards: Shards) -> Table:
    """State, shards, size and origin of a store."""
    spec = info["spec"]
    rows = f"{info['n_rows']:,} of {info['n_rows_expected']:,} rows"
    committed = f"{info['n_shards']:,} of {info['n_shards_expected']:,} shards committed"
    size = f"{formats.size(info['bytes'])} on disk"
    if info["raw_bytes"]:
        share = formats.percent(info["bytes"] / info["raw_bytes"])
        size += f", {share} of {formats.size(info['raw_bytes'])} of {spec['dtype']} activations"
    if info["n_shards_measured"] < info["n_shards"]:
        size += f"; this and the statistics are estimates from {info['n_shards_measured']:,} of the shards"
    lines: list[tuple[str, RenderableType]] = [
        ("store", Text(str(info["path"]), style="bold")),
        ("state", f"{info['state']}, {rows}, {committed}"),
        ("shards", shards),
        ("size", size),
        *_model_lines(spec["model"]),
        *_text_lines(spec),
        ("made with", _listed({key: value for key, value in info["provenance"].items() if key != "audits"})),
        *_audits(info),
        ("fingerprint", info["fingerprint"] or "(when it is sealed)"),
    ]
    return labelled_lines(lines)


def _audits(info: Metrics) -> Iterable[tuple[str, RenderableType]]:
    lines = formats.audit_lines(info["provenance"]) or ["none"]
    return [("audit", Text(line, style="bold red" if line.startswith("FAILED") else "")) for line in lines]


def _model_lines(model: Metrics) -> list[tuple[str, RenderableType]]:
    names = [str(model[name]) for name in ("name", "class", "dtype") if model.get(name)]
    digests = {name: model.get(name) for name in ("weights", "tokenizer")}
    others = {key: value for key, value in model.items() if key not in ("name", "class", "dtype", *digests)}
    described = ", ".join(filter(None, [*names, _listed(others)]))
    return [("model", described or "unknown"), ("", _listed(digests))]


def _text_lines(spec: Metrics) -> list[tuple[str, RenderableType]]:
    """The tokens and how they were made; of a store that was extended, part by part."""
    kept = f"first {spec['skip_first']} of each not kept" if spec["skip_first"] else "all kept"
    shape = f"{spec['n_sequences']:,} sequences of {spec['sequence_length']} tokens, {kept}"
    parts = spec["text"].get("parts")
    made = [
        # The length is in the first line, the tokenizer with the model.
        _listed({key: value for key, value in part.items() if key not in ("tokenizer", "length")})
        for part in (parts if isinstance(parts, list) else [spec["text"]])
        if isinstance(part, Mapping)
    ]
    return [("text", shape), *(("", line) for line in made)]


def _listed(settings: Metrics) -> str:
    """`device cpu, threads 2, torch 2.13.0`: the settings that are known, nested ones after each other."""
    listed = [
        _listed(value) if isinstance(value, Mapping) else f"{key.replace('_', ' ')} {formats.plain(value)}"
        for key, value in settings.items()
        if value is not None
    ]
    return ", ".join(filter(None, listed))


_WHAT, _SIZES = ("width", "dtype", "codec"), ("on disk", "B/value", "of raw")
_STATISTICS = ("mean norm", "abs max", "zeros", "NaN", "Inf")


def sites_table(sites: Mapping[str, Metrics], dtype: str) -> RenderableType:
    """A line for each site: how it is stored, and its statistics; NaN and infinite values stand out.

    A terminal that is too narrow for one table has several, one below the other.
    """
    lines = [_site_line(name, site, dtype) for name, site in sites.items()]
    parts = (_WHAT, _SIZES, _STATISTICS)
    layouts = ([(*_WHAT, *_SIZES, *_STATISTICS)], [(*_WHAT, *_SIZES), _STATISTICS], parts)
    return _FirstThatFits([[_table(lines, headings) for headings in layout] for layout in layouts])


def _table(lines: Sequence[Mapping[str, str]], headings: Sequence[str]) -> Table:
    table = empty_table(("site", *headings), left=("site", "dtype", "codec"))
    for line in lines:
        table.add_row(line["site"], *(line[heading] for heading in headings))
    return table


def _site_line(name: str, site: Metrics, dtype: str) -> dict[str, str]:
    broken = {"NaN": site.get("n_nan"), "Inf": site.get("n_inf")}
    return {
        "site": escape(name),
        "width": "x".join(map(str, site["shape"])),
        "dtype": dtype,
        "codec": "by hand" if site["codec"].startswith("[") else site["codec"],
        "on disk": formats.size(site["bytes"]),
        "B/value": formats.decimals(site["bytes_per_activation"], 2),
        "of raw": formats.percent(site["ratio"]),
        "mean norm": formats.number(site.get("mean_norm")),
        "abs max": formats.number(site.get("abs_max")),
        "zeros": formats.percent(site.get("zero_fraction")),
        **{heading: f"[bold red]{n:,}[/]" if n else "0" for heading, n in broken.items()},
    }


@dataclass(frozen=True)
class _FirstThatFits:
    """Shows the first group of tables that are not wider than the terminal, or the last group."""

    layouts: Sequence[Sequence[Table]]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        unbounded = options.update(max_width=10_000)

        def fits(tables: Sequence[Table]) -> bool:
            return all(console.measure(table, options=unbounded).maximum <= options.max_width for table in tables)

        yield from next(filter(fits, self.layouts), self.layouts[-1])
