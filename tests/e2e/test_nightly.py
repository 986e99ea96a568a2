"""`image: newest`: the service follows new builds, and no bad one takes it down twice."""

import asyncio
import datetime
import itertools
import time
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId
from prefect.client.schemas.objects import State
from prefect.client.schemas.schedules import IntervalSchedule

from pd_deploy.flows.deploy import deploy
from tests.e2e.conftest import INSTANCES, Service


async def nightly(service: Service, **parameters: object) -> State[None]:
    """What the schedule runs; its final state."""
    return await deploy(service.file, image="newest", return_state=True, **parameters)  # type: ignore[call-overload]


DAYS = itertools.count(1)


def images(service: Service) -> set[str]:
    """Tags of the running containers' images."""
    running = service.containers(running=True)
    assert set(running) == INSTANCES
    return {c["Config"]["Labels"]["pd-deploy.image"].rpartition(":")[2] for c in running.values()}


@pytest.fixture
def fresh(service: Service) -> Service:
    """The service, with tags of the test's own, newer than those of the tests before."""
    service.day += datetime.timedelta(days=next(DAYS))
    return service


async def test_the_newest_build_is_taken_by_number_not_by_text(fresh: Service) -> None:
    """And the next night there is nothing to do, within seconds."""
    for tag in (fresh.tag(9), fresh.tag(26), fresh.tag("30_test"), "latest"):
        fresh.push(tag, {"/etc/example": tag})
    assert (await nightly(fresh)).is_completed()
    assert images(fresh) == {fresh.tag(26)}
    before, begin = fresh.states(), time.monotonic()
    state = await nightly(fresh)
    assert time.monotonic() - begin < 10
    assert str(state.message).startswith("Already on ")
    assert fresh.states() == before


async def test_pushed_again_is_a_change_and_the_same_digest_is_none(fresh: Service) -> None:
    """What counts is the digest behind the tag."""
    fresh.push(fresh.tag(1), {"/etc/example": "one"})
    await nightly(fresh)
    fresh.push(fresh.tag(1), {"/etc/example": "two"})
    state = await nightly(fresh)
    assert "changed by" in str(state.message)
    before = fresh.states()
    fresh.push(fresh.tag(1), {"/etc/example": "two"})
    assert str((await nightly(fresh)).message).startswith("Already on ")
    assert fresh.states() == before


@pytest.mark.parametrize("faults", [{"crash_after": 0.3}, {"hang": True}, {"garbage": True}])
async def test_bad_build_is_rolled_back_and_not_taken_again(
    fresh: Service, faults: dict[str, Any]
) -> None:
    """Until there is a newer one. A run by hand stays on the promoted one, too."""
    fresh.change(gates={"ready": 8})
    fresh.push(fresh.tag(1), {"/etc/example": "good"})
    await nightly(fresh)
    fresh.push_bad(fresh.tag(2), **faults)
    state = await nightly(fresh)
    assert state.is_failed()
    assert "The service is back on generation" in str(state.message)
    assert images(fresh) == {fresh.tag(1)}
    before = fresh.states()
    assert str((await nightly(fresh)).message).startswith("Already on ")
    assert "nothing changed" in str((await deploy(fresh.file, return_state=True)).message)
    assert fresh.states() == before
    fresh.push(fresh.tag(3), {"/etc/example": "better"})
    assert (await nightly(fresh)).is_completed()
    assert images(fresh) == {fresh.tag(3)}


async def test_faults_of_hosts_and_registry_change_nothing_and_blame_no_image(
    fresh: Service,
) -> None:
    """Registry down, one host's pull fails, no such build, wrong credentials."""
    fresh.push(fresh.tag(1), {"/etc/example": "good"})
    await nightly(fresh)
    before = fresh.states()
    fresh.stop_registry()
    try:
        state = await nightly(fresh)
        assert state.is_failed()
        assert fresh.lab.registry.partition(":")[0] in str(state.message)
    finally:
        fresh.start_registry()
    assert fresh.states() == before

    fresh.push(fresh.tag(2), {"/etc/example": "next"})
    fresh.refuse_registry("b")
    try:
        state = await nightly(fresh)
        assert state.is_failed()
        assert f"host b ({fresh.lab.hosts['b'].address})" in str(state.message)
    finally:
        fresh.allow_registry("b")
    assert fresh.states() == before
    assert fresh.record()["quarantine"] == {}

    fresh.change(update={"family": "branch-daily", "branch": "master"})
    state = await nightly(fresh)
    assert "expected a build of family" in str(state.message)
    assert fresh.states() == before
    fresh.change(update=None)
    assert (await nightly(fresh)).is_completed()
    assert images(fresh) == {fresh.tag(2)}


async def test_changed_file_blames_no_image(fresh: Service) -> None:
    """The image served before: the fault is elsewhere."""
    fresh.push(fresh.tag(1), {"/etc/example": "good"})
    await nightly(fresh)
    fresh.change(settings={"all": {"arguments": {"no-such-flag": "1"}}})
    state = await nightly(fresh)
    assert "The service is back on generation" in str(state.message)
    assert fresh.record()["quarantine"] == {}


async def test_scheduled_runs_may_not_keep_a_failed_generation(
    fresh: Service, worker: None, prefect: Any
) -> None:
    """Nobody would look at it, and nobody would be served."""
    async with get_client() as client:
        deployment = await client.read_deployment_by_name("pd-deploy/lab-qwq-3p1d")
        soon = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=10)
        schedule = DeploymentScheduleCreate(
            schedule=IntervalSchedule(interval=datetime.timedelta(days=30), anchor_date=soon),
            active=True,
            parameters={"file": fresh.file, "image": "newest", "on_failure": "keep"},
        )
        made = await client.create_deployment_schedules(deployment.id, [schedule])
        chosen = DeploymentFilter(id=DeploymentFilterId(any_=[deployment.id]))
        try:
            for _ in range(120):
                runs = await client.read_flow_runs(deployment_filter=chosen)
                if scheduled := [run for run in runs if run.auto_scheduled]:
                    break
                await asyncio.sleep(0.5)
            first = min(scheduled, key=lambda run: run.expected_start_time)
            message = prefect("pd-deploy", "follow", str(first.id), status=1)
        finally:
            await client.delete_deployment_schedule(deployment.id, made[0].id)
    assert "expected `rollback` for a scheduled run" in message
