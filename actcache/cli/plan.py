"""The verb `plan`: what an extraction is going to cost.

In: options, documented where they are defined. Out: a result on stdout (`--json`: one object), an exit code.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from actcache import formats
from actcache.cli.options import Flag, Flat, RunOptions, TextOptions
from actcache.cli.screen import Screen
from actcache.errors import ConfigError
from actcache.spec import Dtype
from actcache.store_options import StoreOptions

if TYPE_CHECKING:
    from actcache.estimate import Plan, PresetPlan
    from actcache.spec import TokenBlocks

_WHOLE_TOKENS = 1 << 22
"""Tokens of a text that is tokenised as a whole; of longer ones only so many, and the others are estimated."""
_SAMPLE_TOKENS = 1 << 18
"""Tokens that are enough where the number of tokens is given."""


@dataclass(frozen=True, kw_only=True)
class _TextOptions(TextOptions):
    """As for other verbs, but for the text itself, which is an argument here."""

    __module__ = TextOptions.__module__  # where the types of the inherited options are known

    text: Annotated[str, Parameter(parse=False)] = ""


def plan(
    model: str,
    text: str,
    sites: list[str],
    /,
    *,
    run: Annotated[RunOptions | None, Flat] = None,
    cut: Annotated[_TextOptions | None, Flat] = None,
    out: str | None = None,
    tokens: int | None = None,
    workers: int = 1,
    store_dtype: Dtype = "bfloat16",
    skip_first: int = 1,
    sequences_per_shard: int | None = None,
    rows_per_chunk: int | None = None,
    batch_sequences: int | Literal["auto"] = 32,
    price_per_tb: float = 20.0,
    price_per_hour: float | None = None,
    months: float = 1.0,
    epochs: int = 10,
    read_mb_per_s: float | None = None,
    seconds: float = 20.0,
    sample_sequences: int | None = None,
    json: Flag = False,
) -> int:
    """Say what an extraction is going to cost before it runs: bytes, time, memory, money, and when it pays.

    A few batches run through the model, and are encoded and read with every preset in a temporary folder; everything
    else is computed from that. How far these batches differ says how sure the plan is: it gives a range with each
    number.

    Parameters
    ----------
    model
        Base model: `stories-4l` (embedded), a Hugging Face name or folder, or a GGUF file.
    text
        Text, chats or token ids: `stories-corpus` (embedded), a file, a folder, or a `datasets` name, which needs
        --count or --tokens, because it is not read whole.
    sites
        Hook names or patterns of them, such as 'blocks.*.hook_mlp_out'; "actcache sites" lists them.
    out
        Where the store is going to be, to see whether it fits. Nothing is written there.
    tokens
        Plan for so many tokens, whatever the text has: it then is only a sample.
    workers
        Plan for so many processes that share the work, each with a machine like this one.
    store_dtype
        Element type on disk.
    skip_first
        Leading positions of each sequence that are not kept.
    sequences_per_shard
        Sequences of a shard, the unit of work; by default 512, fewer where sites are wide.
    rows_per_chunk
        Rows of the unit of reading; by default half a megabyte of the widest site.
    batch_sequences
        Sequences in one forward pass, or `auto`: as many as make this model fast here.
    price_per_tb
        US dollars for a terabyte and month of storage.
    price_per_hour
        US dollars for an hour of one worker.
    months
        How long the store is kept.
    epochs
        How often the activations are going to be used.
    read_mb_per_s
        Megabytes a second that disk or network give a reader; by default reading is limited by decoding.
    seconds
        How long to measure, about; a slow model takes longer.
    sample_sequences
        Measure on so many sequences (one shard at most), however long it takes; by default on as many as --seconds
        allows.
    json
        Print one JSON object on stdout; progress stays on stderr.
    """
    from actcache.estimate import Terms
    from actcache.estimate import plan as make_plan

    with Screen(json=json) as screen:
        lm = (run or RunOptions()).open(model)
        options = replace(cut or _TextOptions(), text=text)
        lm.resolve(sites, length=options.length)  # a mistyped name is reported before minutes are spent on the text
        blocks, n_tokens = _text(options, lm, screen, tokens)
        found = make_plan(
            lm,
            blocks,
            sites,
            options=StoreOptions(
                dtype=store_dtype,
                skip_first=skip_first,
                sequences_per_shard=sequences_per_shard,
                rows_per_chunk=rows_per_chunk,
            ),
            terms=Terms(
                price_per_tb_month=price_per_tb,
                compute_price_per_hour=price_per_hour,
                months=months,
                epochs=epochs,
                read_bytes_per_s=None if read_mb_per_s is None else 1e6 * read_mb_per_s,
            ),
            out=out,
            batch_sequences=batch_sequences,
            n_tokens=n_tokens,
            workers=workers,
            time_budget_s=seconds,
            sample_sequences=sample_sequences,
        )
        screen.result(found.to_dict(), lambda out: _show(out, found))
    return 0


def _text(options: TextOptions, lm: Any, screen: Screen, tokens: int | None) -> tuple[TokenBlocks, int | None]:
    """Tokens to measure with, and how many there are in all where those are a part.

    Raises:
        ConfigError: a stream that nobody has said the length of.
    """
    from actcache.source import is_streamed

    if options.count is None and tokens is None and is_streamed(options.text):
        raise ConfigError(
            f"{options.text} is streamed and would be read to its end to count its tokens; say how many sequences are "
            "meant with --count, or how many tokens with --tokens"
        )
    enough = max(1, (_WHOLE_TOKENS if tokens is None else _SAMPLE_TOKENS) // max(1, options.length))
    limit = enough if options.count is None else min(options.count, enough)
    with warnings.catch_warnings():
        if limit != options.count:  # nobody has asked for the limit
            warnings.filterwarnings("ignore", message="asked for")
        blocks: TokenBlocks = replace(options, count=limit).blocks_for(lm, screen)
    if tokens is not None:
        return blocks, tokens
    if blocks.n_sequences < limit or limit == options.count:
        return blocks, None
    there = int(blocks.lengths(range(blocks.n_sequences)).sum())
    if options.count is not None:
        screen.say(f"measured on {limit:,} sequences, as if the text had all {options.count:,}")
        return blocks, there * options.count // limit
    share = _share_read(options, blocks.description["n_documents"], screen)
    screen.say(f"the tokens are counted in {formats.percent(share)} of the text, and estimated from that")
    return blocks, round(there / share)


def _share_read(options: TextOptions, n_documents: int, screen: Screen) -> float:
    """How much of a text its first documents are, by their characters (of token ids: by their number)."""
    progress = screen.stage("Read text", "documents")
    head = whole = n_read = 0
    for document in options.documents():
        size = _size(document)
        whole += size
        n_read += size > 0
        head = whole if n_read <= n_documents else head
        if n_read % 4096 == 0:
            progress(n_read, n_read)
    return head / max(1, whole)


def _size(document: Any) -> int:
    """Characters of a text or of a chat's messages; tokens of what was tokenised before."""
    if isinstance(document, str):
        return 0 if document.isspace() else len(document)
    if len(document) and isinstance(document[0], Mapping):
        return sum(len(value) for message in document for value in message.values() if isinstance(value, str))
    return len(document)


