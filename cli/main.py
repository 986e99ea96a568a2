"""`pd-deploy`: check, plan and deploy a service, follow a run, and run the lab.

Exit codes: 0 success, 1 the deployment failed, 2 the input is invalid.
"""

import asyncio
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NoReturn
from uuid import UUID

import typer

from cli import credentials, facts_file, shell, show
from lab import cli as lab_cli
from pd_deploy import deployment as files
from pd_deploy import topology
from pd_deploy.errors import InvalidInput, PdDeployError, Problem
from pd_deploy.plan import Plan

FAILED, INVALID, INTERRUPTED = 1, 2, 130

# For the temporary server that Prefect brings when none is set up: it takes a while to start on a
# busy machine, and reports to nobody. What the user has set stays.
PREFECT_DEFAULTS = {
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",
    "DO_NOT_TRACK": "1",
}

app = typer.Typer(
    help="Brings up prefill/decode-disaggregated LLM inference on bare-metal hosts.\n\n"
    "Start with `check` (is the file right?), then `plan` (what would happen?), then `deploy`.\n\n"
    "Exit codes: 0 success, 1 the deployment failed, 2 the input is invalid.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.add_typer(credentials.app, name="credentials")
app.add_typer(lab_cli.app, name="lab")


class Format(StrEnum):
    """How a plan is printed."""

    TEXT = "text"
    JSON = "json"
    SHELL = "shell"


class Stage(StrEnum):
    """Part of a deployment."""

    CLEANUP = "cleanup"
    LAUNCH = "launch"
    RANKTABLE = "ranktable"
    PROXY = "proxy"
    SERVER = "server"


File = Annotated[Path, typer.Argument(metavar="FILE", help="The deployment file (YAML).")]
Image = Annotated[str | None, typer.Option(help="Run this image instead of the file's own.")]


@app.command()
def check(file: File, image: Image = None) -> None:
    """Check a deployment file; no host is touched.

    Reports everything that is wrong at once, each with the path of its key.

    Example: pd-deploy check deployments/qwq-3p1d.yaml
    """
    service = files.load(file, image=image)
    typer.echo(show.topology(service, topology.build(service)))


@app.command()
def plan(
    file: File,
    image: Image = None,
    format: Annotated[
        Format,
        typer.Option(
            help="text for people, json for programs, shell for scripts with the equivalent "
            "docker commands and files."
        ),
    ] = Format.TEXT,
    host: Annotated[
        str | None, typer.Option(help="With --format shell: only the script of this host.")
    ] = None,
    facts: Annotated[
        Path | None,
        typer.Option(
            metavar="FACTS.json",
            help="Plan offline: take what the hosts would say (interface, device addresses, "
            'image digest) from this file: {"image": "repo@sha256:…", "hosts": {"a": '
            '{"interface": "eth0", "device_addresses": {"0": "192.168.1.100"}}}}.',
        ),
    ] = None,
) -> None:
    """Show exactly what a deployment would do on each host, and change nothing.

    Container settings, commands, environment, and every file with path and content.

    Example: pd-deploy plan deployments/qwq-3p1d.yaml --format json
    """
    service = files.load(file, image=image)
    if host is not None and host not in service.hosts:
        known = ", ".join(service.hosts)
        raise InvalidInput([Problem("--host", f"expected one of {known}, found {host}")])
    made = facts_file.make_plan(service, facts) if facts else _plan_on_hosts(service)
    if format is Format.SHELL:
        hosts = [host] if host else list(service.hosts)
        placed = topology.build(service)
        typer.echo("\n".join(shell.script(service, placed, made, name) for name in hosts), nl=False)
    else:
        typer.echo(made.model_dump_json(indent=2) if format is Format.JSON else show.plan(made))


@app.command()
def deploy(
    file: File,
    image: Image = None,
    stage: Annotated[
        list[Stage] | None,
        typer.Option(help="Run only this stage; may be given several times."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done; change nothing.")
    ] = False,
) -> None:
    """Bring a service up and prove it with a completion.

    The same flow as `prefect deployment run`, run here and now; without a Prefect server set up
    (PREFECT_API_URL) it brings a temporary one. Safe to run again: it changes only what is not as
    it should be.

    Example: pd-deploy deploy deployments/qwq-3p1d.yaml
    """
    topology.build(files.load(file, image=image))
    from cli import run  # noqa: PLC0415  Prefect takes seconds to import

    stages = [one.value for one in stage] if stage else None
    raise typer.Exit(run.deploy(str(file), image=image, stages=stages, dry_run=dry_run))


@app.command()
def follow(
    flow_run: Annotated[UUID, typer.Argument(help="Id of the flow run, as Prefect prints it.")],
) -> None:
    """Follow a run on the Prefect server live, until it ends.

    Exit code 0 when it completed, 1 when it did not.
    """
    from cli import run  # noqa: PLC0415  Prefect takes seconds to import

    raise typer.Exit(run.follow(flow_run))


def main() -> NoReturn:
    """The command; turns errors into one message and an exit code."""
    for key, value in PREFECT_DEFAULTS.items():
        os.environ.setdefault(key, value)
    try:
        app(standalone_mode=True)
    except InvalidInput as error:
        _fail(error, INVALID)
    except PdDeployError as error:
        _fail(error, FAILED)
    except KeyboardInterrupt:
        _fail("interrupted", INTERRUPTED)
    sys.exit(0)


def _fail(error: PdDeployError | str, code: int) -> NoReturn:
    typer.echo(f"pd-deploy: {error}", err=True)
    sys.exit(code)


def _plan_on_hosts(service: files.Deployment) -> Plan:
    topology.build(service)
    from cli import hosts  # noqa: PLC0415  Prefect takes seconds to import

    return asyncio.run(hosts.plan(service))
