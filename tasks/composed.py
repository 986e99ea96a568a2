"""Steps that are more than one call of `pd_deploy.steps`: they log while they work, or join other
steps."""

from collections.abc import Callable, Sequence

from prefect.logging import get_run_logger

from pd_deploy.hosts.container_values import PullProgress
from pd_deploy.steps import containers, identifying, locking, own_code, readiness
from pd_deploy.steps.identifying import Identified
from pd_deploy.steps.report import Gate, Report
from pd_deploy.steps.rollout import HostState, Rollout
from pd_deploy.steps.session import LockedSession
from pd_deploy.steps.surveying import ResolvedImage
from pd_deploy.steps.verify import benchmark as load
from pd_deploy.steps.verify import smoke

MIB = 1 << 20


async def gate(name: str) -> Gate:
    """Join steps: what comes next waits for this gate instead of each of them."""
    return Gate(name)


async def lock(session: LockedSession) -> Report:
    """Take the deployment's lease on every host; log which run holds it while waiting."""
    return await locking.lock(session, get_run_logger().info)


async def pull(rollout: Rollout, name: str) -> Report:
    """Bring the image to a host unless it is there; log how far the pull is."""
    return await containers.pull(rollout, name, _every_tenth())


async def bring_code(rollout: Rollout, name: str) -> Report:
    """Bring the user's own source code to a host; log how far that is."""
    return await own_code.bring(rollout, name, _every_tenth())


async def identify(
    session: LockedSession, states: Sequence[HostState], image: ResolvedImage
) -> Identified:
    """Ask the image what it is; log how far its pull is, where it has to be pulled for that."""
    return await identifying.identify(session, states, image, _every_tenth())


async def clean_up(rollout: Rollout, instance: str) -> Report:
    """Stop an instance's outdated containers; log how many requests a proxy still answers."""
    return await containers.clean_up(rollout, instance, get_run_logger().info)


async def benchmark(rollout: Rollout) -> Report:
    """Let the proxy carry the load of the file; log what could not be judged."""
    try:
        return await load.gate(rollout)
    finally:
        for remark in rollout.attempt.unjudged:
            get_run_logger().warning("benchmark: %s", remark)


async def until_ready(rollout: Rollout, instance: str) -> Report:
    """Wait until an instance is ready; log how far it says it is."""
    return await readiness.until_ready(rollout, instance, get_run_logger().info)


async def open_proxy(rollout: Rollout, instance: str) -> Report:
    """Open a proxy's port to clients, and send a request as a client would."""
    report = await containers.open_proxy(rollout, instance)
    await smoke.answers_clients(rollout, instance)
    return report


def _every_tenth() -> Callable[[PullProgress], None]:
    """Log a pull's progress at each tenth of the known bytes."""
    logger, logged = get_run_logger(), 0

    def log(progress: PullProgress) -> None:
        nonlocal logged
        tenth = 10 * progress.bytes_done // max(progress.bytes_total, 1)
        if tenth > logged:
            logged = tenth
            layers = f", {progress.layers_done} of {progress.layers} layers"
            logger.info(
                "%d of %d MiB%s",
                progress.bytes_done // MIB,
                progress.bytes_total // MIB,
                layers if progress.layers else "",
            )

    return log
