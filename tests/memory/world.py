"""The documented 3P1D, or another example, on two hosts in memory, and runs of the flows there.

A run is the flow's own function with the real tasks and their retries. What Prefect adds around it
is left out: its server, states and logs. Time is virtual, so waits and retries cost nothing.
"""

import asyncio
import copy
import inspect
import pickle
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar
from unittest import mock
from uuid import uuid4

import yaml
from prefect import Task
from prefect.client.schemas.objects import FlowRun
from prefect.context import FlowRunContext
from prefect.logging import disable_run_logger

from pd_deploy.blocks import opening
from pd_deploy.config.fields import split_image
from pd_deploy.config.models import Deployment
from pd_deploy.config.yaml_files import merge
from pd_deploy.flows import events, health, interrupts, past_checks, publish, session
from pd_deploy.flows.deploy import deploy
from pd_deploy.hosts.container_values import DEPLOYMENT_LABEL
from pd_deploy.hosts.lease import Owner
from pd_deploy.planning.plans import InstancePlan
from pd_deploy.records import generations
from pd_deploy.records.releases import Record
from pd_deploy.registry import archives
from pd_deploy.steps import inspecting, surveying
from tests.memory import answers, programs
from tests.memory.calls import Calls, Moment
from tests.memory.clock import Clock, VirtualLoop
from tests.memory.commands import is_draft
from tests.memory.disk import Entry
from tests.memory.host import MemoryHost
from tests.memory.machine import Build, Cluster, Container, Faults, LocalImage, Machine
from tests.memory.playbook import Workbench
from tests.memory.registry import reaching
from tests.unit import example

T = TypeVar("T")

NAME = "qwq-3p1d"
ROOT = f"/var/lib/pd-deploy/{NAME}"
ADDRESSES = {"a": "10.0.0.1", "b": "10.0.0.2"}
SERVERS = {"p0", "p1", "p2", "d0"}
PROXIES = {"c0": "a"}
INSTANCES = {*SERVERS, *PROXIES}
REPOSITORY = "swr.cn-east-4.myhuaweicloud.com/omni-ci/daily_omniinfer"
FIRST = f"{REPOSITORY}:20250722_26"
PROXY_PORT = 7000
MODEL = "/data/models/QwQ-32B"
MODEL_FILES = {"config.json": b"{}", "model-00001.safetensors": b"weights", "README.md": b"QwQ"}
CHANGES: dict[str, Any] = {
    "extends": str(example.FILE),
    "ssh": {"credentials": None},
    "gates": {"lease_lasts": 2, "ready": 20},
    "container": {"stop_timeout": 5},
}


@dataclass(frozen=True)
class Outcome:
    """How a run ended: the message and name of its last state, or what it raised; `killed` ones
    have neither."""

    message: str = ""
    error: BaseException | None = None
    killed: bool = False
    cancelled: bool = False
    word: str = ""
    moments: tuple[Moment, ...] = ()

    @property
    def completed(self) -> bool:
        """Whether it went well."""
        return self.error is None and not self.killed and not self.cancelled


