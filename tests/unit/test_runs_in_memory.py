"""On hosts in memory: stages one by one, runs at the same time, the newest image, and the end."""

import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from pd_deploy.cli import tags
from pd_deploy.config.load import load_deployment
from pd_deploy.errors import LeaseHeld, NoSuchGeneration, NotOurs
from pd_deploy.flows.deploy import deploy
from pd_deploy.flows.preflight import preflight
from pd_deploy.flows.prune import prune
from pd_deploy.flows.recover import recover
from pd_deploy.flows.rollback import rollback
from pd_deploy.flows.teardown import teardown
from pd_deploy.planning.plans import STAGES
from tests.memory.calls import Moment
from tests.memory.machine import Faults
from tests.memory.programs import Proxy
from tests.memory.world import FIRST, NAME, REPOSITORY, ROOT, Reports, World


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


class TestStages:
    @pytest.mark.parametrize("is_upgrade", [False, True], ids=["first", "upgrade"])
    def test_one_by_one_they_end_as_one_full_run(self, world: World, is_upgrade: bool) -> None:
        if is_upgrade:
            world.deploy()
            image = world.push("20250725_1")
        else:
            image = world.push("20250722_27")
        at_once = world.twin()
        assert at_once.run(deploy, image=image).completed
        for stage in STAGES:
            outcome = world.run(deploy, image=image, stages=[stage])
            assert outcome.completed, f"{stage}: {outcome.error}"
        assert world.assert_coherent() == at_once.assert_coherent()
        configs = [{c.name: c.config for c in one.containers()} for one in (world, at_once)]
        assert configs[0] == configs[1]

    def test_no_stage_at_all_is_refused_before_any_host_is_asked(self, world: World) -> None:
        outcome = world.run(deploy, stages=[])
        assert "found an empty list" in str(outcome.error)
        assert not outcome.moments

    def test_server_before_launch_is_out_of_order_and_changes_nothing(self, world: World) -> None:
        outcome = world.run(deploy, stages=["server"])
        assert "launch" in str(outcome.error)
        assert world.containers() == []

    def test_a_dry_run_changes_nothing(self, world: World) -> None:
        world.deploy()
        before, image = world.state(), world.push("20250725_1")
        outcome = world.run(deploy, image=image, dry_run=True)
        assert "nothing was touched" in outcome.message
        assert world.state() == before


def test_only_a_host_that_has_left_the_file_can_be_forgotten(world: World) -> None:
    world.deploy()
    before = world.state()
    outcome = world.run(deploy, forget=["10.0.0.2", "any text"])
    for given in ("10.0.0.2", "any text"):
        assert f"left the file (there is none), found '{given}'" in str(outcome.error)
    assert world.state() == before


class TestTwoRuns:
    def test_the_second_waits_for_the_first(self, world: World) -> None:
        world.change(gates={"lease": 600})
        image = world.push("20250725_1")
        outcomes = world.both((deploy, {}), (deploy, {"image": image}))
        assert [one.error for one in outcomes] == [None, None]
        world.assert_coherent()
        assert {one.config["Image"] for one in world.running().values()} == {
            f"{REPOSITORY}@{world.cluster.registry[image].digest}"
        }

    def test_the_second_is_refused_when_its_wait_is_over(self, world: World) -> None:
        world.change(gates={"lease": 1})
        world.cluster.faults["d0"] = Faults(hangs=True)
        outcomes = world.both((deploy, {}), (deploy, {}))
        first, second = sorted(outcomes, key=lambda one: isinstance(one.error, LeaseHeld))
        assert "within 20 s, found none" in str(first.error)
        assert "is working on qwq-3p1d" in str(second.error)
        assert isinstance(second.error, LeaseHeld)
        world.cluster.faults.clear()
        assert world.run(deploy).completed
        world.assert_coherent()


