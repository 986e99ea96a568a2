"""On hosts in memory: what is the hosts' fault, and not the image's. Names, ports and devices that
others have are refused before anything stops, or found soon after; no image is quarantined."""

from collections.abc import Callable
from pathlib import Path

import pytest

from pd_deploy.errors import (
    ConnectionDropped,
    DiskFull,
    DockerDown,
    DockerRestarted,
    FileMissing,
    HostUnreachable,
    InUse,
    NameTaken,
    RollbackFailed,
    RolledBack,
    SeveralFaults,
    faults_of,
)
from pd_deploy.flows.deploy import deploy
from pd_deploy.flows.recover import recover
from pd_deploy.flows.rollback import rollback
from tests.memory.calls import Moment
from tests.memory.machine import Faults
from tests.memory.world import World
from tests.samples import sampled

NEXT = "20250725_1"


@pytest.fixture
def world(tmp_path: Path) -> World:
    """An upgrade is about to come."""
    world = World(tmp_path)
    world.deploy()
    world.push(NEXT)
    return world


def image(world: World) -> str:
    return next(ref for ref in world.cluster.registry if ref.endswith(f":{NEXT}"))


def next_names(world: World) -> dict[str, str]:
    """The containers of the generation that is about to come, by instance."""
    twin = world.twin()
    assert twin.shared_run(deploy, image=image(twin)).completed
    return {instance: container.name for instance, container in twin.running().items()}


def once(matches: Callable[[Moment], bool], act: Callable[[], None]) -> Callable[[Moment], None]:
    """Act at the first moment that matches."""
    done = list[Moment]()

    def watch(moment: Moment) -> None:
        if not done and matches(moment):
            done.append(moment)
            act()

    return watch


def after_stop_of(world: World, instance: str) -> Callable[[Moment], bool]:
    stopped = f"stop {world.running()[instance].name}"
    return lambda moment: moment.after and moment.what == stopped


class TestNames:
    @pytest.mark.parametrize("instance", ["p0", "d0", "c0"])
    @pytest.mark.parametrize("runs", [True, False])
    def test_a_name_taken_is_refused_before_anything_is_made(
        self, world: World, instance: str, runs: bool
    ) -> None:
        name = next_names(world)[instance]
        stranger = world.stranger("b" if instance == "d0" else "a", name)
        if not runs:
            world.machines["b" if instance == "d0" else "a"].end(stranger, 0)
        before, run = {c.id for c in world.containers()}, stranger.run_id
        serving = world.runs()
        for dry in (True, False):
            error = world.run(deploy, image=image(world), dry_run=dry).error
            assert isinstance(error, NameTaken)
            for word in (name, stranger.id[:12], "busybox:1", "docker rename"):
                assert word in str(error)
        assert {c.id for c in world.containers()} == before
        assert world.runs() == serving
        assert stranger.run_id == run
        assert stranger.running is runs

    def test_all_names_taken_are_told_at_once(self, world: World) -> None:
        names = next_names(world)
        world.stranger("a", names["p0"], labels={"pd-deploy.deployment": "another"})
        world.stranger("b", names["d0"])
        error = world.run(deploy, image=image(world)).error
        assert isinstance(error, SeveralFaults)
        assert {type(fault) for fault in error.faults} == {NameTaken}
        assert len(error.faults) == 2

    def test_a_name_taken_meanwhile_is_refused_while_the_service_runs(self, world: World) -> None:
        name, before = next_names(world)["p0"], world.runs()
        watch = once(lambda one: one.what.startswith("pull"), lambda: taken(world, name))
        error = world.run(deploy, image=image(world), watch=watch).error
        assert isinstance(error, NameTaken)
        assert world.runs() == before
        assert not world.record().quarantine

    def test_so_it_is_for_a_generation_that_is_to_come_back(self, world: World) -> None:
        assert world.run(deploy, image=image(world)).completed
        old = next(c for c in world.containers() if not c.running and "p0" in c.name)
        del world.machines["a"].containers[old.id]
        stranger = world.stranger("a", old.name)
        before = world.runs()
        assert isinstance(world.run(rollback).error, NameTaken)
        assert world.runs() == before
        assert stranger.running


