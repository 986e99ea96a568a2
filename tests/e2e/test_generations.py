"""Upgrades, and what comes back when they fail."""

import asyncio
import json
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from prefect.client.schemas.objects import State

from bench.client import Client
from bench.lab_service import INSTANCES
from pd_deploy.blocks.opening import open_session
from pd_deploy.cli import adopt, execute
from pd_deploy.config.load import load_deployment
from pd_deploy.config.models import Deployment
from pd_deploy.flows.deploy import deploy
from pd_deploy.flows.prune import prune
from pd_deploy.flows.recover import recover
from pd_deploy.flows.rollback import rollback
from pd_deploy.flows.teardown import teardown
from pd_deploy.lab import contracts
from pd_deploy.records.status import Verdict
from pd_deploy.steps.verify import looking
from pd_deploy.steps.verify.looking import HEALTHY, Look
from tests.e2e.conftest import BIN, SECRET, Service, long, until
from tests.e2e.patient_clients import REFUSED, PatientClients
from tests.playbook import Playbook

# By a tolerance that a busy machine does not exceed.
LOAD = {"requests": 20, "concurrency": 10, "input_length": 300, "output_length": 8, "tolerance": 5}
CHANGED = {"all": {"environment": {"EXAMPLE": "1"}}}
WATCHING = "Ctrl-C ends that"


async def run(flow: Any, service: Service, **parameters: object) -> State[None]:
    """A run in this process; its final state."""
    return await flow(service.file, return_state=True, **parameters)


def epochs(service: Service) -> dict[str, str]:
    """Epoch of each running container."""
    return {
        name: c["Config"]["Labels"]["pd-deploy.epoch"]
        for name, c in service.containers(running=True).items()
    }


def all_on(epoch: int) -> dict[str, str]:
    return dict.fromkeys(INSTANCES, str(epoch))


PLUGIN = """\
REVISION = "mine"


def register():
    from omni.accelerators.pd import register as register_connectors

    register_connectors()
"""


async def take_over(service: Service) -> None:
    """Adopt what the playbook has started, and look into it: a server that dies there is noticed,
    though its container runs on."""
    deployment = load_deployment(service.path)
    said = await adopt.adopted(deployment, service.path, {}, yes=False)
    assert "differs  gpu_memory_utilization 0.88 → 0.65" in said
    taken = await adopt.adopted(deployment, service.path, {}, yes=True)
    assert "generation 0 (adopted) is 5 containers, port 7000" in taken
    assert SECRET not in f"{said}{taken}"
    look = await looked_at(deployment)
    assert look.status.verdict == Verdict.SERVING
    assert {i.name: (i.container, i.health) for i in look.instances} == dict.fromkeys(
        INSTANCES, ("running", HEALTHY)
    )
    await execute.executed(deployment, "p1", ["sh", "-c", "kill -9 -1"], lambda *_: None)
    look = await looked_at(deployment)
    (p1,) = (i for i in look.instances if i.health != HEALTHY)
    assert (p1.name, p1.container) == ("p1", "running")
    assert look.status.verdict == Verdict.DEGRADED


async def looked_at(deployment: Deployment) -> Look:
    """What `pd-deploy status` sees."""
    async with open_session(deployment) as session:
        return await looking.look(session)


def own_code(tree: Path) -> Path:
    """Check out the sources of the image, with a change."""
    for path, content in contracts.sources(contracts.OLDEST).items():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_bytes(content.encode() if isinstance(content, str) else content or b"")
    (tree / "omni/__init__.py").write_text(PLUGIN)
    return tree


@contextmanager
def watched(service: Service) -> Iterator[Path]:
    """`pd-deploy deploy --watch`, and what it prints; ended by Ctrl-C while it waits."""
    output = service.path.with_suffix(".log")
    command = [f"{BIN}/pd-deploy", "deploy", service.file, "--watch"]
    with output.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    try:
        yield output
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0, output.read_text()
    finally:
        process.kill()
        process.wait()


def revisions(service: Service) -> set[str]:
    """What the servers say of their code."""
    a, b = (service.lab.hosts[name].address for name in "ab")
    servers = (f"{a}:9000", f"{a}:9001", f"{b}:9002", f"{b}:9100")
    answers = [httpx.get(f"http://{server}/version", trust_env=False) for server in servers]
    return {answer.headers["X-Omni-Revision"] for answer in answers}


