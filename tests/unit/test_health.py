"""pd-health on hosts in memory: what it finds, what it restarts, and what it leaves alone."""

import re
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest
from prefect import Task
from prefect.client.schemas.objects import FlowRun
from prefect.states import Completed

from pd_deploy.blocks.opening import open_session
from pd_deploy.cli import locks
from pd_deploy.cli import status as showing
from pd_deploy.config.load import load_deployment
from pd_deploy.config.models import Health
from pd_deploy.flows import events, past_checks
from pd_deploy.flows.deploy import deploy
from pd_deploy.flows.health import health
from pd_deploy.flows.recover import recover
from pd_deploy.records import mending
from pd_deploy.records.mending import Decision
from pd_deploy.records.releases import Hold, Mending, Silence
from pd_deploy.steps import waiting_room
from tests.memory import answers
from tests.memory import world as memory
from tests.memory.calls import Moment
from tests.memory.programs import Proxy, Server
from tests.memory.world import Faults, Outcome, World

ON_DEMAND = "release_1.2.1-202607241407-vllm"
NOW = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = World(tmp_path)
    world.deploy()
    world.events.clear()
    return world


@pytest.fixture(scope="module")
def deployed_on_demand(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = World(tmp_path_factory.mktemp("on-demand"))
    world.change(proxy={"c0": {"hold": 30}})
    world.deploy()
    image = world.push(ON_DEMAND, answer=answers.of("roles"))
    assert world.shared_run(deploy, image=image).completed
    return world


@pytest.fixture
def on_demand(deployed_on_demand: World) -> World:
    """A service of an image that links on demand."""
    twin = deployed_on_demand.twin()
    twin.events, twin.word = [], ""
    return twin


def told(world: World) -> list[str]:
    """The events since the last time."""
    emitted = [event["event"] for event in world.events]
    world.events.clear()
    return emitted


def checked(world: World, minutes: int) -> list[str]:
    """The names of the last states of checks, one a minute."""
    words = []
    for _ in range(minutes):
        words.append(world.run(health).word)
        world.pass_by(60)
    return words


def untouched(world: World, **parameters: Any) -> Outcome:
    """A check that changes nothing, as it should."""
    before = world.runs()
    outcome = world.run(health, **parameters)
    assert world.runs() == before
    assert not [m for m in outcome.moments if m.what.startswith(("start ", "stop ", "create "))]
    return outcome


def test_when_all_is_well_there_is_one_sentence_and_no_task(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_task(*_: object, **__: object) -> None:
        raise AssertionError("a task was run")

    monkeypatch.setattr(Task, "__call__", no_task)
    monkeypatch.setattr(memory, "_run_in_place", no_task)
    before = world.state()
    outcome = world.run(health)
    assert outcome.word == "Completed"
    assert outcome.message.startswith(f"Generation {world.serving()} serves: 5 instances are")
    assert not [moment for moment in outcome.moments if moment.changes]
    assert world.state() == before
    assert told(world) == []


@pytest.mark.parametrize("killed", [("p1",), ("d0",), ("p0", "c0")], ids=", ".join)
def test_servers_that_link_while_they_load_start_again_as_one_set(
    world: World, killed: tuple[str, ...]
) -> None:
    """Told once, and then all is well."""
    before = world.runs()
    world.kill(*killed)
    outcome = world.run(health)
    assert outcome.word == "Mended", outcome
    assert "(10.0.0." in outcome.message
    world.assert_coherent()
    assert not world.runs().items() & before.items()
    assert told(world) == [events.DEGRADED, events.RECOVERED]
    assert world.run(health).word == "Completed"
    assert told(world) == []


def test_a_proxy_that_ended_starts_alone(world: World) -> None:
    before = world.runs()
    world.kill("c0")
    assert world.run(health).word == "Mended"
    world.assert_coherent()
    assert {n for n, run in world.runs().items() if before[n] != run} == {"c0"}


@pytest.mark.parametrize("damage", ["ended", "status", "refused"])
def test_a_server_that_links_on_demand_starts_alone_while_the_others_serve(
    on_demand: World, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    world = on_demand
    world.pass_by(3600)
    before, served, rooms = world.runs(), list[bool](), list[str]()

    async def prepare(_: object, instance: str) -> tuple[bool, str]:
        rooms.append(instance)  # it would take the open port
        return False, ""

    monkeypatch.setattr(waiting_room, "_prepare", prepare)
    if damage == "ended":
        world.kill("p1")
    else:
        sick(monkeypatch, damage, world.running()["p1"].run_id)

    def watch(moment: Moment) -> None:
        if moment.what.startswith(("start ", "stop ")):
            served.append(world.completes() and world.record().closed is None)

    outcome = world.run(health, watch=watch)
    assert outcome.word == "Mended", outcome
    assert "down for" not in outcome.message
    assert not rooms
    assert served
    assert all(served)
    world.assert_coherent()
    assert {n for n, run in world.runs().items() if before[n] != run} == {"p1"}


def sick(
    monkeypatch: pytest.MonkeyPatch,
    how: str,
    run: str,
    path: str = "/health",
    kind: type[Server | Proxy] = Server,
) -> None:
    """Has a server that runs answer otherwise, or late, or not at all, until it is restarted."""
    answer, serving = kind.answer, Server.serving

    def answering(server: Any, asked: str, body: dict[str, Any]) -> httpx.Response:
        if server.container.run_id == run and asked.startswith(path):
            if how == "late":
                raise httpx.ReadTimeout("")
            return httpx.Response(500)
        return answer(server, asked, body)

    def listening(server: Server) -> set[tuple[str, int]]:
        return set() if server.container.run_id == run else serving(server)

    if how == "refused":
        monkeypatch.setattr(Server, "serving", listening)
    else:
        monkeypatch.setattr(kind, "answer", answering)


def test_a_server_that_answers_late_is_told_and_left_alone(world: World) -> None:
    """It may have much to do, as it shows by an answer now and then."""
    world.change(health={"hung_after": 2})
    for _ in range(2):
        with pytest.MonkeyPatch.context() as for_now:
            sick(for_now, "late", world.running()["p1"].run_id)
            outcome = untouched(world)
        assert outcome.word == "Degraded"
        assert outcome.message.endswith(
            "nothing is restarted for that; p1 gave no answer at 1 check (restarted at 2)"
        )
        assert "p1 gave no answer at 1 check" in status(world)
        assert untouched(world).word == "Completed"
        assert "gave no answer" not in status(world)
    assert told(world) == [events.DEGRADED, events.RECOVERED] * 2


@pytest.mark.parametrize(
    ("hung", "restarted"),
    [("p1", {"p0", "p1", "p2", "d0", "c0"}), ("c0", {"c0"})],
    ids=["one set", "proxy"],
)
def test_what_hangs_for_many_checks_is_restarted_by_the_rules_of_what_failed(
    world: World, monkeypatch: pytest.MonkeyPatch, hung: str, restarted: set[str]
) -> None:
    """So they count as attempts, with pauses and a bound."""
    world.change(health={"hung_after": 2})
    before = world.runs()
    kind = Proxy if hung == "c0" else Server
    sick(monkeypatch, "late", world.running()[hung].run_id, kind=kind)
    assert untouched(world).word in ("Degraded", "Down")
    outcome = world.run(health)
    assert outcome.word == "Mended", outcome
    assert f"{hung} on a (10.0.0.1): does not answer within 3 s" in outcome.message
    world.assert_coherent()
    assert {name for name, run in world.runs().items() if run != before[name]} == restarted
    assert told(world) == [events.DEGRADED, events.RECOVERED]
    assert world.run(health).word == "Completed"
    mending = world.record().mending
    assert mending
    assert (len(mending.attempts), mending.silent) == (1, {})


def test_a_server_that_may_still_load_is_not_counted_as_hanging(
    on_demand: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine may open its port before its model is loaded."""
    world = on_demand
    world.change(health={"hung_after": 1})
    before = world.runs()
    sick(monkeypatch, "late", world.running()["p1"].run_id)
    assert untouched(world).message.endswith("nothing is restarted for that")
    world.pass_by(30)  # more than gates.ready
    assert world.run(health).word == "Mended"
    assert {name for name, run in world.runs().items() if run != before[name]} == {"p1"}


@pytest.mark.parametrize(
    ("minutes", "run", "checks"),
    [(1, "r", 4), (59, "r", 4), (61, "r", 1), (1, "another", 1)],
)
def test_checks_count_in_a_row_and_for_the_same_run(minutes: float, run: str, checks: int) -> None:
    before = Mending(silent={"p0": Silence(run="r", checks=3, last=ago(minutes)[0])})
    counted = mending.silences(before, {"p0": run}, Health(), NOW)
    assert {name: s.checks for name, s in counted.items()} == {"p0": checks}
    assert mending.hung(counted, Health(hung_after=4)) == ({"p0": "r"} if checks == 4 else {})
    assert mending.silences(before, {}, Health(), NOW) == {}
    never = Health(hung_after=0)
    assert mending.hung(counted, never) == {}
    assert mending.told_of_silence(counted, never).endswith("(never restarted for it)")
    assert bool(mending.told(before, Health(), NOW)) is (minutes < 60)


def test_one_look_at_which_a_server_does_not_answer_says_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    sick(monkeypatch, "status", world.running()["d0"].run_id)

    def recovers(moment: Moment) -> None:
        if moment.what.startswith("sleep") or moment.number > 60:
            monkeypatch.undo()

    assert untouched(world, watch=recovers).word == "Completed"
    assert told(world) == []


def test_a_server_that_still_loads_is_left_alone(
    on_demand: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that links on demand was started by somebody, and nobody listens at its port yet."""
    world = on_demand
    sick(monkeypatch, "refused", world.running()["p1"].run_id)
    assert untouched(world).word == "Degraded"
    world.pass_by(30)  # more than gates.ready
    assert world.run(health).word == "Mended"


@pytest.mark.parametrize(
    ("answer", "word"),
    [
        (httpx.Response(500), "Mended"),
        (httpx.Response(200, text="garbage"), "Mended"),
        (httpx.Response(503), "Degraded"),
        (httpx.Response(429), "Degraded"),
        (httpx.Response(404), "Degraded"),
        (httpx.ReadTimeout(""), "Degraded"),
    ],
    ids=str,
)
def test_completions_that_fail_are_put_down_to_the_service_only_where_that_is_sure(
    world: World,
    monkeypatch: pytest.MonkeyPatch,
    answer: httpx.Response | httpx.ReadTimeout,
    word: str,
) -> None:
    run, answering = world.running()["c0"].run_id, Proxy.answer

    def broken(proxy: Proxy, path: str, body: dict[str, Any]) -> httpx.Response:
        if proxy.container.run_id != run or not path.startswith("/v1/"):
            return answering(proxy, path, body)
        if isinstance(answer, Exception):
            raise answer
        return httpx.Response(answer.status_code, content=answer.content)

    monkeypatch.setattr(Proxy, "answer", broken)
    before = world.runs()
    assert world.run(health).word == word
    assert (world.runs() == before) is (word != "Mended")
    recovered = [events.RECOVERED] if word == "Mended" else []
    assert told(world) == [events.DEGRADED, *recovered]


def test_a_device_out_of_order_is_told_once_and_restarts_nothing(world: World) -> None:
    world.machines["a"].health[3] = "Alarm"
    assert "a (10.0.0.1): device 3: npu-smi says Alarm" in untouched(world).message
    assert checked(world, 3) == ["Degraded"] * 3
    assert told(world) == [events.DEGRADED]


def test_a_host_that_is_away_is_waited_for_and_then_all_serves_again(world: World) -> None:
    """Rebooted meanwhile, as its containers show."""
    world.machines["b"].unplug()
    for _ in range(2):
        outcome = world.run(health)
        assert outcome.message.endswith("nothing is restarted before b (10.0.0.2) is back")
        assert outcome.word == "Down"
    world.machines["b"].reboot()
    world.machines["b"].plug_in()
    assert world.run(health).word == "Mended"
    world.assert_coherent()
    assert told(world) == [events.DEGRADED, events.RECOVERED]


def test_a_service_that_clients_use_is_not_down_because_a_host_says_nothing(world: World) -> None:
    """Its Docker engine hangs; its servers go on."""
    world.machines["b"].hanging = ("docker",)
    outcome = world.run(health)
    assert outcome.word == "Degraded"
    assert "clients get completions all the same; nothing is restarted before b" in outcome.message
    assert told(world) == [events.DEGRADED]


def test_what_somebody_works_on_or_holds_is_left_alone(world: World) -> None:
    lease: list[bytes] = []

    def watch(moment: Moment) -> None:
        if moment.what.startswith("start ") and not lease:
            lease.append(world.machines["a"].disk.read(f"{memory.ROOT}/lease").encode())

    assert world.run(deploy, image=world.push("20250723_1"), watch=watch).completed
    world.kill("p1")
    told(world)
    world.machines["a"].disk.put(f"{memory.ROOT}/lease", lease[0], 0o600)
    outcome = untouched(world)
    assert "is working on qwq-3p1d" in outcome.message
    assert outcome.message.endswith("nothing was touched")
    world.machines["a"].disk.remove(f"{memory.ROOT}/lease")
    hold = Hold(by="me on desk", when=NOW, reason="switch S12")
    world.asked(locks.changed(load_deployment(world.path), hold))
    assert "it is held by me on desk" in untouched(world).message
    assert told(world) == []
    world.asked(locks.changed(load_deployment(world.path), None))
    assert world.run(health).word == "Mended"


def test_a_run_that_comes_between_look_and_lease_is_not_fought(world: World) -> None:
    world.kill("p1")
    world.change(gates={"lease": 600})
    first, second = world.both((recover, {}), (health, {}))
    assert first.completed
    assert second.word in ("Degraded", "Completed")
    assert second.message.endswith("nothing was touched")
    world.assert_coherent()


def test_a_failed_generation_that_is_kept_for_inspection_is_left_alone(world: World) -> None:
    bad = world.push("20250724_1", {"p0": Faults(dies_at_request=1)})
    assert world.run(deploy, image=bad, on_failure="keep").error
    told(world)
    assert "of another generation runs" in untouched(world).message
    assert world.run(recover).completed


def test_nothing_is_checked_before_anything_was_promoted(tmp_path: Path) -> None:
    outcome = World(tmp_path).run(health)
    assert outcome.message == "nothing is deployed; nothing was ever promoted"


def test_attempts_come_ever_later_and_end_with_one_event(world: World) -> None:
    """Nothing is quarantined, and nothing goes back to an older image."""
    first = world.serving()
    world.cluster.faults["p1"] = Faults(dies=1)
    world.kill("p1")
    checked(world, 20)
    record = world.record()
    assert record.mending
    assert record.mending.gave_up
    begun = [when - record.mending.attempts[0] for when in record.mending.attempts]
    assert [round(since.total_seconds() / 60) for since in begun] == [0, 2, 6, 16]
    assert "the last attempt failed because" in world.events[-1]["payload"]["message"]
    assert told(world) == [events.DEGRADED, events.DOWN, events.GAVE_UP]
    assert record.serving == first
    assert not record.quarantine
    assert world.record("b") == record
    assert "gave up" in status(world)
    world.cluster.faults.clear()
    assert checked(world, 2) == ["Down", "Down"]


def status(world: World) -> str:
    """What `pd-deploy status` prints."""

    async def tell() -> str:
        async with open_session(load_deployment(world.path)) as session:
            seen = await showing.tell(session, None)
            return showing.text(replace(seen, when=world.cluster.clock.date()))

    return world.asked(tell())


@pytest.mark.parametrize("by", [deploy, recover, health])
def test_after_it_gave_up_it_begins_anew_when_somebody_has_seen_to_it(
    world: World, by: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    world.change(health={"attempts": 1})
    world.cluster.faults["p1"] = Faults(dies=1)
    world.kill("p1")
    assert checked(world, 2) == ["NothingServes", "Down"]
    assert told(world) == [events.DEGRADED, events.DOWN, events.GAVE_UP]
    world.cluster.faults.clear()
    parameters = {"again": True} if by is health else {}
    assert world.run(by, **parameters).completed
    world.assert_coherent()
    assert world.run(health).word == "Completed"
    mending = world.record().mending
    assert mending is None or not mending.gave_up
    assert "gave up" not in status(world)
    world.kill("d0")
    # Its own attempts go on counting.
    assert world.run(health).word == ("Down" if by is health else "Mended")


def test_status_and_checks_go_by_the_same_file(world: World) -> None:
    """As it is now: also where it makes another generation than the one that serves."""
    world.cluster.faults["p1"] = Faults(dies=1)
    world.kill("p1")
    assert checked(world, 1) == ["NothingServes"]
    assert "restarted once in 60 min, and the last attempt failed; the next" in status(world)
    world.change(health={"attempts": 1}, settings={"decode": {"environment": {"EXAMPLE": "1"}}})
    assert "drift         the file makes another generation" in status(world)
    assert "and the last attempt failed; `health.attempts` is 1, so nothing more" in status(world)
    assert "it was restarted once in 60 min" in untouched(world).message


def test_status_says_why_nothing_is_restarted_after_restarts_that_helped(world: World) -> None:
    world.kill("p1")
    assert checked(world, 1) == ["Mended"]
    assert "\nhealth" not in status(world)
    world.kill("p1")
    assert checked(world, 1) == ["Mended"]
    world.kill("p1")
    assert world.run(health).word == "Degraded"
    said = re.search(r"^health +(.*)$", status(world), re.M)
    assert said
    assert said[1].startswith("restarted 2 times in 60 min; the next restart is due at 2026-")
    world.change(health={"attempts": 2})
    assert "60 min; health gives up if it fails again before 2026-" in status(world)


def test_it_only_tells_where_the_file_allows_no_attempt(world: World) -> None:
    world.change(health={"attempts": 0})
    world.kill("p1")
    assert "`health.attempts` is 0" in untouched(world).message
    assert told(world) == [events.DEGRADED]


def ago(*minutes: float) -> tuple[datetime, ...]:
    return tuple(NOW - timedelta(minutes=each) for each in minutes)


@pytest.mark.parametrize(
    ("before", "goes"),
    [
        (None, True),
        (Mending(), True),
        (Mending(attempts=ago(0.9)), False),
        (Mending(attempts=ago(1.1)), True),
        (Mending(attempts=ago(1.1), failed=NOW), False),
        (Mending(attempts=ago(9, 2.9)), False),
        (Mending(attempts=ago(9, 3.1)), True),
        (Mending(attempts=ago(61, 1.1)), True),
        (Mending(attempts=ago(30, 20, 10, 5)), False),
        (Mending(attempts=ago(90, 80, 70, 61)), True),
        (Mending(gave_up=ago(999)[0]), False),
    ],
)
def test_when_it_may_try_again(before: Mending | None, goes: bool) -> None:
    decision = mending.decide(before, Health(), NOW)
    assert (decision == Decision()) is goes
    assert decision.gives_up is (before == Mending(attempts=ago(30, 20, 10, 5)))
    said = mending.told(before, Health(), NOW)
    assert bool(said) is not goes


class _Server:
    """A Prefect server's list of finished runs, the latest first."""

    def __init__(self, names: list[str]) -> None:
        self.runs = [
            FlowRun(id=uuid4(), flow_id=uuid4(), state=Completed(name=name)) for name in names
        ]

    async def __aenter__(self) -> "_Server":
        return self

    async def __aexit__(self, *_: object) -> None: ...

    async def read_flow_runs(self, *, limit: int, offset: int, **_: object) -> list[FlowRun]:
        return self.runs[offset : offset + limit]

    async def delete_flow_run(self, identity: object) -> None:
        self.runs = [run for run in self.runs if run.id != identity]


@pytest.mark.parametrize(
    ("last", "was_told"), [("Completed", False), ("Mended", False), ("Degraded", True)]
)
async def test_old_checks_leave_the_list_and_the_last_one_is_remembered(
    monkeypatch: pytest.MonkeyPatch, last: str, was_told: bool
) -> None:
    names = [last, *["Completed"] * 70, "Mended"]
    server = _Server(names)
    monkeypatch.setattr(past_checks, "get_client", lambda: server)
    flow_run = FlowRun(flow_id=uuid4(), deployment_id=uuid4())
    with memory.FlowRunContext.model_construct(flow=health, flow_run=flow_run, parameters={}):
        assert await past_checks.was_told() is was_told
        await past_checks.forget()
        await past_checks.forget()
    assert [run.state and run.state.name for run in server.runs] == [
        *names[: past_checks.KEPT], "Mended",
    ]  # fmt: skip


async def test_a_server_that_does_not_answer_fails_no_check(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def gone() -> Callable[..., Any]:
        raise OSError("no server")

    monkeypatch.setattr(past_checks, "get_client", gone)
    with memory.disable_run_logger():
        assert not await past_checks.was_told()
        await past_checks.forget()
