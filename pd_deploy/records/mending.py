"""When health restarts what has failed, and when it lets it be. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from pd_deploy.config.models import Health
from pd_deploy.records.releases import Mending, Silence

FACTOR = 3
"""How many times longer each pause is than the one before."""


@dataclass(frozen=True)
class Decision:
    """Whether health may restart what has failed.

    Attributes:
        why: it may not; empty if it may.
        gives_up: whether it gives up by this decision.
    """

    why: str = ""
    gives_up: bool = False


def decide(mending: Mending | None, options: Health, now: datetime) -> Decision:
    """Decide by what was tried lately."""
    if not options.attempts:
        return Decision("`health.attempts` is 0, so nothing is restarted")
    if mending and mending.gave_up:
        return Decision(_gave_up(mending))
    recent = lately(mending, options, now)
    if len(recent) >= options.attempts:
        return Decision(
            f"it was {_restarted(recent, options)}, and that did not help for "
            "long; nothing more is tried",
            gives_up=True,
        )
    if (due := _due(mending, recent, options)) and due > now:
        return Decision(f"the next attempt at a restart is due at {due:%H:%M:%S} UTC")
    return Decision()


def lately(mending: Mending | None, options: Health, now: datetime) -> list[datetime]:
    """List when attempts began that still count."""
    attempts = mending.attempts if mending else ()
    return [when for when in attempts if now - when < timedelta(seconds=options.within)]


def silences(
    before: Mending | None, runs: Mapping[str, str], options: Health, now: datetime
) -> dict[str, Silence]:
    """Count at how many checks in a row instances gave no answer.

    Args:
        runs: which run of its container gives none at this check, by instance.
    """
    known = before.silent if before else {}
    counted = {}
    for name, run in runs.items():
        last = known.get(name)
        goes_on = last and last.run == run and now - last.last < timedelta(seconds=options.within)
        checks = last.checks + 1 if last and goes_on else 1
        counted[name] = Silence(run=run, checks=checks, last=now)
    return counted


def hung(silent: Mapping[str, Silence], options: Health) -> dict[str, str]:
    """List what has given no answer for too long, with the run of its container."""
    after = options.hung_after
    return {name: s.run for name, s in silent.items() if after and s.checks >= after}


def told_of_silence(silent: Mapping[str, Silence], options: Health) -> str:
    """Say for people what gives no answer, and when it is restarted for that; empty if nothing."""
    times = [
        f"{name} gave no answer at {s.checks} check{'s in a row' if s.checks > 1 else ''}"
        for name, s in silent.items()
    ]
    if not times:
        return ""
    then = f"restarted at {options.hung_after}" if options.hung_after else "never restarted for it"
    return f"{', '.join(times)} ({then})"


def told(mending: Mending | None, options: Health, now: datetime) -> str:
    """Say for people what health holds back; empty if nothing, or nothing of late."""
    if mending is None or mending.gave_up:
        return _gave_up(mending) if mending else ""
    within = timedelta(seconds=options.within)
    silent = {name: s for name, s in mending.silent.items() if now - s.last < within}
    if not (recent := lately(mending, options, now)):
        return told_of_silence(silent, options)
    due = _due(mending, recent, options)
    assert due
    is_last = len(recent) >= options.attempts
    if mending.failed is None and due <= now and not is_last:
        return told_of_silence(silent, options)
    failed = ", and the last attempt failed" if mending.failed else ""
    if is_last and (failed or not options.attempts):
        then = f"`health.attempts` is {options.attempts}, so nothing more is tried"
    elif is_last:
        oldest = recent[len(recent) - options.attempts]
        then = f"health gives up if it fails again before {_local(oldest + within)}"
    else:
        then = f"the next restart is due at {_local(due)} at the earliest"
    return f"{_restarted(recent, options)}{failed}; {then}"


def _restarted(recent: list[datetime], options: Health) -> str:
    times = f"{len(recent)} times" if len(recent) > 1 else "once"
    return f"restarted {times} in {_minutes(options.within)}"


def _local(when: datetime) -> str:
    return f"{when.astimezone():%Y-%m-%d %H:%M:%S}"


def _gave_up(mending: Mending) -> str:
    assert mending.gave_up
    return (
        f"health gave up at {mending.gave_up:%Y-%m-%d %H:%M:%S} UTC: `pd-deploy recover FILE` "
        "starts what is to serve, and health watches again"
    )


def _due(mending: Mending | None, recent: list[datetime], options: Health) -> datetime | None:
    """Say when the next attempt may begin: ever longer after the last one."""
    if mending is None or not recent:
        return None
    last = max(filter(None, (recent[-1], mending.failed)))
    return last + timedelta(seconds=options.pause * FACTOR ** (len(recent) - 1))


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 60 else f"{seconds:g} s"
