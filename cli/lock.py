"""`pd-deploy lock`: who works on a deployment, and keeping all runs from doing so."""

import getpass
import socket
from datetime import UTC, datetime
from typing import Annotated

import typer

from pd_deploy.cli.telling import File

app = typer.Typer(
    help="Show who works on a deployment; keep all runs from working on it.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command()
def status(file: File) -> None:
    """Show who works on a deployment's hosts now, and whether it is held."""
    import asyncio

    from pd_deploy.cli import locks
    from pd_deploy.cli.check import load
    from pd_deploy.cli.hosts import asking

    deployment = load(file)
    with asking([deployment]):
        typer.echo(asyncio.run(locks.status(deployment)))


@app.command()
def hold(
    file: File,
    reason: Annotated[
        str, typer.Option("--reason", help="Why; those who are kept from it are told.")
    ],
) -> None:
    """Keep all runs from working on a deployment, nightly ones too, until `lock release`.

    What serves goes on. The hold is in the deployment's record on its hosts; a run that is under
    way is waited for as long as `gates.lease` says, and then has it refused.

    Example: pd-deploy lock hold qwq-3p1d.yaml --reason "switch S12 is replaced"
    """
    from pd_deploy.cli import locks
    from pd_deploy.records.releases import Hold

    if not reason.strip():
        raise typer.BadParameter(
            "expected why, for those who are kept from it", param_hint="--reason"
        )
    who = f"{getpass.getuser()} on {socket.gethostname()}"
    locks.change(file, Hold(by=who, when=datetime.now(UTC), reason=reason))


@app.command()
def release(file: File) -> None:
    """Let runs work on a deployment again."""
    from pd_deploy.cli import locks

    locks.change(file, None)
