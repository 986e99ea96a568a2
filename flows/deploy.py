"""The runbook: bring a service up and prove that it serves."""

from pathlib import Path
from typing import Any

from prefect import State, flow

from pd_deploy.config.load import load_deployment
from pd_deploy.errors import InvalidInput, Problem
from pd_deploy.flows import publish
from pd_deploy.flows.fan_out import fan_out
from pd_deploy.flows.roll_out import OnFailure, roll_out, survey_hosts
from pd_deploy.flows.run import this_run
from pd_deploy.flows.session import connected, locked_session, open_former, open_session
from pd_deploy.planning import placement
from pd_deploy.planning.plans import STAGES, Stage
from pd_deploy.registry import tags
from pd_deploy.registry.tags import NEWEST
from pd_deploy.steps import surveying
from pd_deploy.steps.rollout import Rollout
from pd_deploy.steps.session import Session
from pd_deploy.steps.surveying import with_addresses
from pd_deploy.tasks.image import choose_image, resolve_image
from pd_deploy.tasks.survey import device_addresses


@flow(name="pd-deploy", flow_run_name=publish.run_name, persist_result=False)
async def deploy(
    file: str,
    image: str | None = None,
    stages: list[Stage] | None = None,
    dry_run: bool = False,
    on_failure: OnFailure = "rollback",
    forget: list[str] | None = None,
) -> State[None]:
    """Brings a service up: prefill, decode and proxy on their hosts, proven by a completion.

    Each step looks first and changes only what is not as it should be, so running it again is
    safe. When a new generation fails, the one before serves again.

    Args:
        file: the deployment file, relative to the directory of prefect.yaml.
        image: an image to run instead of the file's own; `newest` for the newest of the file's
            update policy. Without it the promoted image stays, unless the file's has changed.
        stages: run only these, in the order cleanup, launch, ranktable, proxy, server.
        dry_run: report per host what would be done, and change nothing.
        on_failure: rollback, or keep the failed generation as it is, for inspection.
        forget: addresses of hosts that have left the file and are gone for good, so that what the
            deployment left there can't be removed.
    """
    run, given = this_run(), load_deployment(Path(file))
    if run.late > given.window:
        return publish.skipped(run, given)
    if image == NEWEST:
        tags.policy_of(given)
    named = image not in (None, NEWEST)
    placement.build(load_deployment(Path(file), image=image) if named else given)
    if on_failure == "keep" and run.scheduled:
        expected = "expected `rollback` for a scheduled run, where nobody looks; found `keep`"
        raise InvalidInput([Problem("on_failure", expected)])
    chosen = [stage for stage in STAGES if stages is None or stage in stages]
    if dry_run:
        async with open_session(given) as session:
            await open_former(session, await connected(session))
            rollout = await plan(session, image, str(run))
            return await publish.dry_run(rollout, chosen)
    async with locked_session(given, str(run), forget=forget or ()) as session:
        rollout = await plan(session, image, str(run))
        publish.found(rollout)
        if image == NEWEST and not rollout.changes:
            return publish.already_on(rollout)
        return await roll_out(rollout, run, chosen, on_failure)


async def plan(session: Session, image: str | None, run: str) -> Rollout:
    """Reads everything a plan needs, on all hosts at once, and makes it; changes nothing."""
    states = await survey_hosts(session)
    choice = await choose_image(session, states, image, wait_for=states)
    reading = [device_addresses(session, name, wait_for=states) for name in with_addresses(session)]
    found: list[Any] = await fan_out(
        session.barrier, [resolve_image(session, choice), fan_out(session.barrier, reading)]
    )
    resolved, addresses = found
    return surveying.planned(session, states, addresses, resolved, run)