class Reports:
    """The reports that a run has published."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.keys: list[str | None] = []

    async def publish(self, *, key: str | None, **artifact: Any) -> None:
        """Take an artifact in place of a server."""
        if "markdown" in artifact:
            self.texts.append(artifact["markdown"])
            self.keys.append(key)

    @property
    def only(self) -> str:
        """The one that it should have."""
        (text,) = self.texts
        return text


@dataclass(frozen=True)
class Example:
    """The service that a world has: its file with what is changed there, and what is in it."""

    name: str
    changes: Mapping[str, Any]
    servers: frozenset[str]
    image: str
    addresses: Mapping[str, str]
    proxy_port: int
    answer: str

    @property
    def root(self) -> str:
        """Where the hosts keep its state."""
        return f"/var/lib/pd-deploy/{self.name}"


QWQ = Example(
    NAME, CHANGES, frozenset(SERVERS), FIRST, ADDRESSES, PROXY_PORT, answers.of("by its tag")
)
SGLANG = Example(
    "lab-sglang-2p1d",
    {
        "extends": str(example.ROOT / "deployments/lab-sglang-2p1d.yaml"),
        "image": "registry.example/lmsysorg/sglang:v0.5.23",
        "ssh": {"credentials": None},
        "gates": {"lease_lasts": 2, "ready": 20},
        "container": {"stop_timeout": 5, "mounts": []},
    },
    frozenset({"p0", "p1", "d0"}),
    "registry.example/lmsysorg/sglang:v0.5.23",
    {"a": "10.77.0.11", "b": "10.77.0.12"},
    7002,
    answers.sglang(),
)
OF_EXAMPLE = "what the example's images say"
_shared: dict[object, tuple[bytes, Outcome]] = {}
"""What a run leaves, and how it ended, by the text of the deployment file, the cluster before the
run, its flow and its parameters."""


class World:
    """Machines, two by default, a registry, a deployment file, and runs on them.

    Args:
        directory: for the deployment file.
        addresses: of the machines, by name, if there are others than the example has.
        of: the service; by default the documented one.
    """

    def __init__(
        self, directory: Path, addresses: Mapping[str, str] | None = None, of: Example = QWQ
    ) -> None:
        self.example = of
        self.path = directory / f"{of.name}.yaml"
        self.document = of.changes
        self.change()
        self.cluster = Cluster(Clock(), addresses or of.addresses)
        for machine in self.cluster.machines.values():
            _furnish(machine, of)
        self.buried: list[str] = []
        self.events: list[dict[str, Any]] = []
        self.word = ""
        self.push(split_image(of.image).tag or "")

    def change(self, **changes: Any) -> None:
        """Lays changes on the deployment file."""
        self.document = merge(self.document, changes)
        self.path.write_text(yaml.safe_dump(self.document))

    def push(
        self,
        tag: str,
        faults: Mapping[str, Faults] | None = None,
        architecture: str = "arm64",
        repository: str = "",
        answer: str | None = OF_EXAMPLE,
        load_generator: str = "0.9.0",
    ) -> str:
        """Push an image whose engines misbehave so, and that says this of itself, by default what
        the example's says; return its name for a run."""
        ref = f"{repository or split_image(self.example.image).name}:{tag}"
        digest = f"sha256:{len(self.cluster.registry) + 1:064x}"
        answer = self.example.answer if answer == OF_EXAMPLE else answer
        build = Build(
            digest, dict(faults or {}), architecture, answer, load_generator=load_generator
        )
        self.cluster.push(ref, build)
        return ref

    def twin(self) -> "World":
        """A copy that goes its own way; the two share the deployment file."""
        twin = copy.copy(self)
        twin.cluster = pickle.loads(pickle.dumps(self.cluster))
        return twin

    # Runs

    def deploy(self) -> None:
        """Be as after a first run of `deploy`; see `shared_run`."""
        assert not any(machine.containers for machine in self.machines.values())
        assert self.shared_run(deploy).completed

    def shared_run(self, flow: Any, **parameters: Any) -> Outcome:
        """A run of a flow that is made once for each file and each state of the hosts: tests share
        what it leaves, as it costs many times as much as a copy."""
        cluster = pickle.dumps(self.cluster)
        key = self.path.read_text(), cluster, flow.name, tuple(parameters.items())
        if key not in _shared:
            outcome = self.run(flow, **parameters)
            _shared[key] = pickle.dumps(self.cluster), outcome
        after, outcome = _shared[key]
        self.cluster, self.word = pickle.loads(after), outcome.word
        return outcome

    def run(
        self,
        flow: Any,
        *,
        watch: Callable[[Moment], None] | None = None,
        kill_at: int | Callable[[Moment], bool] = 0,
        cancel_at: int = 0,
        cancel_again_at: int = 0,
        cancel_all_at: int = 0,
        hang_at: int = 0,
        artifacts: Callable[..., Awaitable[None]] | None = None,
        due: datetime | None = None,
        **parameters: Any,
    ) -> Outcome:
        """A run of a flow.

        Args:
            watch: told of each moment; what it raises, the call there raises.
            kill_at: number of the moment at which its process is killed, or what tells it where
                numbers differ from run to run, as they do while a thread works.
            cancel_at, cancel_again_at: at which it is cancelled.
            cancel_all_at: at which everything on its event loop is cancelled.
            hang_at: at which a call is not answered, until it is given up.
            artifacts: what publishes them, in place of a server that takes all.
            due: when a schedule wanted it to start.
        """
        loop, calls = VirtualLoop(self.cluster.clock), Calls()
        calls.hangs = lambda moment: moment.number == hang_at
        try:
            with _without_prefect(self, calls, artifacts):
                outcome = loop.run_until_complete(
                    _carried_out(
                        _flow_run(flow, file=str(self.path), due=due, **parameters),
                        calls,
                        watch or (lambda _: None),
                        kill_at,
                        (cancel_at, cancel_again_at),
                        cancel_all_at,
                    )
                )
                _let_go(loop)
                self.word = outcome.word
                return outcome
        finally:
            loop.close()

    def new_states(self, flow: Any, **parameters: Any) -> list[Moment]:
        """The moments of a run that finds the hosts as none before it does: a kill at any other one
        leaves what a kill at one of these leaves."""
        twin, states, moments = self.twin(), set[object](), list[Moment]()

        def watch(moment: Moment) -> None:
            if moment.changes and (state := twin._left_by_a_kill()) not in states:
                states.add(state)
                moments.append(moment)

        assert twin.run(flow, watch=watch, **parameters).completed
        return moments

    def both(self, *runs: tuple[Any, dict[str, Any]]) -> list[Outcome]:
        """Runs at the same time, each with its parameters and perhaps `due`; see `run`."""
        loop, calls = VirtualLoop(self.cluster.clock), Calls()

        async def all_of_them() -> list[Outcome]:
            work = [
                _carried_out(
                    _flow_run(flow, **{"file": str(self.path), **parameters}),
                    calls, lambda _: None, 0, (), 0,
                )
                for flow, parameters in runs
            ]  # fmt: skip
            return list(await asyncio.gather(*work))

        try:
            with _without_prefect(self, calls):
                return loop.run_until_complete(all_of_them())
        finally:
            loop.close()

    def stranger(
        self,
        host: str,
        name: str,
        *,
        ports: Iterable[int] = (),
        devices: Iterable[int] = (),
        labels: Mapping[str, str] | None = None,
        seconds: float = 86_400,
    ) -> Container:
        """Run a container that is not this deployment's on a host, for so many seconds."""
        machine = self.machines[host]
        self.cluster.made += 1
        container_id = f"{self.cluster.made:064x}"
        config = {
            "Image": "busybox:1",
            "Cmd": ["sleep", str(seconds)],
            "Labels": dict(labels or {}),
        }
        image = LocalImage("sha256:busybox", Build("sha256:busybox"))
        container = Container(container_id, name, config, image)
        machine.containers[container_id] = container
        programs.start(machine, container)
        assert isinstance(container.program, programs.Shell)
        container.program.ports = frozenset(ports)
        container.program.devices = frozenset(devices)
        return container

    def playbook(
        self, changes: Mapping[str, Any] | None = None, /, **secrets: str
    ) -> dict[str, Container]:
        """Start the service by the playbook's means: containers without labels under its names, and
        in them launchers and nginx; by instance.

        Args:
            changes: of the documented file.
            secrets: further variables of the launchers.
        """
        made = {}
        servers = len(SERVERS)
        for name, host in example.plan(changes).hosts.items():
            machine = self.machines[name]
            if machine.find_image(FIRST) is None:
                machine.pull(FIRST, self.cluster.registry[FIRST])
            image = machine.find_image(FIRST)
            assert image
            for instance, planned in host.instances.items():
                self.cluster.made += 1
                container_id = f"{self.cluster.made:064x}"
                config = {
                    "Image": FIRST,
                    "Tty": True,
                    "Env": ["LOG_PATH=/data/log_path", "CODE_PATH=/workspace", "PATH=/bin"],
                    "HostConfig": {},
                    "Servers": servers,
                }
                container = Container(container_id, f"{_prefix(planned)}_{instance}", config, image)
                machine.containers[container_id] = made[instance] = container
                programs.start(machine, container)
                self._execute(container, instance, planned, secrets)
        return made

    def _execute(
        self,
        container: Container,
        instance: str,
        planned: InstancePlan,
        secrets: Mapping[str, str],
    ) -> None:
        assert isinstance(container.program, Workbench)
        nginx = ["/usr/local/nginx/nginx", "-c", "/usr/local/nginx/conf/nginx.conf"]
        is_proxy = planned.role == "proxy"
        container.program.spawn(
            nginx if is_proxy else planned.command.argv,
            {**planned.command.environment, "LOG_PATH": f"/data/log_path/{instance}", **secrets},
            "/workspace/omniinfer/tools/scripts",
            f"/data/log_path/{instance}/run.log",
        )

    def asked(self, call: Coroutine[Any, Any, T]) -> T:
        """What a call returns that reads from the hosts without a flow run."""
        loop = VirtualLoop(self.cluster.clock)
        try:
            with _without_prefect(self, Calls()):
                return loop.run_until_complete(call)
        finally:
            loop.close()

    def pass_by(self, seconds: float) -> None:
        """Lets time pass on the hosts."""
        self.cluster.clock.pass_by(seconds)
        self.cluster.settle()

    # What can be seen on the hosts

    @property
    def machines(self) -> dict[str, Machine]:
        """By name."""
        return {machine.name: machine for machine in self.cluster.machines.values()}

    def containers(self) -> list[Container]:
        """All of the deployment, on both hosts, but for waiting rooms."""
        self.cluster.settle()
        return [
            one
            for machine in self.cluster.machines.values()
            for one in machine.containers.values()
            if one.labels.get(DEPLOYMENT_LABEL) == self.example.name
            and one.labels[generations.ROLE] != generations.WAITING_ROOM
        ]

    def waiting_rooms(self) -> list[Container]:
        """What holds requests, or did."""
        self.cluster.settle()
        return [
            one
            for machine in self.cluster.machines.values()
            for one in machine.containers.values()
            if one.labels.get(generations.ROLE) == generations.WAITING_ROOM
        ]

    def running(self) -> dict[str, Container]:
        """Those that run, by instance."""
        running = [one for one in self.containers() if one.running]
        found = {one.labels[generations.INSTANCE]: one for one in running}
        assert len(found) == len(running), "two containers of one instance run"
        return found

    def kill(self, *instances: str) -> None:
        """Ends containers as `docker kill` does."""
        for name in instances:
            container = self.running()[name]
            machine = next(m for m in self.machines.values() if container.id in m.containers)
            machine.end(container, 137)

    def runs(self) -> dict[str, str]:
        """By instance, which run of which container: changes when somebody touches it."""
        return {name: one.run_id for name, one in self.running().items()}

    def serving(self) -> str:
        """The generation of the containers that run."""
        found = {one.labels[generations.GENERATION] for one in self.running().values()}
        assert len(found) == 1, f"several generations run: {found}"
        return found.pop()

    def record(self, host: str = "a") -> Record:
        """What became of the releases, as a host has it."""
        text = self.machines[host].disk.read(f"{self.example.root}/record.json")
        return Record.model_validate_json(text) if text else Record()

    def state(self) -> object:
        """All that a run may change, but for leases and the list of runs."""
        return (
            self.runs(),
            sorted((c.id, c.status) for c in self.containers()),
            [
                {
                    p: _but_for_runs(p, e.content)
                    for p, e in m.disk.entries.items()
                    if "lease" not in p
                }
                for m in self.cluster.machines.values()
            ],
            [
                sorted((i.id, *sorted(i.tags | i.digests)) for i in m.images.values())
                for m in self.cluster.machines.values()
            ],
        )

    def _left_by_a_kill(self) -> object:
        """All that a run may change; of a lease all but its age, the fourth line."""

        def content(path: str, entry: Entry) -> bytes | None:
            if entry.content and path.endswith("/lease"):
                return b"\n".join(entry.content.split(b"\n")[:3])
            return entry.content

        return tuple(
            (
                tuple((c.id, c.status, c.runs) for c in m.containers.values()),
                tuple((i.id, *sorted(i.tags | i.digests)) for i in m.images.values()),
                tuple((p, e.mode, content(p, e)) for p, e in sorted(m.disk.entries.items())),
            )
            for m in self.cluster.machines.values()
        )

    def completes(self, host: str = "a") -> bool:
        """Whether a client gets a completion at a host's public port."""
        machine = self.machines[host]
        proxy = self.cluster.listener(machine, machine.address, self.example.proxy_port)
        if proxy is None:
            return False
        body = {"model": "qwen", "prompt": "2, 4, 6,", "max_tokens": 4}
        answer = proxy.answer("/v1/completions", body)
        return answer.status_code == 200 and answer.json()["choices"][0]["text"] == " 8, 10"

    def assert_coherent(self, proxies: Mapping[str, str] = PROXIES) -> str:
        """One whole generation serves, the record says so, and nothing is left that is not of a
        kept one; its name.

        Args:
            proxies: those of the file, each with its host.
        """
        assert set(self.running()) == {*self.example.servers, *proxies}
        serving, root = self.serving(), self.example.root
        assert all(map(self.completes, proxies.values()))
        assert self.record().serving == serving
        assert self.record().closed is None
        assert self.record("b") == self.record()
        for machine in self.cluster.machines.values():
            disk = machine.disk
            assert disk.read(f"{root}/lease").split("\n")[1] == "", "the lease is still held"
            assert not [path for path, _ in disk.files("/") if is_draft(path)]
            directories = {n for n in disk.names(root) if disk.entries[f"{root}/{n}"].is_directory}
            kept = directories - {".code"}
            ours = [
                c
                for c in machine.containers.values()
                if c.labels.get(DEPLOYMENT_LABEL) == self.example.name
            ]
            assert {c.labels[generations.GENERATION] for c in ours} <= kept
            assert len(kept) <= 2
        return serving


