"""Runs that have lost their lease: they change nothing more, and another run may be at work."""

from typing import NoReturn

from pd_deploy.errors import LeaseLost, PdDeployError
from pd_deploy.flows import events, publish
from pd_deploy.flows.run import remedy
from pd_deploy.steps import containers
from pd_deploy.steps.rollout import Rollout


async def leave(rollout: Rollout, lost: LeaseLost, error: BaseException) -> NoReturn:
    """Leave the hosts as they are, and say so; raise in any case.

    What serves is up to the run that has the lease now. Where somebody deleted its file there may
    be none: then it is told if nothing serves.

    Raises:
        LeaseLost: always.
    """
    if not lost.is_overtaken and await _is_down(rollout):
        lost.nothing_serves = True
        lost.message += f"\nNothing serves: {remedy('FILE')} once no run works on it"
        events.down(rollout, lost)
    await publish.failure(rollout, lost, {})
    raise lost from error


async def _is_down(rollout: Rollout) -> bool:
    """Look whether what this run has stopped was what served, and nothing is in its place."""
    attempt = rollout.attempt
    if not attempt.stopped or attempt.downtime.until:
        return False
    try:
        return await containers.lost_since(rollout) is not None
    except PdDeployError:
        return True
