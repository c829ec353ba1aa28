"""The verbs that make a store or add to one: `extract`, `extend`, `add-sites`, `import`.

In: options, documented where they are defined. Out: a result on stdout (`--json`: one object), an exit code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from actcache.cli.options import (
    RUN,
    STORE,
    BatchSequences,
    Codec,
    FlatRun,
    FlatStore,
    FlatText,
    Json,
    ModelName,
    NewStore,
    NoAudit,
    NoFsync,
    RunOptions,
    Sites,
    StoreFlags,
    TextOptions,
    parse_part,
)
from actcache.cli.options import codecs_by_pattern as by_pattern
from actcache.cli.screen import Screen
from actcache.cli.store_view import show_store
from actcache.errors import ConfigError
from actcache.spec import Dtype


def extract(
    *,
    sites: Sites,
    out: NewStore,
    model: ModelName = "stories-4l",
    run: FlatRun = None,
    text: FlatText = None,
    options: FlatStore = None,
    batch_sequences: BatchSequences = None,
    part: Annotated[str | None, Parameter(group=RUN)] = None,
    dask: Annotated[str | None, Parameter(group=RUN)] = None,
    no_audit: NoAudit = False,
    no_fsync: NoFsync = False,
    json: Json = False,
) -> int:
    """Run a model over a text and keep its activations in a store. Run again to continue where it stopped.

    Parameters
    ----------
    part
        `I/N`: make only part I of N, while other processes, here or on other machines, make the others with the same
        command; the last one seals the store.
    dask
        `local:N` for N processes on this machine, or the address of a dask scheduler (`tcp://host:8786`), whose workers
        make the store.
    """
    from actcache.extraction import extract as extract_activations

    if part and dask:
        raise ConfigError("--part and --dask exclude each other: dask's workers share the work among themselves")
    parts = None if part is None else parse_part(part)
    with Screen(json=json) as screen:
        lm = (run or RunOptions()).open(model)
        text = text or TextOptions()
        # A mistyped name is reported before minutes are spent on the text.
        lm.resolve(sites, length=text.length)
        settings: dict[str, Any] = {
            **(options or StoreFlags()).keywords(),
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
            screen.say(f"part {part} is done; the store is sealed when the last part is done")
        show_store(screen, store)
    return 0


def extend(
    store: str,
    /,
    *,
    model: ModelName = "stories-4l",
    run: FlatRun = None,
    text: FlatText = None,
    batch_sequences: BatchSequences = None,
    no_audit: NoAudit = False,
    no_fsync: NoFsync = False,
    json: Json = False,
) -> int:
    """Append sequences to a store. Use --skip-documents to leave out the documents that it already has.

    Parameters
    ----------
    store
        A finished store, or one that is being extended with the same text.
    """
    from actcache.extraction import extend as extend_store

    with Screen(json=json) as screen:
        lm = (run or RunOptions()).open(model)
        blocks = (text or TextOptions()).blocks_for(lm, screen)
        watch = screen.watch("Extract activations")
        settings: dict[str, Any] = {"batch_sequences": batch_sequences, "audit": not no_audit, "durable": not no_fsync}
        show_store(screen, extend_store(lm, store, blocks, watch=watch, **settings))
    return 0


def add_sites(
    store: str,
    /,
    *,
    sites: Sites,
    model: ModelName = "stories-4l",
    run: FlatRun = None,
    codec: Codec = ("lossless",),
    batch_sequences: BatchSequences = None,
    no_audit: NoAudit = False,
    no_fsync: NoFsync = False,
    json: Json = False,
) -> int:
    """Add sites to a store: the model runs over the store's own tokens again, and only the new sites are kept.

    Sites that the store already has are skipped.

    Parameters
    ----------
    store
        A store.
    """
    from actcache.extraction import add_sites as add

    with Screen(json=json) as screen:
        lm = (run or RunOptions()).open(model)
        watch, codecs = screen.watch("Extract activations"), by_pattern(codec)
        settings: dict[str, Any] = {"batch_sequences": batch_sequences, "audit": not no_audit, "durable": not no_fsync}
        show_store(screen, add(lm, store, sites, codec=codecs, watch=watch, **settings))
    return 0


@dataclass(frozen=True, kw_only=True)
class _ImportOptions(StoreFlags):
    """How a store keeps what it is made from: by default all of it, as it is."""

    dtype: Annotated[Dtype | None, Parameter(name=["--store-dtype", "--dtype"])] = None  # type: ignore[assignment]
    """Element type on disk; by default that of the source. A narrower one rounds."""
    skip_first: int = 0
    """Leading positions of each sequence that are not kept: those with the least context."""
    sequences_per_shard: int | None = None
    """Sequences in a shard, the unit of work; by default a quarter of a gigabyte or less."""


def import_store(
    sources: list[str],
    /,
    *,
    out: NewStore,
    format: Literal["saelens", "npy", "safetensors"],  # noqa: A002  # the option's name
    tokens: Path | None = None,
    options: Annotated[_ImportOptions | None, Parameter(name="*", group=STORE)] = None,
    no_fsync: NoFsync = False,
    json: Json = False,
) -> int:
    """Make a store of activations that another tool has cached. Run again to continue where it stopped.

    Parameters
    ----------
    sources
        For `saelens` the folder of the dataset (cached_activations_path); for `npy` HOOK=FILE.npy, once for each hook;
        for `safetensors` HOOK=FOLDER, once for each hook, or the folder that has a folder named like each hook.
    format
        What wrote them: `saelens` (an Arrow dataset), `npy` (sequences x positions x width, or rows x width), or
        `safetensors` (files chunk-N.safetensors with activation, tokens and mask).
    tokens
        With `npy`: an .npy file of token ids; without it they are zeros.
    """
    from actcache.exchange import import_npy, import_saelens, import_safetensors

    if tokens is not None and format != "npy":
        raise ConfigError(f"--tokens goes with --format npy; {format} files have their token ids inside")
    with Screen(json=json) as screen:
        settings: dict[str, Any] = {
            **(options or _ImportOptions()).keywords(),
            "durable": not no_fsync,
            "progress": screen.stage("Import", "sequences"),
        }
        if format == "saelens":
            store = import_saelens(_only(sources), out, **settings)
        elif format == "npy":
            store = import_npy(_by_hook(sources), out, tokens=tokens, **settings)
        else:
            are_named = len(sources) > 1 or "=" in sources[0]
            store = import_safetensors(_by_hook(sources) if are_named else sources[0], out, **settings)
        show_store(screen, store)
    return 0


def _only(sources: Sequence[str]) -> str:
    if len(sources) != 1:
        raise ConfigError(f"--format saelens takes one folder, not {len(sources)}")
    return sources[0]


def _by_hook(sources: Sequence[str]) -> dict[str, str]:
    """`["HOOK=FILE", ...]` as files by hook."""
    found: dict[str, str] = {}
    for source in sources:
        hook, equals, file = source.partition("=")
        if not (hook and equals and file) or hook in found:
            raise ConfigError(f"sources are given as HOOK=PATH, each hook once, not {source!r}")
        found[hook] = file
    return found
