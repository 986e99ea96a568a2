"""Many services: what `pd-deploy fleet status` tells, and how pd-fleet rolls through them."""

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest import mock
from uuid import UUID, uuid4

import httpx
import pytest
import typer
from prefect import State
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import ObjectNotFound
from prefect.logging import disable_run_logger
from prefect.states import Cancelled, Completed, Failed, Running, Scheduled

from pd_deploy.cli import fleet as command
from pd_deploy.cli import fleet_status
from pd_deploy.cli import hosts as asking
from pd_deploy.config.load import load_deployment
from pd_deploy.errors import InvalidInput
from pd_deploy.flows import fleet, nights, queues
from pd_deploy.flows.deploy import deploy
from pd_deploy.flows.run import FLEET
from pd_deploy.hosts.docker_client import DockerClient
from pd_deploy.records.status import SERVES, Status, Verdict
from tests.memory.clock import Clock, VirtualLoop
from tests.memory.machine import Faults, Machine
from tests.memory.world import NAME, World
from tests.unit.example import ROOT

WAVES = [["canary"], ["one", "two", "three"], ["four"]]
EVERY = [service for wave in WAVES for service in wave]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def status(world: World) -> Status:
    """What is told of the world's service."""
    (answer,) = world.asked(asking.statuses([load_deployment(world.path)]))
    assert isinstance(answer, Status)
    return answer


class TestStatus:
    def test_what_serves_is_told_with_its_image_and_its_time(self, world: World) -> None:
        assert status(world).state == "nothing is deployed"
        world.deploy()
        first = status(world)
        assert (first.deployment, first.generation, first.state) == (NAME, world.serving(), SERVES)
        assert first.image.endswith(":20250722_26")
        assert first.since == world.record().outcomes[world.serving()].when
        world.run(deploy, image=world.push("20250723_1"))
        assert status(world).image.endswith(":20250723_1")
        assert status(world).generation == world.serving() != first.generation

    def test_a_generation_of_another_proxy_alone_serves_with_the_servers_before_it(
        self, world: World
    ) -> None:
        world.deploy()
        servers = {name: run for name, run in world.runs().items() if name != "c0"}
        world.change(proxy={"c0": {"environment": {"EXAMPLE": "1"}}})
        world.run(deploy)
        assert servers.items() <= world.runs().items()
        assert status(world).generation.startswith("2-")
        assert status(world).state == SERVES

    @pytest.mark.parametrize(
        ("damage", "state"),
        [
            (lambda b: b.end(container(b, "p2"), 137), "p2 on b (10.0.0.2): exited"),
            (lambda b: b.containers.clear(), "nothing of it is on b (10.0.0.2)"),
        ],
        ids=["ended", "gone"],
    )
    def test_what_does_not_run_is_named(
        self, world: World, damage: Callable[[Machine], None], state: str
    ) -> None:
        world.deploy()
        damage(world.machines["b"])
        assert status(world).state == state

    def test_a_failed_attempt_is_remarked_while_the_old_one_serves(self, world: World) -> None:
        world.deploy()
        world.run(deploy, image=world.push("20250723_1", {"d0": Faults(garbage=True)}))
        told = status(world)
        assert told.serves
        assert told.remark.startswith("last attempt 2-")
        assert told.remark.endswith(": failed")

    def test_a_host_that_is_away_is_told_beside_what_the_others_know(self, world: World) -> None:
        world.deploy()
        world.machines["b"].unplug()
        told = status(world)
        assert told.generation == world.record().serving
        assert told.state.startswith("no answer from host b (10.0.0.2): ")
        assert not told.serves

    def test_a_host_that_has_left_the_file_is_not_taken_for_one_that_serves(
        self, world: World
    ) -> None:
        world.deploy()
        deployment = load_deployment(world.path)
        moved = deployment.hosts["b"].model_copy(update={"address": "10.0.0.1"})
        elsewhere = deployment.model_copy(update={"hosts": {**deployment.hosts, "b": moved}})
        (told,) = world.asked(asking.statuses([elsewhere]))
        assert isinstance(told, Status)
        assert told.state == "b (10.0.0.2) has left the file, and was not asked"

    def test_services_on_the_same_hosts_are_told_apart_and_each_host_is_listed_once(
        self, world: World, tmp_path: Path
    ) -> None:
        world.deploy()
        twin = tmp_path / "twin.yaml"
        twin.write_text(f"extends: {world.path}\nname: twin\n")
        deployments = [load_deployment(path) for path in (world.path, twin)]
        asked = Counter[str]()
        original = DockerClient.listed

        async def listed(client: DockerClient) -> Any:
            asked[client._where] += 1
            return await original(client)

        with mock.patch.object(DockerClient, "listed", listed):
            first, second = world.asked(asking.statuses(deployments))
        assert isinstance(first, Status)
        assert isinstance(second, Status)
        assert first.serves
        assert second.state == "nothing is deployed"
        assert asked == {"a (10.0.0.1)": 1, "b (10.0.0.2)": 1}


