"""Facts read from a host: one command per group, parsed by pure functions."""

import json
import posixpath
import re
import shlex
import stat
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from pd_deploy.errors import FactsError

# Directories with their mode, files with mode and sha256, three levels deep, but for what is in
# source trees; of the second directory, where others write, only directories. What goes away
# meanwhile is left out.
TREE = r"""[ ! -d "$1" ] || {
  find "$1/" -maxdepth 3 -xdev -path "$1/.code/*/*" -prune -o -exec stat -c '%f %n' {} + 2>/dev/null
  find "$1/" -maxdepth 3 -xdev -mindepth 3 -path "$1/.code/*/*" -prune -o \
    -type f -exec sha256sum {} + 2>/dev/null
}
[ ! -d "$2" ] || find "$2/" -maxdepth 2 -xdev -type d -exec stat -c '%f %n' {} + 2>/dev/null
true"""


@dataclass(frozen=True)
class Seen:
    """What is at a path: the bits of its mode, and of a file the sha256 of its content."""

    is_directory: bool
    mode: int
    sha256: str = ""


@dataclass(frozen=True)
class Links:
    """Links in a directory.

    Attributes:
        links: by path, where each leads in the end, "" for nowhere.
        paths: the same of other paths.
        closed: files and directories in it, or itself, that root may not read.
    """

    links: dict[str, str]
    paths: dict[str, str]
    closed: list[str]


@dataclass(frozen=True)
class DockerAge:
    """How long a Docker daemon runs.

    Attributes:
        seconds: since it started, or since its machine did if that is not known.
        now: the date, in seconds, by the host's clock.
    """

    seconds: float
    now: float


class Runner(Protocol):
    """Runs a command on a host and returns what it prints."""

    @property
    def where(self) -> str:
        """The host's name for messages."""
        ...

    async def output(self, argv: Sequence[str]) -> str:
        """Return the standard output of a command."""
        ...

    async def outputs(self, *commands: Sequence[str]) -> list[str]:
        """Return the standard output of each command."""
        ...


ADDRESSES = ["ip", "-j", "-4", "addr"]
LISTENERS = ["ss", "-Hltnp"]
# Looked up, not asked: nothing is sent there. Prints nothing where no route leads out.
ROUTE = ["sh", "-c", "ip -j -4 route get 8.8.8.8 2>/dev/null; true"]
# Paths go as arguments and come back ended by NUL, so that any name is safe.
MISSING = r"""for p; do [ -e "$p" ] || printf '%s\0' "$p"; done"""
# Links in a directory with where they lead, the directory's own path among them; what is there, or
# where links lead, that root may not read, as on a network file system; and where further paths
# lead.
LINKS = r"""to=$(readlink -f -- "$1"); [ "$to" = "$1" ] || printf 'link\0%s\0%s\0' "$1" "$to"
find "$1/" -maxdepth 2 -type l -exec sh -c 'for link; do
  printf "link\0%s\0%s\0" "$link" "$(readlink -f -- "$link")"; done' sh {} + 2>/dev/null
[ "$(id -u)" != 0 ] ||
  find -L "$1/" -maxdepth 2 -path "$1/?*" \( -name '.*' -o -name lost+found \) -prune -o \
    \( -type f ! -readable -o -type d ! \( -readable -executable \) \) \
    -printf 'closed\0%p\0\0' 2>/dev/null
shift; for p; do printf 'path\0%s\0%s\0' "$p" "$(readlink -f -- "$p")"; done"""
EPHEMERAL = """cat /proc/sys/net/ipv4/ip_local_port_range
cat /proc/sys/net/ipv4/ip_local_reserved_ports 2>/dev/null; true"""
# Sockets that are bound but neither listen nor connect are seen by trying alone.
TAKEN = r"""ss -Htanp || exit
command -v python3 >/dev/null || exit 0
python3 -IS -c '
import errno, socket, sys
for port in sys.argv[1:]:
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(("", int(port)))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                print("BOUND", port)
' "$@"
"""
CONNECTIONS = ["ss", "-Htnp", "state", "established"]
FREE = r"""p=$1; while [ ! -e "$p" ]; do p=$(dirname -- "$p"); done; LC_ALL=C df -P -k -- "$p" """
# A container's id is the last part of its processes' cgroup that looks like one.
CONTAINERS = r"""for p; do
  [ -d "/proc/$p" ] || continue
  printf '%s %s\n' "$p" "$(grep -oE '[0-9a-f]{64}' "/proc/$p/cgroup" 2>/dev/null | tail -n 1)"
done"""
# How long the machine is up, and when the Docker daemon whose socket is $1 started since, in clock
# ticks, of which there are so many in a second; and the date. A file beside the socket names its
# process.
AGES = r"""read -r up _ </proc/uptime
daemon=$(cat "/proc/$(cat "${1%.sock}.pid" 2>/dev/null)/stat" 2>/dev/null)
set -- ${daemon##*)}
echo "$up ${20:-0} $(getconf CLK_TCK) $(date +%s.%N)"
"""
TAIL = r"""lines=$1; bytes=$2; shift 2
show() {
  printf '%s\0' "$1"
  tail -n "$lines" -- "$1" | tail -c "$bytes" | tr -d '\0'
  printf '\0'
}
for p; do
  if [ -d "$p" ]; then for f in "$p"/*; do [ -f "$f" ] && show "$f"; done
  elif [ -f "$p" ]; then show "$p"; fi
done; true"""
SIZES = r"""[ ! -d "$1" ] || find "$1/" -xdev -type f -printf '%s\0%p\0' 2>/dev/null; true"""


