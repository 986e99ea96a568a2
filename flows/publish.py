"""What a run shows in the UI: log lines, a report and a table under stable keys, its last word."""

import asyncio
import logging
import re
import textwrap
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from prefect import State, runtime
from prefect.artifacts import acreate_markdown_artifact, acreate_table_artifact
from prefect.logging import get_run_logger
from prefect.states import Cancelled, Completed

from pd_deploy.config.models import Deployment
from pd_deploy.errors import InvalidInput
from pd_deploy.flows import events
from pd_deploy.flows.run import Run, page, remedy, this_run
from pd_deploy.planning import actions
from pd_deploy.planning.flaws import Flaw
from pd_deploy.planning.host_facts import facts_of
from pd_deploy.planning.plans import STAGES
from pd_deploy.records import benchmark, releases
from pd_deploy.records.releases import History, Record
from pd_deploy.steps import stopping, timeline
from pd_deploy.steps.full_preflight import Findings
from pd_deploy.steps.report import Report
from pd_deploy.steps.rollout import Rollout
from pd_deploy.steps.verify.smoke import Completion

PATIENCE_S = 20
SHOWN_TAGS = 3


def run_name() -> str:
    """Name a flow run after its deployment file and time, so that names sort by time; one that
    somebody gave it, in the UI or with `--name`, stays."""
    if given := given_name(runtime.flow_run.name or ""):
        return given
    parameters = runtime.flow_run.parameters
    started = runtime.flow_run.scheduled_start_time
    kind = "dry run" if parameters.get("dry_run") else "-".join(parameters.get("stages") or [])
    words = [Path(parameters["file"]).stem[:80], kind, f"{started:%m-%d %H:%M:%S}"]
    return " ".join(word for word in words if word)


def given_name(name: str) -> str:
    """Return the name of a run if somebody gave it; "" for one of Prefect's own making, which is
    two words like `brawny-catfish`, in the UI's form also `Sleek-Eel`, or for none."""
    return "" if re.fullmatch(r"([A-Za-z]+-[A-Za-z]+)?", name) else name


def announce(rollout: Rollout) -> None:
    """Log what the run works on, and why it uses this image."""
    plan, serving = rollout.plan, rollout.history.record.serving_name
    get_run_logger().info(
        "%s: generation %s of %s (%s) on %s; serving is %s",
        plan.deployment,
        plan.generation,
        plan.pinned_image,
        rollout.rule,
        ", ".join(f"{name} ({host.address})" for name, host in plan.hosts.items()),
        serving or "none",
    )
    if said := rollout.said_of_changes:
        get_run_logger().info("%s", said)


def warn_of_newer_tags(rollout: Rollout) -> None:
    """Emit an event if there are tags that seem newer, but that the update policy does not take."""
    if not rollout.newer_tags:
        return
    deployment = rollout.session.deployment
    get_run_logger().warning("%s", _newer_tags(rollout))
    events.emit(
        events.NEWER_TAGS,
        deployment,
        _newer_tags(rollout),
        tags=list(rollout.newer_tags),
        repositories=list(deployment.update_repositories),
        image=rollout.release.chosen_image,
    )


def _newer_tags(rollout: Rollout) -> str:
    newer = rollout.newer_tags
    more = f" and {len(newer) - SHOWN_TAGS} more" if len(newer) > SHOWN_TAGS else ""
    return (
        "tags that seem newer are of forms that `update` does not take: "
        f"{', '.join(newer[:SHOWN_TAGS])}{more} (`pd-deploy tags {_file()}` lists all)"
    )


def skipped(run: Run, deployment: Deployment) -> State[None]:
    """End a scheduled run that started too late."""
    message = (
        f"skipped, as it started {short(run.late)} after its scheduled time, and "
        f"`update.window` of {deployment.name} is {short(deployment.window)}; nothing was touched. "
        "Start it by hand, or wait for the next"
    )
    events.emit(events.SKIPPED, deployment, message)
    return Completed(message=message)


def short(span: timedelta) -> str:
    """Write a time span in hours and minutes, or in seconds if it is less than a minute."""
    minutes = round(span.total_seconds()) // 60
    hours = f"{minutes // 60} h" if minutes >= 60 else ""
    rest = f"{minutes % 60} min" if minutes % 60 else ""
    return " ".join(filter(None, (hours, rest))) or f"{span.total_seconds():g} s"


