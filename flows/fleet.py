"""Rolling through many services: wave by wave, the canaries first; the first failure stops it.

Each service is deployed by a run of its own deployment of Prefect, on its own pool and queue, with
its own history, automations and limits: what is known of a run by hand holds here as well. It is no
subflow: Prefect would cancel those together with this run, and a service would go back halfway
through its upgrade because somebody wanted no further ones.
"""

import asyncio
import textwrap
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from uuid import UUID

import httpx
from prefect import State, flow, runtime
from prefect.artifacts import acreate_table_artifact
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import ObjectNotFound
from prefect.logging import get_run_logger
from prefect.states import Cancelled, Completed, Failed

from pd_deploy.errors import InvalidInput, Problem
from pd_deploy.flows import publish
from pd_deploy.flows.interrupts import interruptible
from pd_deploy.flows.run import FLEET
from pd_deploy.registry.tags import NEWEST

POLL_S = 3.0
LONGEST = 300  # characters of why a service failed; the table and its run have all of it
STOPS = "this run starts no more of them; those already running finish by themselves"
NOT_BEGUN = "did not start within {} min, and was cancelled"


@dataclass(frozen=True)
class Ended:
    """How the run of a service ended; `why` is the message of its last state."""

    service: str
    completed: bool
    why: str


@dataclass
class Roll:
    """What became of each service so far."""

    waves: Sequence[Sequence[str]]
    ended: list[Ended] = field(default_factory=list)
    begun: list[str] = field(default_factory=list)

    @property
    def failed(self) -> list[Ended]:
        """Those that failed: none starts any more."""
        return [end for end in self.ended if not end.completed]

    def __str__(self) -> str:
        """Tell what failed, what is done, what is under way and what was not started."""
        settled = {end.service for end in self.ended}
        every = [service for wave in self.waves for service in wave]
        groups = {
            "completed": [end.service for end in self.ended if end.completed],
            "under way": [service for service in self.begun if service not in settled],
            "not started": [service for service in every if service not in self.begun],
        }
        parts = [
            f"{end.service} failed: {textwrap.shorten(end.why, LONGEST, placeholder=' …')}"
            for end in self.failed
        ]
        parts += [f"{what}: {', '.join(names)}" for what, names in groups.items() if names]
        return "; ".join(parts)


@flow(name="pd-fleet", persist_result=False)
@interruptible(left="no service was touched", first=STOPS, reports=False)
async def fleet(
    waves: list[list[str]],
    at_once: int = 4,
    image: str | None = NEWEST,
    begin_within: int = 60,
) -> State[None]:
    """Deploy many services, wave by wave, and stop at the first failure.

    A wave starts when all services of the one before it are deployed and proven. When one fails,
    those under way come to their end, and no other is started. The same holds for a cancellation.

    Args:
        waves: deployments of the flow pd-deploy by name, such as `qwq-3p1d`; the canaries first.
        at_once: how many are deployed at the same time.
        image: as for pd-deploy; `newest` for the newest of each file's own update policy.
        begin_within: minutes after which a run that no worker has begun counts as failed.
    """
    async with get_client() as client:
        deployments = await _deployments(client, waves, at_once, begin_within)
        roll = Roll(waves)
        run_one = partial(_deployed, client, deployments, image, begin_within * 60.0)
        try:
            await roll_through(roll, at_once, run_one)
        except asyncio.CancelledError:
            return Cancelled(message=f"Interrupted, so no more are started; {roll}")
        finally:
            await publish.if_the_server_takes_it(_table(roll))
        if roll.failed:
            return Failed(message=f"Stopped at the first failure; {roll}")
        return Completed(message=f"All waves are deployed; {roll}")


async def roll_through(
    roll: Roll, at_once: int, run_one: Callable[[str], Awaitable[Ended]]
) -> None:
    """Run the services of each wave, at most so many at once; stop after a failure.

    Args:
        roll: gets what became of each.
        run_one: deploys a service; raises only when it is cancelled.
    """
    for wave in roll.waves:
        waiting = deque(wave)

        async def take_turns(waiting: deque[str] = waiting) -> None:
            while waiting and not roll.failed:
                service = waiting.popleft()
                roll.begun.append(service)
                roll.ended.append(await run_one(service))

        await asyncio.gather(*(take_turns() for _ in range(min(at_once, len(wave)))))
        if roll.failed:
            return


