"""Nothing is made inside a store, which holds only its own objects.

A store in a store is deleted with a site, copied with its neighbours and shown by every reader of Zarr as a part of the
outer one. So everything that makes a folder asks here first.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from actcache.errors import ConfigError, CorruptShardError, NotAStoreError, StoreNotFoundError, StoreVersionError
from actcache.store.backends.objects import Objects
from actcache.store.format.root import read_root


def refuse_inside_store(path: str | Path, *, itself: bool = True) -> None:
    """Raise unless a place lies outside every activation store.

    Args:
        path: a folder or URL, which need not be there yet.
        itself: whether the place may not be a store either.

    Raises:
        ConfigError: it lies in a store; the message names both.
    """
    for place in _places(path, itself):
        if _is_store(place):
            raise ConfigError(
                f"{path} lies in the activation store {place}, which holds nothing but its own data; name a place "
                "outside it"
            )


def _places(path: str | Path, itself: bool) -> Iterator[str]:
    """A place and all that it lies in, the nearest first."""
    if "://" not in str(path):
        here = Path(os.path.realpath(Path(path).expanduser()))
        yield from map(str, (here, *here.parents) if itself else here.parents)
        return
    url = urlsplit(str(path))
    parts = url.path.rstrip("/").split("/")
    for n_parts in range(len(parts) - (not itself), 1, -1):
        yield url._replace(path="/".join(parts[:n_parts])).geturl()


def _is_store(place: str) -> bool:
    try:
        objects = Objects(place, read_only=True)
        if objects.size("zarr.json") < 0:
            return False
        read_root(objects)
    except (NotAStoreError, StoreNotFoundError, ConfigError):
        return False
    except OSError as error:  # an unreadable folder says nothing; a damaged store is a store
        return isinstance(error, CorruptShardError)
    except StoreVersionError:
        return True
    return True