def already_on(rollout: Rollout) -> State[None]:
    """End a run that found nothing newer, or nothing newer that the update policy takes."""
    release = rollout.release
    on = f"on {release.chosen_image} ({release.digest[:19]}), generation {release.generation}"
    if rollout.newer_tags:
        message = f"Not updated: {_newer_tags(rollout)}. The service stays {on}: {rollout.rule}"
        return Completed(message=message)
    return Completed(message=f"Already {on}: {rollout.rule}")


async def dry_run(rollout: Rollout, stages: Sequence[str]) -> State[None]:
    """Show what the stages would do on each host."""
    plan = rollout.with_actions(stages)
    for name, host in plan.hosts.items():
        for action in host.actions:
            get_run_logger().info("%s: would %s %s", name, action.verb, action.subject)
    artifact = acreate_markdown_artifact(
        key=f"{plan.deployment}-dry-run",
        markdown=actions.as_markdown(plan),
        description=f"What a run of {_file()} would do",
    )
    await if_the_server_takes_it(artifact)
    changes = sum(len(host.actions) for host in plan.hosts.values())
    newer = f"; {_newer_tags(rollout)}" if rollout.newer_tags else ""
    return Completed(message=f"Dry run: {changes} changes; nothing was touched{newer}")


async def success(
    rollout: Rollout, reports: Iterable[Report], completion: Completion | None
) -> State[None]:
    """Publish the report of a run that went well; return its final state."""
    reports = list(reports)
    changed = sum(report.changed for report in reports)
    outcome = "nothing to do, nothing changed"
    if changed:
        outcome = f"changed by {changed} step{'s' * (changed != 1)}"
    message = f"Generation {rollout.plan.generation}: {outcome}"
    if rollout.attempt.downtime.since and completion:
        message += f", {rollout.attempt.downtime}"
    if held := rollout.attempt.said_of_held:
        message += f"; {held}"
    if cut := stopping.told_of(rollout.attempt.cut, rollout.locked):
        message += f"; {cut}"
    if rollout.attempt.figures:
        message += f"; {'; '.join([str(rollout.attempt.figures), *rollout.attempt.unjudged])}"
    if rollout.newer_tags:
        message += f"; {_newer_tags(rollout)}"
    await _publish(rollout, f"**{message}**", completion)
    if completion:
        message += f"; serves at {completion.url}"
        answer = textwrap.shorten(completion.text, 80, placeholder=" …")
        message += f", which answered {completion.prompt!r} with {answer!r}; {completion.proof}"
    return Completed(message=message)


async def failure(
    rollout: Rollout, error: BaseException, stopped: Mapping[str, Exception | None]
) -> None:
    """Publish why a run failed, and what was stopped because of it."""
    names = [name for name, fault in stopped.items() if fault is None]
    if names:
        get_run_logger().warning("stopped %s again; containers and logs are kept", ", ".join(names))
    for name, fault in stopped.items():
        if fault:
            get_run_logger().error("%s may still run: %s", name, fault)
    if isinstance(error, Exception):
        reason = str(error) or type(error).__name__
        word = "Nothing serves" if getattr(error, "nothing_serves", False) else "Failed"
        await _publish(rollout, f"**{word}:**\n\n```\n{reason}\n```", None)
    else:
        await _publish(rollout, "**Interrupted: the run was cancelled, or got a signal.**", None)


def interrupted(rollout: Rollout, stages: Sequence[str]) -> State[None]:
    """Make the last word of a run that was cancelled when there was nothing to go back to."""
    serving = rollout.history.record.serving_name
    if not rollout.attempt.stopped:
        outcome = "the service was not touched" if serving else "nothing was running before"
    elif set(stages) != set(STAGES):
        outcome = f"only some stages were run, so nothing was brought back: run {remedy()}"
    elif serving:
        outcome = f"{serving} itself was to serve again, but is not proven to: run {remedy()}"
    else:
        outcome = "nothing serves, and no generation did before"
    started = ", ".join(sorted(rollout.attempt.started))
    return Cancelled(
        message=f"Interrupted; {outcome}" + (f"; {started} may run" if started else "")
    )


def interrupted_late(rollout: Rollout) -> State[None]:
    """Make the last word of a run that was cancelled when its work was done."""
    return Cancelled(
        message=f"Interrupted after generation {rollout.plan.generation} was brought up; old ones "
        "may be left, which the next run removes"
    )


def ended_at_once(record: Record) -> State[None]:
    """Make the last word of a run that was cancelled again while it undid what it had done."""
    serving = record.serving_name
    does = f"makes {serving} serve" if serving else "stops what was left"
    if runtime.flow_run.parameters.get("forget"):
        does = "brings the service up"
    return Cancelled(
        message="Interrupted again, so ended at once; what serves now is unknown: "
        f"{remedy()} {does}"
    )