class TestUpgrade:
    async def test_everything_is_made_while_the_old_generation_serves(
        self, service: Service
    ) -> None:
        """Pull, containers, files and the prepared proxy: the old one stops after them. Requests
        are held meanwhile: clients that try again lose none, and find nobody's port closed."""
        service.change(proxy={"c0": {"host": "a", "port": 7000, "hold": 50, "drain": 20}})
        await deploy(service.file)
        old = service.containers(running=True)
        image = service.push("20250723_1", {"/etc/example": "new"})
        with PatientClients(service.url) as clients:
            state = await run(deploy, service, image=image)
        assert state.is_completed(), state.message
        assert {kind: kept.lost for kind, kept in clients.kept.items()} == {
            "keep-alive": [], "new connections": [], "streams": [],
        }  # fmt: skip
        assert sum(kept.refused for kept in clients.kept.values()) == 0
        assert 503 in clients.health
        assert REFUSED not in clients.health
        assert re.search(r"held \d requests? for up to \d+\.\d s", str(state.message))
        assert epochs(service) == all_on(2)
        stopped = service.finished(old["c0"]["Id"])
        for container in service.containers().values():
            assert container["Created"] < stopped
        assert service.containers()["c0"]["State"]["StartedAt"] < stopped
        for name in ("p0", "p1", "p2", "d0"):
            started = service.containers()[name]["State"]["StartedAt"]
            assert all(service.finished(c["Id"]) < started for c in old.values())
        assert re.search(r"down for \d+\.\d s", str(state.message))

    async def test_change_of_the_proxy_alone_restarts_only_the_proxy(
        self, service: Service
    ) -> None:
        """The servers stay as they are, under the generation that started them."""
        await deploy(service.file)
        before = service.states()
        service.change(proxy={"c0": {"host": "a", "port": 7000, "core_num": 2}})
        state = await run(deploy, service)
        assert state.is_completed(), state.message
        after = service.states()
        assert {n: s for n, s in after.items() if n != "c0"} == {
            n: s for n, s in before.items() if n != "c0"
        }
        assert epochs(service) == all_on(1) | {"c0": "2"}
        again = await run(deploy, service)
        assert "nothing to do, nothing changed" in str(again.message)
        assert service.states() == after
        back = await run(rollback, service)
        assert back.is_completed(), back.message
        assert epochs(service) == all_on(1)

    async def test_request_in_flight_is_answered_before_the_old_proxy_stops(
        self, service: Service
    ) -> None:
        """The upgrade waits for it; its client notices nothing."""
        await deploy(service.file)
        old = service.containers()["c0"]["Id"]
        service.change(settings=CHANGED)
        service.faults("d0", token_seconds=0.4)
        body = {"model": "qwen", "max_tokens": 12, "prompt": "a long story"}
        async with httpx.AsyncClient(timeout=60, trust_env=False) as client:
            asking = asyncio.ensure_future(client.post(f"{service.url}/v1/completions", json=body))
            upgrading = asyncio.ensure_future(run(deploy, service))
            answer = await asking
            answered = datetime.now(UTC)
            service.faults("d0")
        assert answer.status_code == 200
        assert answer.json()["usage"]["completion_tokens"] == 12
        state = await upgrading
        assert state.is_completed(), state.message
        stopped = datetime.fromisoformat(service.finished(old))
        assert -1 < (stopped - answered).total_seconds() < 9  # of 10 that the proxy may take

    @long
    async def test_requests_that_the_stop_cuts_are_counted(self, service: Service) -> None:
        """Those that take longer than the proxy may."""
        service.change(container={"stop_timeout": 3})
        await deploy(service.file)
        service.change(settings=CHANGED)
        service.faults("d0", token_seconds=1)
        body = {"model": "qwen", "max_tokens": 60, "prompt": "a long story"}
        async with httpx.AsyncClient(timeout=60, trust_env=False) as client:
            url = f"{service.url}/v1/completions"
            asking = [asyncio.ensure_future(client.post(url, json=body)) for _ in range(3)]
            host, under_way = service.lab.hosts["a"], ["ss", "-Htn", "sport = :7000"]
            await asyncio.to_thread(until, lambda: host.run(under_way).stdout.count("ESTAB") == 3)
            upgrading = asyncio.ensure_future(run(deploy, service))
            answers = await asyncio.gather(*asking, return_exceptions=True)
            service.faults("d0")
        assert all(isinstance(answer, httpx.TransportError) for answer in answers)
        assert "cut 3 requests that were not answered within 3 s" in str((await upgrading).message)

    @long
    async def test_promoted_image_stays_until_the_files_own_changes(self, service: Service) -> None:
        """A run without an image never undoes one with."""
        service.push("20250723_2", {"/etc/example": "newer"})
        await deploy(service.file)
        newer = service.image("20250723_2")
        await deploy(service.file, image=newer)
        before = service.states()
        state = await run(deploy, service)
        assert "nothing to do, nothing changed" in str(state.message)
        assert service.states() == before
        service.change(image=service.image("20250723_3"))
        service.push("20250723_3", {"/etc/example": "newest"})
        assert (await run(deploy, service)).is_completed()
        images = {
            c["Config"]["Labels"]["pd-deploy.image"]
            for c in service.containers(running=True).values()
        }
        assert images == {service.image("20250723_3", here=True)}

    async def test_device_held_by_somebody_else_is_found_before_anything_stops(
        self, service: Service
    ) -> None:
        """By whom, too."""
        service.change(prefill={"p1": None, "p0": {"host": "a", "devices": "0-7"},
                                "p2": {"host": "b", "devices": "0-7"}})  # fmt: skip
        await deploy(service.file)
        before = service.states()
        service.change(prefill={"p1": {"host": "a", "devices": "8-15"},
                                "p0": {"host": "a", "devices": "0-7"},
                                "p2": {"host": "b", "devices": "0-7"}})  # fmt: skip
        holder = service.hold_device("a", 9)
        try:
            state = await run(deploy, service)
        finally:
            holder.terminate()
            holder.wait()
        assert "expected device 9 to be free for p1" in str(state.message)
        assert service.states() == before

    async def test_full_disk_is_found_before_anything_stops(self, service: Service) -> None:
        """For the image and for logs, with how much is there."""
        await deploy(service.file)
        before = service.states()
        service.change(disk={"logs": "900000g"}, settings=CHANGED)
        state = await run(deploy, service)
        assert "GiB free for logs at /data/log_path, found" in str(state.message)
        assert service.states() == before


