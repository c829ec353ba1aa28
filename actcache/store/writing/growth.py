"""What may change about an existing store: nothing, unless it is asked to grow by sequences or by sites.

A growing store stays what it was as long as possible. New shards and new sites are written beside the old ones under a
root that does not know them, and the root changes when all is there. Only a last shard that was not full has to be
taken back before it can be made again, and it is made last.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from actcache.errors import CorruptShardError, StoreMismatchError
from actcache.spec import StoreSpec, TokenBlocks
from actcache.store.backends.objects import Objects
from actcache.store.format import metadata
from actcache.store.format.keys import ROWS, TOKEN_ARRAYS, columns_of, commit_key, site_prefix
from actcache.store.format.records import committed_shards
from actcache.store.format.root import Root, read_root
from actcache.store.store import Store


def check_same_spec(objects: Objects, found: StoreSpec, asked: StoreSpec) -> None:
    """Raise `StoreMismatchError`, listing every difference, unless both specs are equal."""
    differences = list(_differences(_by_site(found), _by_site(asked)))
    if differences:
        raise StoreMismatchError(
            f"the store at {objects} was begun with other settings, so it is left as it is:\n  "
            + "\n  ".join(differences)
            + "\nname another place, or give the settings of the store"
        )


def _by_site(spec: StoreSpec) -> dict[str, Any]:
    plain = spec.to_dict()
    return {
        **plain,
        "sites": {site.name: {**site.to_dict(), "meaning": site.meaning and str(site.meaning)} for site in spec.sites},
        "order of sites": [site.name for site in spec.sites],
    }


def _differences(found: Any, asked: Any, where: str = "") -> Iterator[str]:
    if isinstance(found, dict) and isinstance(asked, dict):
        for key in sorted({*found, *asked}):
            yield from _differences(found.get(key), asked.get(key), f"{where}.{key}".lstrip("."))
    elif found != asked:
        yield f"{where}: the store has {found!r}, asked for {asked!r}"


def check_growth(objects: Objects, found: StoreSpec, asked: StoreSpec, blocks: TokenBlocks) -> None:
    """Raise `StoreMismatchError` unless `asked` is the store's spec with more sequences at the end, or more sites."""
    expected = replace(asked, sites=asked.sites[: len(found.sites)])
    if asked.n_sequences != found.n_sequences:
        expected = replace(expected, n_sequences=found.n_sequences, text=found.text)
    check_same_spec(objects, found, expected)
    if asked.n_sequences < found.n_sequences:
        raise StoreMismatchError(
            f"{objects} has {found.n_sequences:,} sequences, asked for {asked.n_sequences:,}; a store only grows, "
            "'actcache export' makes a smaller one"
        )
    store = Store(objects, read_root(objects))
    for name in TOKEN_ARRAYS:
        stored = store.tokens(name)
        if not np.array_equal(stored, getattr(blocks, name)[: len(stored)]):
            raise StoreMismatchError(
                f"the first {len(stored):,} sequences are not those of {objects}; give its tokens, followed by the new "
                "ones"
            )


def clear_leftovers(objects: Objects, found: StoreSpec, asked: StoreSpec, blocks: TokenBlocks) -> None:
    """Un-commit what an earlier attempt to grow has left, unless it is of these tokens and settings."""
    for site in asked.sites[len(found.sites) :]:
        if any(True for _ in metadata.differences(objects, asked, site)):
            remove_site(objects, site.name)
    reader = Store(objects, Root(state="open", spec=asked), lies_there=False)
    columns = columns_of(asked)
    committed = {name: committed_shards(objects, name) for name in columns}
    for shard in sorted(set().union(*committed.values())):
        # Without a row table nothing says which tokens a site's record belongs to.
        behind = found.n_shards <= shard < asked.n_shards
        if behind and not (shard in committed[ROWS] and _fits(reader, shard, blocks)):
            for name in columns:
                objects.delete(commit_key(name, shard))
    objects.flush()  # before any of it is written again


def _fits(reader: Store, shard: int, blocks: TokenBlocks) -> bool:
    """Whether a shard's row table reaches its last sequence and lists, for each row, the token that is there."""
    try:
        table = reader.shard_row_table(shard)
    except CorruptShardError:
        return False
    sequences = reader.spec.shard_sequences(shard)
    if not len(table["sequence"]) or table["sequence"].max() != sequences[-1]:
        return False
    ids = np.asarray(blocks.ids[sequences.start : sequences.stop])
    return bool((ids[table["sequence"] - sequences.start, table["position"]] == table["token"]).all())


def remove_site(objects: Objects, name: str) -> None:
    """Remove a site's objects, its records first, so that what an interruption leaves does not count."""
    for prefix in (f"{site_prefix(name)}/commit", site_prefix(name)):
        objects.delete_all(prefix)
        objects.flush()