class TestNewest:
    def test_the_newest_build_of_the_family_is_deployed_once(self, world: World) -> None:
        world.deploy()
        for tag in ("20250801_2", "20250801_10", "latest", "20250730_99"):
            world.push(tag)
        assert world.run(deploy, image="newest").completed
        assert world.record().serving
        (release,) = {c.config["Image"] for c in world.running().values()}
        build = world.cluster.registry[f"{REPOSITORY}:20250801_10"]
        assert release == f"{REPOSITORY}@{build.digest}"
        before = world.state()
        world.events.clear()
        assert world.run(deploy, image="newest").message.startswith("Already on")
        assert world.events == []
        assert world.state() == before

    def test_newer_tags_of_other_forms_are_told_instead_and_as_an_event(self, world: World) -> None:
        world.deploy()
        before = world.state()
        world.events.clear()
        unknown, renamed = "nightly-20260102", "master-202601011200-vllm"
        for tag in (renamed, unknown, "nightly-20250102", "release_v0.7.0-20260103-vllm"):
            world.push(tag)
        says = f"`update` does not take: {unknown}, {renamed} (`pd-deploy tags {world.path}` lists"
        message = world.run(deploy, image="newest").message
        assert message.startswith("Not updated: tags that seem newer")
        assert says in message
        assert f"stays on {FIRST}" in message
        assert says in world.run(deploy, image="newest", dry_run=True).message
        assert world.state() == before
        (event,) = world.events
        assert event["event"] == "pd-deploy.newer-tags-not-taken"
        assert event["resource"]["prefect.resource.id"] == "pd-deploy.deployment.qwq-3p1d"
        assert event["payload"]["tags"] == [unknown, renamed]
        world.push("20250801_1")
        message = world.run(deploy, image="newest").message
        assert message.startswith("Generation 2-")
        assert says in message

    def test_of_several_repositories_is_the_newest_of_all(self, world: World) -> None:
        world.deploy()
        renamed = "swr.cn-east-4.myhuaweicloud.com/omni-ci/daily_renamed"
        world.push("20250801_1")
        world.push("20250802_1", repository=renamed)
        world.change(update={"family": "daily", "repository": ["omni-ci/daily_omniinfer", renamed]})
        assert world.run(deploy, image="newest").completed
        (release,) = {c.config["Image"] for c in world.running().values()}
        assert release.startswith(f"{renamed}@")
        assert world.run(deploy, image="newest").message.startswith(
            f"Already on {renamed}:20250802_1"
        )
        world.assert_coherent()

    def test_a_build_in_quarantine_is_passed_over(self, world: World) -> None:
        world.deploy()
        good = world.push("20250801_1")
        bad = world.push("20250801_2", {"d0": Faults(dies=1)})
        assert "service is back" in str(world.run(deploy, image="newest").error)
        searched, quarantine = world.asked(tags.search(load_deployment(world.path)))
        assert searched.expect_build().image == good
        assert [build.image for build in searched.quarantined] == [bad]
        assert [entry.image for entry in quarantine.values()] == [bad]
        assert world.run(deploy, image="newest").completed
        (release,) = {c.config["Image"] for c in world.running().values()}
        assert release.endswith(world.cluster.registry[good].digest)
        world.assert_coherent()

    def test_with_the_registry_down_nothing_changes(self, world: World) -> None:
        world.deploy()
        before = world.runs()
        world.cluster.registry_down = True
        assert world.run(deploy, image="newest").error
        assert world.runs() == before
        assert world.run(deploy).completed
        world.assert_coherent()

    def test_a_night_waits_for_a_registry_under_maintenance(self, world: World) -> None:
        world.deploy()
        image, asked = world.push("20250801_1"), []
        world.cluster.registry_down = True

        def watch(moment: Moment) -> None:
            """The registry comes back ten minutes after the night's first question."""
            if not asked:
                asked.append(world.cluster.clock.seconds())
            if world.cluster.clock.seconds() > asked[0] + 590:
                world.cluster.registry_down = False

        assert world.run(deploy, image="newest", watch=watch).error, "nobody waits at the prompt"
        asked.clear()
        night = world.run(deploy, image="newest", watch=watch, due=datetime.now(UTC))
        assert night.completed, night.error
        (release,) = {c.config["Image"] for c in world.running().values()}
        assert release.endswith(world.cluster.registry[image].digest)
        world.assert_coherent()

    def test_a_build_that_is_removed_before_it_is_pulled_gives_way_to_the_next(
        self, world: World
    ) -> None:
        world.deploy()
        image, removed = world.push("20250801_1"), world.push("20250801_2")
        digest = world.cluster.registry[removed].digest

        def watch(moment: Moment) -> None:
            if moment.what.startswith("pull"):
                for ref in (removed, f"{REPOSITORY}@{digest}"):
                    world.cluster.registry.pop(ref, None)

        night = world.run(deploy, image="newest", watch=watch)
        assert night.completed, night.error
        (release,) = {c.config["Image"] for c in world.running().values()}
        assert release.endswith(world.cluster.registry[image].digest)
        world.assert_coherent()