class TestRollback:
    @pytest.mark.parametrize(
        ("faults", "step"),
        [
            pytest.param({"crash_after": 0.3}, "ready ", marks=long),
            pytest.param({"hang": True}, "ready ", marks=long),
            pytest.param({"garbage": True}, "smoke test", marks=long),
        ],
    )
    async def test_failed_generation_gives_way_to_the_one_before(
        self, service: Service, faults: dict[str, object], step: str
    ) -> None:
        """The same containers as before serve again, and the message says all of it."""
        if "hang" in faults:
            service.change(gates={"ready": 12})
        await deploy(service.file)
        old = {name: c["Id"] for name, c in service.containers(running=True).items()}
        image = service.push_bad("20250724_1", **faults)
        state = await run(deploy, service, image=image)
        message = str(state.message)
        assert state.is_failed()
        assert re.search(rf"new generation 2-\w+ failed at `{step}.*` because ", message)
        assert re.search(r"The service is back on generation 1-\w+, down for \d+\.\d s", message)
        assert "is in quarantine" in message
        assert {n: c["Id"] for n, c in service.containers(running=True).items()} == old
        assert service.completes()

    @long
    async def test_pruned_containers_are_recreated_from_the_saved_spec(
        self, service: Service
    ) -> None:
        """Files and image too."""
        await deploy(service.file)
        old = service.specs()
        files = service.files()
        image = service.push("20250724_2", {"/etc/example": "x"})
        await deploy(service.file, image=image)
        for host in service.lab.hosts.values():
            host.run(["docker", "container", "prune", "-f"])
            host.run(["docker", "image", "prune", "-af"])
            host.run(["sh", "-c", "rm -rf /var/lib/pd-deploy/*/1-*/p? /var/lib/pd-deploy/*/1-*/d0"])
        state = await run(rollback, service)
        assert state.is_completed(), state.message
        assert epochs(service) == all_on(1)
        assert service.specs() == old
        assert files.items() <= service.files().items()

    @long
    async def test_failing_rollback_is_said_plainly(self, service: Service) -> None:
        """With the state of every host."""
        await deploy(service.file)
        image = service.push("20250724_3", {"/etc/example": "y"})
        service.faults("p2", crash_after=0.3)
        state = await run(deploy, service, image=image)
        message = str(state.message)
        assert "does not come back either" in message
        assert "Nothing serves." in message
        assert all(f"host {h.name} ({h.address}): " in message for h in service.lab.hosts.values())
        service.faults("p2")
        failed, state = state.timestamp, await run(recover, service)
        assert state.is_completed()
        assert epochs(service) == all_on(1)
        down = re.search(r"down for ([\d.]+) s", str(state.message))
        assert down, "the time before the recovery counts too"
        assert float(down[1]) > (state.timestamp - failed).total_seconds()

    @long
    async def test_failed_generation_is_kept_on_request(self, service: Service) -> None:
        """What lives of it goes on living; the next run puts things right. A build that is only
        slower is rolled back as well, by the figures of the one that serves."""
        service.change(gates={"benchmark": LOAD})
        first = await run(deploy, service)
        assert "nothing to compare with" in str(first.message)
        image = service.push_bad("20250724_4", garbage=True)
        state = await run(deploy, service, image=image, on_failure="keep")
        assert state.is_failed()
        assert epochs(service) == all_on(2)
        assert (await run(recover, service)).is_completed()
        assert epochs(service) == all_on(1)
        slow = service.push_bad("20250724_5", token_seconds=0.15)
        message = str((await run(deploy, service, image=slow)).message)
        kept = service.record()["figures"]
        assert [(f["generation"][:1], f["passed"]) for f in kept] == [("1", True), ("3", False)]
        assert {(f["load"]["generator"], f["version"]) for f in kept} == {
            ("vllm bench", "0.9.0+empty")
        }
        assert kept[1]["tpot"] > 0.14 > kept[0]["tpot"]
        assert "failed at `benchmark` because" in message
        assert re.search(r"TPOT is \d{3} ms instead of [\d.e-]+ ms with generation 1-", message)
        assert re.search(r"down for [\d.]+ s, .*, [\d.]+ s of it for the benchmark", message)
        assert f"its image {slow} is in quarantine" in message
        assert epochs(service) == all_on(1)

    async def test_rollback_to_a_generation_by_name_and_its_refusals(
        self, service: Service
    ) -> None:
        """Any kept one; one that is not kept is refused with those that are. Each generation runs
        the source code that it was deployed with, which is the user's own."""
        tree = own_code(service.path.parent / "omniinfer")
        # Installed in each container; after that, mounted.
        service.change(code={"source": "omniinfer", "install": "pip"}, allow=["code-commit"])
        state = await run(deploy, service)
        assert state.is_completed(), state.message
        first = service.record()["serving"]
        assert revisions(service) == {"mine"}
        with watched(service) as output:
            until(lambda: output.read_text().count(WATCHING) == 1, 60)
            assert service.record()["serving"] == first
            # Mounted from now on.
            service.change(code={"source": "omniinfer"})
            (tree / "omni/__init__.py").write_text(PLUGIN.replace("mine", "changed"))
            until(lambda: output.read_text().count(WATCHING) > 1, 120)
        assert revisions(service) == {"changed"}, output.read_text()
        state = await run(rollback, service, generation="9-00000000")
        assert "expected 9-00000000 among the kept generations" in str(state.message)
        assert first in str(state.message)
        state = await run(rollback, service, generation=first)
        assert state.is_completed(), state.message
        assert service.record()["serving"] == first
        assert epochs(service) == all_on(1)
        assert revisions(service) == {"mine"}


