"""`pd-deploy status`: look at a service and print it, once or again and again."""

import asyncio
from pathlib import Path

import typer

from pd_deploy.blocks.opening import open_session
from pd_deploy.cli import exit_codes
from pd_deploy.cli.asking import asking, connecting
from pd_deploy.config.models import Deployment

EVERY_S = 2.0
CLEAR = "\x1b[H\x1b[2J"


def show(deployment: Deployment, file: Path, *, as_json: bool, watch: bool) -> int:
    """Print the status of a service, again and again if asked; return the exit code."""
    with asking([deployment]):
        return asyncio.run(_show(deployment, file, as_json=as_json, watch=watch))


async def _show(deployment: Deployment, file: Path, *, as_json: bool, watch: bool) -> int:
    async with open_session(deployment) as session:
        async with connecting(session.hosts):
            await asyncio.to_thread(_import)
        from pd_deploy.cli import looks, service_status

        kept = looks.path_of(deployment.name, file)
        last = looks.read(kept)
        while True:
            told = await service_status.tell(session, last, file.stem)
            if watch and not as_json:
                typer.echo(CLEAR, nl=False)
            as_asked = service_status.as_document if as_json else service_status.text
            typer.echo(as_asked(told))
            last = looks.of(told.look.instances, told.when)
            if not watch:
                looks.write(kept, last)
                return exit_codes.of([told.look.verdict])
            await asyncio.sleep(EVERY_S)


def _import() -> None:
    """Import what asks the hosts: a quarter of a second, in which connections to them are made."""
    import pd_deploy.cli.service_status  # noqa: F401