class TestTheEnd:
    def test_prune_keeps_what_serves_and_the_good_one_before(self, world: World) -> None:
        world.change(keep=1)
        for tag in ("20250722_27", "20250722_28", "20250722_29"):
            assert world.shared_run(deploy, image=world.push(tag)).completed
        serving = world.assert_coherent()
        before = world.state()
        assert "nothing to remove" in world.run(prune).message
        assert world.state() == before
        assert world.run(rollback).completed
        assert world.assert_coherent() != serving

    def test_prune_removes_what_the_file_keeps_no_longer(self, world: World) -> None:
        world.change(keep=2)
        for tag in ("20250722_27", "20250722_28", "20250722_29"):
            assert world.shared_run(deploy, image=world.push(tag)).completed
        world.change(keep=1)
        runs = world.runs()
        assert "removed 1-" in world.run(prune).message
        assert world.runs() == runs
        world.assert_coherent()

    def test_teardown_leaves_nothing_of_the_deployment(self, world: World) -> None:
        untouched = {name: set(m.disk.entries) for name, m in world.machines.items()}
        world.deploy()
        assert world.shared_run(deploy, image=world.push("20250725_1")).completed
        serving = world.serving()
        refused = str(world.run(teardown, name="qwq-3p1").error)
        assert "name: expected qwq-3p1d, the name of the deployment to remove" in refused
        assert world.assert_coherent() == serving
        assert "qwq-3p1d is gone" in world.run(teardown, name=NAME).message
        for name, machine in world.machines.items():
            assert machine.containers == {}
            assert machine.images == {}
            left = set(machine.disk.entries) - untouched[name]
            assert not [path for path in left if path.startswith(ROOT)]
            assert not [path for path, _ in machine.disk.files("/") if "qwq-3p1d" in path]
        world.deploy()
        world.assert_coherent()

    def test_artifacts_say_what_is_so_after_each_kind_of_run(self, world: World) -> None:
        """Their keys are the deployment's name, however its file is called."""
        world.path = world.path.rename(world.path.with_name("Another file.yaml"))
        world.change(keep=2)
        shown: dict[str, Any] = {}

        async def publish(*, key: str, **artifact: Any) -> None:
            shown[key] = artifact.get("table", artifact.get("markdown"))

        def releases() -> list[str]:
            rows = shown["qwq-3p1d-releases"]
            return [f"{row['generation'].partition('-')[0]} {row['result']}" for row in rows]

        for tag in ("20250722_27", "20250722_28", "20250722_29"):
            assert world.run(deploy, image=world.push(tag), artifacts=publish).completed
        keys = {"qwq-3p1d-report", "qwq-3p1d-instances", "qwq-3p1d-releases"}
        assert set(shown) == keys
        assert releases() == ["3 serving", "2 good", "1 good"]
        world.change(keep=1)
        assert world.run(prune, artifacts=publish).completed
        assert releases() == ["3 serving", "2 good"]
        assert world.run(deploy, dry_run=True, artifacts=publish).completed
        assert set(shown) == keys | {"qwq-3p1d-dry-run"}
        bad = world.push("20250723_1", {"p1": Faults(dies=3)})
        assert world.run(deploy, image=bad, artifacts=publish).error
        self.assert_both_ways_are_told(shown["qwq-3p1d-report"])
        assert world.run(teardown, name=NAME, artifacts=publish).completed
        assert (releases(), shown["qwq-3p1d-instances"]) == ([], [])
        assert "**Removed from its hosts.**" in shown["qwq-3p1d-report"]
        assert "serving" not in shown["qwq-3p1d-report"]

    def assert_both_ways_are_told(self, report: str) -> None:
        """What was tried, and the steps of the attempt and of the way back, each in its phase."""
        assert re.search(
            r"Generation 4-\w+ changed against 3-\w+: image \S+ → \S+23_1, keep\.\n", report
        )
        _, *phases = report.split("\n### ")
        titles = [re.sub(", .*", "", phase.partition("\n")[0]) for phase in phases]
        assert titles == ["Look", "Prepare", "Cut-over", "Serve", "Way back"]
        serve, back = phases[3:]
        assert re.search(r"\| ready \| p1 \|  \| \*\*failed:\*\* host a .*: ended with", serve)
        assert re.search(r"\| ready \| \w+ \|  \| \*\*failed:\*\* given up", serve)
        assert re.search(r"\| ready \| p1 \|  \| healthy", back)
        assert re.search(r"\nway back +[\d.]+ s +█", report)
        assert re.search(r"\ndown +[\d.]+ s +▓", report)

    def test_teardown_takes_logs_from_a_former_place_for_logs(self, world: World) -> None:
        world.deploy()
        world.change(paths={"logs": "/data/elsewhere"})
        assert world.run(deploy).completed
        others = "/data/log_path/another/1-0123abcd/p0/server_0.log"
        world.machines["a"].disk.put(others, b"")
        assert world.run(teardown, name=NAME).completed
        for name, machine in world.machines.items():
            left = [path for path in machine.disk.entries if "qwq-3p1d" in path]
            assert [path for path in left if not path.startswith("/data/models")] == []
            assert (others in machine.disk.entries) is (name == "a")

    @pytest.mark.parametrize("end", [prune, teardown], ids=["prune", "teardown"])
    def test_nothing_is_removed_where_a_changed_release_leads(self, world: World, end: Any) -> None:
        """One host's file would otherwise say what to remove on another."""
        world.change(keep=2)
        for tag in ("20250722_27", "20250722_28", "20250722_29"):
            assert world.shared_run(deploy, image=world.push(tag)).completed
        world.change(keep=1)
        first = min(n for n in world.machines["a"].disk.names(ROOT) if n.startswith("1-"))
        for machine in world.machines.values():
            machine.disk.put(f"/etc/{first}/passwd", b"root")
        release = f"{ROOT}/{first}/release.json"
        document = json.loads(world.machines["a"].disk.read(release))
        named: dict[str, Any] = {"name": NAME} if end is teardown else {}
        for logs in ("/etc", "/", "", "-delete", f"/data/{first}", f"/data/log_path/{first}/..",
                     f"/../etc/{first}", f"x/{first}"):  # fmt: skip
            changed = json.dumps(document | {"logs": logs}).encode()
            for machine in world.machines.values():
                machine.disk.put(release, changed, 0o600)
            outcome = world.run(end, **named)
            assert isinstance(outcome.error, NotOurs)
            assert f"found '{logs}" in str(outcome.error)
            for machine in world.machines.values():
                assert machine.disk.read(f"/etc/{first}/passwd") == "root"
                assert machine.disk.get(f"/data/log_path/qwq-3p1d/{first}")

    def test_rollback_to_what_is_not_kept_names_those_that_are(self, world: World) -> None:
        world.deploy()
        outcome = world.run(rollback)
        assert isinstance(outcome.error, NoSuchGeneration)
        outcome = world.run(rollback, generation="9-deadbeef")
        assert isinstance(outcome.error, NoSuchGeneration)
        world.assert_coherent()

    def test_recover_where_all_is_well_touches_nothing(self, world: World) -> None:
        world.deploy()
        runs = world.runs()
        assert world.run(recover).completed
        assert world.runs() == runs


