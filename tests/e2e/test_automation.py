"""What an operator need not do: automations of demo/prefect.yaml put things right after an
interrupted run, and a dead worker or server leaves nothing that the next run does not mend."""

import asyncio
import os
import re
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from uuid import UUID

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import DeploymentUpdate
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterId,
)
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.schedules import IntervalSchedule

from bench.lab_service import INSTANCES
from demo.services import DEPLOY_LAB
from pd_deploy.flows.deploy import deploy
from tests.e2e.conftest import BIN, ROOT, Service, local_server_of, long, until

CHANGED = {"all": {"environment": {"EXAMPLE": "1"}}}
NAME = "lab-qwq-3p1d"
HEALTH = f"pd-health/{NAME}-health"
EVERY = timedelta(seconds=15)  # a check's process is started up to 10 s ahead


@pytest.fixture
async def automated(service: Service, worker: None) -> AsyncIterator[Service]:
    """The service as the deployments of demo/prefect.yaml know it; it takes long to load."""
    before = {}
    async with get_client() as client:
        for deployment in (f"pd-deploy/{NAME}", f"pd-recover/{NAME}-recover", HEALTH):
            found = await client.read_deployment_by_name(deployment)
            before[found.id] = found.parameters
            await client.update_deployment(found.id, _update(service.file))
        yield service
        for identity, parameters in before.items():
            await client.update_deployment(identity, _update(str(parameters["file"])))


@pytest.mark.minutes
@pytest.mark.parametrize("way", [pytest.param("cancelled", marks=long), "killed"])
async def test_interrupted_upgrade_is_recovered_by_itself(
    automated: Service, prefect: Callable[..., str], prefect_env: dict[str, str], way: str
) -> None:
    """The generation before serves again, though nobody asked for it: a run that is asked to end
    goes back by itself, as it says, and leaves nothing for its recovery to do."""
    await deploy(automated.file)
    automated.change(settings=CHANGED, gates={"ready": 300})
    automated.faults("p1", load_seconds=300)
    earlier = {run.id for run in await runs_of("pd-recover")}
    run = start(prefect)
    await asyncio.to_thread(until, lambda: epoch(automated, "p1") == "2", 60)
    if way == "cancelled":
        earlier.add(await cancel_a_queued_run(prefect, prefect_env, behind=run))
    automated.faults("p1")
    # Prefect's cancel sends the same, and kills the process if it takes longer than 30 s.
    os.kill(process_of(run), signal.SIGTERM if way == "cancelled" else signal.SIGKILL)
    recovered = await ended("pd-recover", earlier)
    assert recovered.state
    assert recovered.state.is_completed(), recovered.state.message
    assert {epoch(automated, name) for name in INSTANCES} == {"1"}
    assert automated.completes()
    if way == "killed":
        assert "| under way |" in await report_of(run)
        await a_rebooted_host_serves_again(automated)
    if way == "cancelled":
        async with get_client() as client:
            cancelled = (await client.read_flow_run(run)).state
        assert cancelled
        assert cancelled.is_cancelled()
        assert "The service is back on generation 1-" in str(cancelled.message)
        assert "nothing changed" in str(recovered.state.message)
        outcomes = automated.record()["outcomes"].items()
        ends = {name.partition("-")[0]: outcome["result"] for name, outcome in outcomes}
        assert ends == {"1": "good", "2": "interrupted"}


async def report_of(run: UUID) -> str:
    """The report on a run's page."""
    chosen = FlowRunFilter(id=FlowRunFilterId(any_=[run]))
    async with get_client() as client:
        (report,) = await client.read_artifacts(flow_run_filter=chosen)
    return str(report.data)


