"""`pd-deploy logs`: a generation's logs from all hosts, in one directory or as they come."""

import asyncio
from collections.abc import Collection
from pathlib import Path

import typer

from pd_deploy.cli.hosts import Reached, asking, connected
from pd_deploy.cli.telling import tell
from pd_deploy.config.models import Deployment
from pd_deploy.hosts.concurrent import together
from pd_deploy.steps import logs


def collect(
    deployment: Deployment,
    generation: str | None,
    to: Path | None,
    instances: Collection[str] = (),
) -> tuple[Path, list[str]]:
    """Copy the logs of a generation, or of the latest one.

    Args:
        instances: those whose logs to copy; all if empty.

    Returns:
        The directory that has them, and why hosts did not answer.
    """
    with asking([deployment]):
        return asyncio.run(_collect(deployment, generation, to, instances))


def follow(deployment: Deployment, generation: str | None, instances: Collection[str]) -> None:
    """Print what comes to a generation's logs until it is interrupted."""
    with asking([deployment]):
        asyncio.run(followed(deployment, generation, instances))


async def followed(
    deployment: Deployment, generation: str | None, instances: Collection[str]
) -> None:
    """Print what comes to a generation's logs until it is cancelled."""
    async with connected(deployment) as reached:
        session, history = reached.session, reached.history
        logs.require_instances(session, instances)
        chosen = logs.chosen(history, generation)
        for why in _away(reached):
            tell(why)
        await together(
            logs.follow(session, name, history, chosen, instances, typer.echo)
            for name in session.hosts
        )


async def _collect(
    deployment: Deployment,
    generation: str | None,
    to: Path | None,
    instances: Collection[str] = (),
) -> tuple[Path, list[str]]:
    async with connected(deployment) as connection:
        session, history = connection.session, connection.history
        logs.require_instances(session, instances)
        chosen = logs.chosen(history, generation)
        target = to or Path(f"{deployment.name}-{chosen}-logs")
        containers, reached = await connection.ask(
            lambda name: logs.containers(session, name, history, chosen)
        )
        await together(
            logs.collect(session, name, history, chosen, listed, target, instances)
            for name, listed in containers.items()
        )
        return target, _away(reached)


def _away(reached: Reached) -> list[str]:
    return [error.unanswered for error in reached.away.values()]
