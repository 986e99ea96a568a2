"""Several proxies in front of the same servers: what is rendered, and what runs do with them."""

import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from pd_deploy import engines
from pd_deploy.cli import check, shell
from pd_deploy.config.load import parse_deployment
from pd_deploy.config.models import Deployment
from pd_deploy.config.yaml_files import merge, read
from pd_deploy.errors import InvalidInput, SmokeTestFailed
from pd_deploy.flows import events
from pd_deploy.flows.deploy import deploy
from pd_deploy.flows.health import health
from pd_deploy.flows.recover import recover
from pd_deploy.flows.teardown import teardown
from pd_deploy.planning import peers, placement, scraping
from pd_deploy.planning.plans import Made, Plan
from tests.memory.calls import Moment
from tests.memory.machine import Faults
from tests.memory.programs import Proxy, WaitingRoom
from tests.memory.world import ADDRESSES, PROXY_PORT, SERVERS, World
from tests.unit import example

BOTH = {"c0": "a", "c1": "b"}
TWO: dict[str, Any] = {"proxy": {"c1": {"host": "b"}}}


def deployment_of(name: str, changes: dict[str, Any]) -> Deployment:
    return parse_deployment(merge(read(path_of(name)), changes))


def made_of(name: str, changes: dict[str, Any]) -> Made:
    return example.made(deployment_of(name, changes))


def plan_of(name: str, changes: dict[str, Any] | None = None) -> Plan:
    return example.plan_of(path_of(name), changes)


def path_of(name: str) -> Path:
    return example.ROOT / f"deployments/{name}.yaml"


