"""Taking over a service that the playbook has started, and bringing it back."""

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from pd_deploy.blocks.opening import open_session
from pd_deploy.cli import adopt, bench, diff, execute, hosts, logs, planned, show
from pd_deploy.cli import status as showing
from pd_deploy.config.load import load_deployment
from pd_deploy.errors import InvalidInput, NoSuchGeneration, NotOurs, OutOfOrder, RolledBack
from pd_deploy.flows import events
from pd_deploy.flows.deploy import deploy
from pd_deploy.flows.health import health
from pd_deploy.flows.prune import prune
from pd_deploy.flows.recover import recover
from pd_deploy.flows.rollback import rollback
from pd_deploy.flows.teardown import teardown
from pd_deploy.hosts import exec_processes
from pd_deploy.hosts.container_values import DEPLOYMENT_LABEL, ListedContainer
from pd_deploy.records.adopted import AdoptedContainer, AdoptedService
from pd_deploy.records.releases import History, Record
from pd_deploy.records.status import Verdict
from pd_deploy.records.status import status as judge
from pd_deploy.steps.verify.looking import HEALTHY
from tests.memory.machine import Container, Faults
from tests.memory.playbook import Workbench
from tests.memory.world import FIRST, ROOT, Outcome, World

SECRET = "hf_0123456789abcdef0123456789abcdef01"


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture
def old(world: World) -> dict[str, Container]:
    """The playbook's containers, by instance, which serve."""
    started = world.playbook(HF_TOKEN=SECRET)
    assert world.completes()
    return started


def adopted(world: World, *, yes: bool = True, named: dict[str, list[str]] | None = None) -> str:
    deployment = load_deployment(world.path)
    return world.asked(adopt.adopted(deployment, world.path, named or {}, yes=yes))


def commands(old: dict[str, Container]) -> dict[str, object]:
    """What runs in each container, how it was started."""
    programs = {name: container.program for name, container in old.items()}
    assert all(isinstance(program, Workbench) for program in programs.values())
    return {
        name: [
            (p.title, set(p.block.split("\0")), p.directory, p.output, p.ports)
            for p in program.processes
        ]
        for name, program in programs.items()
        if isinstance(program, Workbench)
    }


def serves(world: World, old: dict[str, Container]) -> bool:
    """Whether the playbook's service serves, and none of the deployment's own containers runs."""
    return all(c.running for c in old.values()) and not world.running() and world.completes()


def test_a_look_shows_what_runs_and_changes_nothing(
    world: World, old: dict[str, Container]
) -> None:
    world.change(model={"max_len_decode": 8192})
    before = world.state()
    said = adopted(world, yes=False)
    assert world.state() == before
    assert "omni-infer-prefill_p1: prefill p1" in said
    assert "devices  8-15" in said
    assert "ports    5569, 9001, 20008" in said
    (line,) = [line for line in said.splitlines() if "max-model-len" in line]
    assert line.strip() == "differs  max-model-len 61244 → 8192"
    assert "nginx: its environment can't be read any more" in said
    assert SECRET not in said
    assert len(old) == 5