def taken(world: World, name: str) -> None:
    world.stranger("a", name)


class TestTakenInTheSecondAfter:
    """Whoever takes a port or device when the old generation has just stopped."""

    @pytest.mark.parametrize("what", ["ports", "devices"])
    def test_it_is_named_within_seconds_and_the_way_back_waits_for_it(
        self, world: World, what: str
    ) -> None:
        label = world.running()["d0"].labels[f"pd-deploy.{what}"]
        number, first = int(label.split(",")[0]), world.serving()
        found_at = list[float]()

        def take() -> None:
            found_at.append(world.cluster.clock.seconds())
            world.stranger("b", "intruder", seconds=30, **{what: [number]})

        watch = once(after_stop_of(world, "d0"), take)
        error = world.run(deploy, image=image(world), watch=watch).error
        assert isinstance(error, RolledBack), error
        assert f"{what[:-1]} {number} with" in str(error)
        assert "container intruder" in str(error)
        assert "pid " in str(error)
        assert 30 <= world.cluster.clock.seconds() - found_at[0] < 60
        assert world.serving() == first
        assert not world.record().quarantine
        world.assert_coherent()

    def test_a_process_outside_of_containers_is_named_too(self, world: World) -> None:
        ports = world.machines["b"].held_ports
        port = int(world.running()["d0"].labels["pd-deploy.ports"].split(",")[0])
        watch = once(after_stop_of(world, "d0"), lambda: ports.__setitem__(port, "nc"))
        error = world.run(deploy, image=image(world), watch=watch).error
        assert isinstance(error, RollbackFailed)
        assert f"port {port} with nc (pid 17)" in str(error)
        ports.clear()
        assert world.run(recover).completed
        assert not world.record().quarantine
        world.assert_coherent()

    def test_a_look_of_a_moment_is_not_taken_for_a_holder(self, world: World) -> None:
        watch = once(
            after_stop_of(world, "d0"),
            lambda: void(world.stranger("b", "look", devices=[8], seconds=1)),
        )
        assert world.run(deploy, image=image(world), watch=watch).completed


def started(world: World, moment: Moment) -> str | None:
    """The name of the container that is started at a moment."""
    verb, _, id_ = moment.what.partition(" ")
    container = world.machines[moment.host].containers.get(id_)
    return container.name if container and verb == "start" else None


def void(_: object) -> None: ...


