"""The benchmark gate: a load on a new generation before clients can connect, and its judgement.

The load comes from the load generator that the image brings. It runs in a container on the proxy's
host and asks the proxy there, so nothing between hosts and no other machine is in the figures, and
no port is opened. The container is a server's where the host has one: it has the model's directory,
as a proxy's has, and besides the devices without which older versions of vLLM don't start. It
needs none of them itself. A container of its own would have the service's key in its settings, and
could stay behind; a command ends with the call that waits for it.
"""

import asyncio
import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from pd_deploy.config.models import Benchmark
from pd_deploy.config.topology import Proxy
from pd_deploy.engines import load_generator
from pd_deploy.engines.load_generator import KEY_VARIABLE, Answer, Asked
from pd_deploy.errors import BenchmarkFailed, ContainerMissing
from pd_deploy.hosts.concurrent import together
from pd_deploy.hosts.host import Host
from pd_deploy.records import benchmark, generations, load_results
from pd_deploy.records.benchmark import Figures, Judgement, Load, Sample
from pd_deploy.records.releases import History
from pd_deploy.steps import containers, throwaway
from pd_deploy.steps.report import Report
from pd_deploy.steps.rollout import Rollout
from pd_deploy.steps.session import Session

SHOWN_FAULTS = 3
SAID_LINES = 5
BY_THE_GATE = "gates.benchmark"
LACKS_IT = "the image does not have it"
LOOK_S = 120.0
"""A file is read, but a container's first start takes long on a busy disk."""
GRACE_S = 30.0
"""How much longer than the load itself its command may take: it bounds the load."""


@dataclass(frozen=True)
class Benchmarked:
    """A load's figures, and what they mean beside those that the hosts keep.

    Attributes:
        read: whether somebody else has measured them.
    """

    figures: Figures
    judgement: Judgement
    faults: tuple[str, ...] = ()
    read: bool = False

    @property
    def failed(self) -> bool:
        """Whether a gate would not let it through."""
        return bool(self.faults or self.judgement.faults)


@dataclass(frozen=True)
class _Carried:
    """How a service carried a load; `seconds` is None if that did not end in time."""

    samples: tuple[Sample, ...]
    seconds: float | None
    version: str


def is_due(rollout: Rollout) -> bool:
    """Tell whether a generation is to carry the load of `gates.benchmark`: not if it has passed all
    gates before, so that a way back, a recovery and a run with nothing to do are not kept up."""
    gates = rollout.session.deployment.gates
    return gates.benchmark is not None and rollout.plan.generation not in rollout.history.good


async def find_generator(rollout: Rollout) -> Report:
    """Look for the load generator in the image, on the first proxy's host, before anything is
    stopped. Where the user's own code runs, it is that which would have it, so nobody is asked.

    Raises:
        BenchmarkFailed: the image does not have it, or does not say so.
    """
    session, where = rollout.session, rollout.session.topology.home
    host, proxy = session.host(where), session.topology.proxies[0]
    generator = session.engine.load_generator(session.deployment, session.topology)
    if rollout.code_on(where):
        return Report("find load generator", generator.name, where, False, "not looked for")
    try:
        output, _ = await throwaway.output(
            session,
            host,
            rollout.plan.pinned_image,
            generator.look_in_container(),
            LOOK_S,
            name=throwaway.name_of(session),
        )
        answer = load_generator.parse(output)
    except TimeoutError:
        raise _not_made(session, proxy, f"the image gave no answer within {LOOK_S:g} s") from None
    except ValueError as said:
        raise _not_made(session, proxy, f"asked for it, the image printed: {said}") from None
    if answer.missing:
        raise _not_made(session, proxy, f"{LACKS_IT}: {answer.missing}")
    found = f"{generator.name} {answer.version}".rstrip()
    return Report("find load generator", generator.name, where, False, found)