async def rolled_back(
    rollout: Rollout, failed: Rollout, error: Exception, completion: Completion
) -> None:
    """Publish that a run failed and that the previous generation serves again."""
    headline = f"**Rolled back:**\n\n```\n{error}\n```"
    await _publish(rollout, headline, completion, failed)


async def taken_back(rollout: Rollout, error: Exception) -> None:
    """Publish that a run failed and what serves again: the adopted service in place of a
    generation, or the other way round."""
    await _publish(rollout, f"**Rolled back:**\n\n```\n{error}\n```", None)


async def listing(deployment: str, history: History) -> None:
    """Publish a deployment's releases."""
    await if_the_server_takes_it(_listing(deployment, history))


async def findings(deployment: str, found: Findings) -> None:
    """Publish what a preflight found, and what the hosts said; log what is wrong, too."""
    for flaw in found.flaws:
        level = logging.ERROR if flaw.is_error else logging.WARNING
        where = f"host {flaw.host}: " if flaw.host else ""
        get_run_logger().log(level, "%s: %s%s → %s", flaw.check, where, flaw.message, flaw.hint)
    rows = [
        {
            "": "error" if flaw.is_error else "warning",
            "check": flaw.check,
            "host": flaw.host,
            "what": flaw.message,
            "what to do": flaw.hint,
        }
        for flaw in found.flaws
    ]
    rows += [
        {"": "found", "check": name, "host": a.where, "what": value, "what to do": ""}
        for a in found.answers
        for name, value in facts_of(a).items()
    ]
    artifact = acreate_table_artifact(
        key=f"{deployment}-preflight", table=rows, description=f"Last preflight of {_file()}"
    )
    await if_the_server_takes_it(artifact)


def checked(found: Sequence[Flaw], hosts: int) -> State[None]:
    """End a preflight without errors."""
    count = len(found)
    warnings = f"{count} warning{'s' * (count != 1)}, no errors" if found else "no problems"
    return Completed(message=f"{warnings} on {hosts} hosts")


async def otherwise(end: State[None] | Exception, left: str) -> None:
    """Publish the report of a run that has none: it failed before it had a plan, had nothing to do,
    or was asked to end at once.

    Args:
        end: its last state, or what it raises.
        left: what became of the hosts, if it did not begin to bring a generation up or back.
    """
    of_run = page.get()
    if of_run.published:
        return
    if isinstance(end, Exception):
        headline, text = "Failed", str(end) or type(end).__name__
    else:
        headline, text = end.name or "", end.message or ""
    if of_run.acts:
        left = f"see `pd-deploy status {_file()}`; {remedy()} repairs what is left"
    is_well = not isinstance(end, Exception) and end.is_completed()
    told = [f"On the hosts: {left}.", "", _next(end), ""] if not is_well else []
    lines = [f"# {of_run.deployment}", "", f"**{headline}:**", "", "```", text, "```", "", *told]
    name = re.sub("[^a-z0-9]+", "-", of_run.deployment.lower()).strip("-") or "run"
    report = acreate_markdown_artifact(
        # Without a key it is on the run's own page alone: the last run that did anything stays.
        key=None if is_well else f"{name}-report",
        markdown="\n".join([*lines, f"By {this_run()}."]),
        description=f"Last run of {_file()}",
    )
    await if_the_server_takes_it(report)


def _next(end: State[None] | Exception) -> str:
    file = _file()
    if isinstance(end, InvalidInput):
        return f"Next: correct that (`pd-deploy check {file}` needs no host), and start it again."
    return (
        f"Next: `pd-deploy status {file}` shows what serves, `pd-deploy plan {file}` which hosts "
        "answer and what a run would do. Start it again once the cause is mended."
    )


async def removed(deployment: str, reports: Sequence[Report]) -> State[None]:
    """Publish that nothing of a deployment is left, in place of what said that it serves."""
    details = "; ".join(f"{report.host}: {report.detail}" for report in reports)
    lines = [f"# {deployment}", "", "**Removed from its hosts.**", "", *_table(reports)]
    report = acreate_markdown_artifact(
        key=f"{deployment}-report",
        markdown="\n".join(lines),
        description=f"Last run of {_file()}",
    )
    instances = acreate_table_artifact(
        key=f"{deployment}-instances", table=[], description=f"Instances of {_file()}"
    )
    nothing = History(Record(), {}, frozenset())
    await if_the_server_takes_it(report, instances, _listing(deployment, nothing))
    return Completed(message=f"{deployment} is gone: {details}")