class TestPruning:
    @long
    async def test_the_last_good_ones_stay_and_the_rest_goes(
        self, service: Service, playbook: Playbook
    ) -> None:
        """Containers, files, logs and names of images; the youngest stays whatever became of it,
        and what was adopted until that is asked for."""
        await take_over(service)
        service.change(keep=2)
        for number in range(1, 6):
            service.change(settings={"all": {"environment": {"EXAMPLE": str(number)}}})
            await deploy(service.file)
        *kept, of_adopted = service.generations()
        assert [name.partition("-")[0] for name in kept] == ["3", "4", "5"]
        assert of_adopted == "adopted"
        for host in service.lab.hosts.values():
            tags = host.run(["docker", "images", "--format", "{{.Repository}}:{{.Tag}}"]).stdout
            ours = [tag.rpartition(":")[2] for tag in tags.split() if tag.startswith("pd-deploy/")]
            assert sorted(ours) == kept
            logs = host.run(["ls", "/data/log_path/qwq-3p1d"]).stdout.split()
            assert sorted(logs) == kept
        state = await run(prune, service)
        assert "nothing to remove" in str(state.message)
        serving = service.states()
        assert set(playbook.states().values()) == {"exited"}
        state = await run(prune, service, adopted=True)
        assert state.is_completed(), state.message
        assert set(playbook.states().values()) == {"gone"}
        for host in service.lab.hosts.values():
            assert host.run(["ls", "/var/lib/pd-deploy/qwq-3p1d/adopted"], check=False).returncode
        assert service.states() == serving

    @long
    async def test_a_host_that_left_the_file_is_cleaned(self, service: Service) -> None:
        """And used again when a generation that ran there comes back."""
        await deploy(service.file)
        service.change(hosts={"a": service.lab.hosts["a"].address, "b": None},
                       prefill={"p0": {"host": "a", "devices": "0-3"},
                                "p1": {"host": "a", "devices": "4-7"}, "p2": None},
                       decode={"d0": {"host": "a", "devices": "8-11"}})  # fmt: skip
        state = await run(deploy, service)
        assert state.is_completed(), state.message
        b = service.lab.hosts["b"]
        assert b.run(["docker", "ps", "-aq"]).stdout == ""
        assert b.run(["ls", "/var/lib/pd-deploy"], check=False).stdout == ""
        assert b.run(["ls", "/data/log_path"], check=False).stdout == ""
        state = await run(rollback, service)
        assert state.is_completed(), state.message
        assert epochs(service) == all_on(1)

    @long
    async def test_a_host_that_left_the_file_and_is_dead_is_forgotten_only_on_request(
        self, service: Service
    ) -> None:
        """It might still run what must not: the error says how to go on without it."""
        await deploy(service.file)
        b = service.lab.hosts["b"]
        service.change(hosts={"a": service.lab.hosts["a"].address, "b": None}, gates={"connect": 1},
                       prefill={"p0": {"host": "a", "devices": "0-3"},
                                "p1": {"host": "a", "devices": "4-7"}, "p2": None},
                       decode={"d0": {"host": "a", "devices": "8-11"}})  # fmt: skip
        before = {n: s for n, s in service.states().items() if n in ("p0", "p1", "c0")}
        b.cut()
        try:
            state = await run(deploy, service)
            assert f"--forget {b.address}" in str(state.message)
            assert {n: s for n, s in service.states().items() if n in before} == before
            state = await run(deploy, service, forget=[b.address])
            assert state.is_completed(), state.message
        finally:
            b.mend()
        assert b.address not in service.record()["hosts"]

    async def test_teardown_removes_all_of_it_and_nothing_else(self, service: Service) -> None:
        """A foreign container and foreign files stay."""
        await deploy(service.file)
        service.change(settings=CHANGED)
        await deploy(service.file)
        a = service.lab.hosts["a"]
        image = service.containers()["c0"]["Config"]["Image"]
        a.run(["docker", "create", "--name", "foreign", image, "true"])
        a.run(["mkdir", "-p", "/var/lib/pd-deploy/other", "/data/log_path/other"])
        try:
            state = await run(teardown, service, name="qwq-3p1d")
            assert state.is_completed(), state.message
            names = a.run(["docker", "ps", "-a", "--format", "{{.Names}}"]).stdout.split()
            assert names == ["foreign"]
            assert a.run(["ls", "/var/lib/pd-deploy", "/data/log_path"]).stdout.split() == [
                "/data/log_path:", "other", "/var/lib/pd-deploy:", "other"]  # fmt: skip
        finally:
            a.run(["docker", "rm", "foreign"])
        b = service.lab.hosts["b"]
        assert b.run(["docker", "ps", "-aq"]).stdout == ""
        assert image.partition("@")[2] not in b.run(["docker", "images", "--digests"]).stdout


