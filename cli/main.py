"""`pd-deploy`: check, plan and deploy a service, follow a run, and run the lab.

Exit codes: 0 success, 1 the deployment failed, 2 the input is invalid.
"""

import os
import sys
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import Annotated, NoReturn
from uuid import UUID

import typer

from pd_deploy.cli import credentials, facts_file, shell, show
from pd_deploy.cli import init as scaffolding
from pd_deploy.config.load import load_deployment
from pd_deploy.config.models import Deployment
from pd_deploy.errors import InvalidInput, PdDeployError, Problem
from pd_deploy.planning import placement
from pd_deploy.planning.plans import Plan
from pd_deploy.registry.tags import NEWEST

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
    "Start with `init` (a directory with an example), then `check` (is the file right?), `plan` "
    "(what would happen?) and `deploy`.\n\n"
    "Exit codes: 0 success, 1 the deployment failed, 2 the input is invalid.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.add_typer(credentials.app, name="credentials")


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


class OnFailure(StrEnum):
    """What becomes of a generation that fails."""

    ROLLBACK = "rollback"
    KEEP = "keep"


File = Annotated[Path, typer.Argument(metavar="FILE", help="The deployment file (YAML).")]
Image = Annotated[str | None, typer.Option(help="Run this image instead of the file's own.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pd-deploy {metadata.version('pd-deploy')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """What stands before the name of a command."""


@app.command()
def init(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Where to; made if it is not there.")
    ],
    example: Annotated[
        str, typer.Option(help=f"One of {', '.join(scaffolding.examples())}.")
    ] = "qwq-3p1d",
) -> None:
    """Make a directory to deploy from: an example's deployment file, prefect.yaml and a README.

    Choose the example nearest to your service and edit its file; the README has the commands that
    follow. Those named lab-… need no hardware: they run on the hosts of `pd-deploy lab up`. Nothing
    that exists is overwritten.

    Example: pd-deploy init my-service --example qwq-3p1d
    """
    written = scaffolding.scaffold(directory, example)
    typer.echo("\n".join(f"wrote {path}" for path in written))
    typer.echo(
        f"Next: cd {directory}, edit {written[0].name}, and pd-deploy check {written[0].name}"
    )
    typer.echo(f"{directory / 'README.md'} has the commands that follow.")


@app.command()
def check(file: File, image: Image = None) -> None:
    """Check a deployment file; no host is touched.

    Reports everything that is wrong at once, each with the path of its key.

    Example: pd-deploy check qwq-3p1d.yaml
    """
    service = _load(file, image)
    typer.echo(show.topology(service, placement.build(service)))


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

    Example: pd-deploy plan qwq-3p1d.yaml --format json
    """
    service = load_deployment(file, image=image)
    if host is not None and host not in service.hosts:
        known = ", ".join(service.hosts)
        raise InvalidInput([Problem("--host", f"expected one of {known}, found {host}")])
    made = (
        facts_file.make_plan(service, facts)
        if facts
        else _plan_on_hosts(load_deployment(file), image)
    )
    if format is Format.SHELL:
        hosts = [host] if host else list(service.hosts)
        placed = placement.build(service)
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
    on_failure: Annotated[
        OnFailure,
        typer.Option(help="Bring the generation before back, or keep the failed one as it is."),
    ] = OnFailure.ROLLBACK,
    forget: Annotated[
        list[str] | None,
        typer.Option(metavar="ADDRESS", help="A host that has left the file and is gone for good."),
    ] = None,
) -> None:
    """Bring a service up and prove it with a completion.

    When a new generation fails, the one that served before is started again.

    The same flow as `prefect deployment run`, run here and now; without a Prefect server set up
    (PREFECT_API_URL) it brings a temporary one. Safe to run again: it changes only what is not as
    it should be.

    Example: pd-deploy deploy qwq-3p1d.yaml
    """
    _load(file)
    if image not in (None, NEWEST):
        _load(file, image)
    from pd_deploy.cli import run  # noqa: PLC0415  Prefect takes seconds to import
    from pd_deploy.flows.deploy import deploy as flow  # noqa: PLC0415  as above

    stages = [one.value for one in stage] if stage else None
    raise typer.Exit(
        run.here(
            flow,
            file=str(file),
            image=image,
            stages=stages,
            dry_run=dry_run,
            on_failure=on_failure.value,
            forget=forget,
        )
    )


@app.command()
def rollback(
    file: File,
    generation: Annotated[
        str | None,
        typer.Argument(help="One that `releases` lists; without it, the good one before."),
    ] = None,
) -> None:
    """Bring a generation back that served before, as it was.

    With its own image, scripts and ranktables, through the same gates. If it fails, what serves
    now serves again.

    Example: pd-deploy rollback qwq-3p1d.yaml
    """
    _load(file)
    from pd_deploy.cli import run  # noqa: PLC0415  Prefect takes seconds to import
    from pd_deploy.flows.rollback import rollback as flow  # noqa: PLC0415  as above

    raise typer.Exit(run.here(flow, file=str(file), generation=generation))


@app.command()
def recover(file: File) -> None:
    """Find out what an interrupted run left, and make the promoted generation serve.

    Example: pd-deploy recover qwq-3p1d.yaml
    """
    _load(file)
    from pd_deploy.cli import run  # noqa: PLC0415  Prefect takes seconds to import
    from pd_deploy.flows.recover import recover as flow  # noqa: PLC0415  as above

    raise typer.Exit(run.here(flow, file=str(file)))


@app.command()
def releases(
    file: File,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """List the kept generations, the youngest first: when, which image, who, what became of it.

    Example: pd-deploy releases qwq-3p1d.yaml
    """
    service = _load(file)
    from pd_deploy.cli import hosts  # noqa: PLC0415  Prefect takes seconds to import

    past = hosts.past(service)
    typer.echo(past.record.model_dump_json(indent=2) if as_json else show.release_table(past))


@app.command()
def logs(
    file: File,
    generation: Annotated[
        str | None, typer.Argument(help="Which one; the youngest without it.")
    ] = None,
    to: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where to; a new directory here without it.")
    ] = None,
) -> None:
    """Collect a generation's logs from all hosts into one directory, also after a failure.

    What each container printed, and the files that servers and proxy wrote: DIR/HOST/INSTANCE/.

    Example: pd-deploy logs qwq-3p1d.yaml --to ./logs
    """
    service = _load(file)
    from pd_deploy.cli import logs as collecting  # noqa: PLC0415  Prefect takes seconds to import

    typer.echo(f"copied to {collecting.collect(service, generation, to)}")


@app.command()
def prune(file: File) -> None:
    """Remove old generations: all but the one that serves, the last good ones and the youngest.

    The file's `keep` says how many good ones. Every run does the same at its end.

    Example: pd-deploy prune qwq-3p1d.yaml
    """
    _load(file)
    from pd_deploy.cli import run  # noqa: PLC0415  Prefect takes seconds to import
    from pd_deploy.flows.prune import prune as flow  # noqa: PLC0415  as above

    raise typer.Exit(run.here(flow, file=str(file)))


@app.command()
def teardown(
    file: File,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Remove a deployment completely, and only it: containers, files, logs and its images.

    Example: pd-deploy teardown qwq-3p1d.yaml --yes
    """
    service = _load(file)
    if not yes:
        typer.confirm(f"Remove {service.name} from {', '.join(service.hosts)}?", abort=True)
    from pd_deploy.cli import run  # noqa: PLC0415  Prefect takes seconds to import
    from pd_deploy.flows.teardown import teardown as flow  # noqa: PLC0415  as above

    raise typer.Exit(run.here(flow, file=str(file)))


@app.command()
def follow(
    flow_run: Annotated[UUID, typer.Argument(help="Id of the flow run, as Prefect prints it.")],
) -> None:
    """Follow a run on the Prefect server live, until it ends.

    Exit code 0 when it completed, 1 when it did not.
    """
    from pd_deploy.cli import run  # noqa: PLC0415  Prefect takes seconds to import

    raise typer.Exit(run.follow(flow_run))


@app.command(
    context_settings={
        "allow_extra_args": True,
        "allow_interspersed_args": False,
        "help_option_names": [],
        "ignore_unknown_options": True,
    }
)
def lab(given: typer.Context) -> None:
    """Two simulated NPU hosts on this machine, to try pd-deploy on without hardware."""
    # What only the lab needs takes half as long to import as all that `check` needs.
    from pd_deploy.lab.cli import app as commands  # noqa: PLC0415

    commands(given.args, prog_name=given.command_path)


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
        _fail("interrupted; `pd-deploy recover FILE` makes whole what it left", INTERRUPTED)
    sys.exit(0)


def _load(file: Path, image: str | None = None) -> Deployment:
    """The file's deployment, sound in itself and as a whole."""
    service = load_deployment(file, image=image)
    placement.build(service)
    return service


def _fail(error: PdDeployError | str, code: int) -> NoReturn:
    typer.echo(f"pd-deploy: {error}", err=True)
    sys.exit(code)


def _plan_on_hosts(service: Deployment, image: str | None) -> Plan:
    placement.build(service)
    from pd_deploy.cli import hosts  # noqa: PLC0415  Prefect takes seconds to import

    return hosts.plan(service, image)
