"""Ctrl-C: once to end cleanly, twice to end at once.

The first one is a `KeyboardInterrupt`, as everywhere in Python: writers finish what they have begun, so that it counts.
The second one ends the process at once and leaves what a crash would leave: objects are put whole, the commit record
last, so nothing unfinished is ever taken for data, and the next writer removes it.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import NoReturn

INTERRUPTED = 130
"""The exit code that shells give a command that Ctrl-C ended."""
_PATIENCE_S = 0.5
_WAITING = "interrupted: waiting for writes under way; Ctrl-C again ends at once"
_AT_ONCE = "interrupted again, ended at once; the same command goes on where this one stopped"


class Interrupts:
    """A context in which a second Ctrl-C ends the process; does nothing where Ctrl-C already means something else.

    Args:
        say: called from another thread if ending takes longer than a moment.
        last_words: formats the message that is printed before the process ends.
    """

    def __init__(self, say: Callable[[str], None], last_words: Callable[[str], str]) -> None:
        self._say, self._last_words = say, last_words
        self._ours = False
        self._patience: threading.Timer | None = None

    def __enter__(self) -> Interrupts:
        in_main = threading.current_thread() is threading.main_thread()
        # Background jobs of a shell ignore the signal, and a program that embeds this may handle it.
        if in_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._first)
            self._ours = True
        return self

    def __exit__(self, *exception: object) -> None:
        if self._patience:
            self._patience.cancel()
        if self._ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _first(self, number: int, frame: FrameType | None) -> NoReturn:
        signal.signal(signal.SIGINT, self._second)
        # Another thread says it: this one may be in the middle of a print, which cannot be entered twice.
        self._patience = threading.Timer(_PATIENCE_S, self._say, [_WAITING])
        self._patience.daemon = True
        self._patience.start()
        raise KeyboardInterrupt

    def _second(self, number: int, frame: FrameType | None) -> NoReturn:
        show_cursor = "\x1b[?25h\n" if sys.stderr.isatty() else ""
        with suppress(OSError):
            os.write(2, f"{show_cursor}{self._last_words(_AT_ONCE)}\n".encode())
        os._exit(INTERRUPTED)
