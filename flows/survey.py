"""Surveying the hosts, and making a plan. Nothing is changed.

`deploy` uses it in a flow run, `pd-deploy plan` without one.
"""

from typing import Any

from pd_deploy.flows.fan_out import fan_out
from pd_deploy.steps import surveying
from pd_deploy.steps.rollout import HostState, Rollout
from pd_deploy.steps.session import Session
from pd_deploy.tasks import (
    choose_image,
    device_addresses,
    make_plan,
    resolve_image,
    survey,
    take_plan,
)


async def survey_hosts(session: Session) -> list[HostState]:
    """Read from all hosts at once what they are, what runs there and what was deployed there."""
    return await fan_out(session.barrier, [survey(session, name) for name in session.hosts])


async def plan(session: Session, image: str | None, run: str, patience: float = 0) -> Rollout:
    """Read everything that a plan needs, on all hosts at once, and make it.

    Args:
        image: the image that the run names.
        run: the run, and who or what started it.
        patience: seconds to wait for a registry that is out of order.
    """
    states = await survey_hosts(session)
    choice = await choose_image.after(*states)(session, states, image, patience)
    chosen = surveying.with_image(session, choice)
    reading = [
        device_addresses.after(choice)(chosen, name) for name in surveying.with_addresses(chosen)
    ]
    looked_up: list[Any] = await fan_out(
        session.barrier,
        [resolve_image.after(choice)(session, choice, patience), fan_out(session.barrier, reading)],
    )
    resolved, addresses = looked_up
    planning = make_plan.after(resolved, *addresses)
    return await planning(session, states, addresses, resolved, run)


async def restore(session: Session, generation: str) -> Rollout:
    """Plan to bring a kept generation back as it was, on the hosts as they are now."""
    session, saved = await surveying.saved(session, generation)
    states = await survey_hosts(session)
    return await take_plan.after(*states)(session, saved, states)