def test_the_first_deployment_takes_over_and_keeps_what_it_replaces(
    world: World, old: dict[str, Container]
) -> None:
    foreign = world.stranger("a", "somebody-else")
    before = commands(old)
    adopted(world)
    assert commands(old) == before
    assert serves(world, old)
    disk = world.machines["a"].disk
    secret = [path for path, content in disk.files("/") if SECRET.encode() in (content or b"")]
    names = [f"omni-infer-prefill_{name}.json" for name in ("p0", "p1")]
    assert secret == [f"{ROOT}/adopted/{name}" for name in names]
    assert {disk.entries[path].mode for path in secret} == {0o600}
    assert disk.entries[f"{ROOT}/adopted"].mode == 0o700
    deployment = load_deployment(world.path)
    assert status(world).splitlines()[0].startswith("qwq-3p1d: serving")
    assert "0 (adopted)" in status(world)
    taken = world.run(deploy)
    assert taken.completed, taken.error
    assert "down for" in taken.message
    assert world.serving()
    assert {c.status for c in old.values()} == {"exited"}
    assert foreign.running
    assert SECRET not in world.machines["a"].disk.read(f"{ROOT}/record.json")
    listed = show.release_table(world.asked(hosts.past(deployment)))
    rows = [line for line in listed.splitlines()[1:] if not line.startswith(" ")]
    assert [row.split("  ")[0] for row in rows] == [world.serving(), "0 (adopted)"]
    assert "  started by: somebody else; adopted by " in listed
    assert world.run(prune).completed
    assert "nothing to do, nothing changed" in world.run(deploy).message
    assert {c.id for c in old.values()} <= everything(world)
    gone = world.run(prune, adopted=True)
    assert gone.completed, gone.error
    assert not {c.id for c in old.values()} & everything(world)
    assert foreign.running
    assert not disk.get(f"{ROOT}/adopted")
    assert world.record().adopted is None
    world.assert_coherent()


def test_all_proxies_of_a_service_are_taken_over_and_brought_back(world: World) -> None:
    two = {"proxy": {"c1": {"host": "b"}}}
    old = world.playbook(two)
    world.change(**two)
    adopted(world)
    before = commands(old)
    failed = world.run(deploy, image=world.push("20250723_1", {"c1": Faults(garbage=True)}))
    assert isinstance(failed.error, RolledBack)
    assert "instance c1: expected a completion" in str(failed.error)
    assert "http://10.0.0.1:7000/v1/completions, which answered" in str(failed.error)
    assert "http://10.0.0.2:7000/v1/completions, which answered" in str(failed.error)
    assert serves(world, old)
    assert world.completes("b")
    assert commands(old) == before


def told(world: World) -> showing.Told:
    async def tell() -> showing.Told:
        async with open_session(load_deployment(world.path)) as session:
            return await showing.tell(session, None)

    return world.asked(tell())


def status(world: World) -> str:
    return showing.text(told(world))


def end(container: Container) -> None:
    """Ends what runs in a container of the playbook's, as when its server dies: the shell stays."""
    assert isinstance(container.program, Workbench)
    container.program.end_all()


def test_status_looks_into_an_adopted_service(world: World, old: dict[str, Container]) -> None:
    adopted(world)
    look = told(world).look
    assert {(i.name, i.role, i.host) for i in look.instances} >= {
        ("p1", "prefill", "a"), ("d0", "decode", "b"), ("c0", "proxy", "a"),
    }  # fmt: skip
    assert len(look.instances) == len(old)
    assert {(i.container, i.health, bool(i.since)) for i in look.instances} == {
        ("running", HEALTHY, True)
    }
    assert status(world).splitlines()[0] == "qwq-3p1d: serving"
    document = json.loads(showing.as_document(told(world)))
    assert (document["generation"], document["image"]) == ("0 (adopted)", FIRST)


@pytest.mark.parametrize(
    ("damage", "verdict", "found"),
    [
        (
            lambda _, old: end(old["p1"]),
            Verdict.DEGRADED,
            "prefill_p1 on 10.0.0.1: does not answer",
        ),
        (lambda _, old: end(old["d0"]), Verdict.DOWN, "decode_d0 on 10.0.0.2: does not answer"),
        (lambda _, old: end(old["c0"]), Verdict.DOWN, "proxy_c0 on 10.0.0.1: does not answer"),
        (
            lambda world, old: world.machines["a"].end(old["p1"], 137),
            Verdict.DEGRADED,
            "prefill_p1 on 10.0.0.1: exited",
        ),
        (
            lambda world, old: world.machines["b"].containers.pop(old["p2"].id),
            Verdict.DEGRADED,
            "prefill_p2 on 10.0.0.2: gone",
        ),
        (lambda world, _: world.machines["b"].unplug(), Verdict.DOWN, "no answer from host b"),
    ],
    ids=["a prefill died", "decode died", "the proxy died", "ended", "removed", "host away"],
)
def test_status_tells_by_its_exit_code_how_an_adopted_service_serves(
    world: World,
    old: dict[str, Container],
    damage: Callable[[World, dict[str, Container]], None],
    verdict: Verdict,
    found: str,
) -> None:
    adopted(world)
    damage(world, old)
    look = told(world).look
    assert look.status.verdict == verdict
    assert found in look.status.state
    assert "does not run" not in look.status.state


