"""What a deployment's hosts have lost is written again; full and read-only disks stop no way back.

On hosts in memory.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pd_deploy.errors import ConnectionDropped, DiskFull, DiskReadOnly, DockerRefused
from pd_deploy.flows.deploy import deploy
from pd_deploy.flows.prune import prune
from pd_deploy.flows.recover import recover
from pd_deploy.flows.teardown import teardown
from tests.memory.calls import Moment
from tests.memory.commands import lease_lines
from tests.memory.machine import Faults
from tests.memory.world import NAME, ROOT, World
from tests.samples import sampled

STATE = "/var/lib/pd-deploy"
RECORD = f"{ROOT}/record.json"
# Changes that a run makes with a look of its own at its lease before each.
LOOKED_AT = ("create", "start", "stop", "kill", "remove", "tag", "rmtree", "drafts")


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = World(tmp_path)
    for machine in world.machines.values():
        machine.disk.mount(STATE)
    return world


@pytest.fixture
def upgraded(world: World) -> World:
    """With three generations, of which the youngest serves and the oldest needs not be kept."""
    world.change(keep=2)
    world.deploy()
    for tag in ("20250723_1", "20250723_2"):
        assert world.shared_run(deploy, image=world.push(tag)).completed
    world.change(keep=1)
    return world


def fill(world: World) -> None:
    for machine in world.machines.values():
        machine.disk.fill(STATE)


def documents(world: World, host: str) -> dict[str, bytes]:
    """Record, accounts and plans that a host has."""
    files = dict(world.machines[host].disk.files(ROOT))
    wanted = ("record.json", "release.json", "plan.json")
    return {path: text for path, text in files.items() if path.endswith(wanted)}


class TestLost:
    @pytest.mark.parametrize("host", ["a", "b"])
    def test_whatever_is_lost_is_written_again_by_a_run_with_nothing_else_to_do(
        self, upgraded: World, host: str
    ) -> None:
        assert upgraded.run(prune).completed
        before = documents(upgraded, host)
        assert len(before) == 5
        for lost in [[path] for path in before] + [list(before)]:
            for path in lost:
                upgraded.machines[host].disk.remove(path)
            outcome = upgraded.run(deploy)
            assert "nothing to do" in outcome.message, outcome.error
            assert documents(upgraded, host) == before

    def test_an_older_record_gives_way(self, world: World) -> None:
        world.deploy()
        older = world.machines["b"].disk.entries[RECORD].content
        assert world.run(deploy, image=world.push("20250723_1")).completed
        world.machines["b"].disk.entries[RECORD].content = older
        assert world.run(prune).completed
        assert world.record("b") == world.record("a")


class TestCopies:
    def faulty(self, world: World, fault: Exception, times: int) -> Any:
        """Has the record's copies to host b fail so often."""
        left = [times]

        def watch(moment: Moment) -> None:
            if moment.what == f"write {RECORD}" and moment.host == "b" and not moment.after:
                left[0] -= 1
                if left[0] >= 0:
                    raise fault

        return watch

    def test_a_copy_that_fails_for_a_moment_is_tried_again(self, world: World) -> None:
        fault = ConnectionDropped("dropped", host="b")
        assert world.run(deploy, watch=self.faulty(world, fault, 2)).completed
        assert world.record("b") == world.record("a")

    def test_one_that_fails_is_told_and_written_by_the_next_run(
        self, world: World, caplog: pytest.LogCaptureFixture
    ) -> None:
        fault = DiskReadOnly("read-only", host="b (10.0.0.2)")
        assert world.run(deploy, watch=self.faulty(world, fault, 99)).completed
        assert "b (10.0.0.2): read-only" in caplog.text
        assert world.record("b") != world.record("a")
        assert world.run(deploy).completed
        assert world.record("b") == world.record("a")

    def test_a_fault_of_the_program_is_not_swallowed(self, world: World) -> None:
        outcome = world.run(deploy, watch=self.faulty(world, TypeError("a bug"), 99))
        assert "a bug" in str(outcome.error)


