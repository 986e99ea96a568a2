"""`pd-deploy lab`: simulated hosts on which to try pd-deploy."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from pd_deploy.lab import cache, contracts
from pd_deploy.lab import sglang as sglangs
from pd_deploy.lab import vllm as engine
from pd_deploy.lab.box import INSIDE_ENVIRONMENT
from pd_deploy.lab.errors import LabError
from pd_deploy.lab.host import LabHost
from pd_deploy.lab.lifecycle import DEFAULT_NAME, DEFAULT_SUBNET, Lab, purge_cache, take_down

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Simulate NPU hosts on this machine, to try pd-deploy without hardware.",
)
Name = Annotated[str, typer.Option(help="The lab's name; several can run side by side.")]
Host = Annotated[str, typer.Argument(help="The host: a, b, …", metavar="HOST")]


@app.command()
def up(
    name: Name = DEFAULT_NAME,
    subnet: Annotated[
        str, typer.Option(help="The lab's network; the registry gets .1, the hosts .11, .12, …")
    ] = DEFAULT_SUBNET,
    hosts: Annotated[
        int | None,
        typer.Option(help="How many hosts. [default: 2, or those of the lab that is up]"),
    ] = None,
) -> None:
    """Start the lab: hosts a, b, … with SSH and Docker, and a registry with the stand-in image.

    Needs root. The first start takes a minute or two, because it downloads Debian packages. A lab
    that is already up is kept; what is left of a broken one is removed first. Beyond z, hosts are
    named aa, ab, and so on.
    """
    with _plain_errors():
        _print_access(Lab.up(name, subnet, hosts=hosts, say=_say))


@app.command()
def vllm(name: Name = DEFAULT_NAME) -> None:
    """Prepare a running lab for vLLM itself, on this machine's CPUs.

    The first time, this installs vLLM and vllm-router in a directory of their own (about 3 GB) and
    makes a model of 200 KB. It pushes the image that they run in to the lab's registry.
    """
    with _plain_errors():
        lab = Lab.load(name)
        engine.prepare(_say)
        packages = engine.IMAGE_PACKAGES
        image = lab.push_packages(engine.IMAGE, engine.IMAGE_TAG, packages, say=_say)
    _say(f"vLLM is ready in {engine.HOME}")
    _say(f"  image   {image}")


@app.command()
def sglang(name: Name = DEFAULT_NAME) -> None:
    """Prepare a running lab for SGLang: its stand-in, and its own router.

    The first time, this installs the router beside vLLM's (about 100 MB).
    """
    with _plain_errors():
        image = sglangs.push(Lab.load(name), _say)
    _say("SGLang's stand-in is ready")
    _say(f"  image   {image}")


@app.command()
def down(
    name: Name = DEFAULT_NAME,
    purge: Annotated[
        bool, typer.Option(help="Also delete the cache, which makes the next start fast.")
    ] = False,
) -> None:
    """Stop the lab, and remove everything of it from this machine except the cache."""
    with _plain_errors():
        removed = take_down(name, say=_say)
        if purge and purge_cache():
            _say(f"removed {cache.CACHE}")
        elif not removed:
            _say(f"there is no lab {name}; nothing to remove")


@app.command()
def status(
    name: Name = DEFAULT_NAME,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Show the hosts and whether their SSH servers and Docker engines answer."""
    with _plain_errors():
        rows = [_status_of(host) for host in Lab.load(name).hosts.values()]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    typer.echo(f"{'host':6}{'address':16}{'power':7}{'ssh':6}{'engine':8}containers")
    for row in rows:
        containers = "-" if row["containers"] is None else row["containers"]
        typer.echo(
            f"{row['host']:6}{row['address']:16}{_word(row['on']):7}{_word(row['ssh']):6}"
            f"{_word(row['engine']):8}{containers}"
        )