class Facts:
    """What a host says about itself."""

    def __init__(self, host: Runner) -> None:
        self._host = host

    async def missing_paths(self, paths: Sequence[str]) -> list[str]:
        """Which of the paths do not exist (a broken link does not)."""
        if not paths:
            return []
        output = await self._host.output(["sh", "-c", MISSING, "sh", *paths])
        return output.split("\0")[:-1]

    async def links(self, directory: str, paths: Sequence[str]) -> Links:
        """Find the links in a directory and what is there that root may not read, and where further
        paths lead."""
        output = await self._host.output(["sh", "-c", LINKS, "sh", directory, *paths])
        return parse_links(output)

    async def ports_in_ephemeral_range(self, ports: Sequence[int]) -> list[int]:
        """Find those of the ports that the kernel may give to an outbound connection."""
        return parse_ephemeral(await self._host.output(["sh", "-c", EPHEMERAL]), ports)

    async def ports_taken(self, ports: Sequence[int], *, reused: bool = True) -> dict[int, str]:
        """Find those of the ports that no server could bind now, each with its holder's name.

        Args:
            reused: whether it binds with SO_REUSEADDR. Without it, connections keep it away that
                are over, for a minute (TIME_WAIT).
        """
        if not ports:
            return {}
        output = await self._host.output(["sh", "-c", TAKEN, "sh", *map(str, ports)])
        return parse_taken(output, ports, self._host.where, reused=reused)

    async def connections(self, port: int) -> list[int]:
        """List the connections that clients have to a port: of each the process that has it."""
        output = await self._host.output([*CONNECTIONS, f"sport = :{port}"])
        return [int(pid) for pid in re.findall(r"users:\(\(\"[^\"]*\",pid=(\d+)", output)]

    async def containers_of(self, pids: Sequence[int]) -> dict[int, str]:
        """Find the container's id of each process, "" for none; leave out processes that ended."""
        if not pids:
            return {}
        output = await self._host.output(["sh", "-c", CONTAINERS, "sh", *map(str, pids)])
        words = (line.partition(" ") for line in output.splitlines())
        return {int(pid): container for pid, _, container in words}

    async def docker_age(self, socket: str) -> DockerAge:
        """Look how long ago the Docker daemon with a socket started."""
        output = await self._host.output(["sh", "-c", AGES, "sh", socket])
        return parse_ages(output, self._host.where)

    async def disk_free(self, *paths: str) -> list[int]:
        """Bytes free for the SSH user where each path is or would be."""
        commands = [["sh", "-c", FREE, "sh", posixpath.normpath(path)] for path in paths]
        outputs = await self._host.outputs(*commands)
        return [parse_disk_free(output, self._host.where) for output in outputs]

    async def tail(
        self, paths: Sequence[str], lines: int = 20, max_bytes: int = 16384
    ) -> dict[str, str]:
        """Read the last lines of log files; a directory stands for the files in it.

        Args:
            paths: files and directories; those that do not exist are left out.
            lines: lines per file.
            max_bytes: bytes per file at most.
        """
        output = await self._host.output(
            ["sh", "-c", TAIL, "sh", str(lines), str(max_bytes), *paths]
        )
        parts = output.split("\0")[:-1]
        return dict(zip(parts[::2], parts[1::2], strict=True))

    async def sizes(self, directory: str) -> dict[str, int]:
        """Return the size of each file below a directory, in bytes, by path; follow no links."""
        output = await self._host.output(["sh", "-c", SIZES, "sh", directory])
        parts = output.split("\0")[:-1]
        return {
            posixpath.normpath(path): int(size)
            for size, path in zip(parts[::2], parts[1::2], strict=True)
        }


