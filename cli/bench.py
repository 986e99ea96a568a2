"""`pd-deploy bench`: a load on what serves, and what its figures mean."""

import asyncio
import getpass
import json
import socket
from datetime import UTC, datetime
from pathlib import Path

import typer

from pd_deploy.cli.exit_codes import FAILED
from pd_deploy.cli.hosts import asking, connected
from pd_deploy.cli.tables import aligned
from pd_deploy.config.models import Benchmark, Deployment
from pd_deploy.errors import NothingServes, OutOfOrder
from pd_deploy.records import load_results
from pd_deploy.records.adopted import SHOWN
from pd_deploy.records.benchmark import Figures, shown
from pd_deploy.records.releases import History
from pd_deploy.steps import locking
from pd_deploy.steps.session import LockedSession
from pd_deploy.steps.verify import benchmark
from pd_deploy.steps.verify.benchmark import Benchmarked


def run(
    deployment: Deployment, file: Path, *, as_json: bool, save: bool, result_file: Path | None
) -> int:
    """Measure what serves, or read what was measured; print the figures, return the exit code."""
    given = result_file.read_text() if result_file else None
    with asking([deployment]):
        history, result = asyncio.run(measured(deployment, save=save, result=given))
    typer.echo(as_document(result) if as_json else text(history, result, file, save=save))
    return FAILED if result.failed else 0


async def measured(
    deployment: Deployment, *, save: bool, result: str | None = None
) -> tuple[History, Benchmarked]:
    """Measure what serves; return what was known before, and the figures.

    Args:
        save: add them to the record on the hosts.
        result: what another load generator wrote; nothing is measured then.

    Raises:
        InvalidInput: the result is of another load than the file's.
        NothingServes: clients can't connect.
        OutOfOrder: an adopted service serves.
        LeaseHeld: they are to be saved while a run works on the deployment.
    """
    given = deployment.gates.benchmark or Benchmark()
    by = f"{getpass.getuser()} on {socket.gethostname()}"
    async with connected(deployment, with_key=result is None) as reached:
        if reached.history.record.adopted_serving:
            raise OutOfOrder(
                f"expected a generation of {deployment.name} to measure, found that generation "
                f"{SHOWN} serves",
                hint="`pd-deploy deploy FILE` brings one up",
            )
        if not reached.history.record.serving or reached.history.record.closed:
            raise NothingServes(
                f"expected {deployment.name} to serve, found that it does not",
                hint="`pd-deploy status FILE` says why",
            )
        asked = {proxy.host for proxy in reached.session.topology.proxies}
        if save or not asked.issubset(reached.session.hosts):
            reached.require_all()
        if result is None:
            judged = await benchmark.measure(reached.session, reached.history, given, by)
        else:
            serving, now = reached.history.record.serving, datetime.now(UTC)
            read = load_results.figures(result, given, generation=serving, when=now, by=by)
            judged = benchmark.read(reached.history, given, read)
        if save:
            taken = locking.lease_for(
                reached.session, "`pd-deploy bench --save`", "", reached.history.lease
            )
            locked = LockedSession.of(reached.session, taken)
            async with taken.held(locked.hosts):
                await locking.save_figures(locked, judged.figures, _say)
        return reached.history, judged


def text(history: History, result: Benchmarked, file: Path, *, save: bool) -> str:
    """Write the kept figures of this load and the new ones as a table, and what they mean."""
    figures = result.figures
    same = [f for f in history.record.figures if f.load == figures.load]
    rows: list[tuple[str, ...]] = [
        ("generation", "when", "TTFT", "95 %", "TPOT", "95 %", "tokens/s", "answered", "")
    ]
    rows += [_row(f, "" if f.passed else "refused") for f in same]
    rows.append(_row(figures, "now, saved" if save else "now"))
    means = [f"failed: {fault}" for fault in result.faults]
    means += [f"worse: {fault}" for fault in result.judgement.faults]
    means += [f"note: {remark}" for remark in result.judgement.remarks]
    if not result.read:
        means.append("note: what clients asked for meanwhile is in these figures")
    if not save and not result.failed and not result.read:
        means.append(f"Next: pd-deploy bench {file} --save keeps them for comparison")
    return "\n".join([str(figures.load), *aligned(rows), *means])


def _row(figures: Figures, remark: str) -> tuple[str, ...]:
    latencies = (figures.ttft, figures.ttft_p95, figures.tpot, figures.tpot_p95)
    return (
        figures.generation,
        f"{figures.when.astimezone():%Y-%m-%d %H:%M}",
        *("" if value is None else shown("ttft", value) for value in latencies),
        f"{figures.throughput:.0f}",
        f"{figures.answered} of {figures.load.requests}",
        remark,
    )


def as_document(result: Benchmarked) -> str:
    """Write figures and what they mean for programs."""
    return json.dumps(
        {
            **result.figures.model_dump(mode="json"),
            "failures": list(result.faults),
            "worse": list(result.judgement.faults),
            "remarks": list(result.judgement.remarks),
        },
        indent=2,
    )


def _say(waiting: str) -> None:
    typer.echo(waiting, err=True)
