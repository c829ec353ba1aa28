"""Whether what a caller gave is an open store."""

from __future__ import annotations

from typing import Any

from actcache.errors import ConfigError
from actcache.files import shown
from actcache.store.reader import Store


def checked_store(store: Any, who: str) -> Store:
    """An open store; where a path was given, the message says how to open it."""
    if not isinstance(store, Store):
        raise ConfigError(f"{who}: store must be an open store, such as open_store({shown(store)})")
    return store
