"""A guard under which this thread starts no process.

transformer-lens installs packages with pip while it opens a multimodal model. Looking at a model must change nothing,
so what it starts is refused as if by the system, and it goes on without.
"""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

_WAYS: list[tuple[Any, str]] = [(subprocess.Popen, "__init__")]
_WAYS += [(subprocess, name) for name in ("run", "call", "check_call", "check_output")]
_WAYS += [(os, name) for name in ("system", "fork", "forkpty", "posix_spawn", "posix_spawnp", "execv", "execve")]

_lock = threading.Lock()
_guarded: list[int] = []
"""Threads under the guard, once for each nested use."""
_originals: dict[tuple[Any, str], Callable[..., Any]] = {}


@contextmanager
def no_processes() -> Iterator[None]:
    """While active, starting a process in this thread raises `PermissionError`; other threads are left alone."""
    with _lock:
        if not _guarded:
            for owner, name in _WAYS:
                if hasattr(owner, name):
                    _originals[owner, name] = getattr(owner, name)
                    setattr(owner, name, _refuse(_originals[owner, name]))
        _guarded.append(threading.get_ident())
    try:
        yield
    finally:
        with _lock:
            _guarded.remove(threading.get_ident())
            if not _guarded:
                for (owner, name), original in _originals.items():
                    setattr(owner, name, original)
                _originals.clear()


def _refuse(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def start(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() in _guarded:
            raise PermissionError("no process may be started while a model is only looked at")
        return original(*args, **kwargs)

    return start
