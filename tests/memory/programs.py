"""What runs in a container: an engine's server, the proxy, or a few words of shell.

A server follows the stand-in in what matters to a deployment: it holds its devices and ports, links
with all of its peers while loading and only then, and hands KV over by the engine's protocol.
"""

import asyncio
import functools
import hashlib
import json
import math
import re
import shlex
from collections.abc import AsyncIterator, Mapping
from typing import Any, Protocol

import httpx

from pd_deploy.code import in_container
from pd_deploy.engines.base import PROVING_ADDRESS
from pd_deploy.engines.common import ENVIRONMENT_FILE
from pd_deploy.engines.omniinfer import engine as omniinfer
from pd_deploy.records import generations
from pd_deploy.steps import waiting_room_program as waiting_room
from tests.memory.machine import Container, Faults, Machine

LOAD_S = 0.3
STOP_S = 0.1
PREPARE_S = 0.1
TAKES_S = 0.3  # from when a waiting room is told to take the port until it listens
ANYWHERE = "0.0.0.0"
TOKENS = ("sun", "moon", "tree", "river", "stone", "bird", "cloud", "fire")
KV_BYTES = 1024
"""Per token."""


class Program(Protocol):
    """The main process of a container that runs."""

    devices: frozenset[int]

    @property
    def api_key(self) -> str:
        """What it wants of clients; empty for nothing."""

    def settle(self) -> None:
        """Does what is due by now."""

    def signal(self, name: str) -> None:
        """Takes a signal; SIGKILL never comes here."""

    def bound(self) -> set[tuple[str, int]]:
        """Addresses and ports that it holds."""

    def serving(self) -> set[tuple[str, int]]:
        """Those of them that take requests."""

    def answer(self, path: str, body: Mapping[str, Any]) -> httpx.Response:
        """Answers a request."""


def start(machine: Machine, container: Container) -> None:
    """Starts a container's program."""
    from tests.memory import sglang  # these are made of what is here
    from tests.memory.playbook import Workbench

    role = container.labels.get(generations.ROLE)
    of_sglang = "sglang" in container.config["Image"]
    container.status = "running"
    container.runs += 1
    container.started_at = machine.clock.date()
    container.error, container.oom_killed = "", False
    if container.config.get("Tty"):
        container.program = Workbench(machine, container)
    elif role is None:
        container.program = Shell(machine, container)
    elif role == "proxy":
        container.program = (sglang.Router if of_sglang else Proxy)(machine, container)
    elif role == generations.PROBE:
        container.program = Probe(machine, container)
    elif role == generations.WAITING_ROOM:
        container.program = WaitingRoom(machine, container)
    else:
        container.program = (sglang.Server if of_sglang else Server)(machine, container)
    container.program.settle()


class _Process:
    """What all programs have in common: an end that comes at some time."""

    def __init__(self, machine: Machine, container: Container) -> None:
        self.machine = machine
        self.container = container
        self.devices: frozenset[int] = frozenset()
        self.ports: frozenset[int] = frozenset()
        self._ends: tuple[float, int] | None = None
        self.began = self.now()

    @property
    def api_key(self) -> str:
        return ""

    def now(self) -> float:
        """Seconds by the machine's clock."""
        return self.machine.clock.seconds()

    def settle(self) -> None:
        if self._ends and self.now() >= self._ends[0]:
            self.machine.end(self.container, self._ends[1])

    def signal(self, name: str) -> None:
        self.ends_in(STOP_S, 0)

    def ends_in(self, seconds: float, code: int) -> None:
        if self._ends is None:
            self._ends = self.now() + seconds, code

    def bound(self) -> set[tuple[str, int]]:
        return {(ANYWHERE, port) for port in self.ports}

    def serving(self) -> set[tuple[str, int]]:
        return set()

    def answer(self, path: str, body: Mapping[str, Any]) -> httpx.Response:
        return httpx.Response(404)

    def say(self, line: str) -> None:
        self.machine.say(self.container, line)

    def refuse(self, line: str, code: int = 1) -> None:
        """Says why, and ends."""
        self.say(line)
        self.ends_in(0, code)

    def script(self) -> str:
        """The start script, as the container sees it."""
        path = str(self.container.config["Cmd"][0])
        found = self.machine.disk.read(path)
        if not found:
            self.refuse(f"bash: {path}: No such file or directory", 127)
        return found


