"""The runbook: bring a service up and prove that it serves."""

from pathlib import Path

from prefect import State, flow

from pd_deploy.blocks.opening import open_former, open_session
from pd_deploy.config.load import naming_lines
from pd_deploy.errors import ImageNotFound, InvalidInput, PdDeployError, Problem, faults_of
from pd_deploy.flows import deployment_file, publish, unknown
from pd_deploy.flows.interrupts import GOES_BACK, interruptible
from pd_deploy.flows.roll_out import OnFailure, roll_out
from pd_deploy.flows.run import this_run
from pd_deploy.flows.session import connected, locked_session, patient
from pd_deploy.flows.survey import plan
from pd_deploy.planning import placement
from pd_deploy.planning.plans import STAGES, Stage
from pd_deploy.registry import tags
from pd_deploy.registry.tags import NEWEST


@flow(
    name="pd-deploy",
    flow_run_name=publish.run_name,
    persist_result=False,
    on_crashed=[unknown.tell],
)
@interruptible(left="nothing that serves was touched", first=GOES_BACK)
async def deploy(
    file: str,
    image: str | None = None,
    stages: list[Stage] | None = None,
    dry_run: bool = False,
    on_failure: OnFailure = "rollback",
    forget: list[str] | None = None,
    message: str | None = None,
) -> State[None]:
    """Bring a service up: prefill, decode and proxy on their hosts; prove it with a completion.

    Each step looks first and changes only what differs from the file, so it is safe to run again.
    If a new generation fails, the previous one serves again.

    Args:
        file: the deployment file, relative to the directory of prefect.yaml.
        image: an image to use instead of the file's, `file:PATH` for one in an archive; `newest`
            for the newest one under the file's update policy. By default, the promoted image stays,
            unless the file's has changed.
        stages: run only these, in the order cleanup, launch, ranktable, proxy, server.
        dry_run: report what would be done on each host, and change nothing.
        on_failure: rollback, or keep the failed generation as it is, for inspection.
        forget: addresses of hosts that were removed from the file and are gone for good, so that
            they can't be cleaned up.
        message: why you start the run; kept with the generation, and shown where runs are listed.
    """
    run, deployment = this_run(), deployment_file.load(file)
    if run.late > deployment.window:
        return publish.skipped(run, deployment)
    if run.scheduled:
        deployment = patient(deployment, deployment.window.total_seconds())
    if stages == []:
        expected = (
            f"expected some of {', '.join(STAGES)}, or no `stages` at all for every "
            "stage; found an empty list"
        )
        raise InvalidInput([Problem("stages", expected)])
    if image == NEWEST:
        tags.policy_of(deployment)
    named = None if image == NEWEST else image
    checked = deployment_file.load(file, image=named) if named else deployment
    with naming_lines(Path(file), image=named):
        placement.build(checked)
    if named:
        image = checked.image
    if on_failure == "keep" and run.scheduled:
        expected = "expected `rollback` for a scheduled run, which nobody watches; found `keep`"
        raise InvalidInput([Problem("on_failure", expected)])
    chosen = [stage for stage in STAGES if stages is None or stage in stages]
    if dry_run:
        async with open_session(deployment) as session:
            await open_former(session, await connected(session))
            rollout = await plan(session, image, str(run))
            return await publish.dry_run(rollout, chosen)
    async with locked_session(deployment, str(run), forget=forget or ()) as session:
        patience = deployment.gates.registry if run.scheduled else 0

        async def attempt() -> State[None]:
            rollout = await plan(session, image, str(run), patience)
            publish.announce(rollout)
            publish.warn_of_newer_tags(rollout)
            if image == NEWEST and not rollout.changes:
                return publish.already_on(rollout)
            return await roll_out(rollout, run, chosen, on_failure)

        try:
            return await attempt()
        except PdDeployError as error:
            # Registries remove builds, this one between two answers: another is the newest now.
            gone = all(isinstance(fault, ImageNotFound) for fault in faults_of(error))
            if image != NEWEST or not gone:
                raise
        return await attempt()
