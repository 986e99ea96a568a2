"""`pd-deploy fleet`: many deployments at once."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Look at many deployments at once.", no_args_is_help=True, rich_markup_mode=None
)


@app.callback()
def options() -> None:
    """Make `status` a command of its own, though it is the only one."""


@app.command()
def status(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[FILES|DIRS]",
            help="Deployment files, and directories with some; by default, this directory.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Print which generation of which image serves, of each deployment.

    All hosts are asked at once, and nothing is changed. A host that does not answer, and a file
    that is invalid, are told in their row. The exit code is that of the worst: 0 all serve, 1 a
    file is invalid or its hosts can't be asked, 3 one is degraded, 4 one is down.

    Example: pd-deploy fleet status deployments/
    """
    from pd_deploy.cli import exit_codes
    from pd_deploy.cli.fleet_status import as_documents, files_of, statuses, table

    rows = statuses(files_of(paths or [Path()]))
    typer.echo(as_documents(rows) if as_json else table(rows))
    raise typer.Exit(exit_codes.of(row.verdict for row in rows))
