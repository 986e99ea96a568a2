"""Collecting a generation's logs from all hosts into one directory."""

import asyncio
from pathlib import Path

from pd_deploy.cli.hosts import looked_at
from pd_deploy.cli.prefect_api import reached
from pd_deploy.config.models import Deployment
from pd_deploy.steps import logs


def collect(deployment: Deployment, generation: str | None, to: Path | None) -> Path:
    """Copy the logs of a generation, the youngest without one named; return where to."""
    with reached():
        return asyncio.run(_collect(deployment, generation, to))


async def _collect(deployment: Deployment, generation: str | None, to: Path | None) -> Path:
    async with looked_at(deployment) as (session, past):
        wanted = logs.chosen(past, generation)
        target = to or Path(f"{deployment.name}-{wanted}-logs")
        await asyncio.gather(
            *(logs.collect(session, name, past, wanted, target / name) for name in session.hosts)
        )
        return target
