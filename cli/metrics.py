"""`pd-deploy metrics`: what Prometheus is to scrape of a service."""

import asyncio
from pathlib import Path
from typing import Any

from pd_deploy.config.models import Deployment
from pd_deploy.errors import InvalidInput, Problem
from pd_deploy.planning import placement, scraping


def of_file(deployment: Deployment) -> list[dict[str, Any]]:
    """List what the file says is to be scraped; ask no host."""
    return scraping.groups(deployment, placement.build(deployment))


def of_what_serves(deployment: Deployment) -> tuple[list[dict[str, Any]], list[str]]:
    """List what is to be scraped of the generation that serves, nothing if none does; and why hosts
    did not answer."""
    from pd_deploy.cli.hosts import asking

    with asking([deployment]):
        return asyncio.run(_of_what_serves(deployment))


async def _of_what_serves(deployment: Deployment) -> tuple[list[dict[str, Any]], list[str]]:
    from pd_deploy.cli.hosts import connected
    from pd_deploy.steps import host_records

    async with connected(deployment) as reached:
        serving, session = reached.history.serving, reached.session
        away = [error.unanswered for error in reached.away.values()]
        if serving is None:
            return [], away
        saved = await host_records.load(session.hosts, session.root, serving.generation)
    topology = placement.derive(saved.deployment)
    return scraping.groups(saved.deployment, topology, serving.generation), away


def write(path: Path, groups: list[dict[str, Any]]) -> None:
    """Replace a file with targets.

    Raises:
        InvalidInput: it can't be written; a file that was there stays as it was.
    """
    from pd_deploy.flows import targets

    try:
        targets.replace(path, scraping.text(groups))
    except OSError as error:
        problem = Problem("--output", f"{path.resolve()} cannot be written: {error.strerror}")
        raise InvalidInput([problem]) from error
