"""stdout and stderr that never end a command: whatever their encoding, closed, or with no reader.

In: the streams of the process. Out: wrapped streams, for as long as a command runs.
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

    Characters that its encoding lacks are escaped, as Python does on stderr. When its reader leaves (`| head -1`), it
    becomes silent and the command goes on.

    Args:
        stream: the stream behind it; None if the process was started without it.
        or_not: ignore every error of the stream, as for stderr.
    """

    def __init__(self, stream: TextIO | None, *, or_not: bool = False) -> None:
        self._stream: Any = io.StringIO() if stream is None else stream
        self._ignored: tuple[type[Exception], ...] = (OSError, ValueError) if or_not else (BrokenPipeError,)
        self._silent = stream is None

    def write(self, text: str) -> int:
        """Write the text, if the stream still has a reader; returns its length."""
        if not self._silent:
            encoding = getattr(self._stream, "encoding", None) or "utf-8"
            with self._going_silent():
                self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        """Flush the stream, if it still has a reader."""
        if not self._silent:
            with self._going_silent():
                self._stream.flush()

    @contextmanager
    def _going_silent(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            self._silent = True
            # Python would try to write the rest of the buffer again at the end of the process, and report a failure.
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
    """A context in which `sys.stdout` and `sys.stderr` accept everything."""
    own = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = cast(TextIO, Outlet(own[0])), cast(TextIO, Outlet(own[1], or_not=True))
    try:
        yield
    finally:
        sys.stderr.flush()
        sys.stdout, sys.stderr = own