def container(machine: Machine, instance: str) -> Any:
    """An instance's running container on a machine."""
    return next(c for c in machine.running() if c.labels["pd-deploy.instance"] == instance)


class TestCommand:
    ROWS: ClassVar = [
        Status(
            "one",
            "3-0123abcd",
            "registry.example/omni/daily:20250722_26",
            verdict=Verdict.SERVING,
        ),
        Status("two", state="nothing is deployed", verdict=Verdict.DOWN),
        Status("three", state="p1 on a (10.0.0.1): exited", verdict=Verdict.DEGRADED),
        Status("four", state="four.yaml: no such file"),
    ]

    def test_a_directory_stands_for_the_deployment_files_in_it(self, tmp_path: Path) -> None:
        for name in ("b.yaml", "a.yml", "prefect.yaml", "notes.md"):
            (tmp_path / name).touch()
        single = tmp_path / "a.yml"
        assert fleet_status.files_of([single, tmp_path]) == [single, tmp_path / "b.yaml"]

    def test_paths_without_a_file_are_all_named(self, tmp_path: Path) -> None:
        with pytest.raises(InvalidInput) as refused:
            fleet_status.files_of([tmp_path, tmp_path / "absent.yaml"])
        assert f"{tmp_path}: expected a deployment file" in str(refused.value)
        assert "absent.yaml: expected a deployment file" in str(refused.value)

    @pytest.mark.parametrize(
        ("rows", "code"),
        [(ROWS, 4), (ROWS[:1], 0), ([ROWS[0], *ROWS[2:]], 3), ([ROWS[0], ROWS[3]], 1)],
    )
    def test_the_exit_code_is_that_of_the_worst(
        self,
        rows: list[Status],
        code: int,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setattr(fleet_status, "statuses", lambda _: rows)
        with pytest.raises(typer.Exit) as ended:
            command.status([ROOT / "deployments"])
        assert ended.value.exit_code == code
        told = capsys.readouterr().out.splitlines()
        assert len(told) == 1 + len(rows)
        assert told[1].split() == ["one", "3-0123abcd", "daily:20250722_26", SERVES]

    def test_json_has_the_same(self) -> None:
        told = json.loads(fleet_status.as_documents(self.ROWS))
        assert [(row["deployment"], row["serves"]) for row in told] == [
            ("one", True),
            ("two", False),
            ("three", False),
            ("four", False),
        ]

    def test_an_invalid_file_is_a_row_with_all_of_its_problems(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        good, bad = ROOT / "deployments/qwq-3p1d.yaml", tmp_path / "bad.yaml"
        bad.write_text(f"extends: {good}\nkeep: 0\nunknown: 1\n")
        monkeypatch.setattr(
            asking, "read_statuses", lambda _: [Status("qwq-3p1d", verdict=Verdict.SERVING)]
        )
        first, second = fleet_status.statuses([bad, good])
        assert (first.deployment, second.deployment) == ("bad", "qwq-3p1d")
        assert f"{bad}: line 2: keep: " in first.state
        assert f"{bad}: line 3: unknown: " in first.state
        assert second.serves


class Server:
    """A Prefect server with a deployment for each service, whose runs take some time.

    Args:
        ends: the last state of the runs of a service; by default, completed.
        seconds: from the start of a run to its end, by service; infinite for one that no worker
            takes.
    """

    def __init__(
        self,
        ends: Mapping[str, State[Any]] | None = None,
        seconds: Mapping[str, float] | None = None,
    ) -> None:
        self._ends = ends or {}
        self._seconds = seconds or {}
        self._ids = {service: uuid4() for service in EVERY}
        self._runs: dict[UUID, tuple[str, float]] = {}
        self.started: list[tuple[str, dict[str, Any]]] = []
        self.keys: list[str] = []
        self.most = 0
        self.cancelled: list[str] = []
        self.away = 0

    async def __aenter__(self) -> "Server":
        return self

    async def __aexit__(self, *_: object) -> None: ...

    async def read_deployment_by_name(self, name: str) -> Any:
        flow, _, service = name.partition("/")
        if flow != "pd-deploy" or service not in self._ids:
            raise ObjectNotFound(Exception("no such deployment"))
        return SimpleNamespace(id=self._ids[service])

    async def create_flow_run_from_deployment(
        self, deployment: UUID, *, parameters: Any, idempotency_key: str, tags: Sequence[str]
    ) -> FlowRun:
        assert tags == [FLEET]
        (service,) = (name for name, known in self._ids.items() if known == deployment)
        run = self._run(uuid4(), service, Scheduled())
        self._runs[run.id] = (service, asyncio.get_running_loop().time())
        self.started.append((service, parameters))
        self.keys.append(idempotency_key)
        self.most = max(self.most, sum(not self._ended(run) for run in self._runs))
        return run

    async def read_flow_run(self, run: UUID) -> FlowRun:
        self.away -= 1
        if self.away >= 0:
            raise httpx.ConnectError("refused")
        service, _ = self._runs[run]
        if self._seconds.get(service) == float("inf"):
            return self._run(run, service, Scheduled())
        if self._ended(run):
            return self._run(run, service, self._ends.get(service, Completed(message="well")))
        return self._run(run, service, Running())

    async def set_flow_run_state(self, run: UUID, state: State[Any]) -> None:
        assert state.is_cancelled()
        self.cancelled.append(self._runs[run][0])

    def _ended(self, run: UUID) -> bool:
        service, begin = self._runs[run]
        return asyncio.get_running_loop().time() - begin >= self._seconds.get(service, 60)

    def _run(self, run: UUID, service: str, state: State[Any]) -> FlowRun:
        return FlowRun(id=run, flow_id=uuid4(), name=f"run of {service}", state=state)


def rolled(server: Server, cancel_after: float = 0, **parameters: Any) -> State[None]:
    """The last state of a roll, in virtual time."""
    loop = VirtualLoop(Clock())

    async def roll() -> State[None]:
        task = asyncio.ensure_future(fleet.fleet.fn(**{"waves": WAVES, **parameters}))
        if cancel_after:
            loop.call_later(cancel_after, task.cancel)
        return await task

    async def nowhere(**_: object) -> None: ...

    with (
        mock.patch.object(fleet, "get_client", return_value=server),
        mock.patch.object(fleet, "acreate_table_artifact", nowhere),
        mock.patch.object(fleet, "time", SimpleNamespace(monotonic=loop.time)),
        mock.patch("pd_deploy.flows.interrupts.SIGNALS", ()),
        disable_run_logger(),
    ):
        try:
            return loop.run_until_complete(roll())
        finally:
            loop.close()


class TestRoll:
    def test_a_wave_starts_when_the_one_before_is_deployed_and_each_run_is_a_deployment_s(
        self,
    ) -> None:
        server = Server()
        state = rolled(server, at_once=2)
        assert state.is_completed()
        assert state.message == f"All waves are deployed; completed: {', '.join(EVERY)}"
        assert [service for service, _ in server.started] == EVERY
        assert server.most == 2
        assert {parameters["image"] for _, parameters in server.started} == {"newest"}
        assert len(set(server.keys)) == len(EVERY)

    def test_without_an_image_each_file_s_own_rule_counts(self) -> None:
        server = Server()
        rolled(server, image=None)
        assert [parameters for _, parameters in server.started] == [{}] * len(EVERY)

    def test_a_canary_that_fails_keeps_all_others_from_starting(self) -> None:
        server = Server({"canary": Failed(message="2 problems\n  a: x\n  b: y" + "\nlog" * 100)})
        state = rolled(server)
        assert state.is_failed()
        message = str(state.message)
        assert message.startswith(
            "Stopped at the first failure; canary failed: Failed: 2 problems a: x b: y log "
        )
        assert message.endswith("log …; not started: one, two, three, four")
        assert len(message) < fleet.LONGEST + 100

    @pytest.mark.parametrize("end", [Failed(message="no"), Cancelled(message="no")])
    def test_those_under_way_come_to_their_end_when_another_fails(self, end: State[Any]) -> None:
        server = Server({"one": end}, {"one": 10, "two": 100})
        state = rolled(server, at_once=2)
        assert state.message == (
            f"Stopped at the first failure; one failed: {end.name}: no; "
            "completed: canary, two; not started: three, four"
        )

    def test_a_cancelled_roll_starts_none_any_more_and_leaves_those_under_way(self) -> None:
        server = Server()
        state = rolled(server, cancel_after=90, at_once=2)
        assert state.is_cancelled()
        assert state.message == (
            "Interrupted, so no more are started; completed: canary; under way: one, two; "
            "not started: three, four"
        )
        assert not server.cancelled

    def test_a_run_that_no_worker_takes_is_cancelled_and_stops_the_roll(self) -> None:
        server = Server(seconds={"canary": float("inf")})
        state = rolled(server, begin_within=5)
        assert state.is_failed()
        assert "canary failed: its run 'run of canary' did not start within 5 min" in str(
            state.message
        )
        assert server.cancelled == ["canary"]

    def test_a_server_that_does_not_answer_for_a_while_decides_nothing(self) -> None:
        server = Server()
        server.away = 7
        assert rolled(server).is_completed()

    def test_all_that_is_wrong_with_the_parameters_is_told_before_any_starts(self) -> None:
        server = Server()
        with pytest.raises(InvalidInput) as refused:
            rolled(server, waves=[["canary", "absent"], [], ["canary"]], at_once=0)
        told = str(refused.value)
        assert "waves: expected a service in every wave" in told
        assert "waves: expected canary once, found it 2 times" in told
        assert "waves: expected a deployment pd-deploy/absent, found none" in told
        assert "at_once: expected 1 or more, found 0" in told
        assert not server.started


class TestNights:
    def test_services_are_spread_over_the_window_and_each_keeps_its_minute(self) -> None:
        crons = [nights.spread(f"service-{n}")["night"] for n in range(50)]
        assert crons == [nights.spread(f"service-{n}")["night"] for n in range(50)]
        times = Counter(crons)
        assert {cron.split()[1] for cron in crons} == {"3", "4"}
        assert max(times.values()) <= 3

    def test_a_window_may_go_past_midnight(self) -> None:
        crons = {nights.spread(f"s{n}", "23:30", 60)["night"] for n in range(200)}
        assert {cron.split()[1] for cron in crons} == {"23", "0"}


class Queues:
    """A Prefect server's queues."""

    def __init__(self, *names: str) -> None:
        self.limits: dict[str, int | None] = dict.fromkeys(names)

    async def __aenter__(self) -> "Queues":
        return self

    async def __aexit__(self, *_: object) -> None: ...

    async def read_work_queue_by_name(self, name: str, work_pool_name: str) -> None:
        assert work_pool_name == "pd-pool"
        if name not in self.limits:
            raise ObjectNotFound(Exception("no such queue"))

    async def create_work_queue(
        self, name: str, concurrency_limit: int, work_pool_name: str
    ) -> None:
        self.limits[name] = concurrency_limit


class TestQueues:
    @pytest.mark.parametrize(
        ("there", "limit"), [((), 1), (("hosts-10.0.0.1-10.0.0.2",), None)], ids=["new", "there"]
    )
    async def test_a_new_queue_lets_one_run_at_a_time_go_and_one_that_is_there_is_left(
        self, monkeypatch: pytest.MonkeyPatch, there: tuple[str, ...], limit: int | None
    ) -> None:
        server = Queues(*there)
        monkeypatch.setattr(queues, "get_client", lambda: server)
        made = await queues.of_hosts(str(ROOT / "deployments/qwq-3p1d.yaml"))
        assert made == {"queue": "hosts-10.0.0.1-10.0.0.2"}
        assert server.limits == {"hosts-10.0.0.1-10.0.0.2": limit}

    def test_a_set_of_hosts_has_one_name_and_another_set_another(self) -> None:
        many = [f"10.0.0.{n}" for n in range(1, 49)]
        assert queues.name_of(many) == queues.name_of(reversed(many))
        assert queues.name_of(many) != queues.name_of(many[:-1])
        assert len(queues.name_of(many)) <= queues.LONGEST