class Shell(_Process):
    """`sleep N`, or `sh -c` with some of `trap '' TERM`, `echo`, `sleep` and `exit`, in turn."""

    def __init__(self, machine: Machine, container: Container) -> None:
        super().__init__(machine, container)
        self._due: list[tuple[float, list[str]]] = []
        command = list(container.config.get("Cmd", []))
        script = command[2] if command[:2] == ["sh", "-c"] else shlex.join(command)
        at, self._deaf = self.began, script.startswith("trap '' TERM;")
        for part in script.split(";"):
            words = shlex.split(part)
            if words[0] == "sleep":
                at += float(words[1])
            elif words[0] in ("echo", "exit"):
                self._due.append((at, words))
            elif words != ["trap", "", "TERM"]:
                raise NotImplementedError(f"the shell in memory knows no {words[0]}")
        self._due.append((at, ["exit", "0"]))

    def settle(self) -> None:
        super().settle()
        while self.container.running and self._due and self.now() >= self._due[0][0]:
            _, words = self._due.pop(0)
            if words[0] == "echo":
                self.say(" ".join(words[1:]))
            else:
                self.machine.end(self.container, int(words[1]))

    def signal(self, name: str) -> None:
        """A plain process ends of a signal."""
        if self._deaf and name == "SIGTERM":
            return
        self.ends_in(0, 128 + {"SIGTERM": 15, "SIGINT": 2, "SIGUSR1": 10}[name])


class Probe(_Process):
    """What says what its image is."""

    def __init__(self, machine: Machine, container: Container) -> None:
        from tests.memory import load  # it is made of what is here

        super().__init__(machine, container)
        answer = container.image.build.answer
        if mounts := container.config["HostConfig"].get("Mounts"):
            answer = self._code(mounts)
        elif load.is_asked(command := container.config["Cmd"]):
            answer, _ = load.carried(machine, container, command, {})
        if answer is not None:
            self.say(answer)
            self.ends_in(PREPARE_S, 0)

    def _code(self, mounts: list[dict[str, str]]) -> str:
        """What `in_container` says of the trees that are mounted."""
        asked = json.loads(self.container.config["Cmd"][-1])
        sources = {mount["Target"]: mount["Source"] for mount in mounts}
        answer: dict[str, Any] = {
            "trees": {name: self._digest(sources[path]) for name, path in asked["trees"].items()}
        }
        if package := asked["package"]:
            answer |= {"package": f"{asked['path']}/{package}/__init__.py"}
            source = sources[asked["trees"]["servers"]]
            initial = self.machine.disk.read(f"{source}/{package}/__init__.py")
            is_broken = initial.startswith("raise")
            answer |= {"fault": "ValueError" if is_broken else "", "missing": ""}
        return in_container.MARK + json.dumps(answer)

    def _digest(self, root: str) -> str:
        disk = self.machine.disk
        return in_container.digest_of(
            (
                path.removeprefix(f"{root}/").encode(errors="surrogateescape"),
                "link" if mode > 0o777 else "program" if mode & 0o100 else "file",
                hashlib.sha256(content).hexdigest(),
            )
            for path, content in disk.files(root)
            for mode in [disk.entries[path].mode]
        )


class WaitingRoom(_Process):
    """What has the proxy's port while no proxy has: clients' requests wait in it."""

    def __init__(self, machine: Machine, container: Container) -> None:
        super().__init__(machine, container)
        options = json.loads(container.config["Cmd"][-1])
        self.port = options["port"]
        self.signals: list[str] = []
        self._takes_at, self._listens = math.inf, False
        if container.image.build.has_python:
            self.say(waiting_room.READY)
        else:
            self.refuse("bash: exec: : not found", 127)

    def settle(self) -> None:
        super().settle()
        if self.now() >= self._takes_at and not (self._listens or self._ends):
            self._listens = True
            self.say(waiting_room.TAKING)
        leaves = bool({"SIGHUP", "SIGTERM"}.intersection(self.signals))
        leaves = leaves or ("SIGUSR2" in self.signals and self._proxy_listens())
        if self.container.running and not self._ends and leaves:
            held = {"held": 3, "refused": 1, "left": 0, "longest": 2.5}
            self.say(waiting_room.CLOSED + json.dumps(held))
            self.ends_in(0, 0)

    def signal(self, name: str) -> None:
        if name == "SIGUSR1" and name not in self.signals:
            self._takes_at = self.now() + TAKES_S
        self.signals.append(name)
        self.settle()

    def bound(self) -> set[tuple[str, int]]:
        return self.serving()

    def serving(self) -> set[tuple[str, int]]:
        if self._ends or not self._listens:
            return set()
        return {(self.machine.address, self.port)}

    def answer(self, path: str, body: Mapping[str, Any]) -> httpx.Response:
        return httpx.Response(503, headers={waiting_room.HEADER: "waiting room"})

    def _proxy_listens(self) -> bool:
        programs = (one.program for one in self.machine.running())
        return any((ANYWHERE, self.port) in p.serving() for p in programs if isinstance(p, Proxy))