async def a_rebooted_host_serves_again(service: Service) -> None:
    """By the schedule of health, once that is turned on; told once, and mended as one set."""
    before = started(service)
    async with get_client() as client:
        health = await client.read_deployment_by_name(HEALTH)
        (schedule,) = health.schedules
        assert not schedule.active
        every = IntervalSchedule(interval=EVERY, anchor_date=datetime(2026, 1, 1, tzinfo=UTC))
        host = service.lab.hosts["b"]
        host.reboot()
        turned = partial(client.update_deployment_schedule, health.id, schedule.id)
        try:
            await turned(active=True, schedule=every)
            mended = await ended("pd-health", set(), "Mended")
        finally:
            await turned(active=False, schedule=schedule.schedule)
    assert "d0 on b" in str(mended.state and mended.state.message)
    assert service.completes()
    after = started(service)
    assert before.keys() == after.keys() == INSTANCES
    assert not [name for name in INSTANCES if before[name] == after[name]]
    assert len(service.record()["mending"]["attempts"]) == 1


def started(service: Service) -> dict[str, str]:
    """When each instance that runs was started."""
    running = service.containers(running=True).items()
    return {name: container["State"]["StartedAt"] for name, container in running}


async def cancel_a_queued_run(
    prefect: Callable[..., str], prefect_env: dict[str, str], *, behind: UUID
) -> UUID:
    """Its follower is told what it waits for, and its recovery, whose id is returned, sees that it
    never started."""
    earlier = {run.id for run in await runs_of("pd-recover")}
    queued = start(prefect)
    follow = [f"{BIN}/pd-deploy", "follow", str(queued)]
    follower = await asyncio.create_subprocess_exec(
        *follow, env=prefect_env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert follower.stdout
    told = (await asyncio.wait_for(follower.stdout.readline(), 60)).decode()
    async with get_client() as client:
        ahead = (await client.read_flow_run(behind)).state
    waits = re.search(rf"waits for run '.*' \({behind}\), Running, which works on", told)
    assert waits, f"{told}; the run ahead: {ahead}"
    prefect("prefect", "flow-run", "cancel", str(queued))
    assert await follower.wait() == 1
    recovery = await ended("pd-recover", earlier)
    assert recovery.state
    assert re.match("skipped, as run '.*' never started", str(recovery.state.message))
    return recovery.id


@long
async def test_upgrade_whose_machine_dies_is_recovered_by_another_worker(
    automated: Service, prefect: Callable[..., str], prefect_env: dict[str, str]
) -> None:
    """The dead run does not stay Running, and the one that waits for its place gets it."""
    prefect("prefect", "work-pool", "create", "own-pool", "--type", "process", "--overwrite")
    async with get_client() as client:
        known = await client.read_deployment_by_name(f"pd-deploy/{NAME}")
        await client.update_deployment(known.id, DeploymentUpdate(work_pool_name="own-pool"))
    await deploy(automated.file)
    automated.change(settings=CHANGED)
    automated.faults("p1", load_seconds=60)
    earlier = {run.id for run in await runs_of("pd-recover")}
    first, second = worker_on("own-pool", prefect_env), None
    try:
        run = start(prefect)
        await asyncio.to_thread(until, lambda: epoch(automated, "p1") == "2", 60)
        waiting = start(prefect)
        first.kill()
        os.kill(process_of(run), signal.SIGKILL)
        killed = time.monotonic()
        automated.faults("p1")
        second = worker_on("own-pool", prefect_env)
        recovered = await ended("pd-recover", earlier)
        print(f"recovered {time.monotonic() - killed:.0f} s after the kill")
        assert recovered.state
        assert recovered.state.is_completed(), recovered.state.message
        async with get_client() as client:
            dead = await client.read_flow_run(run)
        assert dead.state
        assert dead.state.is_crashed()
        assert "took the lease over" in str(dead.state.message)
        assert "Completed: Generation 2-" in prefect("pd-deploy", "follow", str(waiting))
        assert {epoch(automated, name) for name in INSTANCES} == {"2"}
        assert automated.completes()
    finally:
        for worker in filter(None, (first, second)):
            worker.kill()
            worker.wait()
        prefect("prefect", *DEPLOY_LAB)


@long
@pytest.mark.usefixtures("worker")
async def test_killed_worker_does_not_interrupt_its_run(
    service: Service, prefect: Callable[..., str], prefect_env: dict[str, str], tmp_path: Path
) -> None:
    """The run is a process of its own: it ends well, and gives its leases back."""
    prefect("prefect", "work-pool", "create", "own-pool", "--type", "process", "--overwrite")
    one = ("--prefect-file", "demo/prefect.yaml", "-n", NAME, "--pool", "own-pool")
    prefect("prefect", "--no-prompt", "deploy", *one)
    worker = worker_on("own-pool", prefect_env)
    try:
        service.faults("p1", load_seconds=8)
        run = start(prefect, f"file={service.file}")
        await asyncio.to_thread(until, lambda: epoch(service, "p1") == "1", 60)
        worker.kill()
        worker.wait()
        assert "Completed: Generation 1-" in prefect("pd-deploy", "follow", str(run))
    finally:
        worker.kill()
        prefect("prefect", *DEPLOY_LAB)
    state = await deploy(service.file, return_state=True)
    assert "nothing changed" in str(state.message)


@long
async def test_killed_server_leaves_nothing_that_the_next_run_does_not_mend(
    service: Service, without_a_server: dict[str, str]
) -> None:
    """The server that `pd-deploy deploy` started is killed while the servers load."""
    service.change(ssh={"credentials": None, "user": "root"}, gates={"lease_lasts": 3})
    await deploy_by_command(service, without_a_server)
    service.change(settings=CHANGED)
    service.faults("p1", load_seconds=10)
    running = asyncio.ensure_future(deploy_by_command(service, without_a_server))
    await asyncio.to_thread(until, lambda: epoch(service, "p1") == "2", 120)
    os.kill(local_server_of(without_a_server).pid, signal.SIGKILL)
    service.faults("p1")
    await running
    await deploy_by_command(service, without_a_server)
    assert {epoch(service, name) for name in INSTANCES} == {"2"}
    assert service.completes()


def worker_on(pool: str, env: dict[str, str]) -> subprocess.Popen[bytes]:
    """A worker of a test's own, which has to kill it."""
    return subprocess.Popen(
        [f"{BIN}/prefect", "worker", "start", "-p", pool],
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def start(prefect: Callable[..., str], *parameters: str) -> UUID:
    """Starts the deployment as a user does; the id of its run."""
    given = [word for one in parameters for word in ("--param", one)]
    output = prefect("prefect", "deployment", "run", f"pd-deploy/{NAME}", *given)
    found = re.search(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", output)
    assert found
    return UUID(found[0])


def epoch(service: Service, instance: str) -> str | None:
    """Of an instance's running container."""
    running = service.containers(running=True)
    found = running.get(instance)
    return found["Config"]["Labels"]["pd-deploy.epoch"] if found else None


async def runs_of(flow: str) -> list[FlowRun]:
    """All runs of a flow."""
    async with get_client() as client:
        chosen = FlowFilter(name=FlowFilterName(any_=[flow]))
        return await client.read_flow_runs(flow_filter=chosen)


async def ended(flow: str, earlier: set[UUID], name: str | None = None) -> FlowRun:
    """The run of a flow that there was not before, once it has ended, in a state of that name if
    one is given."""
    for _ in range(240):
        for run in await runs_of(flow):
            over = run.id not in earlier and run.state and run.state.is_final()
            if over and run.state and name in (None, run.state.name):
                return run
        await asyncio.sleep(0.5)
    raise AssertionError(f"no further run of {flow} has ended")


def process_of(run: UUID) -> int:
    """The process in which a worker runs a flow run."""
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            environment = (directory / "environ").read_bytes()
        except OSError:
            continue
        if f"PREFECT__FLOW_RUN_ID={run}".encode() in environment:
            return int(directory.name)
    raise AssertionError(f"no process of {run}")


async def deploy_by_command(service: Service, env: dict[str, str]) -> int | None:
    """`pd-deploy deploy` without a Prefect server of its own set up; its exit code."""
    process = await asyncio.create_subprocess_exec(
        f"{BIN}/pd-deploy", "deploy", service.file, env=env, cwd=ROOT,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    return await process.wait()


def _update(file: str) -> DeploymentUpdate:
    return DeploymentUpdate(parameters={"file": file})