async def gate(rollout: Rollout) -> Report:
    """Let the proxies, which only the smoke test can reach, carry a load; keep its figures.

    Raises:
        BenchmarkFailed: it is slower than it may be, requests failed, or the load could not be
            made.
        InstanceDied: a server or a proxy has ended under the load.
    """
    session = rollout.session
    given, clock = session.deployment.gates.benchmark, asyncio.get_running_loop().time
    begin = clock()
    assert given is not None
    proxies = session.topology.proxies
    addresses = await together(containers.let_smoke_test_in(rollout, p.name) for p in proxies)
    attempt = rollout.attempt
    try:
        carried = await _carried(session, list(zip(proxies, addresses, strict=True)), given)
    except (BenchmarkFailed, ContainerMissing):
        if dead := await containers.any_dead(rollout):
            raise dead from None
        raise
    finally:
        attempt.downtime.benchmark += clock() - begin
    if dead := await containers.any_dead(rollout):
        raise dead
    result = _judged(rollout.session, rollout.history, rollout.plan.generation, given, carried)
    attempt.unjudged = result.judgement.remarks
    attempt.figures = result.figures
    if result.failed:
        raise _failure(session, result)
    where = session.topology.home
    return Report("benchmark", rollout.plan.generation, where, False, str(result.figures))


async def measure(session: Session, history: History, given: Benchmark, by: str) -> Benchmarked:
    """Let the service that clients use carry a load; nothing is kept.

    Raises:
        BenchmarkFailed: the load could not be made.
        ContainerMissing: nothing of the service runs on a proxy's host.
    """
    serving = history.record.serving or ""
    entrances = [(proxy, proxy.address) for proxy in session.topology.proxies]
    carried = await _carried(session, entrances, given)
    return _judged(session, history, serving, given, carried, by)


def read(history: History, given: Benchmark, figures: Figures) -> Benchmarked:
    """Judge figures that somebody else has measured of what serves."""
    faults = (f"{figures.failed} failed",) if figures.failed else ()
    return _judgement(history, given, figures, faults, read=True)


async def _carried(
    session: Session, entrances: Sequence[tuple[Proxy, str]], given: Benchmark
) -> _Carried:
    """Let proxies carry a load together, each its share, asked at an address of its host."""
    shares = benchmark.shares(given, len(entrances))
    answers = await together(
        _asked(session, proxy, address, share)
        for (proxy, address), share in zip(entrances, shares, strict=False)
    )
    versions = " and ".join(dict.fromkeys(a.version for a in answers if a.version))
    if any(answer.late for answer in answers):
        return _Carried((), None, versions)
    samples: list[Sample] = []
    seconds = 0.0
    for answer, (proxy, _) in zip(answers, entrances, strict=False):
        try:
            each, lasted = load_results.samples(answer.result or {})
        except ValueError as error:
            raise _not_made(session, proxy, f"its result is no such: {error}") from None
        samples += each
        seconds = max(seconds, lasted)
    return _Carried(tuple(samples), seconds, versions)


async def _asked(session: Session, proxy: Proxy, address: str, share: Benchmark) -> Answer:
    """Run the load generator once, on a proxy's host.

    Raises:
        BenchmarkFailed: it could not be run, or ended without a result.
        ContainerMissing: no container runs there.
    """
    host, deployment = session.host(proxy.host), session.deployment
    generator = session.engine.load_generator(deployment, session.topology)
    asked = Asked(
        url=f"http://{address}:{proxy.port}",
        model=deployment.model.served_name,
        tokenizer=deployment.model.path,
        load=share,
        seed=secrets.randbelow(1 << 31),
    )
    key = session.api_key
    printed = bytearray()
    container = await _container(session, host, proxy)
    try:
        async with asyncio.timeout(share.seconds + GRACE_S):
            await host.docker.execute(
                container,
                generator.in_container(asked),
                lambda out, err: printed.extend(out + err),
                deployment=deployment.name,
                environment={KEY_VARIABLE: key.get_secret_value()} if key else {},
                attended=True,
            )
    except TimeoutError:
        return Answer(late=True)
    try:
        answer = load_generator.parse(printed.decode(errors="replace"))
    except ValueError as said:
        raise _not_made(session, proxy, f"it printed: {said}") from None
    if answer.missing:
        raise _not_made(session, proxy, f"{LACKS_IT}: {answer.missing}")
    if answer.result is None and not answer.late:
        last = " / ".join(answer.said.splitlines()[-SAID_LINES:])
        raise _not_made(
            session, proxy, f"it ended with exit code {answer.code}, having printed: {last}"
        )
    return answer