class TestHistory:
    async def test_releases_and_logs_tell_what_became_of_each(
        self, service: Service, prefect: Callable[..., str], tmp_path: Any
    ) -> None:
        """Also of a failed one, after the rollback."""
        await deploy(service.file)
        image = service.push_bad("20250725_1", crash_after=0.3)
        assert (await run(deploy, service, image=image)).is_failed()
        shown = prefect("pd-deploy", "releases", service.file).splitlines()
        assert shown[0].split()[:3] == ["generation", "created", "image"]
        assert "failed, image quarantined" in shown[1]
        assert "20250725_1" in shown[1]
        below = [line for line in shown[2:] if line.startswith("  ")]
        assert any(line.startswith("  cause: ") and "ready " in line for line in below)
        _, serving = (line for line in shown if line.startswith(("1-", "2-")))
        assert "serving" in serving
        assert any(line.startswith("in quarantine: ") for line in shown)
        prefect("pd-deploy", "logs", service.file, "--to", str(tmp_path / "logs"))
        found = {str(p.relative_to(tmp_path / "logs")) for p in (tmp_path / "logs").rglob("*.log")}
        # Decode starts first, and its end may keep prefills from starting theirs.
        assert {"a/p1/docker.log", "b/d0/docker.log", "b/d0/server_0.log"} <= found
        written = [path.read_text() for path in (tmp_path / "logs").rglob("server_0.log")]
        assert any("Traceback" in text for text in written)