class TestWhatIsMadeOfTheFile:
    """Pure."""

    @pytest.mark.parametrize("file", ["qwq-3p1d", "deepseek-v3-2-a3", "vllm-gpu-3p1d",
                                      "sglang-gpu-2p1d"])  # fmt: skip
    def test_each_has_the_same_servers_behind_it_and_its_own_address(self, file: str) -> None:
        one, two = plan_of(file), plan_of(file, TWO)
        commands = {
            " ".join(plan.instance(name).command.argv)
            .replace(plan.generation, "GENERATION")
            .replace(f"/{name}/", "/PROXY/")
            for plan, name in ((one, "c0"), (two, "c0"), (two, "c1"))
        }
        assert len(commands) == 1
        assert "c1" in two.hosts["b"].instances
        assert len(set(two.container_names.values())) == len(one.container_names) + 1
        assert "# c1 of " in two.instance("c1").start_script.content
        assert two.generation != one.generation

    @pytest.mark.parametrize(
        ("changes", "stay"),
        [
            ({"proxy": {"c1": {"host": "b"}}}, True),
            ({"hosts": {"z": "10.0.0.9"}, "proxy": {"c1": {"host": "z"}}}, True),
            ({"hosts": {"z": "10.0.0.9"}, "proxy": {"c0": {"host": "z"}}}, False),
        ],
        ids=["on a host of servers", "on a host of its own", "the first moves"],
    )
    def test_servers_run_on_when_further_proxies_come(
        self, changes: dict[str, Any], stay: bool
    ) -> None:
        prints = [made_of("qwq-3p1d", of).servers_fingerprint for of in ({}, changes)]
        assert (prints[0] == prints[1]) is stay

    def test_each_shows_metrics_and_is_called_by_all(self) -> None:
        deployment = deployment_of("deepseek-v3-2-a3", TWO)
        topology = placement.derive(deployment)
        rows = scraping.groups(deployment, topology, "1-00000000")
        pages = {row["targets"][0] for row in rows if row["labels"]["role"] == "proxy"}
        assert pages == {proxy.server for proxy in topology.proxies}
        assert all(proxy.port in peers.ports(topology, proxy.host) for proxy in topology.proxies)
        hosts = [str(number) for number in range(20)]
        called = peers.neighbours(hosts, {"3", "7"})
        assert all({"3", "7"} - {host} <= set(others) for host, others in called.items())
        assert all(len(called[centre]) == 19 for centre in ("3", "7"))

    def test_check_and_the_shell_scripts_show_each(self) -> None:
        deployment, plan = deployment_of("qwq-3p1d", TWO), plan_of("qwq-3p1d", TWO)
        assert re.search(r"^c1 +proxy +b +10\.0\.0\.2:7000$", check.describe(deployment), re.M)
        topology = placement.derive(deployment)
        for name, host in BOTH.items():
            script = shell.script(deployment, topology, plan, host)
            opened = re.findall(r"^docker kill --signal \S+ (\S+)$", script, re.M)
            assert opened == [plan.container_names[name]] * 2
            assert script.endswith(f"http://{topology.proxy(name).server}/v1/completions\n")

    @pytest.mark.parametrize(
        ("entry", "said"),
        [
            ({"hold": 20}, "found `hold`: 0 for c0, 20.0 for c1"),
            ({"program": "omni"}, "found `program`: 'by-image' for c0, 'omni' for c1"),
            ({"prefix_aware": True, "drain": 9}, "`drain`: None for c0, 9 for c1; `prefix_aware`"),
        ],
        ids=str,
    )
    def test_clients_may_ask_any_so_they_treat_them_alike(
        self, entry: dict[str, Any], said: str
    ) -> None:
        with pytest.raises(InvalidInput) as refused:
            deployment_of("qwq-3p1d", {"proxy": {"c1": {"host": "b", **entry}}})
        (problem,) = refused.value.problems
        assert problem.key == "proxy"
        assert said in problem.message

    def test_two_on_a_host_have_ports_of_their_own(self) -> None:
        same = deployment_of("qwq-3p1d", {"proxy": {"c1": {"host": "a"}}})
        with pytest.raises(
            InvalidInput, match=r"c1: .*not to be 7000, which on host a is the port"
        ):
            placement.build(same)
        apart = {"proxy": {"c1": {"host": "a", "port": 7001}}}
        placement.build(deployment_of("qwq-3p1d", apart))

    def test_a_proxy_on_an_unknown_host_is_told_by_its_key(self) -> None:
        with pytest.raises(
            InvalidInput, match=r"proxy\.c1\.host: expected one of the file's hosts"
        ):
            deployment_of("qwq-3p1d", {"proxy": {"c1": {"host": "z"}}})

    def test_a_lost_server_restarts_each_proxy_that_would_count_it_wrongly(self) -> None:
        deployment = deployment_of(
            "deepseek-v3-2-a3", {"proxy": {n: {"host": "a", "program": "global", "port": p}
                                           for n, p in (("c0", 7000), ("c1", 7001))}}
        )  # fmt: skip
        topology = placement.derive(deployment)
        first = topology.instances[0].name
        again = engines.get(deployment.engine).restarts_with(deployment, topology, first)
        assert again >= {"c0", "c1"}


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = World(tmp_path)
    world.change(proxy={"c0": {"hold": 50}, "c1": {"host": "b", "hold": 50}})
    world.deploy()
    return world