class TestFailureKept:
    def test_the_failed_generation_is_left_for_inspection(self, world: World) -> None:
        world.deploy()
        bad = world.push("20250724_1", {"d0": Faults(garbage=True)})
        outcome = world.run(deploy, image=bad, on_failure="keep")
        assert outcome.error
        assert len(world.running()) == 5
        assert world.run(recover).completed
        world.assert_coherent()

    def test_a_second_of_no_memory_is_told_as_such(self, world: World) -> None:
        world.deploy()
        bad = world.push("20250724_1", {"d0": Faults(out_of_memory=True)})
        outcome = world.run(deploy, image=bad)
        assert "ran out of memory" in str(outcome.error)
        world.assert_coherent()


class TestSmokeTestWithoutChecks:
    """Where no check knows the right answer, decode's own answers are what is compared with."""

    def test_a_good_service_passes(self, world: World) -> None:
        world.change(smoke={"checks": []})
        world.deploy()
        world.assert_coherent()

    @pytest.mark.parametrize("instance", ["d0", "p1"])
    def test_other_kv_than_prefill_made_is_noticed(self, world: World, instance: str) -> None:
        world.change(smoke={"checks": []})
        world.deploy()
        fault = {"d0": Faults(wrong_kv=True), "p1": Faults(refuses_kv=True)}[instance]
        outcome = world.run(deploy, image=world.push("20250724_1", {instance: fault}))
        assert "service is back" in str(outcome.error)
        world.assert_coherent()


