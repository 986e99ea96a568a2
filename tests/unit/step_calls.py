"""Calls of steps as mypy has to see them; nothing runs this, `make lint` checks it.

`# type: ignore` of a call that mypy accepts is an error of its own (warn_unused_ignores), so this
fails as soon as steps lose the types of their functions.
"""

from typing import assert_type

from pd_deploy.steps.report import Report
from pd_deploy.steps.rollout import Rollout
from pd_deploy.tasks.launch import launch


async def right(rollout: Rollout) -> None:
    """What flows do."""
    assert_type(await launch(rollout, "p0"), Report)
    assert_type(await launch(rollout, instance="p0", wait_for=[]), Report)


async def wrong(rollout: Rollout) -> None:
    """Another type, a parameter that is not there, one that is missing."""
    await launch(rollout, 3)  # type: ignore[call-overload]
    await launch(rollout, host="a")  # type: ignore[call-overload]
    await launch(rollout)  # type: ignore[call-overload]
