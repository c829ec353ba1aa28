"""The verb `import`, and what `export --format saelens` does: activations from and for other tools.

In: options, documented where they are defined. Out: a result on stdout (`--json`: one object), an exit code.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from actcache.cli.options import Flag, Strings, codecs_by_pattern
from actcache.cli.screen import Screen, show_store
from actcache.errors import ConfigError
from actcache.spec import Dtype


def import_store(
    sources: list[str],
    /,
    *,
    format: Literal["saelens", "npy", "safetensors"],  # noqa: A002  # the option's name
    out: str,
    tokens: Path | None = None,
    codec: Strings = ("lossless",),  # type: ignore[assignment]  # cyclopts gives a list
    dtype: Dtype | None = None,
    skip_first: int = 0,
    seed: int = 0,
    sequences_per_shard: int | None = None,
    rows_per_chunk: int | None = None,
    no_fsync: Flag = False,
    json: Flag = False,
) -> int:
    """Make a store of activations that another tool has cached. Run again, it goes on where it stopped.

    Parameters
    ----------
    sources
        For `saelens` the folder of the dataset (cached_activations_path); for `npy` HOOK=FILE.npy, once a hook; for
        `safetensors` HOOK=FOLDER, once a hook, or the folder above folders that are named like the hooks.
    format
        Who wrote it: `saelens` (an Arrow dataset), `npy` (sequences x positions x width, or rows x width), or
        `safetensors` (files chunk-N.safetensors with activation, tokens and mask).
    out
        The store: a folder ending in .zarr, or a URL; begun anew, or continued.
    tokens
        With `npy`: an .npy file of token ids; without it they are zeros.
    codec
        As for "actcache extract".
    dtype
        Element type on disk; by default that of the source. A narrower one rounds.
    skip_first
        Leading positions of each sequence that are not kept.
    seed
        Seed of the shuffle of rows within shards.
    sequences_per_shard
        Sequences of a shard; by default a quarter of a gigabyte or less.
    rows_per_chunk
        Rows of the unit of reading; by default half a megabyte.
    no_fsync
        As for "actcache extract".
    json
        Print one JSON object on stdout; progress stays on stderr.
    """
    from actcache.exchange import import_npy, import_saelens, import_safetensors

    if tokens is not None and format != "npy":
        raise ConfigError(f"--tokens goes with --format npy; {format} files have their token ids inside")
    with Screen(json=json) as screen:
        options: dict[str, Any] = {
            "codec": codecs_by_pattern(codec),
            "dtype": dtype,
            "skip_first": skip_first,
            "seed": seed,
            "sequences_per_shard": sequences_per_shard,
            "rows_per_chunk": rows_per_chunk,
            "durable": not no_fsync,
            "progress": screen.stage("Import", "sequences"),
        }
        if format == "saelens":
            store = import_saelens(_the_only(sources), out, **options)
        elif format == "npy":
            store = import_npy(_by_hook(sources), out, tokens=tokens, **options)
        else:
            named = len(sources) > 1 or "=" in sources[0]
            store = import_safetensors(_by_hook(sources) if named else sources[0], out, **options)
        show_store(screen, store.info())
    return 0


def export_to_saelens(store: str, out: str, sites: Sequence[str], *, json: bool) -> int:
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


def _the_only(sources: Sequence[str]) -> str:
    if len(sources) != 1:
        raise ConfigError(f"--format saelens takes one folder, not {len(sources)}")
    return sources[0]


def _by_hook(sources: Sequence[str]) -> dict[str, str]:
    """`["HOOK=FILE", ...]` as hooks and files."""
    found: dict[str, str] = {}
    for source in sources:
        hook, equals, file = source.partition("=")
        if not (hook and equals and file) or hook in found:
            raise ConfigError(f"sources are given as HOOK=PATH, each hook once, not {source!r}")
        found[hook] = file
    return found