def _show(out: Console, plan: Plan) -> None:
    out.print(_lines(plan))
    out.print(_presets_table(plan))
    below = [
        ("auto", _auto_line(plan.presets["auto"])),
        ("ranges", _range_line(plan)),
        ("break-even", _break_even_line(plan)),
        ("measured", _measured_line(plan)),
    ]
    out.print(_grid(below))


def _lines(plan: Plan) -> Table:
    amounts, asked, memory = plan.amounts, plan.asked, plan.memory
    width, sites = sum(asked.sites.values()), len(asked.sites)
    spread = f", in {amounts.n_stores:,} stores" if amounts.n_stores > 1 else ""
    shared = f" by {plan.workers:,} workers" if plan.workers > 1 else ""
    free = f": {formats.size(plan.free_bytes)} free" if plan.free_bytes is not None else ""
    parts = [
        ("process", memory.process),
        ("weights", memory.weights),
        ("a batch", memory.batch),
        ("shards", memory.buffers),
        ("encoding", memory.encoders),
    ]
    each = " for each worker" if plan.workers > 1 else ""
    elsewhere = "; weights and batch are on the model's device" if memory.model_on_device else ""
    lines = [
        ("model", f"{plan.model}, {_some(sites, 'site')} with {width:,} values a token, kept as {asked.dtype}"),
        ("text", f"{amounts.n_tokens:,} tokens in {amounts.n_sequences:,} sequences, {amounts.n_rows:,} rows"),
        (
            "store",
            f"{_some(amounts.n_shards, 'shard')} of {amounts.sequences_per_shard:,} sequences, chunks of "
            f"{amounts.rows_per_chunk:,} rows, {plan.presets['lossless'].n_objects:,} files{spread}",
        ),
        ("place", f"{plan.out}{free}" if plan.out else ""),
        ("model alone", f"{_time(plan.forward_s)}{shared}, {_rate(plan)} tokens/s ({_spread(plan)})"),
        (
            "memory",
            f"about {formats.size(memory.total)} ({' to '.join(map(formats.size, memory.total_range))}){each}: "
            + ", ".join(f"{name} {formats.size(n_bytes)}" for name, n_bytes in parts)
            + elsewhere,
        ),
    ]
    return _grid(lines)


def _rate(plan: Plan) -> str:
    return formats.count(plan.amounts.n_tokens / plan.forward_s)


