"""`pd-deploy logs`: collect a generation's logs from all hosts in one directory."""

import asyncio
from pathlib import Path

from pd_deploy.cli.hosts import connected
from pd_deploy.cli.prefect_api import reached
from pd_deploy.config.models import Deployment
from pd_deploy.hosts.concurrent import together
from pd_deploy.steps import logs


def collect(deployment: Deployment, generation: str | None, to: Path | None) -> Path:
    """Copy the logs of a generation, or of the latest one; return the directory that has them."""
    with reached():
        return asyncio.run(_collect(deployment, generation, to))


async def _collect(deployment: Deployment, generation: str | None, to: Path | None) -> Path:
    async with connected(deployment) as (session, history):
        chosen = logs.chosen(history, generation)
        target = to or Path(f"{deployment.name}-{chosen}-logs")
        await together(
            logs.collect(session, name, history, chosen, target) for name in session.hosts
        )
        return target
