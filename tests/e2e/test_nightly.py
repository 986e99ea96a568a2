"""`image: newest`: the service follows new builds, and no bad one takes it down twice."""

import asyncio
import contextlib
import datetime
import itertools
import json
import re
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.client.base import PrefectHttpxSyncClient
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import DeploymentUpdate
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.schedules import IntervalSchedule

from bench.lab_service import INSTANCES, STATE
from demo.services import DEPLOY_LAB
from pd_deploy.flows.deploy import deploy
from tests import prefect_settings
from tests.e2e.browser import page
from tests.e2e.conftest import Service, long, until

NIGHTLY = "lab-qwq-3p1d-nightly"


async def nightly(service: Service, **parameters: object) -> State[None]:
    """What the schedule runs; its final state."""
    return await deploy(service.file, image="newest", return_state=True, **parameters)  # type: ignore[call-overload]


DAYS = itertools.count(1)
SOON = datetime.timedelta(minutes=1.5)


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


async def test_the_newest_build_is_taken_by_number_not_by_text(
    fresh: Service, prefect: Callable[..., str]
) -> None:
    """The next night a tag is of a form that nobody knows, which is told by an event, too."""
    for tag in (fresh.tag(9), fresh.tag(26), fresh.tag("30_test"), "latest"):
        fresh.push(tag, {"/etc/example": tag})
    assert (await nightly(fresh)).is_completed()
    assert images(fresh) == {fresh.tag(26)}
    before = fresh.states()
    unknown = f"v9_{fresh.day + datetime.timedelta(days=1):%Y%m%d}"
    fresh.push(unknown, {"/etc/example": fresh.tag(26)})
    state = await nightly(fresh)
    assert str(state.message).startswith("Not updated: ")
    assert f"`update` does not take: {unknown} (" in str(state.message)
    assert fresh.states() == before
    (event,) = await events("pd-deploy.newer-tags-not-taken")
    assert event["resource"]["prefect.resource.id"] == "pd-deploy.deployment.qwq-3p1d"
    assert event["payload"]["tags"] == [unknown]
    assert any(r["prefect.resource.role"] == "flow-run" for r in event["related"])
    listed = json.loads(prefect("pd-deploy", "tags", fresh.file, "--json"))
    assert listed["taken"]["image"].endswith(f"/daily_omniinfer:{fresh.tag(26)}")
    assert listed["newer_of_other_forms"] == [unknown]
    assert {"latest", unknown} <= set(listed["repositories"][0]["of_no_family"])


async def events(name: str) -> list[dict[str, Any]]:
    """What Prefect's server has of an event; it stores them a moment after they were sent."""
    body = {"filter": {"event": {"name": [name]}}}
    async with get_client() as client, asyncio.timeout(60):
        while True:
            answer = await client.request("POST", "/events/filter", json=body)
            if found := answer.json()["events"]:
                return list(found)
            await asyncio.sleep(0.2)


@long
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


@pytest.fixture
async def told(prefect: Callable[..., str]) -> AsyncIterator[list[dict[str, str]]]:
    """What a webhook is sent after `pd-deploy notify`."""
    received: list[dict[str, str]] = []

    class Webhook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Webhook)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    block = CustomWebhookNotificationBlock(
        name="test",
        url=f"http://127.0.0.1:{server.server_port}/",
        json_data={"title": "{{subject}}", "text": "{{body}}"},
    )
    await block.save("test-webhook", overwrite=True)
    made = await asyncio.to_thread(prefect, "pd-deploy", "notify", "custom-webhook/test-webhook")
    try:
        assert made.count("created: ") == len(made.splitlines()) > 4
        yield received
    finally:
        await asyncio.to_thread(prefect, "pd-deploy", "notify", "--stop")
        await asyncio.to_thread(server.shutdown)
        server.server_close()


@pytest.mark.parametrize(
    "faults",
    [
        pytest.param({"crash_after": 0.3}, marks=long),
        pytest.param({"hang": True}, marks=long),
        {"garbage": True},
    ],
)
async def test_bad_build_is_rolled_back_and_not_taken_again(
    fresh: Service, faults: dict[str, Any], told: list[dict[str, str]]
) -> None:
    """Until there is a newer one. A run by hand stays on the promoted one, too. Somebody is told
    of the rollback, and of nothing else."""
    if "hang" in faults:
        fresh.change(gates={"ready": 12})
    fresh.push(fresh.tag(1), {"/etc/example": "good"})
    await nightly(fresh)
    fresh.push_bad(fresh.tag(2), **faults)
    state = await nightly(fresh)
    assert state.is_failed()
    assert "The service is back on generation" in str(state.message)
    assert images(fresh) == {fresh.tag(1)}
    await asyncio.to_thread(until, lambda: told, 60)
    (message,) = told
    assert message["title"] == "qwq-3p1d: rolled back"
    assert re.fullmatch(
        r"qwq-3p1d: new generation 2-.*; the service is back on 1-.*", message["text"]
    )
    before = fresh.states()
    assert str((await nightly(fresh)).message).startswith("Already on ")
    assert "nothing changed" in str((await deploy(fresh.file, return_state=True)).message)
    assert fresh.states() == before
    fresh.push(fresh.tag(3), {"/etc/example": "better"})
    assert (await nightly(fresh)).is_completed()
    assert images(fresh) == {fresh.tag(3)}
    assert told == [message]


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