def test_an_adopted_pod_over_hosts_serves_as_a_whole_or_not_at_all() -> None:
    names = {"p0": "prefill", "d0a": "decode", "d0b": "decode", "c0": "proxy"}
    containers = [
        AdoptedContainer(
            instance=name, role=role, pod=name[:2], host="10.0.0.1", name=name, id=name, image="i"
        )
        for name, role in names.items()
    ]
    service = AdoptedService(
        when=datetime.now(UTC), by="me", containers=tuple(containers), port=7000, model="qwen"
    )
    history = History(Record(adopted=service), {}, frozenset())

    def verdict(*running: str) -> Verdict | None:
        listed = [ListedContainer(name, name, {}, "running", "i") for name in running]
        return judge("qwq-3p1d", history, {"10.0.0.1": listed}, {}).verdict

    assert verdict(*names) == Verdict.SERVING
    assert verdict("p0", "d0a", "c0") == Verdict.DOWN


def test_the_commands_know_an_adopted_service(
    world: World, old: dict[str, Container], tmp_path: Path
) -> None:
    adopted(world)
    deployment, before = load_deployment(world.path), world.state()
    printed: list[bytes] = []
    command = ["sh", "-c", exec_processes.READ]
    ran = execute.executed(deployment, "p1", command, lambda out, _: printed.append(out))
    assert world.asked(ran) == 0
    assert b"listener" in b"".join(printed)
    for generation in (None, "0"):
        with pytest.raises(
            NoSuchGeneration, match=r"found generation 0 \(adopted\) → its logs are"
        ):
            world.asked(logs._collect(deployment, generation, tmp_path / "logs"))
    look = world.asked(planned.look(deployment, None))
    compared = diff.compared(deployment, look)
    assert compared.is_drift
    said = diff.text(compared)
    assert "qwq-3p1d: 0 (adopted) serves, the file makes 1-" in said
    assert "`pd-deploy adopt FILE` compares it" in said
    assert "b: stop omni-infer-decode_d0" in said
    assert "would stop omni-infer-decode_d0" in planned.text(deployment.name, look)
    with pytest.raises(OutOfOrder, match="generation 0"):
        world.asked(bench.measured(deployment, save=False))
    assert world.state() == before


def test_health_checks_an_adopted_service_and_restarts_nothing(
    world: World, old: dict[str, Container]
) -> None:
    adopted(world)
    before = world.state()
    well = world.run(health)
    assert "Generation 0 (adopted) serves: 5 instances are healthy, and a compl" in well.message
    end(old["p1"])
    ill = world.run(health)
    assert ill.word == "Degraded"
    assert "health restarts nothing of generation 0 (adopted): `pd-deploy recover" in ill.message
    assert [event["event"] for event in world.events] == ["pd-deploy.service.degraded"]
    assert world.state() == before
    assert world.run(recover).completed
    assert serves(world, old)
    assert world.run(health).word == "Completed"


def test_teardown_leaves_an_adopted_service_as_it_is(
    world: World, old: dict[str, Container]
) -> None:
    adopted(world)
    before = commands(old)
    torn = world.run(teardown, name="qwq-3p1d")
    assert torn.completed, torn.error
    assert commands(old) == before
    assert serves(world, old)
    assert not world.machines["a"].disk.get(ROOT)


def everything(world: World) -> set[str]:
    return {id for machine in world.machines.values() for id in machine.containers}


