"""`pd-deploy status`: what serves, and how each part of it is."""

import asyncio
import dataclasses
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import typer

from pd_deploy.blocks.opening import open_session
from pd_deploy.cli import exit_codes, hosts, looks, next_runs
from pd_deploy.cli.looks import LastLook, Since
from pd_deploy.cli.next_runs import NextRuns
from pd_deploy.cli.tables import aligned
from pd_deploy.config.models import Deployment, Health
from pd_deploy.records import mending
from pd_deploy.records.adopted import SHOWN
from pd_deploy.steps.session import Session
from pd_deploy.steps.verify import looking
from pd_deploy.steps.verify.looking import HostLook, InstanceLook, Look

EVERY_S = 2.0
CLEAR = "\x1b[H\x1b[2J"


@dataclasses.dataclass(frozen=True)
class Told:
    """A look, and what it means beside the last one.

    Attributes:
        options: what the file lets `pd-health` do; its next check goes by that, too.
        next: when the next scheduled runs are due.
        last: when the last look was; None if there was none.
        since: by instance, what it has served since then.
    """

    look: Look
    options: Health
    next: NextRuns
    when: datetime
    last: datetime | None
    since: dict[str, Since]


def show(deployment: Deployment, file: Path, *, as_json: bool, watch: bool) -> int:
    """Print the status of a service, again and again if asked; return the exit code."""
    with hosts.asking([deployment]):
        return asyncio.run(_show(deployment, file, as_json=as_json, watch=watch))


async def _show(deployment: Deployment, file: Path, *, as_json: bool, watch: bool) -> int:
    kept = looks.path_of(deployment.name, file)
    last = looks.read(kept)
    async with open_session(deployment) as session:
        while True:
            told = await tell(session, last, file.stem)
            if watch and not as_json:
                typer.echo(CLEAR, nl=False)
            typer.echo(as_document(told) if as_json else text(told))
            last = looks.of(told.look.instances, told.when)
            if not watch:
                looks.write(kept, last)
                return exit_codes.of([told.look.verdict])
            await asyncio.sleep(EVERY_S)


async def tell(session: Session, last: LastLook | None, file: str = "") -> Told:
    """Look at a service, and ask for its next scheduled runs at the same time."""
    due = asyncio.ensure_future(next_runs.told(filter(None, [session.deployment.name, file])))
    try:
        look = await looking.look(session)
        since = {i.name: looks.since(last, i) for i in look.instances}
        options, when = session.deployment.health, datetime.now(UTC)
        return Told(look, options, await due, when, last.when if last else None, since)
    finally:
        due.cancel()


def as_document(told: Told) -> str:
    """Format a status for programs."""
    look, release = told.look, told.look.release
    record = look.history.record
    outcome = record.outcomes.get(release.generation) if release else None
    instances = [
        {
            k: v
            for k, v in dataclasses.asdict(i).items()
            if k not in ("run", "requests", "kv_tokens")
        }
        | {"since_last_look": dataclasses.asdict(told.since[i.name])}
        for i in look.instances
    ]
    document: dict[str, Any] = {
        "deployment": look.status.deployment,
        "verdict": look.verdict,
        "state": look.trouble or look.status.state,
        "remark": look.status.remark,
        "generation": look.status.generation,
        "image": look.status.image or None,
        "digest": release and release.digest,
        "contract": release and release.contract,
        "started_by": release and release.started_by,
        "created": release and release.created,
        "promoted_by": outcome and outcome.by,
        "promoted": outcome and outcome.when,
        "instances": instances,
        "hosts": [_host_document(host) for host in look.hosts],
        "drift": look.drift,
        "drift_unknown": look.drift_unknown,
        "hold": record.hold and record.hold.model_dump(mode="json"),
        "mending": record.mending and record.mending.model_dump(mode="json"),
        "quarantine": {k: q.model_dump(mode="json") for k, q in record.quarantine.items()},
        "next_nightly": told.next.nightly,
        "next_check": told.next.check,
        "looked": told.when,
        "last_look": told.last,
    }
    return json.dumps(document, indent=2, default=str)


