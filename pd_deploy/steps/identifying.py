"""Asking an image what it is, in a throwaway container: no device, no network, no mount.

What it says is kept in the record by digest, so that no run asks it again.
"""

import asyncio
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pd_deploy.engines.image_facts import QUESTIONS, FactsOfImage, ImageFacts, brief
from pd_deploy.errors import PdDeployError, TransientError, UnknownImage
from pd_deploy.hosts.concurrent import task_group
from pd_deploy.hosts.host import Host
from pd_deploy.hosts.settled import settled
from pd_deploy.records.releases import Record, digest_of
from pd_deploy.steps import copies, images, surveying, throwaway
from pd_deploy.steps.images import OnProgress
from pd_deploy.steps.rollout import HostState
from pd_deploy.steps.session import LockedSession, Session
from pd_deploy.steps.surveying import ResolvedImage

log = logging.getLogger(__name__)

ANSWER_S = 120.0  # reading sources takes seconds; a container's first start on a busy disk longer


@dataclass(frozen=True)
class Identified:
    """What the image is that is to run.

    Attributes:
        facts: what it says of itself, by architecture of the hosts.
        record: the deployment's, with that.
        detail: in a line.
    """

    facts: FactsOfImage
    record: Record
    detail: str


def unasked(
    session: Session, states: Iterable[HostState], image: ResolvedImage, *, again: bool = False
) -> list[HostState]:
    """List the hosts on which the image has to be asked what it is: for each architecture for which
    that is not known the first one in the file.

    Where an answer is not needed, an image that gave none is not asked again.

    Args:
        again: ask such an image all the same.
    """
    if not session.engine.probe_command():
        return []
    states = list(states)
    record, digest = surveying.history_of(states).record, digest_of(image.pinned_image)
    known = {*record.facts_of(digest)}
    if not (_needs_answer(session) or again):
        known |= record.silent_on(digest)
    by_name = {state.host: state for state in states}
    firsts: dict[str, HostState] = {}
    for state in (by_name[name] for name in session.deployment.hosts if name in by_name):
        firsts.setdefault(state.architecture, state)
    return [state for architecture, state in firsts.items() if architecture not in known]


async def identify(
    session: LockedSession,
    states: Sequence[HostState],
    image: ResolvedImage,
    on_progress: OnProgress | None = None,
) -> Identified:
    """Ask the image what it is, once for each architecture of the hosts; keep what it says.

    It comes to all hosts at the same time, so that the others need not wait for those that are
    asked. Where this run has brought it, it is removed again if it can't be used.

    Raises:
        UnknownImage: it does not say what it is, or nobody knows what an image like it expects.
        InvalidInput: the file breaks a rule with it.
        DiskFull, ImageNotFound, WrongArchitecture, NotReady: as `bring` says, on any host.
    """
    asking = unasked(session, states, image)
    brought: list[Host] = []
    try:
        async with task_group() as group:
            tasks = [
                group.create_task(_of_host(session, state, image, brought, on_progress))
                for state in asking
            ]
            for state in states:
                if state not in asking:
                    group.create_task(bring(session, state, image, brought))
        answers = [task.result() for task in tasks]
        asked = {s.architecture: said for s, said in zip(asking, answers, strict=True)}
        record = await _keep(session, states, image, asked)
        facts = record.facts_of(digest_of(image.pinned_image))
        surveying.fitted(session, image, facts)
    except (PdDeployError, asyncio.CancelledError) as error:
        if not isinstance(error, TransientError):
            await _remove(session, brought, image)
        raise
    detail = "; ".join(dict.fromkeys(map(brief, facts.values()))) or "it does not say what it is"
    return Identified(facts, record, detail)


async def ask(session: Session, host: Host, image: ResolvedImage, name: str) -> ImageFacts:
    """Ask an image on a host what it is, in a container of this name that is gone afterwards.

    Raises:
        UnknownImage: it gives no answer in time, or none that is one.
    """
    code = 0
    try:
        output, code = await throwaway.output(
            session,
            host,
            image.pinned_image,
            session.engine.probe_command(),
            ANSWER_S,
            name=name,
        )
        return session.engine.parse_probe(output)
    except TimeoutError:
        raise _silent(image, host, "no answer", f" within {ANSWER_S:g} s") from None
    except ValueError as answer:
        raise _silent(image, host, f"{answer} (exit code {code})") from None


def _silent(image: ResolvedImage, host: Host, answer: str, when: str = "") -> UnknownImage:
    return UnknownImage(
        f"expected {image.choice.chosen_image} to say what it is{when}, found {answer}",
        host=host.where,
        hint="nothing was stopped. Use another image, or, if you know which contract it follows, "
        "name that in the file (`contract: …`)",
    )


async def _of_host(
    session: LockedSession,
    state: HostState,
    image: ResolvedImage,
    brought: list[Host],
    on_progress: OnProgress | None,
) -> ImageFacts:
    """Bring the image to a host and ask it.

    Raises:
        UnknownImage: it does not say what it is, and nothing can be rendered without that.
    """
    host = session.host(state.host)
    await bring(session, state, image, brought, on_progress)
    name = throwaway.name_of(session)
    try:
        return await ask(session, host, image, name)
    except UnknownImage as error:
        if _needs_answer(session):
            raise
        by_contract = session.engine.BY_CONTRACT
        instead = "it goes by the file's `contract`" if by_contract else "arguments go unchecked"
        log.warning("%s; %s", error.headline, instead)
        return ImageFacts(questions=QUESTIONS, silence=error.headline)


def _needs_answer(session: Session) -> bool:
    """Tell whether nothing can be rendered unless the image says what it is."""
    return session.engine.BY_CONTRACT and session.deployment.contract == "by-image"


async def bring(
    session: Session,
    state: HostState,
    image: ResolvedImage,
    brought: list[Host],
    on_progress: OnProgress | None = None,
) -> None:
    """Bring an image to a host that has room for it; add the host to those that it was brought to.

    Raises:
        DiskFull: there is no room.
        ImageNotFound, WrongArchitecture, NotReady: as `images.bring` says.
    """
    chosen, pinned = image.choice.chosen_image, image.pinned_image
    if await images.bring(session, state, chosen, pinned, on_progress, room_first=True):
        brought.append(session.host(state.host))


async def _keep(
    session: LockedSession,
    states: Sequence[HostState],
    image: ResolvedImage,
    facts: FactsOfImage,
) -> Record:
    """Write what an image says into the record; before anything was deployed, it comes with that:
    a record says that hosts know what was deployed."""
    record = surveying.history_of(states).record
    if not facts:
        return record
    asked = record.asked(digest_of(image.pinned_image), facts)
    if record.sequence:
        # All copies, though the run be cancelled: nothing that follows would write them.
        await settled(copies.write_record(session, copies.hosts_in_order(session), asked))
    return asked


async def _remove(session: LockedSession, brought: Iterable[Host], image: ResolvedImage) -> None:
    for host in brought:
        try:
            await session.may_change(host)
            await host.docker.remove_image(image.pinned_image)
        except PdDeployError as fault:
            log.warning("the image is left on host %s: %s", host.where, fault.headline)