def _spread(plan: Plan) -> str:
    """How much the batches of the sample differed."""
    fast, slow = (1 / seconds for seconds in plan.measured.forward_s_range)
    typical = 1 / plan.measured.forward_s_per_token
    return f"batches from {formats.percent(slow / typical, 0)} to {formats.percent(fast / typical, 0)} of that speed"


def _grid(lines: list[tuple[str, str]]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, line in lines:
        if line:
            table.add_row(name, escape(line))
    return table


def _presets_table(plan: Plan) -> Table:
    headings = [heading for heading in _HEADINGS if heading != "fits" or plan.free_bytes is not None]
    table = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False, collapse_padding=True)
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "preset" else "right", no_wrap=True)
    for name, preset in plan.presets.items():
        line = dict(zip(_HEADINGS, _preset_values(name, preset, plan.free_bytes), strict=True))
        table.add_row(*(line[heading] for heading in headings))
    return table


_HEADINGS = ("preset", "on disk", "B/value", "of raw", "fits", "time", "to read", "USD/month")


def _preset_values(name: str, preset: PresetPlan, free_bytes: int | None) -> tuple[str, ...]:
    on_disk, low, high = (n + preset.other_bytes for n in (preset.bytes, *preset.bytes_range))
    return (
        name,
        _size_text(on_disk) + _give_or_take(on_disk, low, high),
        f"{preset.bytes_per_activation:.2f}",
        formats.percent(preset.ratio),
        _fits(preset.fits, high, free_bytes),
        _time(preset.seconds) + _give_or_take(preset.seconds, *preset.seconds_range),
        _time(preset.read_s),
        _money(preset.cost_per_month),
    )


def _give_or_take(value: float, low: float, high: float) -> str:
    """How far the farther end of a range is away, in percent."""
    away = max(high / value - 1, 1 - low / value)
    return f" ±{formats.percent(away, 1 if away < 0.095 else 0)}"


def _fits(fits: bool | None, most_bytes: int, free_bytes: int | None) -> str:
    if fits is None or free_bytes is None:
        return ""
    return "[bold red]no[/]" if not fits else "yes" if most_bytes <= free_bytes else "[bold red]perhaps[/]"


def _range_line(plan: Plan) -> str:
    """The default preset's ranges in full, and what a range is."""
    preset = plan.presets["lossless"]
    low, high = (_size_text(n_bytes + preset.other_bytes) for n_bytes in preset.bytes_range)
    fast, slow = (_time(seconds) for seconds in preset.seconds_range)
    return (
        f"lossless takes {low} to {high} and {fast} to {slow}: as in the best and in the worst of the batches that "
        "were measured"
    )


def _auto_line(preset: PresetPlan) -> str:
    """What it chose, and for how many sites."""
    chosen = Counter(preset.codecs.values())
    return ", ".join(f"{codec} for {_some(n, 'site')}" for codec, n in chosen.items())


def _break_even_line(plan: Plan) -> str:
    """When the default preset pays, and what the epochs that were asked about take either way."""
    terms, even = plan.terms, plan.presets["lossless"].break_even
    first = _epochs(even.epochs_in_time)
    line = (
        f"lossless {f'takes less time than forward passes again {first}' if first else 'never takes less time'}; "
        f"for {terms.epochs:,} epochs {_time(even.store_s)} against {_time(even.recompute_s)} of one worker"
    )
    if even.store_cost is None or even.recompute_cost is None:
        return line
    first = _epochs(even.epochs_in_money)
    kept = f"storage for {terms.months:g} month{'s' * (terms.months != 1)} included"
    return (
        f"{line}. {f'It costs less {first}' if first else 'It never costs less'}: "
        f"{_money(even.store_cost)} USD against {_money(even.recompute_cost)} USD, {kept}"
    )


def _epochs(first: int | None) -> str:
    return "" if first is None else f"from epoch {first:,} on"


def _measured_line(plan: Plan) -> str:
    measured = plan.measured
    smaller = " (smaller than asked for, to be done in time)" * (measured.batch_sequences < plan.batch_sequences)
    return (
        f"on {measured.n_tokens:,} tokens in batches of {measured.batch_sequences:,}{smaller}; a second of encoding "
        f"delays the model by {measured.contention:.2f} s"
    )


def _some(n: int, what: str) -> str:
    return f"{n:,} {what}{'s' * (n != 1)}"


def _time(seconds: float) -> str:
    """As elsewhere, and in days where hours are too many to grasp."""
    days = seconds / 86400
    return formats.duration(seconds) if days < 2 else f"{days:,.1f} days" if days < 100 else f"{days:,.0f} days"


def _size_text(n_bytes: int) -> str:
    return formats.size(n_bytes) if n_bytes < 1e15 else f"{n_bytes / 1e15:,.2f} PB"


def _money(dollars: float) -> str:
    if dollars >= 1000:
        return f"{dollars:,.0f}"
    return f"{dollars:,.2f}" if dollars >= 0.005 or dollars == 0 else f"{dollars:.1g}"
