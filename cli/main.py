"""`pd-deploy`: check, plan and deploy a service, follow a run, and run the lab.

Exit codes: 0 success, 1 the run failed and the service is as before, 2 the input is invalid, 4 it
failed and nothing serves, 6 it failed and the generation before serves again, 130 interrupted by
Ctrl-C, 143 by SIGTERM.

Each command imports what it needs when it runs, the file's models before Prefect: so `--help` takes
a tenth of a second of CPU, and an invalid file is refused long before Prefect is imported.
"""

import os
import sys
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NoReturn
from uuid import UUID

import typer

from pd_deploy.cli import credentials, fleet, lock, one_server, server
from pd_deploy.cli import init as scaffolding
from pd_deploy.cli.telling import File, tell
from pd_deploy.errors import InvalidInput, PdDeployError
from pd_deploy.flows.garbage import collect_seldom

FAILED, INVALID, DRIFT, INCOMPLETE, INTERRUPTED = 1, 2, 5, 7, 130

# For the server that is started when none is configured. It may need longer than Prefect's 20 s on
# a busy machine. What the user has set takes precedence.
PREFECT_DEFAULTS = one_server.SETTINGS | {
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",
}

app = typer.Typer(
    help="Deploy prefill/decode-disaggregated LLM inference on bare-metal hosts.\n\n"
    "Start with `init` (copies an example), then `check` (is the file valid?), `plan` (what would "
    "change?) and `deploy`.\n\n"
    "Exit codes: 0 success, 1 the run failed and the service is as before, 2 the input is invalid, "
    "4 it failed and nothing serves, 6 it failed and the generation before serves again, 130 "
    "interrupted by Ctrl-C, 143 by SIGTERM; of `status` 1 no host answered, 3 degraded, 4 down; of "
    "`diff` 5 the file differs from what serves; of `plan` and `diff` 7 a host did not answer.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.add_typer(credentials.app, name="credentials")
app.add_typer(server.app, name="server")
app.add_typer(fleet.app, name="fleet")
app.add_typer(lock.app, name="lock")


class Format(StrEnum):
    """The format in which to print a plan."""

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
    """What to do when a generation fails."""

    ROLLBACK = "rollback"
    KEEP = "keep"


Image = Annotated[
    str | None,
    typer.Option(
        help="Use this image instead of the file's; a tag alone is one of the file's repository; "
        "`newest` for the newest of its update policy."
    ),
]


Why = Annotated[
    str | None,
    typer.Option(
        "--message", "-m", help="Why you do it; shown by `history`, `releases` and in the report."
    ),
]


def _print_version(requested: bool) -> None:
    if requested:
        from importlib import metadata

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
    """Take the options that come before a command's name."""


@app.command()
def init(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="The directory; created if it doesn't exist.")
    ],
    example: Annotated[
        str, typer.Option(help=f"One of {', '.join(scaffolding.examples())}.")
    ] = "qwq-3p1d",
) -> None:
    """Make a directory to deploy from.

    It gets a deployment file, a prefect.yaml and a README. Choose the example that is closest
    to your service, and edit its file; the README lists the next commands. Examples named lab-…
    need no hardware: they run on the simulated hosts of `pd-deploy lab up`. Existing files are
    never overwritten.

    Example: pd-deploy init my-service --example qwq-3p1d
    """
    written = scaffolding.scaffold(directory, example)
    typer.echo("\n".join(f"wrote {path}" for path in written))
    typer.echo(
        f"Next: cd {directory}, edit {written[0].name}, and run pd-deploy check {written[0].name}"
    )
    typer.echo(f"{directory / 'README.md'} lists the commands that follow.")


