"""`pd-deploy logs`: collect a generation's logs from all hosts in one directory."""

import asyncio
from pathlib import Path

from pd_deploy.cli.hosts import asking, connected
from pd_deploy.config.models import Deployment
from pd_deploy.hosts.concurrent import together
from pd_deploy.steps import logs


def collect(
    deployment: Deployment, generation: str | None, to: Path | None
) -> tuple[Path, list[str]]:
    """Copy the logs of a generation, or of the latest one.

    Returns:
        The directory that has them, and why hosts did not answer.
    """
    with asking([deployment]):
        return asyncio.run(_collect(deployment, generation, to))


async def _collect(
    deployment: Deployment, generation: str | None, to: Path | None
) -> tuple[Path, list[str]]:
    async with connected(deployment) as reached:
        session, history = reached.session, reached.history
        chosen = logs.chosen(history, generation)
        target = to or Path(f"{deployment.name}-{chosen}-logs")
        await together(
            logs.collect(session, name, history, chosen, target) for name in session.hosts
        )
        return target, [error.headline for error in reached.away.values()]
