"""Whether hosts reach each other's ports before anything listens there. Pure.

Every host of a service runs the same program at the same time: it listens for a moment at the ports
that its peers are going to call, and calls theirs. It ends as soon as all calls are made and all
are received, so nothing is left of it, and at the latest after `WINDOW_S`. Calls end with a reset,
so no port is kept in TIME_WAIT for a server that binds it next.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

WINDOW_S = 10
"""How long a host waits for the others, which start at the same time but for their load."""

REACH = r"""command -v python3 >/dev/null || { echo no python3; exit 0; }
exec python3 -IS -c '
import errno, json, selectors, socket, struct, sys, time
asked = json.loads(sys.argv[1])
end = time.monotonic() + asked["window"]
reset = struct.pack("ii", 1, 0)
selector, listening, expected = selectors.DefaultSelector(), [], 0

def close(kept):
    kept.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
    kept.close()

for port, callers in asked["listen"]:
    listener = socket.socket()
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((asked["address"], port))
        listener.listen(256)
        listener.setblocking(False)
    except OSError:
        listener.close()
        continue
    selector.register(listener, selectors.EVENT_READ, None)
    listening.append(port)
    expected += callers
todo = [(address, port, 0.0) for address, port in asked["call"]]
pending, results, received = {}, {}, 0

def called(to, error):
    if error == errno.ECONNRESET:
        error = 0  # it was taken, and its listener is done already
    if error == errno.ECONNREFUSED and time.monotonic() < end - 0.1:
        todo.append((*to, time.monotonic() + 0.05))
    results["%s:%d" % to] = errno.errorcode.get(error, str(error)) if error else ""

while time.monotonic() < end and (todo or pending or received < expected):
    now, later = time.monotonic(), []
    for address, port, due in todo:
        if due > now:
            later.append((address, port, due))
            continue
        call = socket.socket()
        call.setblocking(False)
        error = call.connect_ex((address, port))
        if error == errno.EINPROGRESS:
            pending[call] = address, port
            selector.register(call, selectors.EVENT_WRITE, None)
        else:
            close(call)
            called((address, port), error)
    todo[:] = later + [one for one in todo if one[2] > now and one not in later]
    for key, _ in selector.select(0.02):
        if key.fileobj in pending:
            to = pending.pop(key.fileobj)
            selector.unregister(key.fileobj)
            error = key.fileobj.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            close(key.fileobj)
            called(to, error)
        else:
            try:
                close(key.fileobj.accept()[0])
                received += 1
            except OSError:
                pass
for to in pending.values():
    results["%s:%d" % to] = "ETIMEDOUT"
print(json.dumps({"listened": listening, "calls": results}))
' "$1"
"""


@dataclass(frozen=True)
class Calls:
    """What came of a host's part.

    Attributes:
        listened: the ports at which it could listen.
        results: by `address:port` that it called, the name of an error, "" for none.
        unread: what it printed, if that is nothing of the kind.
    """

    listened: frozenset[int] = frozenset()
    results: Mapping[str, str] = ()  # type: ignore[assignment]
    unread: str = ""


def command(
    address: str,
    listen: Mapping[int, int],
    call: Sequence[tuple[str, int]],
    window: float = WINDOW_S,
) -> list[str]:
    """Make a host's part.

    Args:
        address: the host's own, where it listens.
        listen: its ports, each with the number of calls that come.
        call: addresses and ports of others.
        window: seconds after which it gives up.
    """
    asked = {"address": address, "listen": sorted(listen.items()), "call": call, "window": window}
    return ["sh", "-c", REACH, "sh", json.dumps(asked)]


def parse(output: str) -> Calls:
    """Parse what a host's part printed."""
    try:
        said = json.loads(output)
        results = {str(to): str(error) for to, error in said["calls"].items()}
        return Calls(frozenset(map(int, said["listened"])), results)
    except (ValueError, TypeError, KeyError, AttributeError):
        return Calls(results={}, unread=" ".join(output.split())[:200] or "nothing")
