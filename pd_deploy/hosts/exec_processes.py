"""The processes in a container that was not made by us: read, ended, and started again. Pure.

Upstream's playbook keeps containers alive with a shell and starts servers and proxy in them by
`docker exec`, so all that says how they run is in the container's /proc. The scripts run in the
container as root; they need what every image of a Linux distribution has.
"""

import base64
import posixpath
import re
import shlex
from collections.abc import Collection, Iterable, Iterator, Mapping

from pydantic import BaseModel, ConfigDict, Field

MAIN = 1
"""The container's own process: a shell that does nothing."""
EPHEMERAL = 32768
"""From here on the kernel gives ports to whoever asks for any."""
_SHELLS = ("bash", "sh", "zsh")
_WAITING = ("sleep", "tail")
_NGINX = re.compile(r"nginx: master process (.+)", re.DOTALL)

# A line for each process, values in base64 since they may hold anything. The list of processes is
# made before the first child of this shell is.
READ = r"""for d in /proc/[0-9]*; do
  p=${d#/proc/}
  [ "$p" != "$$" ] || continue
  parent=$(sed -n 's/^PPid:[^0-9]*//p' "$d/status" 2>/dev/null)
  [ -n "$parent" ] || continue
  printf 'process %s %s' "$p" "$parent"
  for f in cmdline environ; do printf ' %s=' "$f"; base64 -w0 <"$d/$f"; done 2>/dev/null
  for f in cwd exe fd/1 fd/2; do printf ' %s=' "$f"; readlink -n "$d/$f" | base64 -w0; done
  printf ' sockets='
  ls -l "$d/fd" 2>/dev/null | sed -n 's/.*socket:\[\([0-9]*\)\].*/\1/p' | tr '\n' ,
  echo
done
cat /proc/net/tcp /proc/net/tcp6 2>/dev/null | sed -n 's/^ *\([0-9]*: .* 0A .*\)/listener \1/p'"""

# Signals processes, and waits until they have ended; fails if they have not in so many fifths of a
# second. One that has ended and that nobody has waited for is a zombie.
END = r"""signal=$1 left=$2
shift 2
kill -s "$signal" "$@" 2>/dev/null
while :; do
  alive=
  for p; do grep -qs '^State:[[:space:]]*[^Z[:space:]]' "/proc/$p/status" && alive=$p; done
  [ -n "$alive" ] || exit 0
  [ "$left" -gt 0 ] || exit 1
  left=$((left - 1))
  sleep 0.2
done"""

RUN = """exec </dev/null >>"$1" 2>>"$2"; shift 2; exec "$@\""""


class Process(BaseModel):
    """A process as it was seen in a container.

    Attributes:
        parent: 0 if its parent is outside of the container.
        environment: what it was started with; None if the process has overwritten that.
        directory: where it works.
        program: the file that it executes.
        output, errors: the files that it prints to; other places as the kernel names them.
        ports: those that it listens on.
    """

    model_config = ConfigDict(frozen=True)

    pid: int
    parent: int
    argv: tuple[str, ...]
    environment: dict[str, str] | None = Field(repr=False)
    directory: str
    program: str
    output: str
    errors: str
    ports: frozenset[int] = frozenset()

    @property
    def is_nginx(self) -> bool:
        """Whether it is nginx' main process, which ends gracefully by SIGQUIT."""
        return bool(_NGINX.match(" ".join(self.argv)))

    @property
    def is_interactive(self) -> bool:
        """Whether somebody sits in front of it."""
        return self.output.startswith("/dev/pts/")

    @property
    def command(self) -> tuple[str, ...]:
        """What starts it again. nginx has its command in its title, in one string."""
        if title := _NGINX.match(" ".join(self.argv)):
            return tuple(shlex.split(title[1]))
        return self.argv


def parse(output: str) -> list[Process]:
    """Parse what `READ` prints; leave out what has ended meanwhile."""
    lines = output.splitlines()
    ports = dict(_listeners(line for line in lines if line.startswith("listener ")))
    processes = []
    for line in lines:
        kind, _, rest = line.partition(" ")
        if kind != "process":
            continue
        pid, parent, *fields = rest.split(" ")
        values = dict(field.split("=", 1) for field in fields)
        text = {name: _decoded(values.get(name, "")) for name in values if name != "sockets"}
        if not text["cmdline"].strip("\0"):
            continue
        sockets = filter(None, values["sockets"].split(","))
        processes.append(
            Process(
                pid=int(pid),
                parent=int(parent),
                argv=tuple(text["cmdline"].rstrip("\0").split("\0")),
                environment=_environment(text["environ"]),
                directory=text["cwd"],
                program=text["exe"],
                output=text["fd/1"],
                errors=text["fd/2"],
                ports=frozenset(ports[inode] for inode in sockets if inode in ports),
            )
        )
    return processes


def _listeners(lines: Iterable[str]) -> Iterator[tuple[str, int]]:
    """Yield inode and port of each listening socket."""
    for line in lines:
        words = line.split()[1:]
        yield words[9], int(words[1].rpartition(":")[2], 16)


def _decoded(text: str) -> str:
    return base64.b64decode(text).decode(errors="surrogateescape")


