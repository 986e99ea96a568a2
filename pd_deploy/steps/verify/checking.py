"""Checking whether a service serves, as `pd-health` does, and what of it has surely failed.

A container that has ended is sure at once. A server that runs and does not answer is asked again,
because one that is busy answers late: what is late, or out of reach, is told, and never counts as
failed. One whose port is open and that gives no answer at many checks in a row hangs, and has
failed. Changes nothing.
"""

import asyncio
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

import httpx

from pd_deploy.errors import PdDeployError
from pd_deploy.hosts.concurrent import together
from pd_deploy.hosts.host import Host
from pd_deploy.records import generations, mending
from pd_deploy.records.releases import Silence
from pd_deploy.records.status import Verdict
from pd_deploy.steps import adopting
from pd_deploy.steps.rollout import Rollout
from pd_deploy.steps.session import Session
from pd_deploy.steps.verify import adopted, looking, requests
from pd_deploy.steps.verify.answers import NoAnswer, ask
from pd_deploy.steps.verify.looking import HEALTHY, Cause, InstanceLook, Look

LOOKS = 3
"""How often a service is looked at before what runs and does not answer counts as failed."""
LOOKS_FOR_HOSTS = 2
"""The same for hosts that are away: each look waits for them, for `gates.connect`."""
PAUSE_S = 1.0
COMPLETION_S = 20.0
"""How long a completion through a proxy may take: a service that is busy has a queue."""
TOKENS = 2
"""Of that completion: prefill makes the first one, and the second follows from its KV."""
BUSY = frozenset({httpx.codes.TOO_MANY_REQUESTS, httpx.codes.SERVICE_UNAVAILABLE})
"""What a proxy answers that has too much to do, or holds its clients up."""


@dataclass(frozen=True)
class Checked:
    """A service as it was found.

    Attributes:
        look: the last one.
        failed: by name of an instance, or of a proxy, that has surely failed: which run of its
            container did; empty if that has ended, or is gone.
        told: all that is not as it should be, in a line; empty if all is well.
        answered: how long the slowest proxy took for a completion, in s; None if there was none.
        by_completion: whether only completions show that something has failed: none came through
            any proxy.
        silent: what runs and gives no answer, by instance, and at how many checks.
    """

    look: Look
    failed: dict[str, str] = field(default_factory=dict)
    told: str = ""
    answered: float | None = None
    by_completion: bool = False
    silent: Mapping[str, Silence] = field(default_factory=dict)

    @property
    def away(self) -> list[str]:
        """Hosts that did not answer."""
        return [f"{host.name} ({host.address})" for host in self.look.hosts if host.away]

    @property
    def working(self) -> str:
        """Who works on the service now; empty if nobody does."""
        record = self.look.history.record
        if record.hold:
            return f"it is held by {record.hold}"
        return "; ".join(dict.fromkeys(_working(self.look)))

    @property
    def word(self) -> str:
        """The verdict: serving, degraded or down; down, too, where no host answered. Where clients
        get completions, it is not down, whatever can't be seen."""
        verdict = self.look.status.verdict or Verdict.DOWN
        if self.answered is not None and verdict == Verdict.DOWN:
            return str(Verdict.DEGRADED)
        if self.told and verdict == Verdict.SERVING:
            verdict = Verdict.DOWN if self.by_completion else Verdict.DEGRADED
        return str(verdict)


def _working(look: Look) -> list[str]:
    """Say who holds a lease, and has shown that it lives."""
    lasts = look.session.deployment.gates.lease_lasts
    return [str(host.lease) for host in look.hosts if host.lease and host.lease.age < lasts]


