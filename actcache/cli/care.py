"""The verbs that look after a store: `verify`, `audit`, `repair`, `delete-sites`, `export`.

In: options, documented where they are defined. Out: a result on stdout (`--json`: one object), an exit code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from actcache.addresses import shown
from actcache.cli.options import (
    MODEL,
    STORE,
    Codec,
    Flag,
    FlatRun,
    Json,
    NewStore,
    NoFsync,
    RunOptions,
    Sites,
    codecs_by_pattern,
    parse_range,
)
from actcache.cli.screen import UNSOUND, Screen, empty_table
from actcache.cli.store_view import show_store
from actcache.errors import ConfigError

if TYPE_CHECKING:
    from actcache.auditing import Audit
    from actcache.store import Store


def verify(store: str, /, *, sample: float = 1.0, json: Json = False) -> int:
    """Read every byte of a store and check it; exit code 2 if anything has changed since it was written.

    Parameters
    ----------
    store
        A store.
    sample
        Share of the shards to check, for a quick look: 0.05 reads a twentieth.
    """
    from actcache.store import verify as verify_store

    with Screen(json=json) as screen:
        found = verify_store(store, sample=sample, progress=screen.stage("Verify", "columns"))
        faults = [asdict(fault) for fault in found]
        lines = [f"{_location(f['column'], f['shard'])}: {f['reason']}" for f in faults]
        way_out = f"found {len(faults)} fault{'s' * (len(faults) > 1)}; see 'actcache repair --help'"
        place = shown(store)
        sound = f"{place} is sound" if sample == 1 else f"{place}: no fault in the {100 * sample:g} % that were checked"
        said = "\n".join([*lines, way_out]) if faults else sound
        if found.not_bound:
            shards = len({shard for shards in found.not_bound.values() for shard in shards})
            said += f"\n{shards:,} shards of an earlier version do not say which tokens their values belong to"
        payload = {"path": place, "sound": not faults, "sample": sample, "faults": faults, "not_bound": found.not_bound}
        screen.result(payload, lambda out: out.print(said, markup=False, highlight=False))
    return UNSOUND if faults else 0


def _location(column: str, shard: int) -> str:
    return f"{column}, shard {shard}" if shard >= 0 else column


def audit(
    store: str,
    /,
    *,
    sites: Sites = ("*",),
    model: Annotated[str | None, Parameter(group=MODEL)] = None,
    run: FlatRun = None,
    count: Annotated[int, Parameter(name=["--count", "--sequences"])] = 8,
    seed: int = 0,
    json: Json = False,
) -> int:
    """Compare rows of a store with what its model computes for their tokens; exit code 2 if they differ.

    Sequences are drawn from all shards. Each is run alone, at its own length, through the whole plain model, and every
    row that the store has of it is compared with what passes the module that the site's name stands for.

    Parameters
    ----------
    store
        A store.
    model
        The base model that the store was made from; needed unless that is the embedded one.
    count
        Sequences to compare.
    seed
        Which ones: the same number and seed draw the same sequences.
    """
    from actcache.auditing import audit as audit_store
    from actcache.store import open_store

    with Screen(json=json) as screen:
        opened = open_store(store)
        lm = (run or RunOptions()).open(model or _model_of(opened))
        progress = screen.stage("Audit", "sequences")
        found = audit_store(opened, lm, count, seed, sites=sites, progress=progress)
        screen.result(found.to_dict(), lambda out: _show_audit(out, found))
    return 0 if found.sound else UNSOUND


def _model_of(store: Store) -> str:
    """The embedded model, if the store is of that; other models are never opened because a store names them."""
    from actcache.lm.load import EMBEDDED_MODEL

    name = store.spec.model.get("name")
    if name == EMBEDDED_MODEL:
        return EMBEDDED_MODEL
    raise ConfigError(
        f"{store.path} was made from {name or 'a model that it does not name'}: say where that is with --model"
    )


def _show_audit(out: Console, found: Audit) -> None:
    verdict = "sound" if found.sound else "NOT what the model computes"
    compared = f"{len(found.sequences)} sequences, {found.model} in {found.dtype} on {found.device}"
    out.print(Text(f"{found.path} is {verdict}", style="bold" if found.sound else "bold red"), Text(f"({compared})"))
    out.print(_audit_table(found))
    for site in found.failed:
        for reason in site.reasons:
            out.print(f"[bold red]{escape(site.site)}[/]: {escape(reason)}", highlight=False)


def _audit_table(found: Audit) -> Table:
    headings = ("site", "error", "allowed", "rows", "worst row", "compared with")
    table = empty_table(headings, left=("site", "worst row", "compared with"))
    for site in found.sites:
        worst = "sequence {sequence}, position {position}, token {token}".format(**site.worst) if site.worst else ""
        error = f"{site.max_relative_error:.2g}"
        table.add_row(
            escape(site.site),
            error if site.sound else f"[bold red]{error}[/]",
            f"{site.tolerance:.2g}",
            f"{site.n_rows:,}",
            worst,
            escape(site.reference),
        )
    return table


def repair(store: str, /, *, unlock: Flag = False, json: Json = False) -> int:
    """Verify a store and reopen its faulty shards, so that the extract command that made it makes them again.

    A damaged ledger is written again at once. Damaged tokens or root attributes cannot be repaired: everything else was
    made from them, so the store must be extracted again.

    Parameters
    ----------
    store
        A store.
    unlock
        Only remove the lock that a writer on another machine has left; first make sure that this writer has ended.
    """
    from actcache.store import repair as repair_store
    from actcache.store import unlock as unlock_store
    from actcache.store import verify as verify_store

    place = shown(store)
    with Screen(json=json) as screen:
        if unlock:
            said = f"the lock of {place} is removed" if unlock_store(store) else f"{place} was not locked"
            screen.result({"path": place, "said": said}, lambda out: out.print(said, markup=False, highlight=False))
            return 0
        faults = verify_store(store, progress=screen.stage("Verify", "columns"))
        shards = repair_store(store, faults)
        if shards:
            said = f"shards {', '.join(map(str, shards))} are open again; repeat the extract command to make them again"
        elif faults:
            said = "the ledger was damaged, and was written again from the commit records"
        else:
            said = f"{place} is sound"
        screen.result({"path": place, "shards": shards}, lambda out: out.print(said, markup=False, highlight=False))
    return 0


def delete_sites(store: str, /, sites: list[str], *, json: Json = False) -> int:
    """Delete sites of a store and their data.

    Parameters
    ----------
    store
        A finished store.
    sites
        Names of the sites, written out: no patterns here.
    """
    from actcache.store import delete_sites as delete
    from actcache.store import open_store

    with Screen(json=json) as screen:
        delete(store, sites)
        show_store(screen, open_store(store))
    return 0


def export(
    store: str,
    /,
    *,
    sites: Sites = ("*",),
    out: NewStore,
    format: Literal["zarr", "saelens"] = "zarr",  # noqa: A002  # the option's name
    sequences: str | None = None,
    rows: str | None = None,
    codec: Annotated[Codec, Parameter(show_default=False)] = (),
    sequences_per_shard: Annotated[int | None, Parameter(group=STORE)] = None,
    rows_per_chunk: Annotated[int | None, Parameter(group=STORE)] = None,
    no_fsync: NoFsync = False,
    json: Json = False,
) -> int:
    """Copy a store, or a part of it, into a new one. Run again to continue where it stopped.

    The copy may have other codecs and sizes; by default it has those of the store.

    Parameters
    ----------
    store
        A finished store.
    format
        `zarr`, a store; or `saelens`, a folder that SAELens trains from (of whole sites, so with --sites only).
    sequences
        Sequences to copy, as START:STOP.
    rows
        Row ids to copy, as START:STOP.
    sequences_per_shard
        Sequences in a shard, the unit of work; by default as in the store.
    rows_per_chunk
        Rows in a chunk, the unit of reading; by default as in the store, where that fits.
    """
    from actcache.store import export as export_store
    from actcache.store import open_store

    if format == "saelens":
        if codec or sequences or rows or sequences_per_shard or rows_per_chunk:
            raise ConfigError("--format saelens takes whole sites: of the options only --sites goes with it")
        return _export_to_saelens(store, out, sites, json=json)
    with Screen(json=json) as screen:
        taken = None if sequences is None else parse_range("--sequences", sequences)
        copied = export_store(
            open_store(store),
            out,
            sites=sites,
            codec=codecs_by_pattern(codec) if codec else None,
            sequences=None if taken is None else range(taken.start, taken.stop),
            rows=None if rows is None else parse_range("--rows", rows),
            sequences_per_shard=sequences_per_shard,
            rows_per_chunk=rows_per_chunk,
            durable=not no_fsync,
            progress=screen.stage("Export", "shards"),
        )
        show_store(screen, copied)
    return 0


def _export_to_saelens(store: str, out: str, sites: Sequence[str], *, json: bool) -> int:
    """Write a store as a dataset that SAELens trains from."""
    from actcache.exchange import export_saelens
    from actcache.store import open_store

    with Screen(json=json) as screen:
        source = open_store(store)
        folder = export_saelens(source, out, sites=sites, progress=screen.stage("Export", "shards"))
        length = source.spec.rows_per_sequence
        said = f"{folder}: {source.spec.n_sequences:,} sequences; train with use_cached_activations=True, "
        said += f"cached_activations_path={str(folder)!r}, context_size={length}"
        payload = {"path": str(folder), "n_sequences": source.spec.n_sequences, "context_size": length}
        screen.result(payload, lambda out: out.print(said, markup=False, highlight=False))
    return 0
