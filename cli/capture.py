"""Writing what hosts' tools print into files."""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pd_deploy.blocks.opening import open_session
from pd_deploy.cli import hosts
from pd_deploy.config.models import Deployment
from pd_deploy.errors import InvalidInput, PdDeployError, Problem
from pd_deploy.hosts.concurrent import together
from pd_deploy.steps import capturing


def run(
    deployment: Deployment, names: Sequence[str], to: Path, *, keep_addresses: bool
) -> tuple[list[Path], list[str]]:
    """Capture hosts, all by default; return the files written, and why hosts did not answer.

    Raises:
        InvalidInput: the file has no such host.
    """
    if unknown := [name for name in names if name not in deployment.hosts]:
        expected = f"expected hosts of the file ({', '.join(deployment.hosts)})"
        raise InvalidInput([Problem("HOST", f"{expected}, found {', '.join(unknown)}")])
    with hosts.asking([deployment]):
        captured = asyncio.run(_capture(deployment, names or [*deployment.hosts], keep_addresses))
    to.mkdir(parents=True, exist_ok=True)
    written, away = list[Path](), list[str]()
    for name, document in captured.items():
        if isinstance(document, PdDeployError):
            away.append(document.unanswered)
            continue
        written.append(to / f"capture-{name}.json")
        written[-1].write_text(json.dumps(document, indent=1) + "\n")
    return written, away


async def _capture(
    deployment: Deployment, names: Sequence[str], keep_addresses: bool
) -> dict[str, dict[str, Any] | PdDeployError]:
    async with open_session(deployment) as session:

        async def one(name: str) -> dict[str, Any] | PdDeployError:
            try:
                return await capturing.capture(session, name, keep_addresses=keep_addresses)
            except PdDeployError as error:
                return error

        return dict(zip(names, await together(map(one, names)), strict=True))