class Server(_Process):
    """A prefill or a decode."""

    def __init__(self, machine: Machine, container: Container) -> None:
        super().__init__(machine, container)
        labels = container.labels
        self.instance, self.role = labels[generations.INSTANCE], labels[generations.ROLE]
        given = container.image.build.faults
        self.faults = machine.cluster.faults.get(
            self.instance, given.get(self.instance, given.get("*", Faults()))
        )
        self.links: frozenset[str] = frozenset()
        self.kv: dict[str, str] = {}
        self.served = self.kv_tokens = 0
        self.api_port, self.peers, self.ranktable = 0, 0, ""
        self.links_on_demand, self._api_key = False, ""
        if script := self.script():
            self._load(script)
            if ENVIRONMENT_FILE in script:
                mounts = container.config["HostConfig"]["Mounts"]
                sources = {mount["Target"]: mount["Source"] for mount in mounts}
                secrets = machine.disk.read(sources[ENVIRONMENT_FILE])
                self._api_key = secrets.removeprefix("VLLM_API_KEY=").strip()

    def settle(self) -> None:
        super().settle()
        if not self.container.running or self.links or self._ends:
            return
        if self.faults.dies is not None:
            if self.now() >= self.began + LOAD_S / 2:
                self.refuse("RuntimeError: out of memory", self.faults.dies)
                super().settle()
        elif self.faults.out_of_memory:
            if self.now() >= self.began + LOAD_S / 2:
                self.machine.end(self.container, 137, oom_killed=True)
        elif self.is_loaded:
            self._link()

    @property
    def api_key(self) -> str:
        return self._api_key

    @property
    def is_loaded(self) -> bool:
        """Whether it could link."""
        late = self.now() < self.began + LOAD_S
        return self.container.running and not (late or self._ends or self.faults.hangs)

    def bound(self) -> set[tuple[str, int]]:
        return {(self.machine.address, port) for port in self._ports}

    def serving(self) -> set[tuple[str, int]]:
        return {(self.machine.address, self.api_port)} if self.links and not self._ends else set()

    def answer(self, path: str, body: Mapping[str, Any]) -> httpx.Response:
        if path == "/health":
            return httpx.Response(200)
        if path == "/metrics":
            return httpx.Response(200, text=self._metrics())
        if self.faults.dies_at_request is not None:
            self.refuse("RuntimeError: illegal memory access", self.faults.dies_at_request)
            raise httpx.ReadError("the connection was reset")
        if self.faults.garbage:
            return httpx.Response(200, text="garbage")
        return self._completion(path, body)

    def _load(self, script: str) -> None:
        """What is looked at before loading begins."""
        environment = dict(re.findall(r"^export (\w+)=(\S*)$", script, re.MULTILINE))
        self.say(f"{omniinfer.STARTED} {self.role} {self.instance}")
        self.api_port = int(environment["API_PORT"])
        self.links_on_demand = environment.get("OMNI_PD_ROLE") == self.role
        if not self.links_on_demand:
            self.ranktable = self.machine.disk.read(environment["GLOBAL_RANK_TABLE_FILE_PATH"])
        self.peers = _servers_in(self.ranktable)
        if self.ranktable or self.links_on_demand:
            self._take()
        else:
            self.refuse("the global ranktable is missing")

    def _take(self) -> None:
        """Takes its devices and ports."""
        wanted = generations.numbers(self.container.labels[generations.DEVICES])
        taken = wanted & self.machine.device_users().keys()
        ports = self._ports & {port for _, port, *_ in self.machine.listeners()}
        if taken or ports:
            self.refuse(f"devices {sorted(taken)} or ports {sorted(ports)} are in use")
        else:
            self.devices = frozenset(wanted)

    @property
    def _ports(self) -> set[int]:
        if not self.api_port:
            return set()
        return generations.numbers(self.container.labels[generations.PORTS])

    def _link(self) -> None:
        """Links with all peers at once; one that was linked before takes no second link. One that
        links on demand needs no peer for that."""
        if self.links_on_demand:
            self.links = frozenset({self.container.run_id})
            return
        peers = [
            container.program
            for machine, container in self.machine.cluster.running()
            if isinstance(container.program, Server)
            and not machine.unplugged
            and container.program.ranktable == self.ranktable
            and container.image.build == self.container.image.build
        ]
        if len(peers) == self.peers and all(p.is_loaded and not p.links for p in peers):
            links = frozenset(p.container.run_id for p in peers)
            for peer in peers:
                peer.links = links

    def _metrics(self) -> str:
        lines = [f'vllm:request_success_total{{finished_reason="length"}} {self.served}']
        if self.role == "decode":
            source = 'vllm:prompt_tokens_by_source_total{source="external_kv_transfer"}'
            lines.append(f"{source} {self.kv_tokens}")
            lines.append(f"standin:kv_transfer_bytes_total {self.kv_tokens * KV_BYTES}")
        return "\n".join(lines)

    def _completion(self, path: str, body: Mapping[str, Any]) -> httpx.Response:
        prompt, heads = _prompt_of(body), ""
        if offered := body.get("kv_transfer_params"):
            found = self._pull(offered)
            if found != prompt:
                return httpx.Response(500, text="the KV is not there")
            if not self.faults.ignores_kv:
                self.kv_tokens += _length(body)
            heads = "other" if self.faults.wrong_kv else ""
        self.served += 1
        answer = _answer(path, body, _text(prompt, body["max_tokens"], heads))
        if self.role == "prefill" and body["max_tokens"] == 1 and not self.faults.refuses_kv:
            key = f"{self.served}"
            self.kv[key] = prompt
            answer["kv_transfer_params"] = {
                "remote_host_ip": self.machine.address, "port": self.api_port, "key": key,
            }  # fmt: skip
        if body.get("stream") and "prompt" in body and self.faults.token_seconds:
            stream = TokenByToken(body["max_tokens"], self.faults.token_seconds)
            return httpx.Response(200, stream=stream)
        return _response(path, body, answer)

    def _pull(self, offered: Mapping[str, Any]) -> str | None:
        """The prompt whose KV a prefill holds, if there is a link to it."""
        cluster = self.machine.cluster
        machine = cluster.machines[offered["remote_host_ip"]]
        holder = cluster.listener(machine, machine.address, offered["port"])
        if not isinstance(holder, Server):
            return None
        if not (self.links_on_demand or holder.container.run_id in self.links):
            return None
        return holder.kv.pop(offered["key"], None)