class TestQuarantine:
    """Once at the cut-over, by kind of fault: none of them is the image's."""

    def at_the_start_of_d0(self, world: World) -> Callable[[Moment], bool]:
        name = next_names(world)["d0"]
        return lambda one: not one.after and started(world, one) == name

    def all_load(self, world: World) -> Callable[[Moment], bool]:
        names = set(next_names(world).values())
        return lambda one: (
            "/health" in one.what
            and not names - {container.name for container in world.running().values()}
        )

    @pytest.mark.parametrize("what", ["ports", "devices"])
    def test_port_or_device(self, world: World, what: str) -> None:
        number = int(world.running()["d0"].labels[f"pd-deploy.{what}"].split(",")[0])
        watch = once(
            self.at_the_start_of_d0(world),
            lambda: void(world.stranger("b", "intruder", seconds=5, **{what: [number]})),
        )
        error = world.run(deploy, image=image(world), watch=watch).error
        self.goes_back_and_blames_no_image(world, error, InUse, "container intruder")

    def test_disk(self, world: World) -> None:
        machine = world.machines["b"]
        machine.disk.mount("/data/log_path")
        starts = self.at_the_start_of_d0(world)

        def fill() -> None:
            machine.disk.fill("/data/log_path")
            world.cluster.faults["d0"] = Faults(dies=1)

        def put_right() -> None:
            machine.disk.volumes["/data/log_path"].blocks = 1 << 28
            world.cluster.faults.clear()

        self.goes_wrong(world, starts, fill, put_right, DiskFull, "no space left")

    def test_a_file(self, world: World) -> None:
        disk = world.machines["b"].disk
        mounts = world.running()["d0"].config["HostConfig"]["Mounts"]
        path = next(one["Source"] for one in mounts if "model" in one["Source"])
        starts, entry = self.at_the_start_of_d0(world), disk.entries[path]
        self.goes_wrong(
            world,
            starts,
            lambda: void(disk.entries.pop(path)),
            lambda: disk.entries.__setitem__(path, entry),
            FileMissing,
            path,
        )

    @pytest.mark.parametrize("kind", [DockerDown, HostUnreachable, ConnectionDropped])
    def test_docker_and_network(self, world: World, kind: type[Exception]) -> None:
        starts, failing = self.at_the_start_of_d0(world), list[Moment]()

        def watch(moment: Moment) -> None:
            if len(failing) < 4 and starts(moment):
                failing.append(moment)
                raise kind("away")

        error = world.run(deploy, image=image(world), watch=watch).error
        self.goes_back_and_blames_no_image(world, error, kind, "away")

    @pytest.mark.parametrize("beside", [None, "p0"], ids=["alone", "with its peers elsewhere"])
    def test_docker_or_host_that_starts_again(self, world: World, beside: str | None) -> None:
        """Its servers end, and those of other hosts that have links to them."""

        def reboot() -> None:
            world.cluster.clock.pass_by(0.1)  # a host counts hundredths of a second
            if beside:
                world.machines["a"].end(world.running()[beside], 1)
            world.machines["b"].reboot()

        watch = once(self.all_load(world), reboot)
        error = world.run(deploy, image=image(world), watch=watch).error
        self.goes_back_and_blames_no_image(
            world, error, DockerRestarted, "Docker was restarted on host b (10.0.0.2)"
        )

    def test_a_host_that_was_away_for_a_moment(self, world: World) -> None:
        """The servers of the other one end of it."""

        def cut() -> None:
            world.machines["a"].end(world.running()["p0"], 1)
            world.machines["b"].silence = 2
            world.machines["b"].unplug(4)

        watch = once(self.all_load(world), cut)
        error = world.run(deploy, image=image(world), watch=watch).error
        assert isinstance(error, RolledBack), error
        assert not world.record().quarantine
        world.assert_coherent()

    def test_a_call_that_hangs_after_the_cut_over(self, world: World) -> None:
        """Calls of all kinds, for longer than servers have to be ready: that counts from when all
        have started."""
        hanging = dict[tuple[str, str, bool], Moment]()
        moments = world.twin().shared_run(deploy, image=image(world)).moments
        stops = [one.number for one in moments if one.what.startswith("stop ")]
        for one in moments[stops[-1] :]:
            verb, _, what = one.what.partition(" ")
            path = what.partition("/")[2] if verb in ("GET", "POST") else ""
            hanging.setdefault((verb, path, one.after), one)
        assert len(hanging) > 20
        for moment in sampled(list(hanging.values()), 8):
            twin = world.twin()
            twin.run(deploy, image=image(world), hang_at=moment.number)
            assert not twin.record().quarantine, moment
            twin.pass_by(5)
            assert twin.run(recover).completed, moment
            twin.assert_coherent()

    def goes_wrong(
        self,
        world: World,
        when: Callable[[Moment], bool],
        act: Callable[[], None],
        put_right: Callable[[], None],
        kind: type[Exception],
        words: str,
    ) -> None:
        broken = list[bool]()
        breaks = once(when, lambda: (act(), broken.append(True))[1])

        def watch(moment: Moment) -> None:
            breaks(moment)
            if broken and moment.what.startswith("records, "):  # The way back has begun.
                put_right()

        error = world.run(deploy, image=image(world), watch=watch).error
        self.goes_back_and_blames_no_image(world, error, kind, words)

    def goes_back_and_blames_no_image(
        self, world: World, error: BaseException | None, kind: type[Exception], words: str
    ) -> None:
        assert isinstance(error, RolledBack), error
        assert error.__cause__
        assert all(isinstance(fault, kind) for fault in faults_of(error.__cause__))
        assert words in str(error)
        assert not world.record().quarantine
        world.assert_coherent()