def _prefix(planned: InstancePlan) -> str:
    """What the file calls the containers of a role."""
    return planned.container.name.rsplit("_", 2)[0]


def _but_for_runs(path: str, content: bytes | None) -> object:
    """A file's content; of the record, without the list of runs that every failed one goes to."""
    if content is None or not path.endswith("/record.json"):
        return content
    return Record.model_validate_json(content).model_copy(update={"attempts": (), "sequence": 0})


async def _flow_run(flow: Any, *, due: datetime | None = None, **parameters: Any) -> Any:
    """The flow's function, where Prefect says which run it is."""
    flow_run = FlowRun(
        flow_id=uuid4(),
        name=f"run of {flow.name}",
        auto_scheduled=due is not None,
        expected_start_time=due,
    )
    if "name" in inspect.signature(flow.fn).parameters:
        parameters.setdefault("name", NAME)  # a teardown asks whether this one is meant
    context = FlowRunContext.model_construct(flow=flow, flow_run=flow_run, parameters=parameters)
    with context:
        return await flow.fn(**parameters)


async def _carried_out(
    run: Any,
    calls: Calls,
    watch: Callable[[Moment], None],
    kill_at: int | Callable[[Moment], bool],
    cancel_at: tuple[int, ...],
    cancel_all_at: int,
) -> Outcome:
    harness = asyncio.current_task()
    work = asyncio.ensure_future(run)
    kills = kill_at if callable(kill_at) else lambda moment: moment.number == kill_at
    killed = asyncio.get_running_loop().create_future()

    def passes(moment: Moment) -> None:
        watch(moment)
        if moment.number in cancel_at:
            work.cancel()
        if moment.number == cancel_all_at:
            for task in asyncio.all_tasks() - {harness}:
                task.cancel()
        if kills(moment) and not calls.dead:
            calls.dead = True
            killed.set_result(None)

    calls.watch = passes
    await asyncio.wait({work, killed}, return_when=asyncio.FIRST_COMPLETED)
    moments = tuple(calls.moments)
    if killed.done():
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)
        return Outcome(killed=True, moments=moments)
    killed.cancel()
    if work.cancelled():
        return Outcome(error=asyncio.CancelledError(), moments=moments)
    if error := work.exception():
        return Outcome(error=error, moments=moments)
    state = work.result()
    if state.is_failed():
        return Outcome(error=state.data, word=state.name, moments=moments)
    return Outcome(
        str(state.message), cancelled=state.is_cancelled(), word=state.name, moments=moments
    )