class TokenByToken(httpx.AsyncByteStream):
    """A streamed completion, with the tokens that it used at its end."""

    def __init__(self, tokens: int, seconds: float) -> None:
        self._tokens = tokens
        self.seconds = seconds

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for number in range(1, self._tokens + 1):
            await asyncio.sleep(self.seconds)
            reason = "length" if number == self._tokens else None
            yield _event({"choices": [{"index": 0, "text": " sun", "finish_reason": reason}]})
        yield _event({"choices": [], "usage": {"completion_tokens": self._tokens}})
        yield b"data: [DONE]\n\n"


def _event(content: Mapping[str, Any]) -> bytes:
    return f"data: {json.dumps(content)}\n\n".encode()


class Proxy(_Process):
    """The proxy: prepared, then one step on with each signal."""

    def __init__(self, machine: Machine, container: Container) -> None:
        super().__init__(machine, container)
        name = container.labels[generations.INSTANCE]
        self.faults = container.image.build.faults.get(name, Faults())
        self.port = int(container.labels[generations.PORTS].partition(",")[0])
        self._prepared, self._steps = False, 0
        self._due = list[float]()
        """When it is open, by the step."""
        self.streams = list[float]()
        script = self.script()
        self.prefill, self.decode = (
            found[1].split(",")
            if (found := re.search(rf"--{role}-(?:servers-list|endpoints) (\S+)", script))
            else [] for role in ("prefill", "decode")
        )  # fmt: skip

    def settle(self) -> None:
        super().settle()
        if not self.container.running or self._ends or self.now() < self.began + PREPARE_S:
            return
        if self.faults.dies is not None:
            self.refuse("nginx: [emerg] unknown directive", self.faults.dies)
            return
        if not self._prepared:
            self._prepared = True
            self.say(omniinfer.PREPARED)
        while self._steps < len(self._due) and self.now() >= self._due[self._steps]:
            self._steps += 1
            self.say({1: omniinfer.PROVING}.get(self._steps, omniinfer.OPENED))

    def signal(self, name: str) -> None:
        if name == omniinfer.OPEN_SIGNAL:
            if len(self._due) < 2:
                self._due.append(self.now() + self.opens_after(len(self._due) + 1))
            self.settle()
        else:
            self.ends_in(max([STOP_S, *(end - self.now() for end in self.streams)]), 0)

    @property
    def api_key(self) -> str:
        """That of its servers: it passes clients' headers on."""
        machines = self.machine.cluster.machines
        address, _, port = self.prefill[0].partition(":")
        server = self.machine.cluster.listener(machines[address], address, int(port))
        return server.api_key if server else ""

    def opens_after(self, step: int) -> float:
        """How many seconds it takes to open, first to the smoke test, then to clients."""
        return 0

    def stream(self, seconds: float) -> None:
        """A client's request that takes so long to answer."""
        self.streams.append(self.now() + seconds)

    def clients(self) -> int:
        """How many are connected."""
        return sum(end > self.now() for end in self.streams)

    def bound(self) -> set[tuple[str, int]]:
        return self.serving()

    def serving(self) -> set[tuple[str, int]]:
        if self._ends or not self._steps:
            return set()
        return {(PROVING_ADDRESS if self._steps == 1 else ANYWHERE, self.port)}

    def answer(self, path: str, body: Mapping[str, Any]) -> httpx.Response:
        if not path.startswith("/v1/"):
            return httpx.Response(200)
        if self.faults.garbage:
            return httpx.Response(200, text="garbage")
        made = self._ask(self.prefill, path, {**body, "max_tokens": 1, "stream": False})
        if made.status_code != 200:
            return made
        try:
            offered = made.json().get("kv_transfer_params")
        except ValueError:
            return made
        return self._ask(self.decode, path, {**body, "kv_transfer_params": offered})

    def _ask(self, servers: list[str], path: str, body: Mapping[str, Any]) -> httpx.Response:
        for server in servers:
            address, _, port = server.partition(":")
            cluster = self.machine.cluster
            program = cluster.listener(cluster.machines[address], address, int(port))
            if program:
                return program.answer(path, body)
        return httpx.Response(502, text="no server answers")


