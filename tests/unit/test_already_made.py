"""A generation that comes back: what it needs is there, so nothing is made, and clients wait
less."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pd_deploy.flows.deploy import deploy
from pd_deploy.flows.health import health
from pd_deploy.flows.recover import recover
from pd_deploy.flows.rollback import rollback
from pd_deploy.steps.report import Report
from pd_deploy.tasks import story
from tests.memory.world import Faults, World

MAKING = {"pull image", "save", "launch", "ranktable"}


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = World(tmp_path)
    world.deploy()
    world.change(settings={"all": {"environment": {"A": "b"}}})
    assert world.run(deploy).completed
    return world


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> list[Report]:
    """What the steps of runs said."""
    said: list[Report] = []

    def log(result: object) -> None:
        if isinstance(result, Report):
            said.append(result)

    monkeypatch.setattr(story, "log", log)
    return said


def end_all(world: World) -> None:
    """As a power failure does."""
    world.kill(*world.running())


@pytest.mark.parametrize(
    ("damage", "flow"),
    [
        (lambda world: world.kill("p1"), health),
        (lambda world: world.kill("d0"), health),
        (end_all, recover),
        (end_all, deploy),
        (lambda _: None, rollback),
    ],
    ids=["a killed prefill", "a killed decode", "recover", "deploy", "rollback"],
)
def test_nothing_is_made_again(
    world: World, reports: list[Report], damage: Callable[[World], None], flow: Any
) -> None:
    damage(world)
    outcome = world.run(flow)
    assert outcome.completed or outcome.word == "Mended", outcome
    world.assert_coherent()
    assert {report.step for report in reports} >= {"preflight", "start server", "open proxy"}
    assert not MAKING & {report.step for report in reports}


def test_servers_start_before_the_proxy_is_prepared(world: World) -> None:
    """They load longest."""
    world.kill("p1")
    assert world.run(health).word == "Mended"
    started = {name: container.started_at for name, container in world.running().items()}
    proxy = started.pop("c0")
    assert proxy
    assert all(at and at < proxy for at in started.values())


def test_nor_on_the_way_back(world: World, reports: list[Report]) -> None:
    serving = world.serving()
    image = world.push("20250725_1", {"p1": Faults(dies=1)})
    assert world.run(deploy, image=image).error
    assert world.serving() == serving
    made = [report for report in reports if report.step in MAKING]
    assert {report.step for report in made} == MAKING
    assert len(made) == len({(report.step, report.subject) for report in made})


@pytest.mark.parametrize("lost", ["container", "d0/start.sh", "local_ranktable_d0.json"])
def test_what_a_host_lacks_is_made_there(world: World, reports: list[Report], lost: str) -> None:
    generation = world.serving()
    end_all(world)
    b = world.machines["b"]
    if lost == "container":
        del b.containers[next(c.id for c in b.containers.values() if generation in c.name)]
    else:
        (path,) = (p for p in b.disk.entries if generation in p and p.endswith(lost))
        del b.disk.entries[path]
    assert world.run(recover).completed
    world.assert_coherent()
    made = [report for report in reports if report.step in MAKING]
    assert {report.host for report in made} == {"b"}
    assert {report.step for report in made} == MAKING
    assert [report.changed for report in made].count(True) == 1


@pytest.mark.parametrize(
    ("killed", "at_once"),
    [(["p1"], False), (["p0", "p1", "p2"], False), (["d0"], True)],
    ids=["a prefill", "all prefills", "the decode"],
)
def test_all_ends_at_once_where_nobody_is_served(
    world: World, killed: list[str], at_once: bool
) -> None:
    """Elsewhere the proxies end first, so that their last requests are answered: decode does that
    also without a prefill."""
    world.kill(*killed)
    stops = [m for m in world.run(health).moments if m.what.startswith("stop ")]
    of_proxy = [m.number for m in stops if "proxy" in m.what and m.after]
    of_servers = [m.number for m in stops if "proxy" not in m.what and not m.after]
    assert (min(of_servers) < max(of_proxy)) == at_once