def _let_go(loop: asyncio.AbstractEventLoop) -> None:
    """Ends what a run has left behind."""
    left = asyncio.all_tasks(loop)
    for task in left:
        task.cancel()
    if left:
        loop.run_until_complete(asyncio.wait(left))
    loop.run_until_complete(loop.shutdown_asyncgens())


@contextmanager
def _without_prefect(
    world: World, calls: Calls, artifacts: Callable[..., Awaitable[None]] | None = None
) -> Iterator[None]:
    """Tasks run in place, artifacts go nowhere, hosts are in memory, time is the hosts'."""

    def host(name: str, address: str, *_: object, **__: object) -> MemoryHost:
        return MemoryHost(name, world.cluster.machines[address], calls)

    async def buried(owner: Owner, _: str) -> None:
        world.buried.append(owner.flow_run)

    async def nowhere(**_: object) -> None: ...

    async def was_told() -> bool:
        return world.word in past_checks.TROUBLED

    async def forget() -> None: ...

    def emitted(**event: Any) -> None:
        world.events.append(event)

    with ExitStack() as stack:
        for target, attribute, replacement in (
            (Task, "__call__", _run_in_place),
            (opening, "Host", host),
            (session, "bury", buried),
            (interrupts, "SIGNALS", ()),
            (publish, "acreate_markdown_artifact", artifacts or nowhere),
            (publish, "acreate_table_artifact", artifacts or nowhere),
            (events, "emit_event", emitted),
            (health, "now", world.cluster.clock.date),
            (inspecting, "now", lambda: world.cluster.clock.date().timestamp()),
            (past_checks, "was_told", was_told),
            (past_checks, "forget", forget),
            (time, "monotonic", world.cluster.clock.seconds),
            (surveying, "reach", reaching(world.cluster)),
            (archives, "in_thread", _in_place),
        ):
            stack.enter_context(mock.patch.object(target, attribute, replacement))
        stack.enter_context(disable_run_logger())
        yield