@app.command("import-ansible")
def import_ansible(
    inventory: Annotated[
        Path,
        typer.Argument(
            metavar="INVENTORY", help="Ansible's inventory, or a profile of omni_cli (YAML)."
        ),
    ],
    template: Annotated[
        Path | None,
        typer.Argument(
            metavar="TEMPLATE", help="The playbook for it; none with a profile of omni_cli."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="The deployment file; else it is printed."
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="What became of each line; else it goes to standard error."
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="The deployment's name; by default, that of the file.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Answer a placeholder such as IMAGE or MODEL_PATH, or give what the playbook gets "
            "by `-e`; can be repeated.",
        ),
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option(help="Begin with this profile, not with the one that says most of it."),
    ] = None,
    compat: Annotated[
        bool,
        typer.Option(
            "--compat", help="Keep the playbook's values, and allow the rules that they break."
        ),
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Write nothing if the report has warnings.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace files that exist.")] = False,
) -> None:
    """Make a deployment file of an Ansible inventory and playbook.

    Reads the files of omni-infer's playbooks, or a profile of omni_cli. Nothing in them is run: no
    Ansible, no shell, no lookup. Passwords and keys are not written; the report names them.

    The report says of each line what became of it, those first that somebody has to look at. All
    that pd-deploy renders otherwise than the playbook is under `changed`.

    The exit code is 2 if something that a deployment needs is missing or can't be expressed; then
    no file is written. Answer placeholders by --set, correct the files, and run it again.

    Example: pd-deploy import-ansible inventory.yml playbook.yml --set IMAGE=repo:tag -o my.yaml
    """
    from pd_deploy.cli import import_ansible as importing

    importing.refuse_existing([path for path in (output, report) if path], force=force)
    outcome = importing.run(
        inventory,
        template,
        output=output,
        name=name,
        settings=settings or [],
        profile=profile,
        compat=compat,
        strict=strict,
    )
    if report:
        importing.write(report, outcome.report, force=force)
    else:
        typer.echo(outcome.report, err=True)
    where = f" (see {report})" if report else ""
    typer.echo(f"{outcome.summary}{where}", err=True)
    if outcome.text is None:
        raise typer.Exit(INVALID)
    if output:
        importing.write(output, outcome.text, force=force)
        typer.echo(f"wrote {output}. Next: pd-deploy check {output}")
    else:
        typer.echo(outcome.text, nl=False)


@app.command()
def adopt(
    file: File,
    yes: Annotated[
        bool, typer.Option("--yes", help="Take it over; without this, nothing is changed.")
    ] = False,
    container: Annotated[
        list[str] | None,
        typer.Option(
            metavar="HOST=NAME",
            help="A container under a name that the file does not imply; can be repeated.",
        ),
    ] = None,
) -> None:
    """Take over a service that the Ansible playbook has started.

    Shows what runs on the hosts under the playbook's names (`container.names` and the instance's:
    omni_infer_prefill_p0), and how it differs from the file.

    With --yes it is entered into the deployment's record as generation 0, and nothing of it is
    touched. The next `deploy` stops it at its cut-over, and keeps its containers: if that
    deployment fails, the old service is started again and proven. `prune --adopted` removes them.

    Example: pd-deploy adopt qwq-3p1d.yaml
    """
    from pd_deploy.cli.check import load

    deployment = load(file)
    from pd_deploy.cli import adopt as adopting

    typer.echo(adopting.run(deployment, file, container or [], yes=yes))


@app.command()
def check(file: File, image: Image = None) -> None:
    """Check a deployment file, without connecting to any host.

    All problems are reported at once, each with its line and the path of its key.

    Example: pd-deploy check qwq-3p1d.yaml
    """
    from pd_deploy.cli.check import describe, load

    typer.echo(describe(load(file, image)))
    typer.echo(f"\nThe file is valid. Next: pd-deploy plan {file}")


@app.command()
def config(
    file: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="The deployment file (YAML).")
    ] = None,
    schema: Annotated[
        bool,
        typer.Option("--schema", help="Print the JSON schema of deployment files, for editors."),
    ] = False,
) -> None:
    """Print the resolved file: with all that it extends, its profile's values and the defaults.

    With --schema, print the JSON schema of deployment files, and read none.

    Example: pd-deploy config qwq-3p1d.yaml
    """
    if schema == (file is not None):
        raise typer.BadParameter("expected a FILE, or --schema")
    from pd_deploy.cli import config as writing

    if file is None:
        typer.echo(writing.schema_text())
        return
    from pd_deploy.cli.check import load

    typer.echo(writing.resolved(load(file)), nl=False)


