"""SGLang in memory: its server, by the real parser's table of options, and its router.

Prefill and decode are asked at the same time and wait for each other in a room, as on the lab.
"""

import contextlib
import importlib.util
import io
import itertools
import json
import shlex
from argparse import ArgumentParser
from collections.abc import Mapping
from functools import cache
from typing import Any

import httpx

from pd_deploy.engines.routed import RoutedEngine
from pd_deploy.lab import sglang as lab
from tests.memory import programs
from tests.memory.client import NotYet
from tests.memory.machine import Container, Machine

IMPORTS_S = 5.0
"""From the router's start until it listens."""
ROOMS = itertools.count(1)
"""The router draws them at random: none comes twice, also after it was started again."""


class Server(programs.Server):
    """A prefill or a decode; it needs no peer to load."""

    def _load(self, script: str) -> None:
        self.links_on_demand = True
        self.rooms: dict[int, str] = {}
        """The prompts of requests that wait for decode, by room."""
        self.taken: set[int] = set()
        self.say(f"{RoutedEngine.STARTED} {self.role} {self.instance}")
        argv = shlex.split(script.splitlines()[-1])
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                options = parser().parse_args(argv[argv.index("sglang.launch_server") + 1 :])
        except SystemExit:
            self.refuse(said.getvalue().splitlines()[-1], 2)
            return
        self.bootstrap_port = options.disaggregation_bootstrap_port
        self.api_port = options.port
        self._take()

    def _metrics(self) -> str:
        labels = '{model_name="qwq"}'
        return "\n".join([
            f"sglang:num_requests_total{labels} {self.served}",
            f"sglang:prompt_tokens_total{labels} {self.kv_tokens}",
            f"sglang:kv_transfer_total_mb_sum{labels} "
            f"{self.kv_tokens * programs.KV_BYTES / (1 << 20)}",
        ])  # fmt: skip

    def _completion(self, path: str, body: Mapping[str, Any]) -> httpx.Response:
        room = body.get("bootstrap_room")
        if room is None:
            return _refused(400, "Disaggregated request received without bootstrap room id.")
        prompt, heads = programs._prompt_of(body), ""
        if self.role == "prefill":
            self.rooms.setdefault(room, prompt)
            if room not in self.taken:
                raise NotYet
        else:
            prefill = self._peer(body["bootstrap_host"], body["bootstrap_port"])
            if prefill is None:
                return _refused(500, "Could not fetch prefill parallel info from bootstrap server")
            if room not in prefill.rooms:
                raise NotYet
            if prefill.rooms[room] != prompt:
                return _refused(500, "the KV is not there")
            prefill.taken.add(room)
            heads = "other" if self.faults.wrong_kv else ""
        self.served += 1
        self.kv_tokens += programs._length(body)
        answer = programs._answer(path, body, programs._text(prompt, body["max_tokens"], heads))
        return programs._response(path, body, answer)

    def _peer(self, address: str, port: int) -> "Server | None":
        """The prefill whose bootstrap server is there."""
        machine = self.machine.cluster.machines[address]
        for container in machine.running():
            program = container.program
            if isinstance(program, Server) and program.bootstrap_port == port and program.links:
                return program
        return None


class Router(programs.Proxy):
    """The router: it takes its port alone, long after it was started, unless a relay has the port
    in its place."""

    def __init__(self, machine: Machine, container: Container) -> None:
        super().__init__(machine, container)
        script = self.script().splitlines()
        self.is_relayed = any(line.startswith("relay serve ") for line in script)
        words = shlex.split(next(line for line in script if line.startswith("router")))
        self.ways = [
            (words[at + 1].removeprefix("http://"), int(words[at + 2]))
            for at, word in enumerate(words)
            if word == "--prefill"
        ]
        self.decode = [
            words[at + 1].removeprefix("http://")
            for at, word in enumerate(words)
            if word == "--decode"
        ]
        self.prefill = [server for server, _ in self.ways]
        self.asked = 0

    def opens_after(self, step: int) -> float:
        return 0 if self.is_relayed and step == 2 else IMPORTS_S

    def settle(self) -> None:
        steps = self._steps
        super().settle()
        if self._steps > steps and not self.is_relayed and self._is_taken():
            self.refuse("Address already in use (os error 98)")

    def _is_taken(self) -> bool:
        """Whether somebody else has the port at an address where it is to listen."""
        others = (one.program for one in self.machine.running() if one.program is not self)
        bound = {place for other in others if other for place in other.bound()}
        here = {address for address, port in bound if port == self.port}
        return any(
            address in (theirs, programs.ANYWHERE) or theirs == programs.ANYWHERE
            for address, _ in super().serving()
            for theirs in here
        )

    def serving(self) -> set[tuple[str, int]]:
        served = super().serving()
        is_restarting = self._steps < len(self._due) and not self.is_relayed
        return set() if is_restarting else served

    def answer(self, path: str, body: Mapping[str, Any]) -> httpx.Response:
        if not path.startswith("/v1/"):
            return httpx.Response(200)
        prefill, port = self.ways[self.asked % len(self.ways)]
        self.asked += 1
        met = {
            **body,
            "bootstrap_host": prefill.partition(":")[0],
            "bootstrap_port": port,
            "bootstrap_room": next(ROOMS),
        }
        with contextlib.suppress(NotYet):
            return self._ask([prefill], path, met)  # at once only where it refuses
        answer = self._ask(self.decode, path, met)
        self._ask([prefill], path, met)
        return answer


def _refused(status: int, message: str) -> httpx.Response:
    return httpx.Response(status, text=json.dumps({"object": "error", "message": message}))


@cache
def parser() -> ArgumentParser:
    """The strict stand-in's, which was made from the real one."""
    spec = importlib.util.spec_from_file_location("options", lab.STANDIN / "sglang/options.py")
    assert spec
    assert spec.loader
    options = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(options)
    made = options.parser()
    assert isinstance(made, ArgumentParser)
    return made