def test_a_first_deployment_that_fails_brings_the_old_service_back_as_it_was(
    world: World, old: dict[str, Container]
) -> None:
    adopted(world)
    before = commands(old)
    for machine in world.machines.values():
        machine.lingers_for = 60.0
    failed = world.run(deploy, image=world.push("20250723_1", {"d0": Faults(garbage=True)}))
    assert isinstance(failed.error, RolledBack), failed.error
    assert "The service is back on generation 0 (adopted), down for" in str(failed.error)
    assert serves(world, old)
    after = commands(old)
    del before["c0"], after["c0"]  # what nginx was given can't be read
    assert after == before
    assert world.record().closed is None
    assert not world.record().serving
    assert world.events[-1]["payload"]["serving"] == "0 (adopted)"
    # And again, with a good one; and back by hand.
    assert world.run(deploy).completed
    first = world.serving()
    back = world.run(rollback, generation="0")
    assert back.completed, back.error
    assert serves(world, old)
    assert world.run(deploy).completed
    assert world.serving() == first


def test_what_a_killed_run_leaves_is_put_right_by_recovery(
    world: World, old: dict[str, Container]
) -> None:
    adopted(world)
    kills = [m.number for m in world.twin().run(deploy).moments if m.what.startswith("start ")]
    assert world.run(deploy, kill_at=kills[len(kills) // 2]).killed
    assert not world.completes()
    recovered = world.run(recover)
    assert recovered.completed, recovered.error
    twice = world.run(recover)
    assert "nothing changed" in twice.message
    assert serves(world, old)


def test_what_the_way_back_needs_is_missed_before_anything_stops(
    world: World, old: dict[str, Container]
) -> None:
    """A host has lost what was kept of the processes; they still run, so it can be had again."""
    adopted(world)
    world.machines["b"].disk.remove(ROOT)
    refused = world.run(deploy)
    assert "adopted/omni-infer-decode_d0.json as `pd-deploy adopt` wrote" in str(refused.error)
    assert "it still runs: enter it again by `pd-deploy adopt FILE --yes`" in str(refused.error)
    assert serves(world, old)
    adopted(world)
    assert world.run(deploy).completed


@pytest.fixture
def taken_over(world: World, old: dict[str, Container]) -> World:
    """A generation of ours serves, and the adopted service lacks what it needs to come back."""
    adopted(world)
    assert world.run(deploy).completed
    del world.machines["b"].containers[old["d0"].id]
    return world


def numbers(outcome: Outcome, what: str) -> list[int]:
    return [m.number for m in outcome.moments if m.what.startswith(what)]


def test_a_return_to_it_that_fails_or_is_cancelled_goes_back_and_says_what_is_so(
    taken_over: World,
) -> None:
    """Cancelled while it stops what serves, or while what served is started again."""
    serving, twin = taken_over.serving(), taken_over.twin()
    tried = twin.run(rollback)
    assert f"The service is back on generation {serving}" in str(tried.error)
    assert twin.assert_coherent() == serving
    stop, start = numbers(tried, "stop ")[-1], numbers(tried, "start ")[-1]
    for moment in (stop, start):
        twin = taken_over.twin()
        outcome = twin.run(rollback, cancel_at=moment)
        assert f"The service is back on generation {serving}" in (
            outcome.message or str(outcome.error)
        )
        assert outcome.cancelled is (moment == stop)
        assert twin.assert_coherent() == serving
    twin = taken_over.twin()
    outcome = twin.run(rollback, cancel_at=stop, cancel_again_at=stop + 60)
    assert outcome.cancelled
    assert "Interrupted again, so ended at once; what serves now is unknown" in outcome.message
    assert f"`pd-deploy recover {twin.path}` makes {serving} serve" in outcome.message
    assert not twin.completes()
    assert twin.run(recover).completed
    assert twin.assert_coherent() == serving


@pytest.mark.parametrize("flow", [rollback, recover])
def test_that_nothing_serves_is_told_where_neither_comes_back(taken_over: World, flow: Any) -> None:
    """By message, the name of the run's last state, and an event."""
    world = taken_over
    if flow is recover:
        record = world.record().model_copy(update={"serving": None, "sequence": 99})
        for machine in world.machines.values():
            machine.disk.put(f"{ROOT}/record.json", record.model_dump_json().encode(), 0o600)
    world.cluster.faults["p1"] = Faults(dies=1)
    world.events.clear()
    outcome = world.run(flow)
    assert outcome.word == "NothingServes"
    assert "no such container" in str(outcome.error)
    assert "\nNothing serves" in str(outcome.error)
    assert [event["event"] for event in world.events] == [events.DOWN]


def test_ports_of_others_are_refused_with_the_way_to_take_them_over(
    world: World, old: dict[str, Container]
) -> None:
    refused = str(world.run(deploy).error)
    assert "omni-infer-prefill_p0" in refused
    assert "this one replaces: `pd-deploy adopt FILE` takes it over" in refused
    assert serves(world, old)


def test_containers_of_ours_and_parts_of_a_service_are_refused(
    world: World, old: dict[str, Container]
) -> None:
    old["p0"].config["Labels"] = {DEPLOYMENT_LABEL: "another"}
    with pytest.raises(NotOurs, match="omni-infer-prefill_p0 is of deployment another"):
        adopted(world)
    old["p0"].config["Labels"] = {}
    world.machines["b"].end(old["d0"], 137)
    with pytest.raises(InvalidInput, match="container of the playbook's with a decode in it"):
        adopted(world)
    assert world.record().adopted is None


def test_a_container_under_another_name_is_told_by_its_ports(
    world: World, old: dict[str, Container]
) -> None:
    old["d0"].name = "qwq_decode"
    assert "omni-infer-decode_d0: does not run" in adopted(world, yes=False)
    adopted(world, named={"b": ["qwq_decode"]})
    service = world.record().adopted
    assert service
    assert {c.instance: c.name for c in service.containers}["d0"] == "qwq_decode"
    with pytest.raises(InvalidInput, match="found none: a=nobody"):
        adopted(world, named={"a": ["nobody"]})


def test_what_a_process_does_not_have_it_does_not_inherit() -> None:
    """A command in a container is given the container's own environment."""
    process = exec_processes.Process(
        pid=7, parent=1, argv=("python", "x y"), environment={"A": "secret"}, directory="/",
        program="/usr/bin/python", output="/log (deleted)", errors="pipe:[3]",
    )  # fmt: skip
    command = exec_processes.start_command(process, ["A", "B"])
    assert command[4:] == ["/log (deleted)", "/dev/null", "env", "--unset=B", "python", "x y"]
    assert "secret" not in str(command)
    assert "secret" not in repr(process)
    assert len(exec_processes.inexact(process)) == 2


def process(pid: int, parent: int, *argv: str, output: str = "/log") -> exec_processes.Process:
    return exec_processes.Process(
        pid=pid, parent=parent, argv=argv, environment={}, directory="/", program=argv[0],
        output=output, errors=output,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("main", "starts"),
    [
        (("bash",), [7, 9, 12, 13]),
        (("/sbin/docker-init", "--", "/bin/bash"), [7, 9, 12, 13]),
        (("sleep", "infinity"), [7, 9, 12, 13]),
        (("bash", "/start_server.sh"), [9, 12, 13]),
    ],
    ids=str,
)
def test_what_is_started_again(main: tuple[str, ...], starts: list[int]) -> None:
    """Not children, not those that a main process starts, not what somebody sits in front of; but
    what he has left behind, and what prints to the container's own terminal."""
    processes = [
        process(1, 0, *main, output="/dev/pts/0"),
        process(7, 1, "python", "start_api_servers.py"),
        process(8, 7, "vllm", "serve"),
        process(9, 0, "nginx"),
        process(10, 0, "bash", output="/dev/pts/1"),
        process(11, 10, "top", output="/dev/pts/1"),
        process(12, 10, "python", "server.py"),
        process(13, 0, "python", "log.py", output="/dev/pts/0"),
        process(14, 1, "bash", output="/dev/pts/0"),
    ]
    assert [p.pid for p in exec_processes.roots(processes)] == starts