@app.command()
def plan(
    file: File,
    image: Image = None,
    format: Annotated[
        Format,
        typer.Option(
            help="text to read, json for programs, shell for scripts with the equivalent docker "
            "commands and files."
        ),
    ] = Format.TEXT,
    full: Annotated[
        bool,
        typer.Option("--full", help="Print container settings, commands and every file, too."),
    ] = False,
    host: Annotated[
        str | None, typer.Option(help="With --format shell: print only this host's script.")
    ] = None,
    facts: Annotated[
        Path | None,
        typer.Option(
            metavar="FACTS.json",
            help="Plan offline: read what the hosts would report (interface, device addresses, "
            'image digest) from this file: {"image": "repo@sha256:…", "hosts": {"a": '
            '{"interface": "eth0", "device_addresses": {"0": "192.168.1.100"}}}}.',
        ),
    ] = None,
) -> None:
    """Show what a deployment would do on each host.

    Changes nothing. Prints what would be stopped, written, created and started; with --full, also
    container settings, commands, environment, and every file with its path and content.

    If hosts don't answer, shows what it would do on the others, and the exit code is 7.

    Example: pd-deploy plan qwq-3p1d.yaml --format json
    """
    from pd_deploy.cli.plan import written

    made = written(file, image, format=format.value, full=full, host=host, facts=facts)
    typer.echo(made.text, nl=False)
    _tell_away(made.away)
    raise typer.Exit(0 if made.complete else INCOMPLETE)


@app.command()
def diff(file: File) -> None:
    """Compare the file with what serves.

    Changes nothing. Prints the keys of the file that differ, what of each instance would be
    different, and what a run would do. Exit codes: 0 what serves is as the file says, 5 it is not,
    7 a host did not answer, and only the others were compared.

    Example: pd-deploy diff qwq-3p1d.yaml
    """
    from pd_deploy.cli.check import load

    deployment = load(file)
    from pd_deploy.cli import diff as comparing

    difference = comparing.of(deployment)
    typer.echo(comparing.text(difference))
    if difference.away:
        raise typer.Exit(INCOMPLETE)
    raise typer.Exit(DRIFT if difference.is_drift else 0)


