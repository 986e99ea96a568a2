"""`pd-deploy server`: the Prefect server that commands start where none is set up."""

import typer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Show or stop the Prefect server that commands start where none is set up, and keep.",
)


@app.command()
def status() -> None:
    """Show whether it runs, and where its log is."""
    from pd_deploy.cli import local_server

    server = local_server.find()
    if not server:
        typer.echo("not running; a command that needs one starts it if PREFECT_API_URL is not set")
        return
    typer.echo(f"running: pid {server.pid}, {server.api}, Prefect {server.prefect}")
    typer.echo(f"log: {local_server.log()}")


@app.command()
def stop() -> None:
    """Stop it. Its history of runs stays in Prefect's database.

    A run that uses it ends as one does whose server is lost: wait for it first.
    """
    from pd_deploy.cli import local_server

    server = local_server.stop()
    typer.echo(f"stopped pid {server.pid}" if server else "not running")
