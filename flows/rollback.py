"""Bringing back a generation that served before."""

import asyncio
from collections.abc import Iterable

from prefect import State, flow
from prefect.logging import get_run_logger

from pd_deploy.errors import LeaseLost, NoSuchGeneration, RolledBack
from pd_deploy.flows import deployment_file, publish, unknown
from pd_deploy.flows.adopted import return_to
from pd_deploy.flows.interrupts import interruptible
from pd_deploy.flows.roll_out import roll_out
from pd_deploy.flows.run import Run, this_run
from pd_deploy.flows.session import locked_session
from pd_deploy.flows.survey import restore, survey_hosts
from pd_deploy.records.adopted import GENERATION as ADOPTED
from pd_deploy.records.adopted import SHOWN, AdoptedService
from pd_deploy.records.releases import History, HostAccess, Release
from pd_deploy.steps import surveying
from pd_deploy.steps.session import LockedSession
from pd_deploy.tasks import stop_adopted


@flow(
    name="pd-rollback",
    flow_run_name=publish.run_name,
    persist_result=False,
    on_crashed=[unknown.tell],
)
@interruptible(left="nothing that serves was touched")
async def rollback(
    file: str, generation: str | None = None, message: str | None = None
) -> State[None]:
    """Bring back a generation that served before, with its own image, scripts and ranktables.

    It has to pass the same checks as a new one. If it fails, what serves now is started again.

    Args:
        file: the deployment file of the service.
        generation: one that `pd-deploy releases` lists, 0 for what was adopted; by default, the
            previous good one.
        message: why you start the run; shown where runs are listed.
    """
    run, deployment = this_run(), deployment_file.load(file)
    async with locked_session(
        deployment, str(run), lambda history: _hosts_of(history, generation)
    ) as session:
        history = surveying.history_of(await survey_hosts(session))
        if service := adopted_target(history, generation):
            return await _to_adopted(session, service, history, run)
        release = target(history, generation)
        rollout = await restore(session, release.generation)
        publish.announce(rollout)
        return await roll_out(rollout, run)


def target(history: History, generation: str | None) -> Release:
    """Choose the release to go back to.

    Raises:
        NoSuchGeneration: it is not kept, or there is no good one before.
    """
    name = generation or history.before()
    if release := history.releases.get(name or ""):
        return release
    kept = ", ".join(sorted(history.releases)) or "none"
    raise NoSuchGeneration(
        f"expected {name or 'a good generation before the one that serves'} among the kept "
        f"generations, found {kept}",
        hint="`pd-deploy releases FILE` says what became of each",
    )


def adopted_target(history: History, generation: str | None) -> AdoptedService | None:
    """Return the adopted service, if it is to go back to: it is named, or no other one is good."""
    named = generation == ADOPTED or (generation is None and history.before() is None)
    return history.record.adopted if named else None


def _hosts_of(history: History, generation: str | None) -> Iterable[HostAccess]:
    """List the hosts of the release to go back to; those of an adopted service are the file's."""
    if adopted_target(history, generation):
        return ()
    return target(history, generation).hosts.values()


async def _to_adopted(
    session: LockedSession, service: AdoptedService, history: History, run: Run
) -> State[None]:
    """Bring the adopted service back; if it fails, what serves now is started again.

    Raises:
        RolledBack: it failed, and what served serves again.
    """
    serving = history.serving
    try:
        return await return_to(session, service, run)
    except (Exception, asyncio.CancelledError) as fault:
        if serving is None or isinstance(fault, LeaseLost):
            raise
        why = "the run was interrupted" if isinstance(fault, asyncio.CancelledError) else str(fault)
        get_run_logger().error("%s does not come back: %s", SHOWN, why)
        await stop_adopted(session.for_deployment(session.deployment), service)
        await roll_out(await restore(session, serving.generation), run)
        raise RolledBack(
            f"generation {SHOWN} does not come back: {why}\nThe service is back on generation "
            f"{serving.generation}"
        ) from fault