def tree(directory: str, logs: str) -> list[str]:
    """Make the command for `parse_tree`: what is in a deployment's directory, and the directories
    in that of its logs."""
    return ["sh", "-c", TREE, "sh", directory, logs]


def parse_tree(output: str) -> dict[str, Seen]:
    """Path → what is there, from lines of `stat -c '%f %n'` and of `sha256sum`."""
    tree: dict[str, Seen] = {}
    for line in output.splitlines():
        value, _, path = line.partition(" ")
        path = posixpath.normpath(path.removeprefix(" "))
        if re.fullmatch(r"[0-9a-f]{64}", value) and path in tree:
            tree[path] = replace(tree[path], sha256=value)
        elif re.fullmatch(r"[0-9a-f]{1,8}", value):
            mode = int(value, 16)
            tree[path] = Seen(stat.S_ISDIR(mode), stat.S_IMODE(mode))
    return tree


def parse_interface(output: str, address: str, where: str = "") -> str | None:
    """Find the network interface that owns an IPv4 address in the output of `ADDRESSES`.

    Loopback interfaces don't count: nothing reaches another host through them.
    """
    owners = _owners(output, address, where)
    return next((name for name, loopback in owners if not loopback), None)


def parse_loopback(output: str, address: str, where: str = "") -> str | None:
    """Find the loopback interface that owns an IPv4 address in the output of `ADDRESSES`."""
    owners = _owners(output, address, where)
    return next((name for name, loopback in owners if loopback), None)


def _owners(output: str, address: str, where: str) -> list[tuple[str, bool]]:
    """List the interfaces with an address, each with whether it is a loopback one."""
    try:
        return [
            (
                str(interface["ifname"]),
                interface["ifname"] == "lo" or "LOOPBACK" in interface.get("flags", []),
            )
            for interface in json.loads(output)
            for info in interface.get("addr_info", [])
            if info.get("local") == address
        ]
    except (ValueError, TypeError, KeyError, AttributeError):
        raise _unreadable(
            shlex.join(ADDRESSES), "a JSON list of interfaces", output, where
        ) from None


def parse_route(output: str, where: str = "") -> str | None:
    """Parse the host's own address on its default route in the output of `ROUTE`."""
    try:
        routes = json.loads(output or "[]")
        return next((str(route["prefsrc"]) for route in routes if route.get("prefsrc")), None)
    except (ValueError, TypeError, KeyError, AttributeError):
        raise _unreadable("ip -j -4 route get 8.8.8.8", "a JSON list", output, where) from None


