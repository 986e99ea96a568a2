"""Resolve the image, and bring it to a host."""

from collections.abc import Callable

from prefect.logging import get_run_logger

from pd_deploy.hosts.container_values import PullProgress
from pd_deploy.records.releases import Choice
from pd_deploy.steps import containers, surveying
from pd_deploy.steps.report import Report
from pd_deploy.steps.rollout import HostState, Rollout
from pd_deploy.steps.session import Session
from pd_deploy.steps.surveying import ResolvedImage
from pd_deploy.tasks.step import step

MIB = 1 << 20


@step("choose image")
async def choose_image(
    session: Session, states: list[HostState], requested_image: str | None
) -> Choice:
    """Decides which image the run takes."""
    choice = await surveying.choose(session, states, requested_image)
    get_run_logger().info("%s: %s", choice.chosen_image, choice.rule)
    return choice


@step("resolve image")
async def resolve_image(session: Session, choice: Choice) -> ResolvedImage:
    """Finds the digest behind a tag, once for all hosts."""
    return await surveying.resolve_image(session, choice)


@step("pull image {host}")
async def pull_image(rollout: Rollout, host: str) -> Report:
    """Brings the image to a host unless it is there, and logs how far it is."""
    return await containers.pull(rollout, host, _every_tenth())


def _every_tenth() -> Callable[[PullProgress], None]:
    """Logs a pull's progress when another tenth of the known bytes has come."""
    logger, logged = get_run_logger(), 0

    def log(progress: PullProgress) -> None:
        nonlocal logged
        tenth = 10 * progress.bytes_done // max(progress.bytes_total, 1)
        if tenth > logged:
            logged = tenth
            logger.info(
                "%d of %d MiB, %d of %d layers",
                progress.bytes_done // MIB,
                progress.bytes_total // MIB,
                progress.layers_done,
                progress.layers,
            )

    return log
