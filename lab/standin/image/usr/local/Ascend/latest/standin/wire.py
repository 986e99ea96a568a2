"""Messages between instances: JSON lines over TCP."""

import json
import socket
import threading
from collections.abc import Callable
from typing import Any, BinaryIO

Handler = Callable[[BinaryIO, socket.socket], None]


def send(connection: socket.socket, message: dict[str, Any]) -> None:
    """Send one message."""
    connection.sendall(json.dumps(message).encode() + b"\n")


def receive(stream: BinaryIO) -> dict[str, Any] | None:
    """Read one message; None at the end of the stream or at something that is no message."""
    try:
        line = stream.readline()
        message = json.loads(line) if line else None
    except (OSError, ValueError):
        return None
    return message if isinstance(message, dict) else None


def bind(address: str, port: int) -> socket.socket:
    """Bind a socket that does not listen yet, so connections to it are refused.

    Raises:
        OSError: the address is not local or the port is taken.
    """
    # Two bound sockets may share a port until one listens, hence the trial.
    with _bound(address, port) as trial:
        trial.listen()
    return _bound(address, port)


def serve(listener: socket.socket, handler: Handler) -> None:
    """Handle each connection in a thread of its own, until the process ends."""
    listener.listen(128)
    threading.Thread(target=_accept, args=(listener, handler), daemon=True).start()


def _bound(address: str, port: int) -> socket.socket:
    bound = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((address, port))
    except OSError:
        bound.close()
        raise
    return bound


def _accept(listener: socket.socket, handler: Handler) -> None:
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=_handle, args=(connection, handler), daemon=True).start()


def _handle(connection: socket.socket, handler: Handler) -> None:
    with connection, connection.makefile("rb") as stream:
        try:
            handler(stream, connection)
        except OSError as error:
            print(f"WARNING connection lost: {error}", flush=True)