async def _container(session: Session, host: Host, proxy: Proxy) -> str:
    """Choose the container on a proxy's host in which the load generator runs: the first server's
    in the order of the file, or the proxy's own.

    Raises:
        ContainerMissing: none of them runs.
    """
    here = await host.docker.containers({generations.DEPLOYMENT: session.deployment.name})
    running = {state.labels.get(generations.INSTANCE): state.id for state in here if state.running}
    names = [instance.name for instance in session.topology.on_host(proxy.host)]
    for name in (*names, proxy.name):
        if name in running:
            return running[name]
    raise ContainerMissing(
        f"expected a running container of {' or '.join((*names, proxy.name))}, found none",
        host=host.where,
        hint="`pd-deploy status FILE` shows what runs",
    )


def _not_made(session: Session, proxy: Proxy, why: str) -> BenchmarkFailed:
    generator = session.engine.load_generator(session.deployment, session.topology)
    return BenchmarkFailed(
        f"expected `{' '.join(generator.command)}`, the image's own load generator, to measure the "
        f"service; {why}. This says nothing about its speed",
        host=session.host(proxy.host).where,
        instance=proxy.name,
        hint="use an image whose generator runs, or deploy without `gates.benchmark`",
    )


def _judged(
    session: Session,
    history: History,
    generation: str,
    given: Benchmark,
    carried: _Carried,
    by: str = BY_THE_GATE,
) -> Benchmarked:
    generator = session.engine.load_generator(session.deployment, session.topology)
    load, when = Load.of(given, generator.name), datetime.now(UTC)
    if carried.seconds is None:
        figures = benchmark.unended(
            load, generation=generation, when=when, by=by, seconds=given.seconds,
            version=carried.version,
        )  # fmt: skip
        return _judgement(history, given, figures, ())
    figures = benchmark.summed_up(
        carried.samples, load, generation=generation, when=when, by=by, seconds=carried.seconds,
        version=carried.version,
    )  # fmt: skip
    faults = Counter(sample.fault for sample in carried.samples if sample.fault)
    listed = [f"{count} × {fault}" for fault, count in faults.most_common(SHOWN_FAULTS)]
    return _judgement(history, given, figures, listed)


def _judgement(
    history: History,
    given: Benchmark,
    figures: Figures,
    faults: Sequence[str],
    *,
    read: bool = False,
) -> Benchmarked:
    judgement = benchmark.judge(figures, given, history.record.figures, history.good)
    passed = not (faults or judgement.faults)
    return Benchmarked(
        figures.model_copy(update={"passed": passed}), judgement, tuple(faults), read
    )


def _failure(session: Session, result: Benchmarked) -> BenchmarkFailed:
    """Make an error of what is wrong: failed requests say nothing about speed, so they come first
    and alone."""
    figures, judgement = result.figures, result.judgement
    hosts = dict.fromkeys(session.host(proxy.host).where for proxy in session.topology.proxies)
    where = {"host": ", ".join(hosts), "instance": ", ".join(session.topology.proxy_names)}
    if result.faults:
        return BenchmarkFailed(
            f"expected answers to all of {figures.load}, found that {figures.failed} failed: "
            + "; ".join(result.faults),
            of_the_generation=judgement.of_the_generation,
            hint="look at the servers' logs; if the load is too much for the service, lower "
            "`gates.benchmark`",
            **where,
        )
    what = "; ".join(judgement.faults)
    if not figures.ended:
        what += "; lower `gates.benchmark.requests`, or raise its `seconds`, which are downtime"
    return BenchmarkFailed(
        f"it is slower than it may be under {figures.load}: {what}",
        of_the_generation=judgement.of_the_generation,
        hint="compare by `pd-deploy bench FILE`; `gates.benchmark` has the limits and the "
        "tolerance",
        **where,
    )
