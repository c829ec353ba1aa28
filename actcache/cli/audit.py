"""The verb `audit`: whether a store's rows are what its model computes.

In: options, documented where they are defined. Out: a result on stdout (`--json`: one object), an exit code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from actcache.cli.options import Flag, Flat, RunOptions, Strings
from actcache.cli.screen import Screen, empty_table
from actcache.cli.stores import UNSOUND
from actcache.errors import ConfigError

if TYPE_CHECKING:
    from actcache.auditing import Audit
    from actcache.store import Store


def audit(
    store: str,
    /,
    *,
    model: str | None = None,
    run: Annotated[RunOptions | None, Flat] = None,
    sequences: int = 8,
    seed: int = 0,
    sites: Strings = ("*",),  # type: ignore[assignment]  # cyclopts gives a list
    json: Flag = False,
) -> int:
    """Hold rows of a store against what its model computes for their tokens; exit code 2 if they differ.

    Sequences are drawn over all shards. Each is run alone, at its own length, through the whole plain model, and every
    row that the store has of it is compared with what passes the module that the site's name stands for.

    Parameters
    ----------
    store
        The store.
    model
        Base model that it was made from, and options of how that is opened as for "actcache extract"; needed unless it
        was the embedded model.
    sequences
        Sequences to look at.
    seed
        Which ones: the same number and seed draw the same sequences.
    sites
        Names or patterns of the sites to look at.
    json
        Print one JSON object on stdout; progress stays on stderr.
    """
    from actcache.auditing import audit as audit_store
    from actcache.store import open_store

    with Screen(json=json) as screen:
        opened = open_store(store)
        lm = (run or RunOptions()).open(model or _model_of(opened))
        progress = screen.stage("Audit", "sequences")
        found = audit_store(opened, lm, sequences, seed, sites=sites, progress=progress)
        screen.result(found.to_dict(), lambda out: _show(out, found))
    return 0 if found.sound else UNSOUND


def _model_of(store: Store) -> str:
    """The model of a store that says enough to find it again; nothing is opened on a store's word alone."""
    from actcache.lm.load import EMBEDDED_MODEL

    name = store.spec.model.get("name")
    if name == EMBEDDED_MODEL:
        return EMBEDDED_MODEL
    raise ConfigError(
        f"{store.path} was made from {name or 'a model that it does not name'}: say where that is, --model"
    )


def _show(out: Console, found: Audit) -> None:
    verdict = "sound" if found.sound else "NOT what the model computes"
    looked_at = f"{len(found.sequences)} sequences, {found.model} in {found.dtype} on {found.device}"
    out.print(Text(f"{found.path} is {verdict}", style="bold" if found.sound else "bold red"), Text(f"({looked_at})"))
    out.print(_sites(found))
    for site in found.failed:
        for reason in site.reasons:
            out.print(f"[bold red]{escape(site.site)}[/]: {escape(reason)}", highlight=False)


def _sites(found: Audit) -> RenderableType:
    table: Table = empty_table(
        ("site", "error", "allowed", "rows", "worst row", "compared with"), left=("site", "worst row", "compared with")
    )
    for site in found.sites:
        worst = "sequence {sequence}, position {position}, token {token}".format(**site.worst) if site.worst else ""
        table.add_row(
            escape(site.site),
            f"{site.max_relative_error:.2g}" if site.sound else f"[bold red]{site.max_relative_error:.2g}[/]",
            f"{site.tolerance:.2g}",
            f"{site.n_rows:,}",
            worst,
            escape(site.reference),
        )
    return table
