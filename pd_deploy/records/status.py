"""What serves, by the records and the containers of a deployment's hosts. Pure.

All that says whether a service serves, `status` as well as `fleet status`, judges by `verdict`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Protocol, TypeVar

from pd_deploy.hosts.container_values import DEPLOYMENT_LABEL
from pd_deploy.records.adopted import SHOWN, AdoptedService
from pd_deploy.records.generations import GENERATION, INSTANCE, ROLE, RUNNING, latest
from pd_deploy.records.releases import History, Place, Release

SERVES = "serves"
ROLES = ("prefill", "decode", "proxy")
GONE = "gone"


class Verdict(StrEnum):
    """Whether clients get answers.

    Serving: all of the promoted generation runs. Degraded: something of it does not, or was not
    reached, but there is a whole prefill, a whole decode and a proxy. Down: there is not, or the
    service is closed to clients, or nothing was promoted.
    """

    SERVING = "serving"
    DEGRADED = "degraded"
    DOWN = "down"


class AnyContainer(Protocol):
    """What is needed of a container, listed or inspected."""

    @property
    def id(self) -> str:
        """Its id."""
        ...

    @property
    def name(self) -> str:
        """Its name."""
        ...

    @property
    def labels(self) -> dict[str, str]:
        """Its labels."""
        ...

    @property
    def status(self) -> str:
        """Docker's word for its state."""
        ...


C = TypeVar("C", bound=AnyContainer)


@dataclass(frozen=True)
class Member:
    """An instance, or a proxy, of what is to serve.

    Attributes:
        host: the address of its host.
        trouble: why it does not serve; empty if it does.
    """

    name: str
    role: str
    pod: str
    host: str
    trouble: str = ""


@dataclass(frozen=True)
class Status:
    """A deployment as its hosts have it.

    Attributes:
        generation: the one that serves, or is to; empty if there is none.
        image: its image, with the tag.
        since: when it was promoted last.
        state: `SERVES`, or what is not as it should be.
        remark: what else people want to know.
        verdict: whether clients get answers, as far as can be seen from here; None if no host was
            asked, or none answered.
    """

    deployment: str
    generation: str = ""
    image: str = ""
    since: datetime | None = None
    state: str = SERVES
    remark: str = ""
    verdict: Verdict | None = None

    @property
    def serves(self) -> bool:
        """Whether all of it runs and clients can connect."""
        return self.verdict == Verdict.SERVING


def status(
    deployment: str,
    history: History,
    containers: Mapping[str, Sequence[AnyContainer]],
    away: Mapping[str, str],
    unhealthy: Mapping[str, str] | None = None,
) -> Status:
    """Say what serves.

    Args:
        history: what the hosts that answered know of the deployment's past.
        containers: all containers of each host that answered, by its address.
        away: the hosts that could not be looked at, by address: name, address and why.
        unhealthy: instances that run and do not answer as they should, and what was found, if they
            were asked.
    """
    ours = {
        address: [c for c in listed if c.labels.get(DEPLOYMENT_LABEL) == deployment]
        for address, listed in containers.items()
    }
    release, record = history.serving, history.record
    troubles = [*away.values()]
    if not containers:
        return Status(deployment, state="; ".join(troubles))
    if service := record.adopted_serving:
        return _of_adopted(deployment, service, history, containers, away, unhealthy)
    if release is None:
        running = sorted(c.name for host in ours.values() for c in host if c.status in RUNNING)
        if running:
            troubles.append(f"no generation serves, but {', '.join(running)} runs")
        elif history.generations:
            troubles.append("no generation serves")
        elif not away:
            troubles.append("nothing is deployed")
        state, remark = "; ".join(troubles), _last_attempt(history)
        return Status(deployment, state=state, remark=remark, verdict=Verdict.DOWN)
    parts = members(release, ours, away, unhealthy or {})
    troubles += _troubles(release, parts, ours, away)
    if record.closed:
        troubles.append(f"closed to clients since {record.closed:%Y-%m-%d %H:%M:%S}")
    outcome = record.outcomes.get(release.generation)
    return Status(
        deployment,
        release.generation,
        release.chosen_image,
        outcome.when if outcome else None,
        "; ".join(troubles) or SERVES,
        _last_attempt(history),
        verdict(parts, bool(record.closed), bool(troubles)),
    )


