"""The benchmark gate: a load on a new generation before clients can connect, and its judgement."""

import asyncio
import uuid
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime

from pd_deploy.config.models import Benchmark
from pd_deploy.errors import BenchmarkFailed
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
    """Let the proxy, which only the smoke test can reach, carry a load; keep its figures.

    Raises:
        BenchmarkFailed: it is slower than it may be, or requests failed.
        InstanceDied: a server or the proxy has ended under the load.
    """
    session = rollout.session
    given, clock = session.deployment.gates.benchmark, asyncio.get_running_loop().time
    begin = clock()
    assert given is not None
    address = await containers.let_smoke_test_in(rollout)
    measured = await _carried(session, address, given)
    attempt = rollout.attempt
    attempt.downtime.benchmark += clock() - begin
    if dead := await containers.any_dead(rollout):
        raise dead
    result = _judged(rollout.history, rollout.plan.generation, BY_THE_GATE, given, measured)
    attempt.unjudged = result.judgement.remarks
    attempt.figures = result.figures
    if result.failed:
        raise _failure(session, result)
    where = session.topology.proxy.host
    return Report("benchmark", rollout.plan.generation, where, False, str(result.figures))


async def measure(session: Session, history: History, given: Benchmark, by: str) -> Benchmarked:
    """Let the service that clients use carry a load; nothing is kept."""
    serving = history.record.serving or ""
    measured = await _carried(session, session.topology.proxy.address, given)
    return _judged(history, serving, by, given, measured)


async def _carried(session: Session, address: str, given: Benchmark) -> Measured:
    proxy = session.topology.proxy
    url = f"http://{address}:{proxy.port}{requests.COMPLETIONS}"
    fields = session.engine.cache_busting_fields(str(uuid.uuid4()))
    async with session.host(proxy.host).http(address, proxy.port) as client:
        return await generator.carried(
            client,
            url,
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
    judgement = benchmark.judge(figures, given, history.record.figures, history.good)
    faults = Counter(sample.fault for sample in measured.samples if sample.fault)
    listed = tuple(f"{count} × {fault}" for fault, count in faults.most_common(SHOWN_FAULTS))
    passed = not (listed or judgement.faults)
    return Benchmarked(figures.model_copy(update={"passed": passed}), judgement, listed)


def _failure(session: Session, result: Benchmarked) -> BenchmarkFailed:
    """Make an error of what is wrong: failed requests say nothing about speed, so they come first
    and alone."""
    proxy, figures, judgement = session.topology.proxy, result.figures, result.judgement
    where = {"host": session.host(proxy.host).where, "instance": proxy.name}
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
