"""Surveying the hosts, and making a plan. Nothing is changed, but that an image which no run knows
yet is brought to a host and asked what it is.

`deploy` uses it in a flow run, `pd-deploy plan` without one.
"""

from collections.abc import Mapping

from pd_deploy.engines.base import HostFacts
from pd_deploy.flows.fan_out import fan_out
from pd_deploy.steps import comparing, identifying, own_code, surveying
from pd_deploy.steps.rollout import HostState, Rollout
from pd_deploy.steps.session import LockedSession, Session
from pd_deploy.tasks import (
    choose_image,
    device_addresses,
    identify_image,
    make_plan,
    read_code,
    resolve_image,
    survey,
    take_plan,
)
from pd_deploy.tasks.step import Result


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
    return await plan_of(session, await survey_hosts(session), image, run, patience=patience)


async def plan_of(
    session: Session,
    states: list[HostState],
    image: str | None,
    run: str,
    *,
    patience: float = 0,
    facts_of_absent: Mapping[str, HostFacts] | None = None,
) -> Rollout:
    """Make a plan of what hosts have said; see `plan`.

    Args:
        facts_of_absent: what is assumed of the deployment's other hosts, for a look only.
    """
    source = None
    if session.deployment.own_code:
        source = await read_code.after(*states)(session)
        session = own_code.with_tree(session, source)
    choice = await choose_image.after(*states)(session, states, image, patience)
    resolved = await resolve_image.after(choice)(session, choice, patience)
    latest: Result = resolved
    record = surveying.history_of(states).record
    # Whoever only looks makes no container: then the image's age goes by its tag.
    if isinstance(session, LockedSession) and identifying.unasked(session, states, resolved):
        latest = identified = await identify_image.after(resolved)(session, states, resolved)
        record = identified.record
    chosen = surveying.for_image(session, resolved, record)
    reading = [
        device_addresses.after(latest)(chosen, name) for name in surveying.with_addresses(chosen)
    ]
    addresses = await fan_out(session.barrier, reading)
    planning = make_plan.after(latest, *addresses)
    planned = await planning(
        session, states, addresses, resolved, run, record, source, facts_of_absent
    )
    return await comparing.with_changes(planned)


async def restore(session: Session, generation: str) -> Rollout:
    """Plan to bring a kept generation back as it was, on the hosts as they are now."""
    session, saved = await surveying.saved(session, generation)
    states = await survey_hosts(session)
    return await take_plan.after(*states)(session, saved, states)
