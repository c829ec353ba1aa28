"""What server and consumers say to each other: one JSON object per line, on a Unix domain socket.

consumer   {"actcache": 1, "process": 4711, "state": {...} or null}
server     {"actcache": 1, "store": ..., "sites": ..., "state": {...}, ...}    with the descriptor of the memory
server     {"batch": 17, "n_rows": 4096, "place": {...}, "rows": OFFSET, "sites": [OFFSET, ...]}
consumer   {"done": 17}                                                        its memory may be reused
server     {"end": true} or {"error": "..."}                                   the last line
"""

from __future__ import annotations

import json
import socket
from typing import Any

PROTOCOL = 1
_MOST_LINE_BYTES = 1 << 16
Message = dict[str, Any]


class Lines:
    """A connection on which both sides speak in lines."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket, self._received = connection, b""

    def fileno(self) -> int:
        """For selectors."""
        return self._socket.fileno()

    @property
    def in_midst(self) -> bool:
        """Whether a part of a line has arrived, and its end has not."""
        return bool(self._received)

    def send(self, message: Message, *descriptors: int) -> None:
        """Send a message, and descriptors with it.

        Raises:
            OSError: the other side is gone, or has read so little that there is no room for another line.
        """
        line = json.dumps(message).encode() + b"\n"
        n_sent = socket.send_fds(self._socket, [line], descriptors) if descriptors else 0
        self._socket.sendall(line[n_sent:])

    def receive(self) -> list[Message]:
        """The messages that are complete; waits until something has arrived.

        Raises:
            OSError: the other side is gone. ValueError: what it sent is not a message.
        """
        return self._messages(self._socket.recv(_MOST_LINE_BYTES))

    def receive_descriptor(self) -> tuple[list[Message], list[int]]:
        """Like `receive`, with the descriptor that has arrived."""
        data, descriptors, _, _ = socket.recv_fds(self._socket, _MOST_LINE_BYTES, 1)
        return self._messages(data), descriptors

    def _messages(self, data: bytes) -> list[Message]:
        if not data:
            raise ConnectionResetError("the other side has closed the connection")
        *lines, self._received = (self._received + data).split(b"\n")
        if len(self._received) > _MOST_LINE_BYTES:
            raise ValueError("a line without an end")
        return [_message(line) for line in lines]

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()


def _message(line: bytes) -> Message:
    try:
        message = json.loads(line)
    except RecursionError:
        message = None
    if not isinstance(message, dict):
        raise ValueError(f"{line[:40]!r} is no message")
    return message