async def check(session: Session, now: datetime) -> Checked:
    """Look at a service, ask each proxy for a completion as a client would; say what has failed.

    A completion that comes through one proxy shows that servers answer; so another one through
    which none comes has failed itself.
    """
    looks = [await looking.look(session, as_deployed=True)]
    while _is_in_doubt(looks):
        await asyncio.sleep(PAUSE_S)
        looks.append(await looking.look(session, as_deployed=True))
    last = looks[-1]
    options, before = session.deployment.health, last.history.record.mending
    counted = mending.silences(before, silent(looks, now), options, now)
    lost = failed(looks, now) | mending.hung(counted, options)
    checked = Checked(last, lost, told=last.trouble, silent=counted)
    if last.status.verdict != Verdict.SERVING:
        return await _as_clients_see(checked)
    entrances = _entrances(last)
    asked = await together(_completion(last.session, entrance) for entrance in entrances)
    faults = [answer for answer in asked if answer.fault]
    if not faults:
        return replace(checked, answered=max(answer.seconds for answer in asked))
    told = [f"a completion through {a.entrance.where} failed: {a.fault}" for a in faults]
    sure = {answer.entrance.proxy for answer in faults if answer.is_sure}
    all_fail, one_serves = len(sure) == len(asked), len(faults) < len(asked)
    lost = {i.name: i.run for i in last.instances if all_fail or (one_serves and i.name in sure)}
    told = [checked.told, *told] if checked.told else told
    return replace(checked, failed=lost, told="; ".join(told), by_completion=all_fail)


async def _as_clients_see(checked: Checked) -> Checked:
    """Ask for completions where hosts don't answer: what is on them may serve all the same, as when
    only their Docker engine hangs."""
    look = checked.look
    healthy = {i.name for i in look.instances if i.health == HEALTHY}
    if not checked.away or look.history.record.closed or not look.history.record.serving:
        return checked
    entrances = [entrance for entrance in _entrances(look) if entrance.proxy in healthy]
    asked = await together(_completion(look.session, entrance) for entrance in entrances)
    if not asked or any(answer.fault for answer in asked):
        return checked
    told = f"{checked.told}; clients get completions all the same"
    return replace(checked, told=told, answered=max(answer.seconds for answer in asked))


def failed(looks: Sequence[Look], now: datetime) -> dict[str, str]:
    """List what has surely failed, with the run of its container; of an adopted service nothing,
    as it is not restarted. Pure.

    What has ended or is gone, and the proxies where a run has left them closed; and what runs, but
    refused or answered with an error at each look, unless it may still be loading: then nobody
    listens at its port yet.
    """
    last = looks[-1]
    if last.release is None:
        return {}
    serves = {i.name for i in last.instances if i.health == HEALTHY}
    lost = dict.fromkeys(
        last.session.topology.proxy_names if last.history.record.closed else (), ""
    )
    lost |= {i.name: "" for i in last.instances if _has_ended(i)}
    for instance in last.instances if len(looks) >= LOOKS else ():
        is_loading = instance.cause == "refused" and _may_load(instance, last, serves, now)
        if all(_was(instance, look, "refused", "status") for look in looks) and not is_loading:
            lost[instance.name] = instance.run
    return lost


def silent(looks: Sequence[Look], now: datetime) -> dict[str, str]:
    """List what runs, with its port open, and gave no answer at any look, unless it may still be
    loading; with the run of its container. Pure.

    A proxy may only wait for a server: proxies count if no server does. Of an adopted service
    nothing is counted, as nothing of it is restarted.
    """
    last = looks[-1]
    if last.release is None:
        return {}
    serves = {i.name for i in last.instances if i.health == HEALTHY}
    runs = {
        i.name: i.run
        for i in last.instances
        if len(looks) >= LOOKS
        and all(_was(i, look, "silent") for look in looks)
        and not _may_load(i, last, serves, now)
    }
    servers = {i.name for i in last.instances if i.role != "proxy"}
    return {name: run for name, run in runs.items() if name in servers} or runs


def to_restart(rollout: Rollout, checked: Checked, tried: bool) -> frozenset[str]:
    """List what runs and has to start again, unless somebody has restarted it since it was looked
    at. Pure.

    A completion that failed does not say which server is to blame: proxies start again alone where
    servers can be left, and all does where that was tried.
    """
    runs = {
        state.labels[generations.INSTANCE]: state.run
        for states in rollout.containers.values()
        for state in states
        if state.name in rollout.plan.roles
    }
    names = {name for name, run in checked.failed.items() if run and runs.get(name) == run}
    if not checked.by_completion or tried:
        return frozenset(names)
    session = rollout.session
    first, proxies = session.topology.instances[0], session.topology.proxy_names
    is_one_set = session.engine.restarts_with(session.deployment, session.topology, first.name)
    return frozenset(names if is_one_set >= names else names.intersection(proxies))