class TestStreams:
    """Requests under way when the proxy stops: `container.stop_timeout` is 5 s."""

    def stop_with(self, world: World, flow: Any, streams: list[float], **parameters: Any) -> str:
        world.deploy()
        proxy = world.running()["c0"].program
        assert isinstance(proxy, Proxy)
        for seconds in streams:
            proxy.stream(seconds)
        outcome = world.run(flow, **parameters)
        return outcome.message or str(outcome.error)

    @pytest.mark.parametrize(
        ("way", "streams", "count"),
        [
            ("upgrade", [60, 60, 2], 2),
            ("upgrade", [9], 1),
            ("upgrade", [4.8, 1], 0),
            ("rolled back", [60, 60, 2], 2),
            ("teardown", [9], 1),
        ],
    )
    def test_those_that_are_cut_are_counted_and_told(
        self, world: World, way: str, streams: list[float], count: int
    ) -> None:
        faults = {"d0": Faults(garbage=True)} if way == "rolled back" else {}
        image = {"image": world.push("20250725_1", faults)} if way != "teardown" else {}
        told = self.stop_with(
            world, deploy if image else teardown, streams, **(image or {"name": NAME})
        )
        which = {0: "", 1: "1 request that was", 2: "2 requests that were"}[count]
        cut = f"cut {which} not answered within 5 s (container.stop_timeout)"
        assert (cut in told) is bool(count), told
        assert ("cut " in told) is bool(count), told


def test_other_kv_is_told_from_a_model_that_answers_otherwise(world: World) -> None:
    bad = world.push("20250724_1", {"d0": Faults(wrong_kv=True)})
    assert "decode reads other KV than prefill made" in str(world.run(deploy, image=bad).error)


