"""One tree of errors; each is also the builtin that a caller would expect.

ActcacheError
├── ConfigError(ValueError)            an option is outside its range, or options contradict each other
├── TextError(ValueError)              no text, or not enough
├── ModelNotFoundError(FileNotFoundError)
├── SiteError(KeyError)                a hook name or pattern that matches nothing
├── StoreError(ValueError)             the store cannot be used as asked
│   ├── StoreNotFoundError(FileNotFoundError)
│   ├── NotAStoreError                 the folder holds something other than a store
│   ├── StoreVersionError              written by a newer version of the format
│   ├── StoreMismatchError             another model, text or spec than that of the store
│   ├── StoreIncompleteError           not sealed yet
│   └── StoreBusyError                 another writer is writing it
├── CorruptShardError(OSError)         what is on disk is not what was written
├── AuditError(ValueError)             what is stored is not what the model computes
├── StorageFullError(OSError)          no room; once there is, the same command continues
├── ClusterError(RuntimeError)         workers cannot be reached, or die or fail at the same work again and again
├── ServingError(ConnectionError)      the server of batches is missing, refuses, or is gone
├── RunNotFoundError(FileNotFoundError)
├── TrainingError(RuntimeError)        the loss has become infinite or NaN
└── StateError(ValueError)             a saved state that belongs to something else
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its type where it says nothing."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


class ActcacheError(Exception):
    """Base of every error that the library raises on purpose; its message is written for the user.

    Examples:
        >>> try:
        ...     ac.open_store("nowhere.zarr")
        ... except ac.ActcacheError as error:
        ...     print(type(error).__name__, isinstance(error, FileNotFoundError))
        StoreNotFoundError True
    """


class ConfigError(ActcacheError, ValueError):
    """An option is outside its range, or options contradict each other."""


class TextError(ActcacheError, ValueError):
    """There is no text, or not enough."""


class ModelNotFoundError(ActcacheError, FileNotFoundError):
    """There is no base model of that name or in that folder."""


class SiteError(ActcacheError, KeyError):
    """A hook name or pattern that matches nothing in the model or the store."""

    def __str__(self) -> str:
        # KeyError would show the repr of its argument.
        return str(self.args[0]) if self.args else ""


class StoreError(ActcacheError, ValueError):
    """The store cannot be used as asked."""


class StoreNotFoundError(StoreError, FileNotFoundError):
    """There is no store at that place."""


class NotAStoreError(StoreError):
    """There is something at that place, but not an activation store."""


class StoreVersionError(StoreError):
    """The store was written by a newer version of the format."""


class StoreMismatchError(StoreError):
    """The store was begun with another model, text or spec."""


class StoreIncompleteError(StoreError):
    """The store is not sealed: some of its shards are not written yet."""


class StoreBusyError(StoreError):
    """Another process, or another writer in this one, is writing the store."""


class CorruptShardError(ActcacheError, OSError):
    """What is on disk is not what was written. Damaged values are never replaced by zeros or guesses.

    Args:
        reason: what is wrong, and where.
        store: the store that `actcache verify` should check; None where the reason itself says what to do.
    """

    def __init__(self, reason: str, *, store: object = None) -> None:
        super().__init__(reason)
        self.reason = reason
        """What is wrong, and where."""
        self.way_out = "" if store is None else f"run 'actcache verify {store}'"
        """What to do about it; empty where the reason says so itself."""

    def __str__(self) -> str:
        return f"{self.reason}; {self.way_out}" if self.way_out else self.reason


class AuditError(ActcacheError, ValueError):
    """An audit has found that what is stored is not what the model computes."""

    def __init__(self, message: str, entry: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.entry = dict(entry or {})
        """The audit's entry in the store's provenance, JSON-able."""


class StorageFullError(ActcacheError, OSError):
    """There is no room left; once there is, the same command continues."""


class ClusterError(ActcacheError, RuntimeError):
    """The workers of a cluster cannot be reached, or die or fail at the same work again and again."""


class ServingError(ActcacheError, ConnectionError):
    """The server that a loader's batches come from is missing, refuses, or is gone."""


class RunNotFoundError(ActcacheError, FileNotFoundError):
    """The folder is not a run directory: it has no `metrics.json`."""


class TrainingError(ActcacheError, RuntimeError):
    """The training loss has become infinite or NaN, because of the data or of the settings."""


class StateError(ActcacheError, ValueError):
    """A saved state that belongs to another version, store or setting."""