@long
async def test_changed_file_blames_no_image(fresh: Service) -> None:
    """The image served before: the fault is elsewhere."""
    fresh.push(fresh.tag(1), {"/etc/example": "good"})
    await nightly(fresh)
    fresh.change(settings={"all": {"arguments": {"no-such-flag": "1"}}})
    state = await nightly(fresh)
    assert "The service is back on generation" in str(state.message)
    assert fresh.record()["quarantine"] == {}


@pytest.fixture
async def scheduled(fresh: Service, worker: None) -> AsyncIterator[DeploymentResponse]:
    """The service's nightly as demo/prefect.yaml has it, but for the file; off before and after."""
    async with get_client() as client:
        known = await client.read_deployment_by_name(f"pd-deploy/{NIGHTLY}")
        parameters = {**known.parameters, "file": fresh.file}
        await client.update_deployment(known.id, DeploymentUpdate(parameters=parameters))
        try:
            yield known
        finally:
            (schedule,) = known.schedules
            again = {"schedule": schedule.schedule, "active": False}
            await client.update_deployment_schedule(known.id, schedule.id, **again)
            await client.update_deployment(known.id, DeploymentUpdate(parameters=known.parameters))


@pytest.fixture
def switch(
    scheduled: DeploymentResponse, prefect: Any, tmp_path: Path
) -> Iterator[dict[str, Callable[[bool], object]]]:
    """The ways by which a user turns the nightly on and off."""
    (schedule,) = scheduled.schedules
    server = prefect_settings.API.removesuffix("/api")

    def by_command(on: bool) -> None:
        verb, name = "resume" if on else "pause", f"pd-deploy/{NIGHTLY}"
        prefect("prefect", "deployment", "schedule", verb, name, str(schedule.id))

    def by_api(on: bool) -> None:
        path = f"/deployments/{scheduled.id}/schedules/{schedule.id}"
        with PrefectHttpxSyncClient(base_url=prefect_settings.API) as client:
            client.patch(path, json={"active": on})

    with page(tmp_path / "browser") as shown:

        def by_page(on: bool, where: str = "") -> None:
            shown.open(f"{server}{where}/deployments/deployment/{scheduled.id}")
            shown.turn(on=on)

        def by_newer_page(on: bool) -> None:
            by_page(on, "/v2")

        yield {one.__name__: one for one in (by_command, by_api, by_page, by_newer_page)}


@pytest.mark.minutes
async def test_whoever_turns_it_on_the_night_takes_the_newer_build(
    fresh: Service, scheduled: DeploymentResponse, switch: dict[str, Any], prefect: Any
) -> None:
    """Whatever Prefect does to the schedule on the way, and if the file is applied again."""
    fresh.push(fresh.tag(1), {"/etc/example": "newer than the file's"})
    for turn in switch.values():
        await asyncio.to_thread(turn, True)
        for run in await due(scheduled):
            assert run.parameters == {"file": fresh.file, "image": "newest"}
        await asyncio.to_thread(turn, False)
        assert not await due(scheduled, active=False)
    await asyncio.to_thread(switch["by_command"], True)
    silent = "recover lab-qwq-3p1d after a run that fell silent"
    prefect("prefect", "automation", "pause", silent)
    prefect("prefect", *DEPLOY_LAB)
    async with get_client() as client:
        automations = await client.read_automations()
        assert {one.name for one in automations if not one.enabled} == {silent}
        again = await client.read_deployment(scheduled.id)
        assert again.schedules[0].active
        parameters = {**again.parameters, "file": fresh.file}
        await client.update_deployment(scheduled.id, DeploymentUpdate(parameters=parameters))
    prefect("prefect", "automation", "resume", silent)
    assert "Completed: Generation 1-" in await tonight(scheduled, prefect)
    assert images(fresh) == {fresh.tag(1)}


