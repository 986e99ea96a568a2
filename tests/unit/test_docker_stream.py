"""Output of a command, however it comes with the headers of the engine's answer."""

import socket
import struct
import threading
from pathlib import Path

import pytest

from pd_deploy.hosts.docker_stream import WholeStreams

HEADERS = (
    b"HTTP/1.1 101 UPGRADED\r\nContent-Type: application/vnd.docker.raw-stream\r\n"
    b"Connection: Upgrade\r\nUpgrade: tcp\r\n\r\n"
)
FRAMES = b"".join(
    struct.pack(">BxxxL", number, len(text)) + text
    for number, text in ((1, b"here\n"), (2, b"there\n"), (1, b"x" * 20_000))
)


@pytest.mark.parametrize("early", [0, 3, 13, 24, len(FRAMES)])
def test_what_comes_with_the_headers_is_not_lost(tmp_path: Path, early: int) -> None:
    """So many bytes of it, the rest once these have been read."""
    path, read = tmp_path / "s", threading.Event()

    def answer() -> None:
        connection, _ = server.accept()
        with connection:
            connection.recv(65_536)
            connection.sendall(HEADERS + FRAMES[:early])
            read.wait(5)
            connection.sendall(FRAMES[early:])

    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        engine = threading.Thread(target=answer)
        engine.start()
        client = WholeStreams(f"unix://{path}", version="1.41", timeout=5)
        stream = client.exec_start("id", stream=True, demux=True)
        read.set()
        out, err = (b"".join(part or b"" for part in parts) for parts in zip(*stream, strict=True))
        engine.join()
        client.close()
    assert (out, err) == (b"here\n" + b"x" * 20_000, b"there\n")
