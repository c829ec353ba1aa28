"""How the verb `plan` shows a plan: what is stored, what every preset costs, when it pays off.

In: a plan. Out: lines and a table on the terminal.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from actcache import formats
from actcache.cli.screen import empty_table, labelled_lines

if TYPE_CHECKING:
    from actcache.estimate import Plan, PresetPlan


def show_plan(out: Console, plan: Plan) -> None:
    """Print a plan."""
    out.print(_lines(plan))
    out.print(_presets_table(plan))
    below = [
        ("auto", _auto_line(plan.presets["auto"])),
        ("ranges", _range_line(plan)),
        ("break-even", _break_even_line(plan)),
        ("measured", _measured_line(plan)),
    ]
    out.print(labelled_lines(below))


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
        ("model", f"{plan.model}, {_counted(sites, 'site')} with {width:,} values a token, kept as {asked.dtype}"),
        ("text", f"{amounts.n_tokens:,} tokens in {amounts.n_sequences:,} sequences, {amounts.n_rows:,} rows"),
        (
            "store",
            f"{_counted(amounts.n_shards, 'shard')} of {amounts.sequences_per_shard:,} sequences, chunks of "
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
    return labelled_lines(lines)


def _rate(plan: Plan) -> str:
    return formats.count(plan.amounts.n_tokens / plan.forward_s)


def _spread(plan: Plan) -> str:
    """How much the speed differed between the batches of the sample."""
    fast, slow = (1 / seconds for seconds in plan.measured.forward_s_range)
    typical = 1 / plan.measured.forward_s_per_token
    return f"batches from {formats.percent(slow / typical, 0)} to {formats.percent(fast / typical, 0)} of that speed"


def _presets_table(plan: Plan) -> Table:
    headings = [heading for heading in _HEADINGS if heading != "fits" or plan.free_bytes is not None]
    table = empty_table(headings, left=("preset",))
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
    """The distance to the farther end of a range, in percent."""
    away = max(high / value - 1, 1 - low / value)
    return f" ±{formats.percent(away, 1 if away < 0.095 else 0)}"


def _fits(fits: bool | None, most_bytes: int, free_bytes: int | None) -> str:
    if fits is None or free_bytes is None:
        return ""
    return "[bold red]no[/]" if not fits else "yes" if most_bytes <= free_bytes else "[bold red]perhaps[/]"


def _range_line(plan: Plan) -> str:
    """The ranges of the default preset in full, and what a range means."""
    preset = plan.presets["lossless"]
    low, high = (_size_text(n_bytes + preset.other_bytes) for n_bytes in preset.bytes_range)
    fast, slow = (_time(seconds) for seconds in preset.seconds_range)
    return (
        f"lossless takes {low} to {high} and {fast} to {slow}: as in the best and in the worst of the measured batches"
    )


def _auto_line(preset: PresetPlan) -> str:
    """Which codecs `auto` chose, and for how many sites."""
    chosen = Counter(preset.codecs.values())
    return ", ".join(f"{codec} for {_counted(n, 'site')}" for codec, n in chosen.items())


def _break_even_line(plan: Plan) -> str:
    """When the default preset pays off, and what the given number of epochs takes with a store and without one."""
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
    smaller = " (smaller than requested, to finish in time)" * (measured.batch_sequences < plan.batch_sequences)
    return (
        f"on {measured.n_tokens:,} tokens in batches of {measured.batch_sequences:,}{smaller}; a second of encoding "
        f"delays the model by {measured.contention:.2f} s"
    )


def _counted(n: int, what: str) -> str:
    return f"{n:,} {what}{'s' * (n != 1)}"


def _time(seconds: float) -> str:
    """A duration, in days from two days on."""
    days = seconds / 86400
    return formats.duration(seconds) if days < 2 else f"{days:,.1f} days" if days < 100 else f"{days:,.0f} days"


def _size_text(n_bytes: int) -> str:
    return formats.size(n_bytes) if n_bytes < 1e15 else f"{n_bytes / 1e15:,.2f} PB"


def _money(dollars: float) -> str:
    if dollars >= 1000:
        return f"{dollars:,.0f}"
    return f"{dollars:,.2f}" if dollars >= 0.005 or dollars == 0 else f"{dollars:.1g}"