async def _publish(
    rollout: Rollout,
    headline: str,
    completion: Completion | None,
    failed: Rollout | None = None,
) -> None:
    deployment = rollout.plan.deployment
    report = acreate_markdown_artifact(
        key=f"{deployment}-report",
        markdown=_report(rollout, headline, completion, failed),
        description=f"Last run of {_file()}",
    )
    instances = acreate_table_artifact(
        key=f"{deployment}-instances",
        table=_instances(rollout),
        description=f"Instances of {_file()}",
    )
    await if_the_server_takes_it(report, instances, _listing(deployment, rollout.history))


def _listing(deployment: str, history: History) -> Coroutine[Any, Any, object]:
    return acreate_table_artifact(
        key=f"{deployment}-releases",
        table=[dict(row) for row in releases.table(history)],
        description=f"Releases of {_file()}",
    )


async def if_the_server_takes_it(*artifacts: Coroutine[Any, Any, object]) -> None:
    """Publish artifacts, if that is possible in `PATIENCE_S`.

    They decide nothing: what a run did to its hosts is so, whether its server hears of it or not,
    and meanwhile others wait for the hosts' leases.
    """
    if of_run := page.get(None):
        of_run.published = True
    try:
        async with asyncio.timeout(PATIENCE_S):
            for fault in await asyncio.gather(*artifacts, return_exceptions=True):
                if isinstance(fault, Exception):
                    raise fault
    except Exception as fault:
        why = str(fault) or f"no answer within {PATIENCE_S} s"
        get_run_logger().warning("the Prefect server did not accept this run's report: %s", why)


def _report(
    rollout: Rollout, headline: str, completion: Completion | None, failed: Rollout | None
) -> str:
    """Write a run's report.

    Args:
        rollout: the generation that serves now, or was to.
        failed: the one from which the run went back, if it did.
    """
    lines = [f"# {rollout.plan.deployment}", "", headline, ""]
    lines += [
        f"Image `{rollout.release.chosen_image}`, `{rollout.plan.pinned_image}` ({rollout.rule})",
        "",
        *([f"{said[0].upper()}{said[1:]}.", ""] if (said := rollout.said_by_image) else []),
        f"By {this_run()}.",
        "",
        *_changes([failed, rollout] if failed else [rollout]),
    ]
    steps, downtime = rollout.session.timeline, rollout.attempt.downtime
    if downtime.since and downtime.until:
        lines += [f"The service was {downtime}.", ""]
    elif downtime.since:
        lines += [f"The service is down since {downtime.since:%Y-%m-%d %H:%M:%S} UTC.", ""]
    down = (downtime.since, downtime.until or datetime.now(UTC)) if downtime.since else None
    lines += ["```", *timeline.waterfall(steps, down), "```", ""]
    if completion:
        lines += [
            f"Completion through `{completion.url}` in {completion.seconds:.2f} s:",
            "",
            f"> {completion.prompt}",
            "",
            *(f"> {line}" for line in completion.text.strip().splitlines()),
            "",
            f"{completion.proof}.",
            "",
            *(f"- {handover}" for handover in completion.proof.handovers),
            *(f"- {remark}" for remark in completion.remarks),
            "",
        ]
    lines += benchmark.as_markdown(rollout.history.record.figures)
    return "\n".join([*lines, *timeline.tables(steps)])


def _changes(rollouts: Iterable[Rollout]) -> list[str]:
    """Say of generations what each has changed against the one before it."""
    said = [(one.release.generation, one.said_of_changes) for one in rollouts]
    return [line for name, text in said if text for line in (f"Generation {name} {text}.", "")]


def _table(reports: Iterable[Report]) -> list[str]:
    return [
        "| step | of | changed | what | s |",
        "|---|---|---|---|---|",
        *(
            f"| {r.step} | {r.subject} | {'yes' if r.changed else ''} | {r.detail} "
            f"| {r.seconds:.1f} |"
            for r in reports
        ),
    ]


def _instances(rollout: Rollout) -> list[dict[str, str]]:
    topology = rollout.session.topology
    rows = [
        {
            "instance": i.name,
            "role": i.role,
            "host": i.host,
            "address": i.server,
            "devices": i.device_list,
            "container": rollout.plan.instance(i.name).container.name,
        }
        for i in topology.instances
    ]
    rows += [
        {
            "instance": proxy.name,
            "role": "proxy",
            "host": proxy.host,
            "address": proxy.server,
            "devices": "",
            "container": rollout.plan.instance(proxy.name).container.name,
        }
        for proxy in topology.proxies
    ]
    return rows


def _file() -> str:
    return str(runtime.flow_run.parameters["file"])
