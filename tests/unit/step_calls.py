"""Calls of steps as mypy has to see them; nothing runs this, `make lint` checks it.

`# type: ignore` of a call that mypy accepts is an error of its own (warn_unused_ignores), so this
fails as soon as steps lose the types of their functions.
"""

from typing import assert_type

from pd_deploy.steps.report import Report
from pd_deploy.steps.rollout import Rollout
from pd_deploy.tasks import launch


async def right(rollout: Rollout, report: Report) -> None:
    """What flows do."""
    assert_type(await launch(rollout, "p0"), Report)
    assert_type(await launch(rollout, instance="p0"), Report)
    assert_type(await launch.after(report, rollout)(rollout, "p0"), Report)
    assert_type(await launch.after()(rollout, instance="p0"), Report)


async def wrong(rollout: Rollout) -> None:
    """Another type, a parameter that is not there, one that is missing."""
    await launch(rollout, 3)  # type: ignore[arg-type]
    await launch(3, host="a")  # type: ignore[call-arg, arg-type]
    await launch(rollout, "p0", wait_for=[])  # type: ignore[call-arg]
    await launch(rollout)  # type: ignore[call-arg]


async def wrong_after(rollout: Rollout, reports: list[Report]) -> None:
    """The same of a step that waits for others, and others that are no results of steps."""
    await launch.after(*reports)(rollout, 3)  # type: ignore[arg-type]
    await launch.after(*reports)(rollout, host="a")  # type: ignore[call-arg]
    await launch.after(*reports)(rollout)  # type: ignore[call-arg]
    await launch.after(reports)(rollout, "p0")  # type: ignore[arg-type]
    await launch.after("p0")(rollout, "p0")  # type: ignore[arg-type]
