"""The verbs that make a store and look after it. A store is named by a folder or a URL.

In: options, documented where they are defined. Out: a result on stdout (`--json`: one object), an exit code.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any, Literal

from actcache.addresses import shown
from actcache.cli.options import Flag, Flat, ModelOptions, Strings, TextOptions, codecs_by_pattern, part_of, stretch
from actcache.cli.screen import Screen, _place, show_store
from actcache.errors import ConfigError
from actcache.spec import Dtype

UNSOUND = 2


Batch = int | Literal["auto"] | None


def extract(
    *,
    sites: Strings,
    out: str,
    model: Annotated[ModelOptions | None, Flat] = None,
    text: Annotated[TextOptions | None, Flat] = None,
    codec: Strings = ("lossless",),  # type: ignore[assignment]  # cyclopts gives a list
    store_dtype: Dtype = "bfloat16",
    skip_first: int = 1,
    seed: int = 0,
    sequences_per_shard: int | None = None,
    rows_per_chunk: int | None = None,
    batch_sequences: Batch = None,
    part: str | None = None,
    dask: str | None = None,
    no_audit: Flag = False,
    no_fsync: Flag = False,
    json: Flag = False,
) -> int:
    """Run the model over a text once and keep its activations in a store. Run again, it goes on where it stopped.

    Parameters
    ----------
    sites
        Hook names or patterns of them, such as 'blocks.*.hook_mlp_out'; "actcache sites" lists them.
    out
        The store: a folder ending in .zarr, or a URL such as s3://bucket/name.zarr; begun anew, or continued.
    codec
        Preset `raw`, `lossless`, `sparse` or `int8`, `auto`, or the JSON text of a list of Zarr codecs; for some sites
        only as 'PATTERN=CODEC', several times.
    store_dtype
        Element type on disk.
    skip_first
        Leading positions of each sequence that are not kept: those with the least context.
    seed
        Seed of the shuffle of rows within shards.
    sequences_per_shard
        Sequences of a shard, the unit of work; by default 512, fewer where sites are wide.
    rows_per_chunk
        Rows of the unit of reading; by default half a megabyte of the widest site.
    batch_sequences
        Sequences in one forward pass, or `auto`: as many as make this model fast here. By default those of the store
        that is continued, or 32. Halved when memory does not suffice.
    part
        `I/N`: make only part I of N, while other processes, here or on other machines, make the others with the same
        command; the last of them seals the store.
    dask
        `local:N` for N processes of this machine, or the address of a dask scheduler (`tcp://host:8786`), whose workers
        then make the store.
    no_audit
        Seal the store without the small audit that holds some of its rows against the plain model (see "actcache
        audit"). A store whose audit has failed is sealed by this alone.
    no_fsync
        Do not flush what is written to the disk: a little faster, and a power cut may take shards that count.
    json
        Print one JSON object on stdout; events, one JSON object a line, go to stderr.
    """
    from actcache.extraction import extract as extract_activations

    if part and dask:
        raise ConfigError("--part and --dask exclude each other: dask's workers share the work among themselves")
    parts = None if part is None else part_of(part)
    with Screen(json=json) as screen:
        lm = (model or ModelOptions()).load()
        text = text or TextOptions()
        # A mistyped name is reported before minutes are spent on the text.
        lm.resolve(sites, length=text.length)
        settings: dict[str, Any] = {
            "codec": codecs_by_pattern(codec),
            "dtype": store_dtype,
            "skip_first": skip_first,
            "seed": seed,
            "sequences_per_shard": sequences_per_shard,
            "rows_per_chunk": rows_per_chunk,
            "batch_sequences": batch_sequences,
            "audit": not no_audit,
            "durable": not no_fsync,
        }
        blocks = text.blocks_for(lm, screen)
        settings["watch"] = screen.watch("Extract activations")
        if dask is None:
            store = extract_activations(lm, blocks, sites, out, part=parts, **settings)
        else:
            from actcache.cluster import extract_on_cluster

            store = extract_on_cluster(lm, blocks, sites, out, cluster=dask, say=screen.say, **settings)
        if not store.sealed:
            screen.say(f"part {part} is done; the store is sealed when the last part is")
        show_store(screen, store.info())
    return 0


def extend(
    store: str,
    /,
    *,
    model: Annotated[ModelOptions | None, Flat] = None,
    text: Annotated[TextOptions | None, Flat] = None,
    batch_sequences: Batch = None,
    no_audit: Flag = False,
    no_fsync: Flag = False,
    json: Flag = False,
) -> int:
    """Append sequences to a store. Use --skip-documents, so that they are not those that it has.

    Parameters
    ----------
    store
        A finished store, or one that is being extended with the same text.
    batch_sequences
        As for "actcache extract".
    no_audit
        As for "actcache extract".
    no_fsync
        As for "actcache extract".
    json
        Print one JSON object on stdout; progress stays on stderr.
    """
    from actcache.extraction import extend as extend_store

    with Screen(json=json) as screen:
        lm = (model or ModelOptions()).load()
        blocks = (text or TextOptions()).blocks_for(lm, screen)
        watch = screen.watch("Extract activations")
        settings: dict[str, Any] = {"batch_sequences": batch_sequences, "audit": not no_audit, "durable": not no_fsync}
        grown = extend_store(lm, store, blocks, watch=watch, **settings)
        show_store(screen, grown.info())
    return 0


def add_sites(
    store: str,
    /,
    *,
    sites: Strings,
    model: Annotated[ModelOptions | None, Flat] = None,
    codec: Strings = ("lossless",),  # type: ignore[assignment]
    batch_sequences: Batch = None,
    no_audit: Flag = False,
    no_fsync: Flag = False,
    json: Flag = False,
) -> int:
    """Add sites to a store: the model runs over the store's own tokens once more, and only the new sites are kept.

    Parameters
    ----------
    store
        A store.
    sites
        Hook names or patterns; those that the store has already are passed over.
    codec
        As for "actcache extract".
    batch_sequences
        As for "actcache extract".
    no_audit
        As for "actcache extract".
    no_fsync
        As for "actcache extract".
    json
        Print one JSON object on stdout; progress stays on stderr.
    """
    from actcache.extraction import add_sites as add

    with Screen(json=json) as screen:
        lm = (model or ModelOptions()).load()
        watch, codecs = screen.watch("Extract activations"), codecs_by_pattern(codec)
        settings: dict[str, Any] = {"batch_sequences": batch_sequences, "audit": not no_audit, "durable": not no_fsync}
        grown = add(lm, store, sites, codec=codecs, watch=watch, **settings)
        show_store(screen, grown.info())
    return 0


def delete_sites(store: str, sites: list[str], /, *, json: Flag = False) -> int:
    """Take sites out of a store, data and all.

    Parameters
    ----------
    store
        A finished store.
    sites
        Names of sites, written out: no patterns here.
    json
        Print one JSON object on stdout.
    """
    from actcache.store import delete_sites as delete
    from actcache.store import open_store

    with Screen(json=json) as screen:
        delete(store, sites)
        show_store(screen, open_store(store).info())
    return 0


def export(
    store: str,
    /,
    *,
    out: str,
    sites: Strings = ("*",),  # type: ignore[assignment]
    codec: Strings = (),  # type: ignore[assignment]
    sequences: str | None = None,
    rows: str | None = None,
    sequences_per_shard: int | None = None,
    rows_per_chunk: int | None = None,
    format: Literal["zarr", "saelens"] = "zarr",  # noqa: A002  # the option's name
    no_fsync: Flag = False,
    json: Flag = False,
) -> int:
    """Copy a store, or a part of it, into a new one, perhaps with other codecs or sizes. Run again, it goes on.

    Parameters
    ----------
    store
        A finished store.
    out
        The new store: a folder ending in .zarr, or a URL.
    sites
        Names or patterns of the sites to take.
    codec
        As for "actcache extract"; by default every site keeps its own.
    sequences
        Sequences to take, as START:STOP.
    rows
        Row ids to take, as START:STOP.
    sequences_per_shard
        Sequences of a shard; by default the store's.
    rows_per_chunk
        Rows of the unit of reading; by default the store's, where it fits.
    format
        `zarr`, a store; or `saelens`, a folder that SAELens trains from (of whole sites, so with --sites only).
    no_fsync
        As for "actcache extract".
    json
        Print one JSON object on stdout; progress stays on stderr.
    """
    from actcache.cli.exchange import export_to_saelens
    from actcache.store import export as export_store
    from actcache.store import open_store

    if format == "saelens":
        if codec or sequences or rows or sequences_per_shard or rows_per_chunk:
            raise ConfigError("--format saelens takes whole sites: of the options only --sites goes with it")
        return export_to_saelens(store, out, sites, json=json)
    with Screen(json=json) as screen:
        taken = None if sequences is None else stretch("--sequences", sequences)
        copied = export_store(
            open_store(store),
            out,
            sites=sites,
            codec=codecs_by_pattern(codec) if codec else None,
            sequences=None if taken is None else range(taken.start, taken.stop),
            rows=None if rows is None else stretch("--rows", rows),
            sequences_per_shard=sequences_per_shard,
            rows_per_chunk=rows_per_chunk,
            durable=not no_fsync,
            progress=screen.stage("Export", "shards"),
        )
        show_store(screen, copied.info())
    return 0


def info(store: str, /, *, json: Flag = False) -> int:
    """Say what a store holds, how far it is, how large, and the statistics of its sites (NaN and Inf counted).

    Parameters
    ----------
    store
        The store.
    json
        Print one JSON object on stdout.
    """
    from actcache.store import open_store

    with Screen(json=json) as screen:
        show_store(screen, open_store(store).info())
    return 0


def verify(store: str, /, *, sample: float = 1.0, json: Flag = False) -> int:
    """Read every byte of a store and check it; exit code 2 if anything is not as it was written.

    Parameters
    ----------
    store
        The store.
    sample
        Share of the shards to check, for a quick look: 0.05 reads a twentieth.
    json
        Print one JSON object on stdout; progress stays on stderr.
    """
    from actcache.store import verify as verify_store

    with Screen(json=json) as screen:
        found = verify_store(store, sample=sample, progress=screen.stage("Verify", "columns"))
        faults = [asdict(fault) for fault in found]
        lines = [f"{_place(f['column'], f['shard'])}: {f['reason']}" for f in faults]
        way_out = f"found {len(faults)} fault{'s' * (len(faults) > 1)}; see 'actcache repair --help'"
        place = shown(store)
        sound = f"{place} is sound" if sample == 1 else f"{place}: no fault in the {100 * sample:g} % of it looked at"
        said = "\n".join([*lines, way_out]) if faults else sound
        if found.not_bound:
            shards = len({shard for shards in found.not_bound.values() for shard in shards})
            said += f"\n{shards:,} shards of an earlier version do not say which tokens their values belong to"
        payload = {"path": place, "sound": not faults, "sample": sample, "faults": faults, "not_bound": found.not_bound}
        screen.result(payload, lambda out: out.print(said, markup=False, highlight=False))
    return UNSOUND if faults else 0


def repair(store: str, /, *, unlock: Flag = False, json: Flag = False) -> int:
    """Verify a store and open its faulty shards again, so that the extract command that made it makes them anew.

    A damaged ledger is written anew at once. Damaged tokens or root attributes cannot be mended: everything else was
    made from them, so the store must be extracted anew.

    Parameters
    ----------
    store
        The store.
    unlock
        Only take away the lock that a writer on another machine has left; make sure first that it is gone.
    json
        Print one JSON object on stdout; progress stays on stderr.
    """
    from actcache.store import repair as repair_store
    from actcache.store import unlock as unlock_store
    from actcache.store import verify as verify_store

    place = shown(store)
    with Screen(json=json) as screen:
        if unlock:
            said = f"the lock of {place} is taken away" if unlock_store(store) else f"{place} was not locked"
            screen.result({"path": place, "said": said}, lambda out: out.print(said, markup=False, highlight=False))
            return 0
        faults = verify_store(store, progress=screen.stage("Verify", "columns"))
        shards = repair_store(store, faults)
        opened = f"shards {', '.join(map(str, shards))} are open again; repeat the extract command to make them anew"
        mended = (
            "the ledger was damaged, and was written anew from the commit records" if faults else f"{place} is sound"
        )
        payload = {"path": place, "shards": shards}
        screen.result(payload, lambda out: out.print(opened if shards else mended, markup=False, highlight=False))
    return 0