def _environment(text: str) -> dict[str, str] | None:
    """Parse an environment; None for what a title was written over, also the end of one."""
    entries = text.rstrip("\0").split("\0")
    if not all("=" in entry for entry in entries):
        return None
    return {name: value for name, _, value in (entry.partition("=") for entry in entries)}


def roots(processes: Iterable[Process]) -> list[Process]:
    """List those that are started again: nobody in the container has started them but a shell, or
    somebody from outside. All others are their children, or those of a main process that is more
    than a shell."""
    processes = list(processes)
    left_out = {process.pid for process in attended(processes)}
    left_out |= {process.pid for process in processes if _is_shell(process.argv)}
    by_itself = {MAIN} if runs_by_itself(processes) else set[int]()
    outside = ({0, MAIN} | left_out) - by_itself
    return [p for p in processes if p.parent in outside and p.pid not in left_out | {MAIN}]


def attended(processes: Iterable[Process]) -> list[Process]:
    """List those that somebody has in front of him, at a terminal that is not the container's: they
    are not started again."""
    processes = list(processes)
    own = {process.output for process in processes if process.pid == MAIN}
    return [p for p in processes if p.is_interactive and p.output not in own]


def runs_by_itself(processes: Iterable[Process]) -> bool:
    """Tell whether a container's main process is more than what keeps it alive, so that all else
    comes with it."""
    main = next((process.argv for process in processes if process.pid == MAIN), ())
    words = main[main.index("--") + 1 :] if "--" in main else main
    return not (_is_shell(words) or posixpath.basename("".join(words[:1])) in _WAITING)


def _is_shell(argv: tuple[str, ...]) -> bool:
    return len(argv) == 1 and posixpath.basename(argv[0]).lstrip("-") in _SHELLS


def listened(processes: Iterable[Process]) -> list[int]:
    """List the ports that processes listen on, but for those that the kernel has chosen."""
    return sorted({port for process in processes for port in process.ports if port < EPHEMERAL})


def flag(processes: Iterable[Process], *names: str) -> str:
    """Return the first value that any process is given for one of some flags; "" for none."""
    for name in names:
        for process in processes:
            for word, after in zip(process.argv, [*process.argv[1:], ""], strict=True):
                if word == name:
                    return after
                if word.startswith(f"{name}="):
                    return word.partition("=")[2]
    return ""


def api_ports(processes: Iterable[Process]) -> list[int]:
    """List the ports on which vLLM's servers take requests."""
    processes = list(processes)
    served = [p for p in processes if "serve" in p.argv[:4] and "--port" in p.argv]
    numbers = {port for p in served if (port := flag([p], "--port")).isdecimal()}
    return sorted(map(int, numbers & {str(port) for p in processes for port in p.ports}))


def runs_again(process: Process, now: Iterable[Process]) -> bool:
    """Tell whether what was started as a process is there."""
    return any(other.argv == process.argv for other in roots(now))


def end_command(processes: Collection[Process], signal: str, seconds: int) -> list[str]:
    """Make the command that signals processes and waits for their end."""
    pids = [str(process.pid) for process in processes]
    return ["sh", "-c", END, "sh", signal, str(seconds * 5), *pids]


def start_command(process: Process, inherited: Iterable[str]) -> list[str]:
    """Make the command that starts a process again; its environment goes beside it.

    Args:
        inherited: names of the variables that a command in the container is given anyhow.
    """
    given = process.environment
    unset = [f"--unset={name}" for name in sorted(set(inherited) - set(given or {}))]
    cleared = ["env", *unset] if given is not None and unset else []
    files = [_file(process.output), _file(process.errors)]
    return ["sh", "-c", RUN, "sh", *files, *cleared, *process.command]


def _file(path: str) -> str:
    return path if path.startswith("/") and not path.startswith("/dev/") else "/dev/null"


def inexact(process: Process) -> list[str]:
    """Say what of a process can't be brought back as it was."""
    said = []
    if process.environment is None:
        said.append(
            "its environment can't be read any more (nginx writes its title over it): it gets the "
            "container's own"
        )
    if process.is_nginx and any(" " in word or word.startswith("-g") for word in process.command):
        said.append("its arguments are read from its title, where blanks in them can't be seen")
    for name, place in (("output", process.output), ("errors", process.errors)):
        if not place.startswith("/") or process.is_interactive:
            said.append(f"its {name} went to {place or 'nowhere'}: they go nowhere")
        elif place.endswith(" (deleted)"):
            said.append(f"its {name} went to a file that is deleted: it is made again")
    if process.directory.endswith(" (deleted)"):
        said.append("the directory that it works in is deleted: it can't be started again")
    return said


def shown(process: Process) -> str:
    """Name a process in a few words, without its arguments, which may hold secrets."""
    words = [posixpath.basename(word) for word in process.command[:2]]
    return " ".join(word for word in words if not word.startswith("-"))


def known_environment(processes: Iterable[Process]) -> Mapping[str, str]:
    """Return all variables of some processes; those of later ones win."""
    merged: dict[str, str] = {}
    for process in processes:
        merged |= process.environment or {}
    return merged
