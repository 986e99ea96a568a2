"""Showing what an image is, by what it says of itself."""

import asyncio
import json
from dataclasses import dataclass
from uuid import uuid4

from pd_deploy.cli import hosts
from pd_deploy.cli.tables import aligned
from pd_deploy.config.models import Deployment
from pd_deploy.engines.image_facts import FactsOfImage, ImageFacts, rows
from pd_deploy.errors import InvalidInput, Problem, UnknownImage
from pd_deploy.hosts.concurrent import together
from pd_deploy.records.releases import Choice, digest_of
from pd_deploy.registry.tags import NEWEST
from pd_deploy.steps import identifying, surveying
from pd_deploy.steps.asking import promptly
from pd_deploy.steps.rollout import HostState
from pd_deploy.steps.session import Session
from pd_deploy.steps.surveying import ResolvedImage


@dataclass(frozen=True)
class Shown:
    """An image, what it says of itself, and the contract by which it would be deployed: empty if
    its engine has none, and why where nobody knows it."""

    image: ResolvedImage
    facts: FactsOfImage
    contract: str
    why: str = ""


def read(deployment: Deployment, image: str | None, on: str | None) -> Shown:
    """Ask an image what it is, unless the hosts know; pull it for that where it is not there.

    Args:
        image: `newest` for the newest of the file's update policy; by default the deployment's.
        on: the host to ask it on; by default one of each architecture.

    Raises:
        InvalidInput: no such host.
        UnknownImage: it does not say what it is.
    """
    if on is not None and on not in deployment.hosts:
        message = f"expected one of the file's hosts ({', '.join(deployment.hosts)}), found {on}"
        raise InvalidInput([Problem("--on", message)])
    with hosts.asking([deployment]):
        return asyncio.run(asked(deployment, image, on))


async def asked(deployment: Deployment, image: str | None, on: str | None) -> Shown:
    """Ask an image what it is; see `read`."""
    async with hosts.connected(deployment) as connection:
        connection.require_all()
        session = connection.session
        names = [on] if on else list(deployment.hosts)
        states = await together(
            promptly(session.host(name), surveying.survey(session, name)) for name in names
        )
        choice = Choice(deployment.image, None, "the file's own")
        if image == NEWEST:
            choice = await surveying.choose(session, states, NEWEST)
        resolved = await surveying.resolve_image(session, choice)
        facts = dict(connection.history.record.facts_of(digest_of(resolved.pinned_image)))
        asking = identifying.unasked(session, states, resolved, again=True)
        answers = await together(_answer(session, state, resolved) for state in asking)
        facts |= {s.architecture: said for s, said in zip(asking, answers, strict=True)}
        return _judged(session, resolved, facts)


async def _answer(session: Session, state: HostState, image: ResolvedImage) -> ImageFacts:
    await identifying.bring(session, state, image, [])
    # A run may be asking at the same time.
    name = f"pd-deploy-probe_{session.deployment.name}_{uuid4().hex[:8]}"
    return await identifying.ask(session, session.host(state.host), image, name)


def _judged(session: Session, image: ResolvedImage, facts: FactsOfImage) -> Shown:
    deployment = session.deployment.model_copy(update={"image": image.choice.chosen_image})
    try:
        fits = {session.engine.for_image(deployment, said).contract for said in facts.values()}
        if not session.engine.BY_CONTRACT:
            return Shown(image, facts, "")
    except UnknownImage as error:
        return Shown(image, facts, "none that is known", error.message)
    return Shown(image, facts, " or ".join(sorted(fits)))


def as_text(shown: Shown) -> str:
    """Write what an image is for people."""
    lines = [f"image {shown.image.choice.chosen_image}, {shown.image.pinned_image}"]
    if not shown.facts:
        return "\n".join([*lines, "its engine depends on nothing that images differ in"])
    if shown.contract:
        lines.append(f"contract {shown.contract}" + (f": {shown.why}" if shown.why else ""))
    for architecture, facts in shown.facts.items():
        lines += ["", f"== {architecture}", *aligned(rows(facts))]
    return "\n".join(lines)


def as_json(shown: Shown) -> str:
    """Write what an image is for programs."""
    document = {
        "image": shown.image.choice.chosen_image,
        "pinned_image": shown.image.pinned_image,
        "contract": shown.contract or None if shown.facts and not shown.why else None,
        "architectures": {name: facts.model_dump() for name, facts in shown.facts.items()},
    }
    return json.dumps(document, indent=2)
