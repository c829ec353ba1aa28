"""Delete sites from a store.

The store without them is sealed first, then their data goes: an interruption leaves a valid store.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from actcache.errors import SiteError, StoreIncompleteError
from actcache.store.backends.objects import Objects, to_write
from actcache.store.format.keys import columns_of, site_prefix
from actcache.store.format.root import Root, read_root, write_root
from actcache.store.locks.lock import WriterLock
from actcache.store.store import Store
from actcache.store.writing.growth import remove_site
from actcache.store.writing.seal import check_complete, seal


def delete_sites(path: str | Path | Objects, names: list[str]) -> None:
    """Delete sites from a sealed store. After a crash the same call finishes what was begun.

    Raises:
        SiteError: no such site. ConfigError: no site would be left. StoreIncompleteError: the store is not finished.
        CorruptShardError: what stays is damaged; nothing has been changed.

    Examples:
        >>> fewer = ac.export(store, "fewer-sites.zarr")
        >>> ac.delete_sites("fewer-sites.zarr", ["blocks.3.mlp.hook_in"])
        >>> ac.open_store("fewer-sites.zarr").sites
        ['blocks.3.hook_mlp_out']
    """
    objects = to_write(path)
    read_root(objects)  # if there is no store, the lock must not make a folder
    with WriterLock(objects):
        root = read_root(objects)
        store = Store(objects, root)
        store.check()
        objects.remove_partial_writes()
        stay = tuple(site for site in root.spec.sites if site.name not in names)
        for name in names:
            begun = next(objects.list(site_prefix(name)), None) is not None
            if name not in columns_of(root.spec)[1:] and not begun:
                raise SiteError(f"no site {name!r} in {objects}; there are {', '.join(columns_of(root.spec)[1:])}")
        if stay != root.spec.sites:
            if root.state != "sealed":
                raise StoreIncompleteError(f"{objects} is not finished; finish 'actcache extract' first")
            spec = replace(root.spec, sites=stay)
            complete = check_complete(objects, spec, root)
            write_root(objects, Root(state="open", spec=spec, provenance=root.provenance))
            seal(objects, complete)
        elif root.state == "open" and len(store.committed) == root.spec.n_shards:
            seal(objects)
        for name in names:
            remove_site(objects, name)