def _host_document(host: HostLook) -> dict[str, Any]:
    lease = host.lease and host.lease.owner
    document = dataclasses.asdict(dataclasses.replace(host, lease=None))
    return document | {"lease": lease and lease.model_dump(mode="json")}


def text(told: Told) -> str:
    """Format a status for people."""
    look = told.look
    return "\n".join(
        [
            f"{look.status.deployment}: {_verdict(look)}",
            *aligned([*_facts(told)]),
            "",
            *aligned([*_instances(told)]),
            "",
            *aligned([("host", "devices"), *((_where(h), _devices(h)) for h in look.hosts)]),
        ]
    )


def _verdict(look: Look) -> str:
    words = [str(look.verdict or "not known")]
    if look.trouble:
        words.append(look.trouble)
    return "; ".join(filter(None, (": ".join(words), look.status.remark)))


def _facts(told: Told) -> Iterator[tuple[str, str]]:
    if told.look.status.verdict:
        yield from _of_hosts(told)
    yield "next nightly", told.next.nightly
    yield "next check", told.next.check


def _of_hosts(told: Told) -> Iterator[tuple[str, str]]:
    """List what is on the hosts, of which at least one answered."""
    look, release, record = told.look, told.look.release, told.look.history.record
    if service := record.adopted_serving:
        yield "generation", f"{SHOWN}, since {_time(service.when)} by {service.by}"
        yield "image", service.image
    if release:
        yield "generation", f"{release.generation}{_since(look.status.since)}"
        yield "image", f"{release.chosen_image} ({release.digest[:19]})"
        if release.contract:
            yield "contract", release.contract
        yield "created", f"{_time(release.created)} by {release.started_by}"
        outcome = record.outcomes.get(release.generation)
        if outcome and outcome.by != release.started_by:
            yield "promoted", f"{_time(outcome.when)} by {outcome.by}"
    holdings = {str(host.lease): None for host in look.hosts if host.lease}
    yield "lease", "; ".join(holdings) or "free"
    if record.hold:
        yield "held by", str(record.hold)
    if held_back := mending.told(record.mending, told.options, told.when):
        yield "health", held_back
    drift = f"not known: {look.drift_unknown}" if look.drift is None else look.drift or "none"
    yield "drift", drift
    listed = (f"{q.image} ({digest[:19]})" for digest, q in record.quarantine.items())
    yield "quarantine", ", ".join(listed) or "none"


def _instances(told: Told) -> Iterator[tuple[str, ...]]:
    ago = f" in {_span((told.when - told.last).total_seconds())}" if told.last else ""
    yield (
        "instance",
        "role",
        "host",
        "devices",
        "container",
        "health",
        "since",
        "restarts",
        f"requests{ago}",
        f"KV tokens{ago}",
    )
    for i in told.look.instances:
        since = told.since[i.name]
        yield (
            i.name,
            i.role,
            i.host,
            ranges(i.devices),
            i.container,
            i.health,
            _time(i.since) if i.since else "",
            _restarts(i),
            _count(since.requests, i, told),
            _count(since.kv_tokens, i, told),
        )


def _restarts(instance: InstanceLook) -> str:
    if not instance.run:
        return ""
    if instance.restarts is None:
        return "not counted"
    return f"{instance.restarts}{', last outside' if instance.started_outside else ''}"


def _count(number: int | None, instance: InstanceLook, told: Told) -> str:
    if number is not None:
        return str(number)
    return "" if told.last or instance.requests is None else "first look"


def _where(host: HostLook) -> str:
    return f"{host.name} ({host.address})"


def _devices(host: HostLook) -> str:
    return host.away or host.devices or "not told by this engine"


def ranges(numbers: tuple[int, ...]) -> str:
    """Write numbers as the file does: `0-3,8`."""
    parts: list[tuple[int, int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1] = parts[-1][0], number
        else:
            parts.append((number, number))
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in parts)


def _since(when: datetime | None) -> str:
    return f", since {_time(when)}" if when else ""


def _time(when: datetime) -> str:
    return f"{when.astimezone():%Y-%m-%d %H:%M:%S}"


def _span(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"
