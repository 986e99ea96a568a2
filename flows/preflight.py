"""Checking hosts before a service is deployed: all problems at once, nothing is changed."""

from collections.abc import Callable

from prefect import State, flow
from prefect.logging import get_run_logger

from pd_deploy.blocks.opening import open_session
from pd_deploy.errors import HostError, PdDeployError, SeveralFaults, faults_of
from pd_deploy.flows import deployment_file, publish, survey, unknown
from pd_deploy.flows.fan_out import fan_out
from pd_deploy.flows.interrupts import interruptible
from pd_deploy.flows.run import this_run
from pd_deploy.planning import flaws
from pd_deploy.steps import full_preflight
from pd_deploy.steps.full_preflight import Findings
from pd_deploy.steps.session import Session
from pd_deploy.tasks import check_plan, compare_all, inspect_host, ping_devices, try_ports


@flow(
    name="pd-preflight",
    flow_run_name=publish.run_name,
    persist_result=False,
    on_crashed=[unknown.tell],
)
@interruptible(left="a preflight changes nothing", first="this preflight ends; it changes nothing")
async def preflight(file: str, image: str | None = None, full_hashes: bool = False) -> State[None]:
    """Check the hosts of a service in full: tools, devices, networks, ports, model, image.

    Fails if there is an error; warnings alone complete. Changes nothing, and takes no lease.

    Args:
        file: the deployment file.
        image: an image to check instead of the file's; `newest` for the newest of its policy.
        full_hashes: read the model's files whole on all hosts, not only their ends.
    """
    named = None if image == "newest" else image
    deployment = deployment_file.load(file, image=named)
    async with open_session(deployment) as session:
        found = await find_flaws(
            session, image, str(this_run()), full_hashes, get_run_logger().info
        )
    errors = [flaw for flaw in found.flaws if flaw.is_error]
    await publish.findings(deployment.name, found)
    if errors:
        faults = [HostError(f.message, host=f.host or None, hint=f.hint or None) for f in errors]
        raise faults[0] if len(faults) == 1 else SeveralFaults(faults)
    return publish.checked(found.flaws, len(deployment.hosts))


async def find_flaws(
    session: Session,
    image: str | None,
    run: str,
    full_hashes: bool = False,
    on_progress: Callable[[str], None] = lambda _: None,
) -> Findings:
    """Check everything that can be checked, with the hosts that answer.

    Args:
        image: the image that the run names.
        run: the run, and who or what started it.
        full_hashes: whether to read the model's files whole.
        on_progress: told how far that is.
    """
    names, barrier = list(session.deployment.hosts), session.barrier
    inspected = await fan_out(barrier, [inspect_host(session, name) for name in names])
    ways = await fan_out(
        barrier,
        [
            compare_all(session, inspected, full_hashes, on_progress),
            ping_devices(session, inspected),
            try_ports(session, inspected),
        ],
    )
    found = [flaw for one in inspected for flaw in one.flaws]
    found += [flaw for of_way in ways for flaw in of_way]
    if all(one.answers for one in inspected):
        try:
            found += await check_plan(await survey.plan(session, image, run))
        except PdDeployError as error:
            faults = [fault for fault in faults_of(error) if isinstance(fault, PdDeployError)]
            found += map(full_preflight.flaw_of, faults)
    told = flaws.allowed(dict.fromkeys(found), session.deployment.allow)
    answers = [one.answers for one in inspected if one.answers]
    return Findings(sorted(told, key=lambda flaw: not flaw.is_error), answers)