@app.command()
def push(
    tag: Annotated[
        str, typer.Argument(help="The new build's tag, such as 20250723_27.", metavar="TAG")
    ],
    contract: Annotated[
        str,
        typer.Option(
            help="What its engines and its proxy expect, oldest first: "
            f"{', '.join(contracts.CONTRACTS)}."
        ),
    ] = contracts.OLDEST,
    fault: Annotated[
        list[str] | None,
        typer.Option(
            help="A fault of its engines, such as unhealthy=true; can be given several times. "
            f"There are: {', '.join(contracts.known_faults())}.",
            metavar="KEY=VALUE",
        ),
    ] = None,
    name: Name = DEFAULT_NAME,
) -> None:
    """Push another build of the stand-in image, good or with faults, to try an upgrade."""
    with _plain_errors():
        faults = dict(_fault(text) for text in fault or [])
        lab = Lab.load(name)
        digest = lab.push_build(tag, contract, faults)
    image = f"{lab.image.rpartition(':')[0]}:{tag}"
    _say(f"pushed {image}  {digest[:19]}")
    _say(f"Next: pd-deploy deploy FILE --image {tag}")


@app.command("exec", context_settings={"allow_interspersed_args": False})
def exec_(
    host: Host,
    command: Annotated[
        list[str], typer.Argument(help="The command and its arguments, after --.", metavar="CMD…")
    ],
    name: Name = DEFAULT_NAME,
) -> None:
    """Run a command on a host as root, without SSH: `pd-deploy lab exec a -- docker ps`."""
    with _plain_errors():
        argv = _host(name, host).box.command(command)
    environment = {**INSIDE_ENVIRONMENT, "TERM": os.environ.get("TERM", "dumb")}
    sys.exit(subprocess.call(argv, env=environment))


@app.command()
def cut(host: Host, name: Name = DEFAULT_NAME) -> None:
    """Unplug a host's network cable: its processes keep running, but can't be reached."""
    with _plain_errors():
        _host(name, host).cut()


@app.command()
def mend(host: Host, name: Name = DEFAULT_NAME) -> None:
    """Plug a host's network cable in again."""
    with _plain_errors():
        _host(name, host).mend()


@app.command()
def reboot(host: Host, name: Name = DEFAULT_NAME) -> None:
    """Reboot a host as a power failure does: all on it ends at once, and its disk stays."""
    with _plain_errors():
        _host(name, host).reboot()
    _say(f"{host} is up again; what ran on it has ended")


def _fault(text: str) -> tuple[str, object]:
    key, equals, value = text.partition("=")
    known = contracts.known_faults()
    if key not in known:
        raise LabError(f"--fault: expected one of {', '.join(known)}, found {key!r}")
    if not equals:
        raise LabError(f"--fault: expected KEY=VALUE, such as {key}={json.dumps(known[key])}")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        raise LabError(
            f"--fault {key}: expected a number, true, false or null, found {value!r}"
        ) from None


def _host(name: str, host: str) -> LabHost:
    hosts = Lab.load(name).hosts
    if host not in hosts:
        raise LabError(f"expected a host of lab {name} ({', '.join(hosts)}), found {host!r}")
    return hosts[host]


def _status_of(host: LabHost) -> dict[str, str | int | bool | None]:
    return {
        "host": host.name,
        "address": host.address,
        "on": host.on,
        "ssh": host.ssh_answers(),
        "engine": host.engine_answers(),
        "containers": host.containers(),
    }


def _word(state: object) -> str:
    return "up" if state else "down"


def _say(line: str) -> None:
    typer.echo(line)


def _print_access(lab: Lab) -> None:
    _say(f"\nlab {lab.name} is ready")
    for host in lab.hosts.values():
        _say(f"  host {host.name}  {host.address}")
    for image, digest in lab.images.items():
        _say(f"  image   {image}  {digest[:19]}")
    first = next(iter(lab.hosts.values()))
    options = f"-i {lab.ssh_key} -o UserKnownHostsFile={lab.known_hosts}"
    _say(f"  try     ssh {options} root@{first.address} docker info")


@contextmanager
def _plain_errors() -> Iterator[None]:
    try:
        yield
    except LabError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