@app.command()
def preflight(
    file: File,
    image: Image = None,
    offline: Annotated[
        bool, typer.Option("--offline", help="Ask no host: check what the file alone tells.")
    ] = False,
    full_hashes: Annotated[
        bool,
        typer.Option(
            "--full-hashes", help="Read the model's files whole on all hosts, not only their ends."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Check hosts in full before a service is deployed to them.

    Drivers, devices and their network, ways between hosts, clocks, memory, model, image, and what
    a run would need: all problems in one table, with what to do. Changes nothing.

    Exit codes: 0 no errors, 1 errors, 2 the file is invalid. Warnings are no errors.

    Example: pd-deploy preflight qwq-3p1d.yaml
    """
    from pd_deploy.cli.check import load

    deployment = load(file, image)
    from pd_deploy.cli import preflight as checking

    if offline:
        found, what = checking.offline(deployment), "without asking hosts"
    else:
        found = checking.run(deployment, image, full_hashes=full_hashes)
        what = f"{len(found.answers)} of {len(deployment.hosts)} hosts answered"
    if as_json:
        typer.echo(checking.as_json(deployment, found))
    else:
        typer.echo(checking.as_text(deployment, found, what))
    raise typer.Exit(FAILED if any(flaw.is_error for flaw in found.flaws) else 0)


@app.command()
def capture(
    file: File,
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[HOST...]", help="Hosts; by default, all.")
    ] = None,
    to: Annotated[Path, typer.Option(metavar="DIR", help="Write the files there.")] = Path(),
    public_addresses: Annotated[
        bool, typer.Option("--public-addresses", help="Leave public addresses as they are.")
    ] = False,
) -> None:
    """Write what the hosts' tools print to capture-HOST.json, to show it to somebody or to test.

    npu-smi, hccn_tool, docker info, ip, sysctl and others. Serial numbers, hardware addresses,
    names of hosts, secrets and public addresses are taken out; look through it all the same.

    Example: pd-deploy capture qwq-3p1d.yaml a --to captures
    """
    from pd_deploy.cli.check import load

    deployment = load(file)
    from pd_deploy.cli import capture as capturing

    written, away = capturing.run(deployment, names or (), to, keep_addresses=public_addresses)
    for path in written:
        typer.echo(f"wrote {path}")
    _tell_away(away)
    raise typer.Exit(FAILED if away else 0)


@app.command()
def deploy(
    file: File,
    image: Image = None,
    stage: Annotated[
        list[Stage] | None,
        typer.Option(help="Run only this stage; can be repeated."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be done; change nothing.")
    ] = False,
    on_failure: Annotated[
        OnFailure,
        typer.Option(help="Go back to the previous generation, or keep the failed one as it is."),
    ] = OnFailure.ROLLBACK,
    forget: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ADDRESS",
            help="Don't clean up this host: it was removed from the file and is gone for good.",
        ),
    ] = None,
    watch: Annotated[
        bool,
        typer.Option(
            "--watch",
            help="Deploy again whenever the file or its source code changes, until Ctrl-C.",
        ),
    ] = False,
    message: Why = None,
) -> None:
    """Bring a service up, and prove it with a completion.

    If the new generation fails, the one that served before is started again. The same happens on
    Ctrl-C and SIGTERM, if it was already stopped; a second one ends the run at once.

    This runs the same flow as `prefect deployment run`, but in this process. If no Prefect server
    is configured (PREFECT_API_URL), one is started on this machine, and kept for the next command.
    It is safe to run again: only what differs from the file is changed.

    With --watch, it runs again after each change of the file or of the directory that `code` names,
    and once more if something changed during a run. Ctrl-C ends watching and leaves the service up.

    Example: pd-deploy deploy qwq-3p1d.yaml
    """
    _refuse_invalid(file)
    _refuse_invalid(file, image)
    from pd_deploy.cli import run
    from pd_deploy.cli.watch import deploy_on_change
    from pd_deploy.flows.deploy import deploy as flow

    def once() -> int:
        return run.here(
            flow,
            file=str(file),
            image=image,
            stages=[entry.value for entry in stage] if stage else None,
            dry_run=dry_run,
            on_failure=on_failure.value,
            forget=forget,
            message=message,
        )

    raise typer.Exit(deploy_on_change(file, once) if watch else once())


@app.command()
def rollback(
    file: File,
    generation: Annotated[
        str | None,
        typer.Argument(
            help="One that `releases` lists, 0 for what was adopted; by default, the previous good "
            "one."
        ),
    ] = None,
    message: Why = None,
) -> None:
    """Bring back a generation that served before.

    It gets its own image, scripts and ranktables, and has to pass the same checks. If it fails,
    the generation that serves now is started again.

    Example: pd-deploy rollback qwq-3p1d.yaml
    """
    _refuse_invalid(file)
    from pd_deploy.cli import run
    from pd_deploy.flows.rollback import rollback as flow

    raise typer.Exit(run.here(flow, file=str(file), generation=generation, message=message))


@app.command()
def recover(file: File, message: Why = None) -> None:
    """Repair what an interrupted run left behind.

    A promoted generation is completed; one that was not is stopped, and the previous one serves
    again.

    Example: pd-deploy recover qwq-3p1d.yaml
    """
    _refuse_invalid(file)
    from pd_deploy.cli import run
    from pd_deploy.flows.recover import recover as flow

    raise typer.Exit(run.here(flow, file=str(file), message=message))


@app.command()
def status(
    file: File,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Print it again every 2 s, until Ctrl-C.")
    ] = False,
) -> None:
    """Show what serves, and how each part of it is.

    Asks all hosts at once and changes nothing. Requests and KV tokens are those since the last
    look; with --watch, since the one before. A host that does not answer is told in its row.

    Exit codes: 0 serving, 3 degraded (something does not run or was not reached, but a whole
    prefill, a whole decode and a proxy are there), 4 down, 1 no host answered.

    Example: pd-deploy status qwq-3p1d.yaml --watch
    """
    from pd_deploy.cli.check import load

    deployment = load(file)
    from pd_deploy.cli import status as showing

    try:
        code = showing.show(deployment, file, as_json=as_json, watch=watch)
    except KeyboardInterrupt:
        code = INTERRUPTED
    raise typer.Exit(code)


@app.command()
def metrics(
    file: File,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="TARGETS.json",
            help="Replace this file, which is never half written; else print.",
        ),
    ] = None,
    serving: Annotated[
        bool,
        typer.Option(
            "--serving",
            help="Ask the hosts what serves: its targets, with the label generation.",
        ),
    ] = False,
) -> None:
    """Print what Prometheus is to scrape of a service.

    The servers, and each proxy if it shows metrics, in the form of `file_sd_configs`, with the
    labels deployment, role, instance, host and server. Without --serving, no host is asked.

    Example: pd-deploy metrics qwq-3p1d.yaml -o /etc/prometheus/pd-deploy/qwq-3p1d.json
    """
    from pd_deploy.cli.check import load

    deployment = load(file)
    from pd_deploy.cli import metrics
    from pd_deploy.planning import scraping

    if serving:
        groups, away = metrics.of_what_serves(deployment)
        _tell_away(away)
    else:
        groups = metrics.of_file(deployment)
    if output:
        metrics.write(output, groups)
        typer.echo(f"wrote {len(groups)} targets to {output}")
    else:
        typer.echo(scraping.text(groups), nl=False)


@app.command()
def releases(
    file: File,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """List the generations, the latest first.

    Each has its date, its image, who deployed it, and what became of it.

    Example: pd-deploy releases qwq-3p1d.yaml
    """
    from pd_deploy.cli import show
    from pd_deploy.cli.check import load

    deployment = load(file)
    from pd_deploy.cli import hosts

    past = hosts.read_past(deployment)
    if as_json:
        _tell_away(past.away)
        typer.echo(past.history.record.model_dump_json(indent=2))
    else:
        typer.echo(show.release_table(past))


@app.command()
def bench(
    file: File,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
    save: Annotated[
        bool,
        typer.Option(
            "--save", help="Keep the figures on the hosts, for new generations to be compared with."
        ),
    ] = False,
    result: Annotated[
        Path | None,
        typer.Option(
            "--result",
            exists=True,
            dir_okay=False,
            help="Measure nothing; judge what `vllm bench serve --save-result` wrote.",
        ),
    ] = None,
) -> None:
    """Measure what serves: time to the first token, time per token, and throughput.

    Sends the load of `gates.benchmark` (by default 100 requests, 8 at a time, of 1024 tokens for
    128) to where clients ask, by the load generator that the image brings, on the proxies' hosts,
    and compares the figures with those on the hosts.

    The exit code is 1 if they are worse than the file allows, or if requests failed.

    Example: pd-deploy bench qwq-3p1d.yaml --save
    """
    from pd_deploy.cli.check import load

    deployment = load(file)
    from pd_deploy.cli import bench as measuring

    raise typer.Exit(
        measuring.run(deployment, file, as_json=as_json, save=save, result_file=result)
    )


@app.command()
def tags(
    file: File,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """List the tags of the image's repositories, and which one `--image newest` would take.

    Says for each repository of the update policy which tags are builds, in quarantine, or of no
    known form. Changes nothing.

    Example: pd-deploy tags qwq-3p1d.yaml
    """
    from pd_deploy.cli.check import load

    deployment = load(file, "newest")
    from pd_deploy.cli import tags as listing

    search, quarantine = listing.read(deployment)
    typer.echo(
        listing.as_json(search, quarantine) if as_json else listing.as_text(search, quarantine)
    )


@app.command()
def image(
    file: File,
    image: Annotated[
        str | None,
        typer.Argument(
            help="By default the file's; a tag alone is one of the file's repository; `newest` for "
            "the newest of its update policy."
        ),
    ] = None,
    on: Annotated[
        str | None,
        typer.Option(metavar="HOST", help="Ask it there; by default once per architecture."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Show what an image is, and by which contract it would be deployed.

    Pulls the image if no run has asked it yet, and reads its scripts, packages and KV connectors
    in a container without devices, network or mounts, which is removed again.

    Example: pd-deploy image qwq-3p1d.yaml newest
    """
    from pd_deploy.cli import image as asking
    from pd_deploy.config.load import load_deployment

    deployment = load_deployment(file, image=None if image == "newest" else image)
    shown = asking.read(deployment, image, on)
    typer.echo(asking.as_json(shown) if as_json else asking.as_text(shown))


@app.command()
def history(
    file: File,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """List the last runs that changed what serves or failed, the latest first.

    Unlike `releases`, it has runs whose generation was pruned, and those that failed before they
    had planned one. The hosts keep the last 50.

    Example: pd-deploy history qwq-3p1d.yaml
    """
    from pd_deploy.cli.check import load

    deployment = load(file)
    from pd_deploy.cli import hosts, show

    past = hosts.read_past(deployment)
    if as_json:
        _tell_away(past.away)
        typer.echo(show.attempts_document(past))
    else:
        typer.echo(show.attempt_table(past))


@app.command()
def logs(
    file: File,
    generation: Annotated[
        str | None, typer.Argument(help="The generation; by default, the latest.")
    ] = None,
    to: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Copy to this directory; by default, to a new one here."),
    ] = None,
    instance: Annotated[
        list[str] | None,
        typer.Option(help="Only the logs of this instance, such as p1; can be repeated."),
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Print what comes, until Ctrl-C; copy nothing.")
    ] = False,
) -> None:
    """Collect a generation's logs from all hosts, or follow them.

    Works after a failure, too. DIR/HOST/INSTANCE/ gets what the container printed, and the log
    files of the server or proxy. If a host does not answer, those of the others are copied, and
    the exit code is 1.

    Example: pd-deploy logs qwq-3p1d.yaml --to ./logs
    """
    from pd_deploy.cli.check import load

    deployment = load(file)
    if follow and to:
        raise typer.BadParameter("expected --follow or --to, found both")
    from pd_deploy.cli import logs as collecting

    if follow:
        try:
            collecting.follow(deployment, generation, instance or ())
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
    directory, away = collecting.collect(deployment, generation, to, instance or ())
    typer.echo(f"copied to {directory}")
    _tell_away(away)
    raise typer.Exit(FAILED if away else 0)


@app.command("exec", context_settings={"allow_interspersed_args": False})
def execute(
    file: File,
    instance: Annotated[str, typer.Argument(help="The instance, such as p1, or the proxy.")],
    command: Annotated[list[str], typer.Argument(metavar="-- COMMAND...")],
) -> None:
    """Run a command in an instance's container.

    What it prints is printed; its exit code is this one's. It gets no input and no terminal, and
    runs on if this is interrupted.

    Example: pd-deploy exec qwq-3p1d.yaml p1 -- npu-smi info
    """
    from pd_deploy.cli.check import load

    deployment = load(file)
    from pd_deploy.cli import execute as executing

    # The `--` before a command stays there when it follows other arguments.
    argv = command[1:] if command[:1] == ["--"] else command
    raise typer.Exit(executing.run(deployment, instance, argv))


@app.command()
def prune(
    file: File,
    adopted: Annotated[
        bool,
        typer.Option("--adopted", help="Remove the adopted service, generation 0, and no other."),
    ] = False,
) -> None:
    """Remove old generations.

    The one that serves, the last good ones and the latest stay; `keep` in the file says how many
    good ones. Every deployment ends with this step. What `adopt` took over stays until it is
    removed by --adopted.

    Example: pd-deploy prune qwq-3p1d.yaml
    """
    _refuse_invalid(file)
    from pd_deploy.cli import run
    from pd_deploy.flows.prune import prune as flow

    raise typer.Exit(run.here(flow, file=str(file), adopted=adopted))


@app.command()
def teardown(
    file: File,
    yes: Annotated[bool, typer.Option("--yes", help="Don't ask for confirmation.")] = False,
) -> None:
    """Remove a deployment from its hosts.

    Removes its containers, files, logs and images, and nothing else.

    Example: pd-deploy teardown qwq-3p1d.yaml --yes
    """
    from pd_deploy.cli.check import load

    deployment = load(file)
    if not yes:
        hosts = ", ".join(deployment.hosts)
        typer.confirm(f"Remove {deployment.name} from hosts {hosts}?", abort=True)
    from pd_deploy.cli import run
    from pd_deploy.flows.teardown import teardown as flow

    raise typer.Exit(run.here(flow, file=str(file), name=deployment.name))


@app.command()
def follow(
    flow_run: Annotated[
        UUID | None,
        typer.Argument(
            help="The flow run's id, as Prefect prints it; by default, the latest of pd-deploy's, "
            "apart from checks of health."
        ),
    ] = None,
) -> None:
    """Follow a flow run on the Prefect server until it ends.

    The exit code is that of `deploy`: 0 if the run completed, 4 if nothing serves, 6 if the
    generation before serves again, 1 otherwise.
    """
    from pd_deploy.cli import run

    raise typer.Exit(run.follow(flow_run))


@app.command()
def notify(
    block: Annotated[
        str | None,
        typer.Argument(metavar="[TYPE/NAME]", help="The notification block that sends."),
    ] = None,
    stop: Annotated[bool, typer.Option("--stop", help="Tell nobody any more.")] = False,
) -> None:
    """Be told of rollbacks, services that are down, and runs that did not happen.

    Makes automations on the Prefect server that send by a notification block, for all services.
    With another block, they send by that one; an automation that was paused stays so. Without
    arguments, shows them.

    Example: pd-deploy notify slack-webhook/ops
    """
    from pd_deploy.cli import notify as notifying

    if block and stop:
        raise typer.BadParameter("expected a block or --stop, found both")
    if block:
        notifying.send(block)
    elif stop:
        notifying.stop()
    else:
        notifying.show()


@app.command(
    context_settings={
        "allow_extra_args": True,
        "allow_interspersed_args": False,
        "help_option_names": [],
        "ignore_unknown_options": True,
    }
)
def lab(context: typer.Context) -> None:
    """Simulate two NPU hosts on this machine."""
    from pd_deploy.lab.cli import app as commands

    commands(context.args, prog_name=context.command_path)


def main() -> NoReturn:
    """Run the command; turn an error into one message and an exit code."""
    for key, value in PREFECT_DEFAULTS.items():
        os.environ.setdefault(key, value)
    collect_seldom()
    # httpx would import its own command line, which is a tenth of what `status` imports.
    sys.modules.setdefault("httpx._main", None)  # type: ignore[arg-type]
    try:
        app(standalone_mode=True)
    except InvalidInput as error:
        _fail(error, INVALID)
    except PdDeployError as error:
        _fail(error, FAILED)
    except OSError as error:
        if not error.filename:
            raise
        # A file of this machine that can't be read or written, such as one that was asked for.
        _fail(f"{error.filename}: {error.strerror}", FAILED)
    except ValueError as error:
        if (faults := _of_prefects_settings(error)) is None:
            raise
        _fail(faults, FAILED)
    sys.exit(0)


def _of_prefects_settings(error: ValueError) -> str | None:
    """Say what is wrong with Prefect's settings, if that is the error: it refuses to be loaded."""
    from pydantic import ValidationError

    if not isinstance(error, ValidationError) or not error.title.endswith("Settings"):
        return None
    # Without what was found: it may be a password.
    faults = [
        ": ".join(filter(None, (".".join(map(str, fault["loc"])), fault["msg"])))
        for fault in error.errors(include_input=False)
    ]
    return (
        f"Prefect can't use its settings: {'; '.join(faults)} → correct the environment's "
        "PREFECT_… variables, or those of Prefect's profile (`prefect config view`)"
    )


def _refuse_invalid(file: Path, image: str | None = None) -> None:
    """End here if the file is invalid, before anything that takes seconds to import."""
    from pd_deploy.cli.check import load

    load(file, image)


def _tell_away(why: Iterable[str]) -> None:
    for line in why:
        tell(line)


def _fail(error: PdDeployError | str, code: int) -> NoReturn:
    tell(error)
    sys.exit(code)