def _of_adopted(
    deployment: str,
    service: AdoptedService,
    history: History,
    containers: Mapping[str, Sequence[AnyContainer]],
    away: Mapping[str, str],
    unhealthy: Mapping[str, str] | None,
) -> Status:
    """Say whether the adopted service serves. Shells keep its containers alive: as long as its
    servers were not asked, that tells little."""
    parts = [
        Member(
            c.name,
            c.role,
            c.pod or c.instance,
            c.host,
            _unasked(c.host, containers, away)
            or _ended([one for one in containers[c.host] if one.id == c.id])
            or (unhealthy or {}).get(c.instance, ""),
        )
        for c in service.containers
    ]
    troubles = [*away.values()]
    troubles += [
        f"{p.name} on {p.host}: {p.trouble}" for p in parts if p.trouble and p.host not in away
    ]
    closed = history.record.closed
    if closed:
        troubles.append(f"closed to clients since {closed:%Y-%m-%d %H:%M:%S}")
    said = "" if unhealthy is not None else "its servers were not asked, only Docker"
    return Status(
        deployment,
        SHOWN,
        service.image,
        state="; ".join(troubles) or SERVES,
        remark="; ".join(filter(None, (said, _last_attempt(history)))),
        verdict=verdict(parts, bool(closed), bool(troubles)),
    )


def verdict(parts: Iterable[Member], closed: bool, troubled: bool) -> Verdict:
    """Judge whether a service serves.

    Args:
        parts: all of the promoted generation.
        closed: whether clients can't connect.
        troubled: whether anything is not as it should be.
    """
    whole: dict[tuple[str, str], bool] = {}
    for part in parts:
        key = part.role, part.pod
        whole[key] = whole.get(key, True) and not part.trouble
    answering = {role for (role, _), is_whole in whole.items() if is_whole}
    if closed or not answering.issuperset(ROLES):
        return Verdict.DOWN
    return Verdict.DEGRADED if troubled else Verdict.SERVING


def members(
    release: Release,
    ours: Mapping[str, Sequence[AnyContainer]],
    away: Mapping[str, str],
    unhealthy: Mapping[str, str],
) -> list[Member]:
    """List all instances and proxies of a release, with what is wrong with each."""
    found = {
        host.name: containers_of(release, ours.get(host.address, ()))
        for host in release.hosts.values()
    }
    return [
        Member(
            name,
            place.role,
            place.pod,
            address := release.hosts[place.host].address,
            _unasked(address, ours, away)
            or _ended(found[place.host].get(name, ()))
            or unhealthy.get(name, ""),
        )
        for name, place in (release.instances or _by_labels(found)).items()
    ]


def containers_of(release: Release, listed: Iterable[C]) -> dict[str, list[C]]:
    """Group a release's containers on a host by instance.

    Where only the proxy changed, that of the servers' own generation is kept, and ended.
    """
    by_instance: dict[str, list[C]] = {}
    for container in listed:
        if container.labels.get(GENERATION) in (release.generation, release.servers):
            name = container.labels.get(INSTANCE, container.name)
            by_instance.setdefault(name, []).append(container)
    return by_instance


def _by_labels(found: Mapping[str, Mapping[str, Sequence[AnyContainer]]]) -> dict[str, Place]:
    """Where the instances are of a release that does not say so: older versions wrote none."""
    return {
        name: Place(role=containers[0].labels.get(ROLE, ""), pod=name, host=host)
        for host, by_instance in found.items()
        for name, containers in by_instance.items()
    }


def _unasked(
    address: str, ours: Mapping[str, Sequence[AnyContainer]], away: Mapping[str, str]
) -> str:
    if address in away:
        return "no answer from its host"
    return "" if address in ours else "its host has left the file, and was not asked"


def _ended(containers: Sequence[AnyContainer]) -> str:
    if any(c.status in RUNNING for c in containers):
        return ""
    return containers[0].status if containers else GONE


def _troubles(
    release: Release,
    parts: Sequence[Member],
    ours: Mapping[str, Sequence[AnyContainer]],
    away: Mapping[str, str],
) -> list[str]:
    """Name what of a release does not serve, host by host."""
    troubles = []
    for host in release.hosts.values():
        where = f"{host.name} ({host.address})"
        if host.address in away:
            continue
        if host.address not in ours:
            troubles.append(f"{where} has left the file, and was not asked")
        elif not containers_of(release, ours[host.address]):
            troubles.append(f"nothing of it is on {where}")
        else:
            here = [part for part in parts if part.host == host.address]
            troubles += [f"{p.name} on {where}: {p.trouble}" for p in here if p.trouble]
    return troubles


def _last_attempt(history: History) -> str:
    """Tell how the youngest generation ended, if it is not the one that serves."""
    youngest = latest(history.generations)
    if not youngest or str(youngest) == history.record.serving:
        return ""
    outcome = history.record.outcomes.get(str(youngest))
    if outcome and outcome.result == "good":
        return ""
    return f"last attempt {youngest}: {outcome.result if outcome else 'unfinished'}"