async def _deployments(
    client: PrefectClient, waves: Sequence[Sequence[str]], at_once: int, begin_within: int
) -> dict[str, UUID]:
    """Look up all services before the first is touched.

    Raises:
        InvalidInput: all that is wrong with the parameters.
    """
    problems = []
    if not waves or not all(waves):
        problems.append(Problem("waves", f"expected a service in every wave, found {waves}"))
    for key, number in (("at_once", at_once), ("begin_within", begin_within)):
        if number < 1:
            problems.append(Problem(key, f"expected 1 or more, found {number}"))
    every = Counter(service for wave in waves for service in wave)
    deployments = {}
    for service, times in every.items():
        if times > 1:
            problems.append(Problem("waves", f"expected {service} once, found it {times} times"))
        try:
            deployment = await client.read_deployment_by_name(f"pd-deploy/{service}")
            deployments[service] = deployment.id
        except ObjectNotFound:
            problems.append(
                Problem("waves", f"expected a deployment pd-deploy/{service}, found none")
            )
    if problems:
        raise InvalidInput(problems, hint="`prefect deployment ls` lists the deployments")
    return deployments


async def _deployed(
    client: PrefectClient,
    deployments: Mapping[str, UUID],
    image: str | None,
    patience: float,
    service: str,
) -> Ended:
    """Run a service's deployment, and wait for its end."""
    try:
        run = await client.create_flow_run_from_deployment(
            deployments[service],
            parameters={"image": image} if image else {},
            # If the answer is lost and asked for again, or this run is, no second one starts.
            idempotency_key=f"{runtime.flow_run.id}/{service}",
            tags=[FLEET],
        )
        get_run_logger().info("%s: run %r (%s)", service, run.name, run.id)
        return await _end_of(client, run, patience, service)
    except (httpx.HTTPError, ObjectNotFound) as error:
        why = "its run was deleted" if isinstance(error, ObjectNotFound) else repr(error)
        return Ended(service, False, f"the Prefect server does not say what became of it: {why}")


async def _end_of(client: PrefectClient, run: FlowRun, patience: float, service: str) -> Ended:
    deadline = time.monotonic() + patience
    while not (run.state and run.state.is_final()):
        if run.state and run.state.is_scheduled() and time.monotonic() > deadline:
            why = NOT_BEGUN.format(f"{patience / 60:g}")
            await client.set_flow_run_state(run.id, Cancelled(message=f"It {why}"))
            return Ended(service, False, f"its run {run.name!r} {why}")
        await asyncio.sleep(POLL_S)
        run = await _looked_up(client, run)
    get_run_logger().info("%s: %s: %s", service, run.state.name, run.state.message)
    return Ended(service, run.state.is_completed(), f"{run.state.name}: {run.state.message}")


async def _looked_up(client: PrefectClient, run: FlowRun) -> FlowRun:
    """Read a run again; a server that does not answer now may do so the next time.

    Raises:
        ObjectNotFound: somebody deleted it.
    """
    try:
        return await client.read_flow_run(run.id)
    except httpx.HTTPError as error:
        get_run_logger().warning("run %r could not be looked up: %r", run.name, error)
        return run


async def _table(roll: Roll) -> object:
    ended = {end.service: end for end in roll.ended}
    rows = [
        {
            "wave": number,
            "service": service,
            "ended": ("completed" if ended[service].completed else "failed")
            if service in ended
            else ("under way" if service in roll.begun else "not started"),
            "message": ended[service].why if service in ended else "",
        }
        for number, wave in enumerate(roll.waves, 1)
        for service in wave
    ]
    return await acreate_table_artifact(
        key="pd-fleet", table=rows, description="The last roll through the fleet"
    )