@pytest.mark.minutes
async def test_the_service_follows_what_images_are_from_one_contract_to_the_next(
    fresh: Service, scheduled: DeploymentResponse, prefect: Any
) -> None:
    """An image that nobody knows is passed over without a word to clients, and the way back leads
    over all of them."""
    # v1's prefills bind ports of their own choice, and two of them share host a.
    apart = {"p1": {"environment": {"VLLM_LLMDATADIST_BASE_PORT": 15600}}}
    # Tags that tell no age: what follows does so from the images.
    fresh.change(prefill=apart, update={"family": "pattern", "pattern": r"night-(\d+)"})
    for night, contract in enumerate(("v0-early", "v0", "v1", "roles"), 1):
        fresh.lab.push_build(f"night-{night}", contract)
        if contract in ("v0-early", "roles"):
            said = await tonight(scheduled, prefect)
        else:
            state: State[None] = await deploy(fresh.file, image="newest", return_state=True)
            said = f"{state.name}: {state.message}"
        assert f"Completed: Generation {night}-" in said
        assert images(fresh) == {f"night-{night}"}
    before, quarantine = fresh.states(), fresh.record()["quarantine"]
    fresh.lab.push_variant("night-5", {CONNECTORS: NEXT}, source_tag="night-4")
    said = await tonight(scheduled, prefect, status=1)
    assert "expected an image that follows one of the contracts" in said
    assert "KV connectors NextConnector" in said
    assert fresh.states() == before
    assert fresh.record()["quarantine"] == quarantine == {}
    contracts = {row["contract"]: row["generation"] for row in releases(fresh)}
    assert list(contracts) == ["v0-early", "v0", "v1", "roles"]
    await asyncio.to_thread(prefect, "pd-deploy", "rollback", fresh.file, contracts["v0"])
    assert images(fresh) == {"night-2"}


CONNECTORS = "/workspace/omniinfer/components/omni-npu/src/omni_npu/connector/register.py"
NEXT = 'KVConnectorFactory.register_connector("NextConnector", "omni_npu.connector.next", "Next")\n'


def releases(service: Service) -> list[dict[str, Any]]:
    """What host a has of each generation, the oldest first."""
    accounts = service.lab.hosts["a"].run(["sh", "-c", f"cat {STATE}/qwq-3p1d/*/release.json"])
    decoder, text, found = json.JSONDecoder(), accounts.stdout.strip(), []
    while text:
        account, end = decoder.raw_decode(text)
        found.append(account)
        text = text[end:].strip()
    return sorted(found, key=lambda account: str(account["created"]))


async def tonight(deployment: DeploymentResponse, prefect: Any, status: int = 0) -> str:
    """Have the schedule start a run in a moment; what following it prints, to its end."""
    # Prefect plans only what is still to come, and on a busy machine it gets to it late.
    for seconds in (5, 20, 60):
        now = datetime.datetime.now(datetime.UTC)
        then = now + datetime.timedelta(seconds=seconds)
        soon = IntervalSchedule(interval=datetime.timedelta(days=30), anchor_date=then)
        (schedule,) = deployment.schedules
        async with get_client() as client:
            again = {"schedule": soon, "active": True}
            await client.update_deployment_schedule(deployment.id, schedule.id, **again)
        with contextlib.suppress(TimeoutError):
            (first,) = await due(deployment, after=now, patience=seconds + 10.0)
            break
    else:
        raise AssertionError(f"Prefect planned no run for {then}")
    return str(
        await asyncio.to_thread(prefect, "pd-deploy", "follow", str(first.id), status=status)
    )


async def due(
    deployment: DeploymentResponse,
    *,
    active: bool = True,
    after: datetime.datetime | None = None,
    patience: float = 60.0,
) -> list[FlowRun]:
    """The schedule's runs that wait to start, once it is on or off and there are some or none.

    Args:
        after: take those that are to start within a minute and a half from then, also if they have.

    Raises:
        TimeoutError: it is not so after `patience`, in seconds.
    """
    chosen = DeploymentFilter(id=DeploymentFilterId(any_=[deployment.id]))
    end = time.monotonic() + patience
    async with get_client() as client:
        while time.monotonic() < end:
            (schedule,) = (await client.read_deployment(deployment.id)).schedules
            runs = await client.read_flow_runs(deployment_filter=chosen)
            waiting = [
                run
                for run in runs
                if run.auto_scheduled
                and (
                    run.state_type is StateType.SCHEDULED
                    if after is None
                    else after < run.expected_start_time < after + SOON
                )
            ]
            if schedule.active is active and bool(waiting) is active:
                return waiting
            await asyncio.sleep(0.5)
    raise TimeoutError(f"expected {active=} and runs accordingly, found {schedule} and {waiting}")