def parse_listeners(output: str, where: str = "") -> dict[int, str]:
    """Parse the TCP ports listened on in the output of `LISTENERS`, each with its process's name
    ("" if not visible)."""
    listeners: dict[int, str] = {}
    for line in output.splitlines():
        socket = re.match(r"LISTEN\s+\d+\s+\d+\s+\S+:(\d+)\s+\S+\s*(?:users:\(\((.*)\)\))?", line)
        if not socket:
            raise _unreadable("ss -Hltnp", "LISTEN lines", line, where)
        name = _holder(socket[2])
        listeners[int(socket[1])] = name or listeners.get(int(socket[1]), "")
    return listeners


def parse_taken(
    output: str, ports: Sequence[int], where: str = "", *, reused: bool = True
) -> dict[int, str]:
    """Parse port → holder in what `TAKEN` prints: all sockets, and ports that can't be bound."""
    lines = output.splitlines()
    listening = "\n".join(line for line in lines if line.startswith("LISTEN"))
    taken = parse_listeners(listening, where)
    for line in lines:
        # Of connections whose process is gone, or that are over, nothing keeps a server away.
        socket = re.match(
            r"(?:ESTAB|SYN-SENT|CLOSE-WAIT)\s+\d+\s+\d+\s+\S+:(\d+)\s+\S+\s*(?:users:\(\((.*)\)\))?",
            line,
        )
        if socket and int(socket[1]) not in taken:
            taken[int(socket[1])] = _holder(socket[2]) or "an outbound connection"
        elif bound := re.fullmatch(r"BOUND (\d+)", line):
            taken.setdefault(int(bound[1]), "")
        elif not reused and (over := re.match(r"[A-Z0-9-]+\s+\d+\s+\d+\s+\S+:(\d+)\s", line)):
            taken.setdefault(int(over[1]), "connections that are over (TIME_WAIT)")
    return {port: taken[port] for port in ports if port in taken}


def parse_links(output: str) -> Links:
    """Parse what `LINKS` prints."""
    parts = output.split("\0")[:-1]
    by_kind: dict[str, dict[str, str]] = {"link": {}, "path": {}, "closed": {}}
    for kind, path, to in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
        by_kind[kind][posixpath.normpath(path)] = to
    return Links(by_kind["link"], by_kind["path"], sorted(by_kind["closed"]))


def parse_ephemeral(output: str, ports: Sequence[int]) -> list[int]:
    """Parse what `EPHEMERAL` prints: the range, and in a second line what is reserved in it."""
    limits, _, reserved = output.partition("\n")
    low, _, high = limits.strip().partition("\t")
    if not (low.isdecimal() and high.strip().isdecimal()):
        return []
    spans = [span.partition("-") for span in reserved.strip().split(",") if span]
    return [
        port
        for port in ports
        if int(low) <= port <= int(high)
        and not any(int(first) <= port <= int(last or first) for first, _, last in spans)
    ]


def parse_ages(output: str, where: str = "") -> DockerAge:
    """Parse what `AGES` prints."""
    try:
        up, started, ticks, now = map(float, output.split())
    except ValueError:
        raise _unreadable("/proc/uptime, getconf and date", "four numbers", output, where) from None
    return DockerAge(max(up - started / ticks, 0), now)


def _holder(users: str | None) -> str:
    holder = re.match(r'"([^"]*)",pid=(\d+)', users or "")
    return f"{holder[1]} (pid {holder[2]})" if holder else ""


def parse_disk_free(output: str, where: str = "") -> int:
    """Parse the free bytes in the output of `df -P -k`."""
    lines = output.splitlines()
    disk = re.match(r".*\s\d+\s+\d+\s+(\d+)\s+\d+%\s", lines[1]) if len(lines) == 2 else None
    if not disk:
        raise _unreadable("df -P -k", "a header and one line", output, where)
    return int(disk[1]) * 1024


def _unreadable(command: str, expected: str, output: str, where: str) -> FactsError:
    return FactsError(
        f"`{command}`: expected {expected}, found {output[:200]!r}",
        host=where or None,
        hint="run the command on the host to see why",
    )
