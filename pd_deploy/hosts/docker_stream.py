"""What Docker's engine sends on a connection that it has upgraded, from its first byte on."""

import io
import socket
from collections.abc import Iterator
from typing import Any

from docker import APIClient
from docker.utils.socket import demux_adaptor, frames_iter


class WholeStreams(APIClient):
    """A client that loses no output of a command.

    The SDK reads an upgraded connection below the buffer by which the answer's headers were read,
    and so loses what came together with them: all of a command that is soon done.
    """

    def _read_from_socket(
        self, response: Any, stream: bool, tty: bool = True, demux: bool = False
    ) -> Iterator[tuple[bytes | None, bytes | None]]:
        """Iterate over standard output and standard error; `stream` and `demux` are taken as set.

        Named and called by the SDK.
        """
        connection = _Connection(response.raw._fp.fp)
        for frame in frames_iter(connection, tty):  # type: ignore[no-untyped-call]
            yield demux_adaptor(*frame)


class _Connection:
    """A connection, after the bytes of it that have been read into a buffer."""

    def __init__(self, buffer: io.BufferedReader) -> None:
        raw: Any = buffer.raw
        timeout = raw._sock.gettimeout()
        raw._sock.setblocking(False)
        try:
            early = buffer.read(len(buffer.peek()))
        finally:
            raw._sock.settimeout(timeout)
        self._connection = raw
        # The SDK waits for something to read: for these bytes in a socket of their own.
        self._rest = len(early)
        if early:
            self._early, end = socket.socketpair()
            with end:
                end.sendall(early)

    def fileno(self) -> int:
        """Return what can be waited for."""
        return (self._early if self._rest else self._connection).fileno()

    def recv(self, size: int) -> bytes:
        """Read what comes next, `size` bytes at most."""
        if not self._rest:
            return bytes(self._connection.read(size) or b"")
        data = self._early.recv(min(size, self._rest))
        self._rest -= len(data)
        if not self._rest:
            self._early.close()
        return data
