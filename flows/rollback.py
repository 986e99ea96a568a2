"""Bringing back a generation that served before."""

from prefect import State, flow

from pd_deploy.errors import NoSuchGeneration
from pd_deploy.flows import deployment_file, publish, unknown
from pd_deploy.flows.interrupts import interruptible
from pd_deploy.flows.roll_out import roll_out
from pd_deploy.flows.run import this_run
from pd_deploy.flows.session import locked_session
from pd_deploy.flows.survey import restore, survey_hosts
from pd_deploy.records.releases import History, Release
from pd_deploy.steps import surveying


@flow(
    name="pd-rollback",
    flow_run_name=publish.run_name,
    persist_result=False,
    on_crashed=[unknown.tell],
)
@interruptible(left="nothing on the hosts was changed")
async def rollback(
    file: str, generation: str | None = None, message: str | None = None
) -> State[None]:
    """Bring back a generation that served before, with its own image, scripts and ranktables.

    It has to pass the same checks as a new one. If it fails, what serves now is started again.

    Args:
        file: the deployment file of the service.
        generation: one that `pd-deploy releases` lists; by default, the previous good one.
        message: why you start the run; shown where runs are listed.
    """
    run, deployment = this_run(), deployment_file.load(file)
    async with locked_session(
        deployment, str(run), lambda history: target(history, generation).hosts.values()
    ) as session:
        release = target(surveying.history_of(await survey_hosts(session)), generation)
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
