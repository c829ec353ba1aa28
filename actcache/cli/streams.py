"""stdout and stderr that end no command: of any encoding, closed, or with nobody at the other end.

In: the streams of the process. Out: the same, while a command runs, in front of which is told what cannot be printed.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast


class Outlet:
    """A text stream to which everything can be written.

    Characters that its encoding does not have are escaped, as Python does on stderr. Once nobody reads it any more, it
    is silent: whoever looks at the first line of a list (`| head -1`) has got what they want, and the command goes on.

    Args:
        stream: what is written to; None where the process was started without it.
        or_not: nothing that goes wrong with it is worth an end: for stderr.
    """

    def __init__(self, stream: TextIO | None, *, or_not: bool = False) -> None:
        self._stream: Any = io.StringIO() if stream is None else stream
        self._ignored: tuple[type[Exception], ...] = (OSError, ValueError) if or_not else (BrokenPipeError,)
        self._silent = stream is None

    def write(self, text: str) -> int:
        """Write what can be written."""
        if not self._silent:
            encoding = getattr(self._stream, "encoding", None) or "utf-8"
            with self._going_silent():
                self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        """Hand on what was written."""
        if not self._silent:
            with self._going_silent():
                self._stream.flush()

    @contextmanager
    def _going_silent(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            self._silent = True
            # What is left in the buffer would be tried again at the end of the process, and said to have failed.
            with suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)
            if isinstance(error, self._ignored):
                return
            if isinstance(error, OSError):
                raise OSError(error.errno, f"the result cannot be written to stdout: {error.strerror}") from error
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def patient_streams() -> Iterator[None]:
    """A context in which `sys.stdout` and `sys.stderr` take everything."""
    own = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = cast(TextIO, Outlet(own[0])), cast(TextIO, Outlet(own[1], or_not=True))
    try:
        yield
    finally:
        sys.stderr.flush()
        sys.stdout, sys.stderr = own