class Watch:
    """Who has each proxy's port at each moment."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.answers: dict[str, list[str]] = {name: [] for name in BOTH}

    def __call__(self, _: Moment) -> None:
        for name, host in BOTH.items():
            machine = self.world.machines[host]
            program = self.world.cluster.listener(machine, machine.address, PROXY_PORT)
            answer = {Proxy: "proxy", WaitingRoom: "room"}.get(type(program), "nobody")
            if answer not in self.answers[name][-1:]:
                self.answers[name].append(answer)


HELD = "held 3 requests for up to 2.5 s"
THROUGH_ROOMS = {name: ["proxy", "room", "proxy"] for name in BOTH}


def test_an_upgrade_holds_proves_and_opens_each(world: World) -> None:
    assert world.assert_coherent(BOTH)
    watch = Watch(world)
    outcome = world.run(deploy, image=world.push("20250725_1"), watch=watch)
    assert outcome.completed, outcome.error
    assert watch.answers == THROUGH_ROOMS
    assert f"c0 {HELD}" in outcome.message
    assert f"c1 {HELD}" in outcome.message
    assert "serves at http://10.0.0.1:7000/v1/completions, http://10.0.0.2:7000" in outcome.message
    assert world.waiting_rooms() == []
    world.assert_coherent(BOTH)


def test_one_that_fails_its_smoke_test_brings_all_back(world: World) -> None:
    before, watch = world.serving(), Watch(world)
    bad = world.push("20250725_1", {"c1": Faults(garbage=True)})
    outcome = world.run(deploy, image=bad, watch=watch)
    assert "instance c1: expected a completion from http://10.0.0.2:7000" in str(outcome.error)
    assert isinstance(outcome.error.__cause__, SmokeTestFailed)
    assert watch.answers == THROUGH_ROOMS
    assert world.assert_coherent(BOTH) == before


def test_a_second_one_comes_and_goes_while_the_servers_run_on(tmp_path: Path) -> None:
    """Nothing but proxies starts again, also with a host of its own, and after it is lost."""
    world = World(tmp_path, {**ADDRESSES, "z": "10.0.0.9"})
    world.deploy()
    servers = {name: run for name, run in world.runs().items() if name in SERVERS}
    world.change(hosts={"z": "10.0.0.9"}, proxy={"c1": {"host": "z"}})
    assert world.run(deploy).completed
    assert world.runs().keys() == {*SERVERS, "c0", "c1"}
    assert world.completes("a")
    assert world.completes("z")
    world.machines["z"].unplug()
    assert "z (10.0.0.9)" in str(world.run(deploy).error)
    world.change(hosts={"z": None}, proxy={"c1": None})
    assert "`pd-deploy deploy FILE --forget 10.0.0.9`" in str(world.twin().run(recover).error)
    bad = world.push("20250725_1", {"d0": Faults(garbage=True)})
    failing = world.twin()
    failed = failing.run(deploy, image=bad, forget=["10.0.0.9"])
    assert "The service is back on generation 1-" in str(failed.error), "2- needs the lost host"
    assert failing.completes("a")
    assert failing.run(recover).completed
    assert world.run(deploy, forget=["10.0.0.9"]).completed
    assert world.completes("a")
    assert servers.items() <= world.runs().items()


def broken(world: World, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Has a proxy that runs give no completions until it starts again."""
    run, answering = world.running()[name].run_id, Proxy.answer

    def answer(proxy: Proxy, path: str, body: dict[str, Any]) -> httpx.Response:
        if proxy.container.run_id == run and path.startswith("/v1/"):
            return httpx.Response(500)
        return answering(proxy, path, body)

    monkeypatch.setattr(Proxy, "answer", answer)


@pytest.mark.parametrize(("name", "how"), [("c1", "killed"), ("c0", "gives no completions")])
def test_health_mends_one_while_clients_ask_the_other(
    world: World, monkeypatch: pytest.MonkeyPatch, name: str, how: str
) -> None:
    world.events.clear()
    before, (other,) = world.runs(), BOTH.keys() - {name}
    if how == "killed":
        world.machines[BOTH[name]].end(world.running()[name], 137)
    else:
        broken(world, monkeypatch, name)
    watch = Watch(world)
    outcome = world.run(health, watch=watch)
    assert outcome.word == "Mended", outcome
    assert "down for" not in outcome.message
    assert watch.answers[other] == ["proxy"]
    assert {n for n, run in world.runs().items() if before[n] != run} == {name}
    assert [event["event"] for event in world.events] == [events.DEGRADED, events.RECOVERED]
    world.assert_coherent(BOTH)


def test_one_whose_host_is_away_is_told(world: World) -> None:
    world.machines["b"].unplug()
    assert "b (10.0.0.2)" in world.run(health).message


def test_recovery_and_teardown_know_each(world: World) -> None:
    for name, host in BOTH.items():
        world.machines[host].end(world.running()[name], 137)
    watch = Watch(world)
    assert world.run(recover, watch=watch).completed
    assert watch.answers == {name: ["nobody", "room", "proxy"] for name in BOTH}
    world.assert_coherent(BOTH)
    assert world.run(teardown).completed
    assert world.containers() == []