class TestOneAtATime:
    async def test_two_runs_never_interleave(self, service: Service) -> None:
        """The second waits, then finds nothing left to do."""
        service.faults("p0", load_seconds=3)
        states = await asyncio.gather(run(deploy, service), run(deploy, service))
        assert all(state.is_completed() for state in states), [s.message for s in states]
        messages = sorted("nothing changed" in str(state.message) for state in states)
        assert messages == [False, True]

    @long
    async def test_a_run_that_waits_too_long_says_for_whom(self, service: Service) -> None:
        """Name, age and machine; what runs is not touched."""
        service.change(gates={"lease": 1})
        service.faults("p0", load_seconds=6)
        first = asyncio.ensure_future(run(deploy, service))
        await asyncio.to_thread(until, lambda: "p0" in service.containers(running=True))
        second = await run(deploy, service)
        assert second.is_failed()
        assert re.search(
            r"run 'test-3p1d .*is working on qwq-3p1d \(renewed \d+ s ago", str(second.message)
        )
        assert (await first).is_completed()

    async def test_a_run_that_was_overtaken_changes_nothing_more(self, service: Service) -> None:
        """Its lease has another number: it ends, and says so."""
        service.faults("p0", load_seconds=5)
        running = asyncio.ensure_future(run(deploy, service))
        await asyncio.to_thread(until, lambda: "p0" in service.containers(running=True))
        for host in service.lab.hosts.values():
            script = "cd /var/lib/pd-deploy/qwq-3p1d && printf '99\\nother\\n{}\\n' >lease"
            host.run(["sh", "-c", script])
        state = await running
        assert state.is_failed()
        assert "expected this run's lease" in str(state.message)
        assert set(service.containers(running=True)) == INSTANCES

    @long
    async def test_overlapping_deployments_are_refused(self, service: Service) -> None:
        """Devices and ports of another deployment that runs here, by name."""
        await deploy(service.file)
        service.change(name="second")
        state = await run(deploy, service)
        message = str(state.message)
        assert state.is_failed()
        assert "of deployment qwq-3p1d uses them" in message
        assert "expected the devices 0, 1, 2, 3, 4, 5, 6, 7 to be this deployment's" in message
        assert len(service.containers(running=True)) == len(INSTANCES)


async def test_upgrade_is_measured_by_a_client_that_keeps_asking(service: Service) -> None:
    """The run's own figure is what the client saw, but for its pauses between requests."""
    await deploy(service.file)
    service.change(settings=CHANGED)
    with Client(service.url) as client:
        state = await run(deploy, service)
        assert await asyncio.to_thread(client.served_again)
    said = re.search(r"down for (\d+\.\d) s", str(state.message))
    assert said
    assert abs(float(said[1]) - client.gap) < 1.5 + client.gap / 5, json.dumps(client.gap)