async def _in_place(call: Callable[[], T], _: str) -> T:
    """What a thread would do: the hosts' time does not wait for one."""
    return call()


async def _run_in_place(task: Any, *args: Any, wait_for: object = None, **kwargs: Any) -> Any:
    """What Prefect does of a task here: its function, again while its own condition says so."""
    for delay in (*task.retry_delay_seconds, None):
        try:
            return await task.fn(*(quoted.unwrap() for quoted in args), **kwargs)
        except Exception as error:
            state = SimpleNamespace(data=error)
            if delay is None or not task.retry_condition_fn(task, None, state):
                raise
        await asyncio.sleep(delay)
    raise AssertionError


def _furnish(machine: Machine, of: Example) -> None:
    """What a host has: the driver, the model, the devices."""
    for directory in _furniture(Path(of.changes["extends"]), of.name):
        machine.disk.add_directory(directory)
    for name, content in MODEL_FILES.items():
        machine.disk.put(f"{MODEL}/{name}", content, 0o644)


@cache
def _furniture(file: Path, name: str) -> tuple[str, ...]:
    """Directories of the host that the example's containers want, and the devices."""
    hosts = example.plan_of(file).hosts.values()
    containers = [i.container for host in hosts for i in host.instances.values()]
    return tuple(
        dict.fromkeys(
            [m.source for c in containers for m in c.mounts if name not in m.source]
            + [device.partition(":")[0] for c in containers for device in c.devices]
            + [f"/dev/davinci{number}" for number in range(16)]
        )
    )


__all__ = ["Deployment", "Faults", "Outcome", "World"]
