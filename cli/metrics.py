"""`pd-deploy metrics`: what Prometheus is to scrape of a service."""

import asyncio
import contextlib
import json
import os
from pathlib import Path
from typing import Any

from pd_deploy.config.models import Deployment
from pd_deploy.errors import InvalidInput, Problem
from pd_deploy.planning import placement, scraping

READABLE = 0o644  # Prometheus runs as another user


def of_file(deployment: Deployment) -> list[dict[str, Any]]:
    """List what the file says is to be scraped; ask no host."""
    return scraping.groups(deployment, placement.build(deployment))


def of_what_serves(deployment: Deployment) -> list[dict[str, Any]]:
    """List what is to be scraped of the generation that serves; nothing if none does."""
    from pd_deploy.cli.hosts import asking

    with asking([deployment]):
        return asyncio.run(_of_what_serves(deployment))


async def _of_what_serves(deployment: Deployment) -> list[dict[str, Any]]:
    from pd_deploy.cli.hosts import connected
    from pd_deploy.steps import host_records

    async with connected(deployment) as reached:
        serving, session = reached.history.serving, reached.session
        if serving is None:
            return []
        saved = await host_records.load(session.hosts, session.root, serving.generation)
    topology = placement.derive(saved.deployment)
    return scraping.groups(saved.deployment, topology, serving.generation)


def text(groups: list[dict[str, Any]]) -> str:
    """Write targets as Prometheus reads them."""
    return json.dumps(groups, indent=2) + "\n"


def write(path: Path, content: str) -> None:
    """Replace a file at once: whoever reads it meanwhile gets the old content or the new.

    The draft's name does not end in `.json`, so `file_sd_configs` with `*.json` passes it over.

    Raises:
        InvalidInput: it can't be written; a file that was there stays as it was.
    """
    path = path.resolve()
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        draft.write_text(content)
        draft.chmod(READABLE)
        draft.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        problem = Problem("--output", f"{path} cannot be written: {error.strerror}")
        raise InvalidInput([problem]) from error