def test_an_image_that_cannot_be_named_on_a_host_fails_no_proven_service(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """The next run gives it its name, which keeps it from a prune."""

    def refuse(moment: Moment) -> None:
        if moment.what.startswith("tag ") and moment.host == "b" and not moment.after:
            raise DockerRefused("no room for the name", host="b (10.0.0.2)")

    outcome = world.run(deploy, watch=refuse)
    assert outcome.completed, outcome.error
    serving = world.assert_coherent()
    assert "b (10.0.0.2): no room for the name" in caplog.text

    def names() -> set[str]:
        return {tag for image in world.machines["b"].images.values() for tag in image.tags}

    assert f"pd-deploy/qwq-3p1d:{serving}" not in names()
    assert world.run(deploy).completed
    assert f"pd-deploy/qwq-3p1d:{serving}" in names()


def test_what_runs_between_steps_is_tried_again(world: World) -> None:
    """Every write of the record fails once, and so does every look at the saved plan: those on the
    way back, too."""
    world.deploy()
    first, asked = world.serving(), Counter[str]()

    def watch(moment: Moment) -> None:
        failing = (f"write {RECORD}", f"read {ROOT}/{first}/plan.json")
        if moment.what in failing and not moment.after:
            asked[moment.what] += 1
            if asked[moment.what] % 2:
                raise ConnectionDropped("dropped", host=moment.host)

    image = world.push("20250724_1", {"d0": Faults(garbage=True)})
    outcome = world.run(deploy, image=image, watch=watch)
    assert "The service is back on generation" in str(outcome.error)
    assert len(asked) == 2
    assert world.assert_coherent() == first

    @pytest.mark.parametrize("lost", [f"{ROOT}/lease", ROOT])
    def test_the_number_of_a_lease_goes_on(self, upgraded: World, lost: str) -> None:
        """Whether its file was deleted on a host, or all that the host had."""
        machine = upgraded.machines["a"]
        number = int(lease_lines(machine, ROOT)[0])
        machine.disk.remove(lost)
        upgraded.deploy()
        assert int(lease_lines(machine, ROOT)[0]) == number + 1


class TestFull:
    def test_prune_makes_room(self, upgraded: World) -> None:
        number = lease_lines(upgraded.machines["a"], ROOT)[0]
        fill(upgraded)
        outcome = upgraded.run(prune)
        assert "removed 1-" in outcome.message, outcome.error
        assert upgraded.machines["a"].disk.free(STATE) > 0
        assert lease_lines(upgraded.machines["a"], ROOT)[:2] == [str(int(number) + 1), ""]

    def test_teardown_removes_all(self, upgraded: World) -> None:
        fill(upgraded)
        assert upgraded.run(teardown, name=NAME).completed
        assert not upgraded.containers()
        assert not upgraded.machines["a"].disk.get(ROOT)

    def test_recover_brings_the_service_back(self, world: World) -> None:
        """From a kill at any moment, with the disk full since."""
        world.deploy()
        image = world.push("20250725_1")
        for moment in sampled(world.new_states(deploy, image=image), 16, 1):
            twin = world.twin()
            twin.run(deploy, image=image, kill_at=moment.number)
            twin.pass_by(5)
            fill(twin)
            outcome = twin.run(recover)
            assert outcome.completed, f"{moment}: {outcome.error}"
            twin.assert_coherent()

    def test_full_at_the_cut_over_the_new_generation_is_promoted(self, world: World) -> None:
        """Room for the record was kept before anything stopped."""
        world.deploy()

        def watch(moment: Moment) -> None:
            if moment.what.startswith("stop "):
                fill(world)

        assert world.run(deploy, image=world.push("20250723_1"), watch=watch).completed
        assert world.assert_coherent().startswith("2-")

    def test_a_deploy_wants_room_before_anything_stops(self, world: World) -> None:
        world.deploy()
        before = world.runs()
        for machine in world.machines.values():
            machine.disk.fill(STATE)
            machine.disk.volumes[STATE].blocks += 100
        outcome = world.run(deploy, image=world.push("20250723_1"))
        said = str(outcome.error)
        for host in ("a (10.0.0.1)", "b (10.0.0.2)"):
            assert f"host {host}: expected 1.0 MiB free for its state at {STATE}, found 0.4" in said
        assert world.runs() == before

    def test_a_first_deploy_names_disk_and_host(self, world: World) -> None:
        fill(world)
        outcome = world.run(deploy)
        assert isinstance(outcome.error, DiskFull)
        assert f"host a (10.0.0.1): can't write {ROOT}/lease: its disk is full" in str(
            outcome.error
        )


def test_a_read_only_disk_is_named_and_nothing_is_touched(upgraded: World) -> None:
    before = upgraded.state()
    for machine in upgraded.machines.values():
        machine.disk.volumes[STATE].read_only = True
    outcome = upgraded.run(deploy, image=upgraded.push("20250724_1"))
    assert isinstance(outcome.error, DiskReadOnly)
    assert f"host a (10.0.0.1): can't write {ROOT}/lease: its disk is mounted read-only" in str(
        outcome.error
    )
    assert upgraded.state() == before


def test_a_clock_set_back_keeps_no_recovery_waiting(world: World) -> None:
    world.deploy()
    image = world.push("20250725_1")
    moments = world.twin().shared_run(deploy, image=image).moments
    created = next(m for m in moments if m.what.startswith("create ") and m.after)
    world.run(deploy, image=image, kill_at=created.number)
    world.cluster.clock.step(-525)
    before = world.cluster.clock.seconds()
    assert world.run(recover).completed
    assert world.cluster.clock.seconds() - before < 60
    world.assert_coherent()


@pytest.mark.parametrize("seconds", [-3600, 3600])
def test_how_far_a_killed_run_has_brought_the_proxy_is_known_without_dates(
    world: World, seconds: int
) -> None:
    """On the way back, to a container whose log tells of an earlier start: killed after each change
    from the proxy's start until it is open, with the clock set before it says anything."""
    world.deploy()
    first, proxy = world.serving(), world.running()["c0"].id
    image = world.push("20250724_1", {"d0": Faults(garbage=True)})
    moments = world.twin().shared_run(deploy, image=image).moments
    start = next(m for m in moments if m.what == f"start {proxy}" and m.after)
    opened = next(m for m in moments[::-1] if m.what.startswith("kill "))
    later = [m for m in moments[start.number : opened.number] if m.changes and m.after]
    assert len(later) > 5
    for moment in sampled(later, 6):
        twin = world.twin()

        def watch(passing: Moment, twin: World = twin) -> None:
            if passing.number == start.number:
                twin.cluster.clock.step(seconds)

        assert twin.run(deploy, image=image, watch=watch, kill_at=moment.number).killed
        twin.pass_by(5)
        before = twin.cluster.clock.seconds()
        assert twin.run(recover).completed, moment
        assert twin.cluster.clock.seconds() - before < 60, moment
        assert twin.assert_coherent() == first


@pytest.mark.parametrize("when", ["stop ", "start "])
def test_clocks_set_back_at_a_cut_over_keep_nobody_waiting(world: World, when: str) -> None:
    """After each stop, or after each start: on the way there, and on the way back to containers
    whose logs know later times."""
    world.deploy()
    first, good = world.serving(), world.push("20250723_1")

    def watch(moment: Moment) -> None:
        if moment.what.startswith(when) and moment.after:
            world.cluster.clock.step(-3600)

    before = world.cluster.clock.seconds()
    bad = world.run(
        deploy, image=world.push("20250724_1", {"d0": Faults(garbage=True)}), watch=watch
    )
    assert "The service is back on generation" in str(bad.error)
    assert world.assert_coherent() == first
    assert world.run(deploy, image=good, watch=watch).completed
    assert world.assert_coherent() != first
    assert world.cluster.clock.seconds() - before < 60


@pytest.mark.parametrize("flow", [deploy, prune, teardown])
def test_a_run_looks_at_its_lease_before_each_change(upgraded: World, flow: Any) -> None:
    """On each host it has looked at least as often as it has changed anything."""
    looks, changes = dict.fromkeys("ab", 0), dict.fromkeys("ab", 0)

    def watch(moment: Moment) -> None:
        if moment.after:
            return
        if moment.what == f"read {ROOT}/lease":
            looks[moment.host] += 1
        verb, _, rest = moment.what.partition(" ")
        if (moment.changes and verb in LOOKED_AT) or moment.what == f"write {RECORD}":
            changes[moment.host] += 1
            assert looks[moment.host] >= changes[moment.host], f"{moment} ({rest})"

    image = upgraded.push("20250724_1")
    parameters = {deploy: {"image": image}, teardown: {"name": NAME}}.get(flow, {})
    assert upgraded.run(flow, watch=watch, **parameters).completed
    assert sum(changes.values()) > 3
