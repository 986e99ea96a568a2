"""What `pd-deploy lock` does on the hosts."""

import asyncio
from pathlib import Path

import typer

from pd_deploy.cli.check import load
from pd_deploy.cli.hosts import asking, connected
from pd_deploy.config.models import Deployment
from pd_deploy.hosts import lease
from pd_deploy.records.releases import Hold
from pd_deploy.steps import locking
from pd_deploy.steps.session import LockedSession


async def status(deployment: Deployment) -> str:
    """Say who works on each host, and who holds the deployment."""
    async with connected(deployment) as connection:
        session = connection.session
        command = lease.look_command(session.root)
        printed, reached = await connection.ask(lambda name: session.host(name).output(command))
        lines = [
            f"{session.host(name).where}: {lease.parse_look(text) or 'free'}"
            for name, text in printed.items()
        ]
        lines += [error.unanswered for error in reached.away.values()]
        hold = reached.history.record.hold
        return "\n".join([*lines, f"held by {hold}" if hold else "not held"])


def change(file: Path, hold: Hold | None) -> None:
    """Hold a file's deployment, or let runs work on it again; say what it was before."""
    deployment = load(file)
    with asking([deployment]):
        before = asyncio.run(changed(deployment, hold))
    if hold:
        was = f"; before it was held by {before}" if before else ""
        typer.echo(f"{deployment.name} is held: no run works on it{was}")
        typer.echo(f"Next: pd-deploy lock release {file}")
    else:
        was = f"it was held by {before}" if before else "it was not held"
        typer.echo(f"runs may work on {deployment.name}; {was}")


async def changed(deployment: Deployment, hold: Hold | None) -> Hold | None:
    """Hold a deployment, or let runs work on it again; return the hold before."""
    async with connected(deployment) as reached:
        reached.require_all()
        session = reached.session
        run = f"`pd-deploy lock {'hold' if hold else 'release'}`"
        taken = locking.lease_for(session, run, "", reached.history.lease)
        locked = LockedSession.of(session, taken)
        async with taken.held(locked.hosts):
            return await locking.set_hold(locked, hold, _say)


def _say(waiting: str) -> None:
    typer.echo(waiting, err=True)
