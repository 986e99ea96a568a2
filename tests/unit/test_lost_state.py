"""On hosts in memory: the hosts have lost what was deployed, and a service runs."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pd_deploy.cli import show
from pd_deploy.cli.hosts import Past
from pd_deploy.errors import FactsError, NothingServes, Unrecorded
from pd_deploy.flows.deploy import deploy
from pd_deploy.flows.recover import recover
from pd_deploy.hosts.container_values import ContainerState
from pd_deploy.records.releases import History, Record, merge
from pd_deploy.records.status import Status, Verdict
from pd_deploy.steps import host_records
from tests.memory.calls import Moment
from tests.memory.world import ROOT, World


@pytest.fixture
def world(tmp_path: Path) -> World:
    """An image that is newer than the file's serves."""
    world = World(tmp_path)
    world.deploy()
    assert world.run(deploy, image=world.push("20250725_1")).completed
    return world


def test_files_of_another_user_are_told_as_such() -> None:
    """What may not be read comes as empty; the records are written whole."""
    host: Any = SimpleNamespace(where="a (10.0.0.1)")
    for name in ("record.json", "1-0123abcd/release.json"):
        with pytest.raises(FactsError, match=rf"{name} .* this SSH user can't read it .*ssh\.user"):
            host_records.parse(f"{name}\0\0", host, ROOT)


def lose(world: World) -> None:
    for machine in world.machines.values():
        machine.disk.remove(ROOT)


def test_recover_writes_a_whole_running_generation_down_again(world: World) -> None:
    runs, serving = world.runs(), world.serving()
    lose(world)
    outcome = world.run(recover)
    assert outcome.completed, outcome.error
    assert world.runs() == runs
    assert world.record().serving == serving
    world.assert_coherent()
    assert world.run(deploy).completed
    assert world.runs() == runs


def test_so_it_does_if_only_the_generations_files_are_lost(world: World) -> None:
    runs, serving = world.runs(), world.serving()
    for machine in world.machines.values():
        machine.disk.remove(f"{ROOT}/{serving}")
    assert world.run(recover).completed
    assert world.runs() == runs
    world.assert_coherent()


@pytest.mark.parametrize("change", ["file", "part"])
def test_recover_leaves_alone_what_is_not_a_whole_generation_of_the_file(
    world: World, change: str
) -> None:
    lose(world)
    if change == "file":
        world.change(model={"max_len_decode": 4096})
    else:
        world.machines["a"].end(world.running()["p0"], 1)
    runs = world.runs()
    error = world.run(recover).error
    assert isinstance(error, Unrecorded)
    for container in world.running().values():
        assert container.name in str(error)
    assert "20250725_1@sha256:" in str(error)
    assert world.runs() == runs


def test_deploy_asks_for_the_image_and_then_writes_down_what_runs(world: World) -> None:
    lose(world)
    runs = world.runs()
    for dry in (True, False):
        error = world.run(deploy, dry_run=dry).error
        assert isinstance(error, Unrecorded)
        assert world.runs() == runs
    named = str(error).partition("--image ")[2].partition("`")[0]
    assert world.run(deploy, image=named).completed
    assert world.runs() == runs
    world.assert_coherent()


def test_deploy_asks_nothing_if_the_files_own_image_runs(tmp_path: Path) -> None:
    """As after the scripts that `plan --format shell` prints were run by hand."""
    world = World(tmp_path)
    world.deploy()
    lose(world)
    runs = world.runs()
    assert world.run(deploy, dry_run=True).completed
    assert world.run(deploy).completed
    assert world.runs() == runs
    world.assert_coherent()


def test_a_service_that_was_never_promoted_is_not_stopped_without_a_word(tmp_path: Path) -> None:
    """A first run was killed between the opening of the port and its promotion."""
    world = World(tmp_path)
    moments = list[Moment]()
    assert world.twin().run(deploy, watch=moments.append).completed
    opened = [one for one in moments if one.what.startswith("kill") and one.after][-1]
    assert world.run(deploy, kill_at=opened.number).killed
    world.pass_by(5)
    assert world.completes()
    assert isinstance(world.run(recover).error, NothingServes)
    assert not world.running()
    assert world.run(recover).completed


def container(name: str, generation: str) -> ContainerState:
    labels = {"pd-deploy.generation": generation}
    return ContainerState(name, name, labels, "running", None, None, None, "image:1")


def test_releases_tells_what_runs_where_nothing_is_recorded() -> None:
    nothing: History = merge([Record()], [], [])
    status = Status("x", verdict=Verdict.DOWN)
    assert show.release_table(Past(nothing, [], status)) == "nothing has been deployed yet"
    shown = show.release_table(Past(nothing, [container("p0", "1-0d51c0f7")], status))
    assert "no host knows what was deployed" in shown
    assert "p0 of image image:1" in shown