@pytest.mark.parametrize("instance", ["d0", "p1", "c0"])
def test_a_server_that_died_is_brought_back_with_its_generation(
    world: World, instance: str
) -> None:
    """The proxy's container is the same one: it can't be prepared while it still serves."""
    world.deploy()
    serving, dead = world.serving(), world.running()[instance]
    machine = next(m for m in world.machines.values() if dead.id in m.containers)
    machine.end(dead, 1)
    outcome = world.run(deploy)
    assert outcome.completed, outcome.error
    assert world.assert_coherent() == serving


class TestReports:
    """However a run ends, it has one report."""

    @pytest.mark.parametrize(
        ("flow", "parameters", "says"),
        [
            (deploy, {"image": f"{REPOSITORY}:20990101_1"}, ["**Failed:**", "20990101_1"]),
            (deploy, {"image": "newest"}, ["**Completed:**\n", "Already on"]),
            (deploy, {"stages": []}, ["**Failed:**", "found an empty list"]),
            (deploy, {"image": "newest", "due": datetime(1970, 1, 1, tzinfo=UTC)}, ["skipped"]),
            (rollback, {"generation": "9-01234567"}, ["**Failed:**", "9-01234567"]),
            (
                teardown,
                {"name": "another"},
                ["**Failed:**", "the name of the deployment to remove"],
            ),
            (prune, {"adopted": True}, ["**Failed:**", "expected an adopted service"]),
            (recover, {}, ["**Generation 1-"]),
            (preflight, {"image": "a bad name"}, ["**Failed:**", "a preflight changes nothing"]),
        ],
        ids=lambda value: getattr(value, "name", None),
    )
    def test_a_run_without_a_plan_has_one(
        self, world: World, flow: Any, parameters: dict[str, Any], says: list[str]
    ) -> None:
        world.deploy()
        before, reports = world.state(), Reports()
        outcome = world.run(flow, artifacts=reports.publish, **parameters)
        did_nothing = "**Completed:**" in reports.only
        assert reports.keys == [None if did_nothing else f"{NAME}-report"], outcome
        assert [text for text in says if text not in reports.only] == []
        if outcome.error:
            assert str(outcome.error) in reports.only
            assert "\nOn the hosts: " in reports.only
            assert "\nNext: " in reports.only
        assert world.state() == before

    def test_a_host_that_does_not_answer_is_its_cause(self, world: World) -> None:
        world.deploy()
        world.machines["b"].unplug()
        reports = Reports()
        assert world.run(deploy, artifacts=reports.publish).error
        assert "host b (10.0.0.2): no SSH" in reports.only
        assert "On the hosts: nothing that serves was touched." in reports.only
        assert "`pd-deploy plan " in reports.only

    def test_where_nothing_serves_it_says_so(self, tmp_path: Path) -> None:
        world = World(tmp_path)
        world.cluster.faults["p1"] = Faults(dies=1)
        published: list[str] = []

        async def publish(*, key: str | None, **artifact: Any) -> None:
            published.append(f"{key}: {artifact.get('markdown', '')}")

        assert world.run(deploy, artifacts=publish).word == "NothingServes"
        (report,) = (text for text in published if text.startswith("qwq-3p1d-report"))
        assert "**Nothing serves:**" in report
        assert "The service was down for" not in report

    @pytest.mark.parametrize("text", ["a: b: c", "name: X\nnonsense: 1\n"])
    def test_a_bad_file_has_one_under_its_own_name(self, world: World, text: str) -> None:
        world.path = world.path.rename(world.path.with_name("Another_file.yaml"))
        world.path.write_text(text)
        reports = Reports()
        assert world.run(deploy, artifacts=reports.publish).error
        assert reports.keys == ["another-file-report"]
        assert "`pd-deploy check " in reports.only

    def test_a_fault_of_ours_has_one_too(
        self, world: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("pd_deploy.flows.deploy.locked_session", lambda *_, **__: 1 / 0)
        reports = Reports()
        assert isinstance(world.run(deploy, artifacts=reports.publish).error, ZeroDivisionError)
        assert "**Failed:**\n\n```\ndivision by zero\n```" in reports.only