@functools.cache
def _servers_in(ranktable: str) -> int:
    """The servers of a service, by the global ranktable: those of all hosts of all pods."""
    if not ranktable:
        return 0
    return sum(len(pod["server_list"]) for pod in json.loads(ranktable)["server_group_list"])


def _prompt_of(body: Mapping[str, Any]) -> str:
    if "messages" in body:
        return str(body["messages"][-1]["content"])
    prompt = body["prompt"]
    # Of thousands of tokens: their text would take longer to make than all else of an answer.
    return f"tokens {hash(tuple(prompt))}" if isinstance(prompt, list) else str(prompt)


def _length(body: Mapping[str, Any]) -> int:
    prompt = body.get("prompt")
    return len(prompt) if isinstance(prompt, list) else len(_prompt_of(body).split())


def _text(prompt: str, count: int, heads: str) -> str:
    """Continues numbers of equal distance if the KV is the prompt's own; else some words."""
    numbers = [int(found) for found in re.findall(r"\d+", prompt)] if prompt.endswith(",") else []
    if len(numbers) > 2 and not heads:
        step = numbers[-1] - numbers[-2]
        return ",".join(f" {numbers[-1] + step * (i + 1)}" for i in range(max(count // 2, 1)))
    digest = hashlib.sha256(f"{heads}{prompt}".encode()).digest()
    return "".join(f" {TOKENS[digest[i % 32] % len(TOKENS)]}" for i in range(count))


def _answer(path: str, body: Mapping[str, Any], text: str) -> dict[str, Any]:
    said: dict[str, Any] = {"text": text}
    if path.endswith("/chat/completions"):
        said = {"message": {"role": "assistant", "content": text}}
    choice = {"index": 0, "finish_reason": "length", **said}
    return {"choices": [choice], "usage": {"prompt_tokens": _length(body)}}


def _response(path: str, body: Mapping[str, Any], answer: dict[str, Any]) -> httpx.Response:
    if not body.get("stream"):
        return httpx.Response(200, json=answer)
    choice = dict(answer["choices"][0])
    if "message" in choice:
        choice["delta"] = choice.pop("message")
    return httpx.Response(200, text=f"data: {json.dumps({'choices': [choice]})}\n\ndata: [DONE]\n")
