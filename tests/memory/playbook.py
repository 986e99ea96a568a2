"""A container as upstream's playbook leaves it: a shell that waits, and in it processes that
`docker exec` has started.

They are what the playbook's are in what matters to taking them over: a launcher that takes ports
and devices from its environment alone and starts a server, and nginx, whose title hides its
environment. The shell takes no notice of SIGTERM.
"""

import base64
import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from pd_deploy.hosts import exec_processes
from tests.memory.machine import Container, Machine
from tests.memory.programs import ANYWHERE, _answer, _Process, _prompt_of, _response, _text

PROXY_PORT = 7000
OF_PREFILL = 20000
"""From here on prefills take links, each at its first device."""


@dataclass(frozen=True)
class Executed:
    """A process in it."""

    pid: int
    parent: int
    argv: tuple[str, ...]
    environment: Mapping[str, str]
    directory: str
    output: str
    ports: frozenset[int] = frozenset()
    devices: frozenset[int] = frozenset()

    @property
    def title(self) -> str:
        """Its command line in /proc."""
        if posixpath.basename(self.argv[0]) == "nginx":
            return f"nginx: master process {' '.join(self.argv)}\0\0\0"
        return "".join(f"{word}\0" for word in self.argv)

    @property
    def block(self) -> str:
        """Its environment in /proc."""
        if posixpath.basename(self.argv[0]) == "nginx":
            return "nginx.conf\0\0\0"
        return "".join(f"{name}={value}\0" for name, value in self.environment.items())


class Workbench(_Process):
    """The main process of such a container."""

    def __init__(self, machine: Machine, container: Container) -> None:
        super().__init__(machine, container)
        self.own = dict(entry.split("=", 1) for entry in container.config["Env"])
        self.processes = [Executed(1, 0, ("bash",), self.own, "/data", "/dev/pts/0")]
        self._pids = 1

    def signal(self, name: str) -> None:
        """A shell in front of a terminal is deaf to it."""

    def bound(self) -> set[tuple[str, int]]:
        return {(ANYWHERE, port) for process in self.processes for port in process.ports}

    def serving(self) -> set[tuple[str, int]]:
        return self.bound()

    def end_all(self) -> None:
        """End what runs in it; its shell stays."""
        self._keep([p for p in self.processes if p.pid == exec_processes.MAIN])

    @property
    def launchers(self) -> list[Executed]:
        """The launchers that run in it."""
        return [p for p in self.processes if "start_api_servers.py" in p.argv]

    def answer(self, path: str, body: Mapping[str, Any]) -> httpx.Response:
        if self.launchers:
            return httpx.Response(200)
        if not path.startswith("/v1/"):
            return httpx.Response(404)
        programs = [one.program for _, one in self.machine.cluster.running()]
        servers = [p for p in programs if isinstance(p, Workbench) and p.launchers]
        if len(servers) != self.container.config["Servers"]:
            return httpx.Response(502, text="no server answers")
        answer = _answer(path, body, _text(_prompt_of(body), body["max_tokens"], ""))
        return _response(path, body, answer)

    def execute(
        self, argv: Sequence[str], environment: Mapping[str, str], directory: str
    ) -> tuple[str, int]:
        """What a command prints, and its exit code."""
        script, arguments = argv[2], list(argv[4:])
        if script == exec_processes.READ:
            return self._read(), 0
        if script == exec_processes.END:
            pids = set(map(int, arguments[2:]))
            self._keep([p for p in self.processes if not {p.pid, p.parent} & pids])
            return "", 0
        assert script == exec_processes.RUN
        output, _, *words = arguments
        variables = {**self.own, **environment}
        if words[0] == "env":
            for word in [word for word in words if word.startswith("--unset=")]:
                variables.pop(word.removeprefix("--unset="), None)
                words.remove(word)
            words.remove("env")
        self.spawn(words, variables, directory, output)
        return "", 0

    def spawn(
        self, argv: Sequence[str], environment: Mapping[str, str], directory: str, output: str
    ) -> None:
        """Start something in it; a launcher without its environment, or whose ports or devices
        somebody has, ends at once."""
        ports, devices, children = {PROXY_PORT}, set[int](), list[Executed]()
        self._pids += 2
        if "start_api_servers.py" in argv:
            try:
                port = int(environment["API_PORT"])
                devices = set(map(int, environment["ASCEND_RT_VISIBLE_DEVICES"].split(",")))
                ports = {int(environment["ZMQ_PORT"]), port}
            except KeyError:
                return
            if environment["ROLE"] == "prefill":
                ports.add(OF_PREFILL + min(devices))
            serve = ("python3", "/usr/bin/vllm", "serve", "/m", "--port", str(port))
            serve = (*serve, "--served-model-name", "qwen")
            children = [Executed(self._pids + 1, self._pids, serve, environment, directory, output)]
        taken = {port for _, port, *_ in self.machine.listeners()} & ports
        if "start_api_servers.py" in argv:  # bound without SO_REUSEADDR
            taken |= set(filter(self.machine.lingers, ports))
        if taken or devices & self.machine.device_users().keys():
            return
        root = Executed(
            self._pids, 1, tuple(argv), dict(environment), directory, output,
            frozenset(ports), frozenset(devices),
        )  # fmt: skip
        self._keep([*self.processes, root, *children])

    def _keep(self, processes: list[Executed]) -> None:
        self.processes = processes
        self.devices = frozenset(d for p in processes for d in p.devices)

    def _read(self) -> str:
        lines = []
        for p in self.processes:
            values = {"cmdline": p.title, "environ": p.block, "cwd": p.directory}
            values |= {"exe": p.argv[0], "fd/1": p.output, "fd/2": p.output}
            encoded = [f"{k}={base64.b64encode(v.encode()).decode()}" for k, v in values.items()]
            sockets = "".join(f"{port}," for port in p.ports)
            lines.append(f"process {p.pid} {p.parent} {' '.join(encoded)} sockets={sockets}")
            lines += [
                f"listener 0: 00000000:{port:04X} 00000000:0000 0A 0:0 0:0 0 0 0 {port} 1"
                for port in p.ports
            ]
        return "".join(f"{line}\n" for line in lines)
