"""The benchmark gate: a load on a new generation before clients can connect, and its judgement."""

import asyncio
import uuid
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime

from pd_deploy.config.models import Benchmark
from pd_deploy.config.topology import Proxy
from pd_deploy.errors import BenchmarkFailed
from pd_deploy.hosts.concurrent import together
from pd_deploy.records import benchmark
from pd_deploy.records.benchmark import Figures, Judgement, Load
from pd_deploy.records.releases import History
from pd_deploy.steps import containers
from pd_deploy.steps.report import Report
from pd_deploy.steps.rollout import Rollout
from pd_deploy.steps.session import Session
from pd_deploy.steps.verify import load as generator
from pd_deploy.steps.verify import requests
from pd_deploy.steps.verify.load import Measured

SHOWN_FAULTS = 3
BY_THE_GATE = "gates.benchmark"


@dataclass(frozen=True)
class Benchmarked:
    """A load's figures, and what they mean beside those that the hosts keep."""

    figures: Figures
    judgement: Judgement
    faults: tuple[str, ...] = ()

    @property
    def failed(self) -> bool:
        """Whether a gate would not let it through."""
        return bool(self.faults or self.judgement.faults)


def is_due(rollout: Rollout) -> bool:
    """Tell whether a generation is to carry the load of `gates.benchmark`: not if it has passed all
    gates before, so that a way back, a recovery and a run with nothing to do are not kept up."""
    gates = rollout.session.deployment.gates
    return gates.benchmark is not None and rollout.plan.generation not in rollout.history.good


async def gate(rollout: Rollout) -> Report:
    """Let the proxies, which only the smoke test can reach, carry a load; keep its figures.

    Raises:
        BenchmarkFailed: it is slower than it may be, or requests failed.
        InstanceDied: a server or a proxy has ended under the load.
    """
    session = rollout.session
    given, clock = session.deployment.gates.benchmark, asyncio.get_running_loop().time
    begin = clock()
    assert given is not None
    proxies = session.topology.proxies
    addresses = await together(containers.let_smoke_test_in(rollout, p.name) for p in proxies)
    measured = await _carried(session, list(zip(proxies, addresses, strict=True)), given)
    attempt = rollout.attempt
    attempt.downtime.benchmark += clock() - begin
    if dead := await containers.any_dead(rollout):
        raise dead
    result = _judged(rollout.history, rollout.plan.generation, BY_THE_GATE, given, measured)
    attempt.unjudged = result.judgement.remarks
    attempt.figures = result.figures
    if result.failed:
        raise _failure(session, result)
    where = session.topology.home
    return Report("benchmark", rollout.plan.generation, where, False, str(result.figures))


async def measure(session: Session, history: History, given: Benchmark, by: str) -> Benchmarked:
    """Let the service that clients use carry a load; nothing is kept."""
    serving = history.record.serving or ""
    entrances = [(proxy, proxy.address) for proxy in session.topology.proxies]
    measured = await _carried(session, entrances, given)
    return _judged(history, serving, by, given, measured)


def read(history: History, given: Benchmark, figures: Figures) -> Benchmarked:
    """Judge figures that another load generator has measured of what serves."""
    return _judgement(
        history, given, figures, [f"{figures.failed} failed"] if figures.failed else []
    )


async def _carried(
    session: Session, entrances: Sequence[tuple[Proxy, str]], given: Benchmark
) -> Measured:
    """Let proxies carry a load together, each asked at an address of its host."""
    fields = session.engine.cache_busting_fields(str(uuid.uuid4()))
    headers = session.authorization
    async with AsyncExitStack() as stack:
        asked = [
            (
                await stack.enter_async_context(
                    session.host(proxy.host).http(address, proxy.port, headers=headers)
                ),
                f"http://{address}:{proxy.port}{requests.COMPLETIONS}",
            )
            for proxy, address in entrances
        ]
        return await generator.carried(
            asked,
            session.deployment,
            Load.of(given),
            fields,
            limit=given.seconds,
            token_ids=session.engine.TAKES_TOKEN_IDS,
        )


def _judged(
    history: History, generation: str, by: str, given: Benchmark, measured: Measured
) -> Benchmarked:
    figures = benchmark.summed_up(
        measured.samples,
        Load.of(given),
        generation=generation,
        when=datetime.now(UTC),
        by=by,
        seconds=measured.seconds,
        delays=measured.delays,
        busy=measured.busy,
    )
    faults = Counter(sample.fault for sample in measured.samples if sample.fault)
    listed = [f"{count} × {fault}" for fault, count in faults.most_common(SHOWN_FAULTS)]
    return _judgement(history, given, figures, listed)


def _judgement(
    history: History, given: Benchmark, figures: Figures, faults: Sequence[str]
) -> Benchmarked:
    judgement = benchmark.judge(figures, given, history.record.figures, history.good)
    passed = not (faults or judgement.faults)
    return Benchmarked(figures.model_copy(update={"passed": passed}), judgement, tuple(faults))


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
    return BenchmarkFailed(
        f"it is slower than it may be under {figures.load}: " + "; ".join(judgement.faults),
        of_the_generation=judgement.of_the_generation,
        hint="compare by `pd-deploy bench FILE`; `gates.benchmark` has the limits and the "
        "tolerance",
        **where,
    )