def _has_ended(instance: InstanceLook) -> bool:
    return instance.container not in ("", *generations.RUNNING)


def _was(instance: InstanceLook, look: Look, *causes: Cause) -> bool:
    """Tell whether a look found the same run of an instance failing by one of these causes."""
    return any(i.run == instance.run and i.cause in causes for i in look.instances)


def _may_load(instance: InstanceLook, look: Look, serves: set[str], now: datetime) -> bool:
    """Tell whether a server may still be loading: it was started lately, and none that it links to
    while it loads serves already."""
    session = look.session
    if instance.name in session.topology.proxy_names or instance.since is None:
        return False
    linked = session.engine.restarts_with(session.deployment, session.topology, instance.name)
    ready = timedelta(seconds=session.deployment.gates.ready)
    servers = linked.difference(session.topology.proxy_names)
    return now - instance.since < ready and not servers & serves


def _is_in_doubt(looks: Sequence[Look]) -> bool:
    """Tell whether to look again: something does not answer, and nothing has surely failed."""
    last = looks[-1]
    if not last.status.generation or _working(last):
        return False
    if any(host.away for host in last.hosts):
        return len(looks) < LOOKS_FOR_HOSTS
    if any(map(_has_ended, last.instances)):
        return False
    unread = any(host.devices.startswith(looking.NOT_KNOWN) for host in last.hosts)
    return (unread or any(i.cause for i in last.instances)) and len(looks) < LOOKS


@dataclass(frozen=True)
class _Entrance:
    """Where clients ask: a proxy, at its address and port; and the body of what they ask."""

    proxy: str
    host: Host
    address: str
    port: int
    body: Mapping[str, Any]

    @property
    def where(self) -> str:
        """Its URL."""
        return f"http://{self.address}:{self.port}"


def _entrances(look: Look) -> list[_Entrance]:
    session, service = look.session, look.history.record.adopted_serving
    if service:
        body = adopted.body(session, service)
        hosts = {proxy: adopting.host_of(session, proxy) for proxy in service.proxies}
        return [
            _Entrance(proxy.instance, host, host.address, service.port_of(proxy), body)
            for proxy, host in hosts.items()
        ]
    smoke = session.deployment.smoke
    body = requests.prompt(session.deployment, smoke.prompt, smoke.max_tokens)
    return [
        _Entrance(proxy.name, session.host(proxy.host), proxy.address, proxy.port, body)
        for proxy in session.topology.proxies
    ]


@dataclass(frozen=True)
class _Asked:
    """What a proxy gave for a completion.

    Attributes:
        fault: what came in its place; empty if it came.
        is_sure: whether that is sure to be a fault of the service.
        seconds: how long the answer took.
    """

    entrance: _Entrance
    fault: str = ""
    is_sure: bool = False
    seconds: float = 0.0


async def _completion(session: Session, entrance: _Entrance) -> _Asked:
    """Ask a proxy for a completion where clients ask, again if it fails."""
    url, own = f"{entrance.where}{requests.COMPLETIONS}", str(uuid.uuid4())
    body = {**entrance.body, "max_tokens": TOKENS, **session.engine.cache_busting_fields(own)}
    found, is_sure = "", True
    headers = session.authorization
    async with entrance.host.http(entrance.address, entrance.port, headers=headers) as client:
        for turn in range(LOOKS):
            if turn:
                await asyncio.sleep(PAUSE_S)
            begin = time.monotonic()
            try:
                await ask(client, url, body, timeout=COMPLETION_S)
            except (NoAnswer, PdDeployError) as error:
                found = error.message if isinstance(error, PdDeployError) else str(error)
                is_sure = is_sure and _is_of_the_service(error)
                if turn and not is_sure:
                    break
            else:
                return _Asked(entrance, seconds=time.monotonic() - begin)
    return _Asked(entrance, found, is_sure)


def _is_of_the_service(error: Exception) -> bool:
    """Tell whether what came in place of a completion is sure to be a fault of the service: not
    where it came late, the way there was lost, or the request was not to its liking."""
    if isinstance(error, PdDeployError) or isinstance(error.__cause__, httpx.TimeoutException):
        return False
    status = error.status if isinstance(error, NoAnswer) else None
    return status is None or (status >= 500 and status not in BUSY)
