"""One tree of errors; each is also the builtin that a caller would expect.

ActcacheError
├── ConfigError(ValueError)            an option is outside its range, or options contradict each other
├── TextError(ValueError)              no text, or too little of it
├── ModelNotFoundError(FileNotFoundError)
├── SiteError(KeyError)                a hook name or pattern that matches nothing
├── StoreError(ValueError)             the store cannot be used as asked
│   ├── StoreNotFoundError(FileNotFoundError)
│   ├── NotAStoreError                 the folder holds something else
│   ├── StoreVersionError              written by a newer version of the format
│   ├── StoreMismatchError             another model, text or spec than the store was begun with
│   ├── StoreIncompleteError           not sealed yet
│   └── StoreBusyError                 somebody else is writing it
├── CorruptShardError(OSError)         what is on disk is not what was written
├── AuditError(ValueError)             what is stored is not what the model computes
├── StorageFullError(OSError)          no room; the same command continues once there is
├── ClusterError(RuntimeError)         workers cannot be reached, or die or fail at the same work again and again
├── ServingError(ConnectionError)      the server of batches is not there, refuses, or is gone
├── RunNotFoundError(FileNotFoundError)
├── TrainingError(RuntimeError)        the loss is not finite any more
└── StateError(ValueError)             a saved state that belongs to something else
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its type where it says nothing."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


class ActcacheError(Exception):
    """Base of every error that the library raises on purpose; its message is written for the user."""


class ConfigError(ActcacheError, ValueError):
    """An option is outside its range, or options contradict each other."""


class TextError(ActcacheError, ValueError):
    """There is no text, or too little of it."""


class ModelNotFoundError(ActcacheError, FileNotFoundError):
    """No base model by that name or in that folder."""


class SiteError(ActcacheError, KeyError):
    """A hook name or pattern that matches nothing in the model or the store."""

    def __str__(self) -> str:
        # KeyError shows the repr of its argument; a message is meant to be read.
        return str(self.args[0]) if self.args else ""


class StoreError(ActcacheError, ValueError):
    """The store cannot be used as asked."""


class StoreNotFoundError(StoreError, FileNotFoundError):
    """There is no store at that place."""


class NotAStoreError(StoreError):
    """There is something at that place, but no activation store."""


class StoreVersionError(StoreError):
    """The store was written by a newer version of the format."""


class StoreMismatchError(StoreError):
    """The store was begun with another model, text or spec."""


class StoreIncompleteError(StoreError):
    """The store is not sealed: some of its shards are still to be written."""


class StoreBusyError(StoreError):
    """Another process, or another writer in this one, is writing the store."""


class CorruptShardError(ActcacheError, OSError):
    """What is on disk is not what was written; never answered with zeros or guesses.

    Args:
        reason: what is wrong, and where.
        store: the store that `actcache verify` should look at; None where the reason itself says what to do.
    """

    def __init__(self, reason: str, *, store: object = None) -> None:
        super().__init__(reason)
        self.reason = reason
        """What is wrong, and where."""
        self.way_out = "" if store is None else f"run 'actcache verify {store}'"
        """What to do about it; empty where the reason says it."""

    def __str__(self) -> str:
        return f"{self.reason}; {self.way_out}" if self.way_out else self.reason


class AuditError(ActcacheError, ValueError):
    """What is stored is not what the model computes, as far as an audit has looked."""

    def __init__(self, message: str, entry: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.entry = dict(entry or {})
        """What the store's provenance keeps of the audit, JSON-able."""


class StorageFullError(ActcacheError, OSError):
    """No room left; the same command continues once there is."""


class ClusterError(ActcacheError, RuntimeError):
    """The workers of a cluster cannot be reached, or die or fail at the same work again and again."""


class ServingError(ActcacheError, ConnectionError):
    """The server that a loader's batches come from is not there, refuses, or is gone."""


class RunNotFoundError(ActcacheError, FileNotFoundError):
    """The folder is no run directory: it has no `metrics.json`."""


class TrainingError(ActcacheError, RuntimeError):
    """The training loss is not finite any more: of what is trained on, or of how."""


class StateError(ActcacheError, ValueError):
    """A saved state that belongs to another version, store or setting."""
