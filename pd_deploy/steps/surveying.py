"""Reading what is: facts of a host, its devices' addresses, the image behind a tag.

Changes nothing.
"""

import asyncio
import posixpath
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TypeVar

from pd_deploy.code.reading import Source
from pd_deploy.config.fields import archive_of, split_image
from pd_deploy.config.models import Deployment
from pd_deploy.config.topology import Topology
from pd_deploy.engines.base import HostFacts, Layout
from pd_deploy.engines.image_facts import FactsOfImage
from pd_deploy.errors import (
    FactsError,
    FactsUnknown,
    HostError,
    ImageNotFound,
    PdDeployError,
    RegistryUnavailable,
    SeveralFaults,
    UnknownImage,
    Unrecorded,
)
from pd_deploy.hosts import facts
from pd_deploy.hosts.concurrent import task_group, together
from pd_deploy.hosts.container_values import ContainerState
from pd_deploy.hosts.docker_client import name_taken
from pd_deploy.hosts.host import Host
from pd_deploy.planning import placement, plans
from pd_deploy.records import generations, releases
from pd_deploy.records.releases import Choice, History, Place, Record, Release
from pd_deploy.registry import archives, tags
from pd_deploy.registry.client import Search, reach, search
from pd_deploy.registry.repository import repositories_of
from pd_deploy.steps import host_records
from pd_deploy.steps.attempt import Attempt
from pd_deploy.steps.host_records import HostRecords, Saved
from pd_deploy.steps.rollout import HostState, Rollout
from pd_deploy.steps.session import Session, host_accesses

T = TypeVar("T")

ASK_AGAIN_S = 15.0  # a registry that is out of order is not asked more often


@dataclass(frozen=True)
class Addresses:
    """Network addresses of a host's devices."""

    host: str
    of_device: dict[int, str]


@dataclass(frozen=True)
class ResolvedImage:
    """The image that will run, why that one, and its digest or id."""

    choice: Choice
    pinned_image: str


async def connect(session: Session, name: str) -> HostRecords:
    """Connect to a host and read what was deployed on it before."""
    return await host_records.read(session.host(name), session.root)


async def survey(session: Session, name: str) -> HostState:
    """Read what a plan needs to know of a host: its facts, what runs there, and what was deployed
    there before.

    Raises:
        FactsError: the host does not own the address that the file gives.
        HostError, TransientError: as the hosts layer raises them.
    """
    host, deployment = session.host(name), session.deployment.name
    logs = Layout.log_root_of(session.deployment)
    async with task_group() as group:
        reading = group.create_task(
            host.outputs(
                host_records.command(session.root),
                facts.tree(session.root, logs),
                facts.ADDRESSES,
                facts.LISTENERS,
                facts.ROUTE,
            )
        )
        info = group.create_task(host.docker.info())
        containers = await host.docker.listed()
        labelled = [c for c in containers if c.labels.get(generations.DEPLOYMENT) == deployment]
        probes = {c.id for c in labelled if c.labels.get(generations.ROLE) == generations.PROBE}
        rooms = [c for c in labelled if c.labels.get(generations.ROLE) == generations.WAITING_ROOM]
        ours = {c.id for c in labelled} - probes - {c.id for c in rooms}
        states = group.create_task(host.docker.states(ours))
    records, tree, addresses, listeners, route = reading.result()
    interface = facts.parse_interface(addresses, host.address, host.where)
    if interface is None:
        raise _not_owned(host, name, addresses)
    if info.result().is_rootless:
        raise HostError(
            "expected Docker to run as root, found a rootless engine: other hosts can't reach what "
            "its containers listen on",
            host=host.where,
            hint="set the host's `docker_socket` to the socket of the system's Docker",
        )
    if info.result().remaps_users:
        raise HostError(
            "expected Docker without userns-remap, found that it remaps users: containers "
            "then get neither devices nor the host's network",
            host=host.where,
            hint='remove "userns-remap" from /etc/docker/daemon.json and restart Docker',
        )
    entry = session.deployment.hosts.get(name)
    return HostState(
        host=name,
        interface=(entry and entry.interface) or interface,
        route_address=facts.parse_route(route, host.where),
        architecture=info.result().architecture,
        docker_version=info.result().version,
        docker_root=info.result().root_dir,
        containers=tuple(states.result()),
        listening=frozenset(facts.parse_listeners(listeners, host.where)),
        tree=facts.parse_tree(tree),
        records=host_records.parse(records, host, session.root),
        strangers=tuple(c for c in containers if c.id not in ours),
        waiting_rooms=tuple(rooms),
        probe_left=bool(probes),
    )


def _not_owned(host: Host, name: str, addresses: str) -> FactsError:
    """Why no interface of a host can be the one of its address."""
    loopback = facts.parse_loopback(addresses, host.address, host.where)
    if loopback is None:
        message = (
            f"expected the host to have its address {host.address}, found no interface with it"
        )
        return FactsError(
            message, host=host.where, hint=f"correct hosts.{name} in the deployment file"
        )
    return FactsError(
        f"expected its address {host.address} on an interface that the other hosts reach, "
        f"found it only on {loopback}",
        host=host.where,
        hint=f"give hosts.{name} the address of a network interface (`ip -4 addr` lists them), "
        f"or put {host.address} on one",
    )


def history_of(states: Iterable[HostState]) -> History:
    """Merge the deployment's history from what all hosts know, containers included."""
    states = list(states)
    history = host_records.merged(state.records for state in states)
    labelled = {c.labels.get(generations.GENERATION, "") for s in states for c in s.containers}
    return releases.merge(
        [history.record], history.releases.values(), history.generations | labelled
    )


def unrecorded(states: Iterable[HostState]) -> list[tuple[str, ContainerState]]:
    """List the deployment's running containers, with their host, if no host knows any more what
    was deployed. A run writes its record before it makes a container, so that was lost."""
    states = list(states)
    history = history_of(states)
    if history.serving or (history.record.sequence and not history.record.serving):
        return []
    return [(s.host, c) for s in states for c in s.containers if c.status in generations.RUNNING]


def lost(session: Session, running: Iterable[tuple[str, ContainerState]]) -> Unrecorded:
    """Make the error for containers that run of which no host has a record."""
    running = list(running)
    shown = ", ".join(f"{state.name} on {host}" for host, state in running)
    images = " or ".join(sorted({image_of(state) for _, state in running}))
    return Unrecorded(
        f"expected a record of what was deployed below {session.root}, found none on any host, "
        f"but these containers run: {shown}. They are left alone",
        hint=f"`pd-deploy deploy FILE --image {images}`, with FILE as it was then, writes down "
        "what runs and touches nothing; `pd-deploy teardown FILE` removes it",
    )


def image_of(state: ContainerState) -> str:
    """Name a container's image as a run would: with its tag, and by digest."""
    named = state.labels.get(generations.IMAGE, state.image).partition("@")[0]
    return f"{named}@{state.image.rpartition('@')[2]}" if "@" in state.image else named


async def choose(
    session: Session,
    states: Iterable[HostState],
    requested_image: str | None,
    patience: float = 0,
) -> Choice:
    """Decide which image a run takes; see `releases.choose`.

    `newest` is looked up in the registry by the file's update policy, from here or, where the
    registry can't be reached from here, through the first proxy's host.

    Args:
        patience: seconds to wait for a registry that is out of order.

    Raises:
        ImageNotFound, RegistryDenied, RegistryUnavailable, RegistryMisconfigured.
    """
    history, deployment = history_of(states), session.deployment
    if requested_image != tags.NEWEST:
        states = list(states)
        running = unrecorded(states)
        of_file = {deployment.image, deployment.image_reference}
        others = {state.labels.get(generations.IMAGE) for _, state in running} - of_file
        if requested_image is None and others:
            raise lost(session, running)
        choice = releases.choose(deployment.image, requested_image, history.serving)
        return replace(choice, last_digest=history.last_digest(choice.chosen_image))
    searched = await _when_in_order(lambda: search_tags(session, history), patience)
    build, rule = searched.expect_build(), tags.rule_of(searched.policy)
    return Choice(build.image, build.digest, rule, newer_tags=searched.newer_of_other_forms)


async def search_tags(session: Session, history: History) -> Search:
    """Search the repositories of the file's update policy for the newest build that is not in
    quarantine.

    Raises:
        ImageNotFound, RegistryDenied, RegistryUnavailable, RegistryMisconfigured.
    """
    policy, via = tags.policy_of(session.deployment), session.registry_host
    login = session.registry_login
    async with AsyncExitStack() as stack:
        registries = [
            await stack.enter_async_context(reach(repository, login=login, via=via))
            for repository in repositories_of(session.deployment)
        ]
        return await search(registries, policy, skip=history.record.quarantine)


def planned(
    session: Session,
    states: Sequence[HostState],
    addresses: Sequence[Addresses],
    image: ResolvedImage,
    by: str,
    record: Record | None = None,
    source: Source | None = None,
    facts_of_absent: Mapping[str, HostFacts] | None = None,
) -> Rollout:
    """Plan the rollout of the deployment file with an image.

    Args:
        by: the run, and who or what started it.
        record: the deployment's, where it was changed since the survey.
        source: the user's own source tree, if the file has one.
        facts_of_absent: what is assumed of hosts that were not surveyed, for a look only.

    Raises:
        FactsError: devices share an address, or hosts announce another than the file's.
        FactsUnknown: too little is known of hosts that were not surveyed.
        InvalidInput: the file breaks a rule with this image.
    """
    file_image, history = session.deployment.image, history_of(states)
    history = replace(history, record=record or history.record)
    facts = history.record.facts_of(releases.digest_of(image.pinned_image))
    deployment = fitted(session, image, facts)
    session = session.with_deployment(deployment)
    by_host = {state.host: state for state in states}
    addresses_of = {entry.host: entry.of_device for entry in addresses}
    known = {
        name: HostFacts(state.interface, addresses_of.get(name, {}), state.route_address)
        for name, state in by_host.items()
    } | dict(facts_of_absent or {})
    _require_facts(session, known)
    host_facts = {name: known[name] for name in deployment.hosts}
    session.engine.check_facts(deployment, host_facts)
    rendered = plans.make(
        deployment,
        session.topology,
        session.engine,
        facts=host_facts,
        pinned_image=image.pinned_image,
        history=history,
    )
    release = history.releases.get(rendered.plan.generation) or Release(
        generation=rendered.plan.generation,
        servers=rendered.plan.servers,
        servers_fingerprint=rendered.servers_fingerprint,
        chosen_image=image.choice.chosen_image,
        pinned_image=image.pinned_image,
        file_image=file_image,
        hosts=host_accesses(deployment),
        instances=_places(session.topology),
        contract=deployment.contract if session.engine.BY_CONTRACT else "",
        code=_trees(session, rendered.plan),
        logs=Layout.of(deployment, rendered.plan.generation).log_root,
        created=datetime.now(UTC),
        started_by=by,
    )
    history = history.with_release(release)
    _require_names(session, rendered.plan, by_host)
    return Rollout(
        session,
        by_host,
        history,
        rendered.plan,
        release,
        image.choice.rule,
        Attempt.begin(history.record),
        image.choice.newer_tags,
        source,
        facts=host_facts,
    )


def _require_facts(session: Session, known: Mapping[str, HostFacts]) -> None:
    """Refuse to plan without what hosts say that were not surveyed.

    Raises:
        FactsUnknown: all such hosts.
    """
    unknown = [
        name
        for name in session.deployment.hosts
        if name not in known
        or (
            _reads_addresses(session, name)
            and not known[name].device_addresses.keys() >= set(_devices(session, name))
        )
    ]
    if unknown:
        raise FactsUnknown(
            f"no plan without host {', '.join(unknown)}: its network interface and the addresses "
            "of its devices are part of the plan, and nothing that serves was deployed with them"
        )


def _trees(session: Session, plan: plans.Plan) -> tuple[str, ...]:
    """List the source trees that a plan's containers mount."""
    root = Layout.code_root(session.root)
    mounts = (mount for host in plan.hosts.values() for mount in host.code(root).values())
    return tuple(sorted({posixpath.basename(mount.source) for mount in mounts}))


def _places(topology: Topology) -> dict[str, Place]:
    """Say where each instance and each proxy is."""
    places = {i.name: Place(role=i.role, pod=i.pod, host=i.host) for i in topology.instances}
    return places | {p.name: Place(role="proxy", pod=p.name, host=p.host) for p in topology.proxies}


def for_image(session: Session, image: ResolvedImage, record: Record) -> Session:
    """Return the session of the deployment with an image, which decides what it needs to know.

    Raises:
        UnknownImage, InvalidInput: as in `fitted`.
    """
    facts = record.facts_of(releases.digest_of(image.pinned_image))
    return session.with_deployment(fitted(session, image, facts))


def fitted(session: Session, image: ResolvedImage, facts: FactsOfImage) -> Deployment:
    """Return the deployment with an image, as what the image says of itself wants it.

    Raises:
        UnknownImage: nobody knows what an image like this expects, or it is another one for each
            architecture.
        InvalidInput: the file breaks a rule with this image.
    """
    deployment = session.deployment.model_copy(update={"image": image.choice.chosen_image})
    fits = {name: session.engine.for_image(deployment, said) for name, said in facts.items()}
    contracts = {name: fit.contract for name, fit in fits.items()}
    if len(set(contracts.values())) > 1:
        listed = ", ".join(f"{contract} for {name}" for name, contract in contracts.items())
        raise UnknownImage(
            f"expected {deployment.image} to follow the same contract on all hosts, found {listed}",
            hint="nothing was stopped; use an image whose builds are of one age",
        )
    deployment = next(iter(fits.values()), deployment)
    placement.build(deployment, facts.values())
    return deployment


async def saved(session: Session, name: str) -> tuple[Session, Saved]:
    """Read a kept generation, and the session as it was for it; survey that one for `restored`.

    How clients are treated meanwhile is as the file says now.

    Raises:
        NoSuchGeneration: it is not kept.
    """
    loaded = await host_records.load(session.hosts, session.root, name)
    deployment = _with_patience(loaded.deployment, session.deployment)
    loaded = loaded.model_copy(update={"deployment": deployment})
    return session.for_deployment(loaded.deployment), loaded


def _with_patience(deployment: Deployment, of: Deployment) -> Deployment:
    """Give a deployment's proxies another one's `hold` and `drain`, by which nothing runs."""
    # What is not given stays so, or the saved plan would be written anew.
    patience = {
        key: value
        for key in ("hold", "drain")
        if (value := getattr(of.first_proxy, key)) != getattr(deployment.first_proxy, key)
    }
    proxies = {name: p.model_copy(update=patience) for name, p in deployment.proxy.items()}
    return deployment.model_copy(update={"proxy": proxies})


def restored(session: Session, saved: Saved, states: Sequence[HostState]) -> Rollout:
    """Plan the rollout that brings a saved generation back as it was."""
    history, by_host = history_of(states), {state.host: state for state in states}
    _require_names(session, saved.plan, by_host)
    return Rollout(
        session,
        by_host,
        history,
        saved.plan,
        history.releases[saved.plan.generation],
        "as it was saved",
        Attempt.begin(history.record, _lost_since(saved, history, states)),
        facts=saved.facts,
    )


def _lost_since(saved: Saved, history: History, states: Iterable[HostState]) -> datetime | None:
    """Since when the generation that is to serve can't, by the clocks of its hosts."""
    if history.record.serving != saved.plan.generation:
        return None
    names = saved.plan.roles.keys()
    return generations.lost_since(c for s in states for c in s.containers if c.name in names)


def _require_names(session: Session, plan: plans.Plan, states: Mapping[str, HostState]) -> None:
    """Refuse a plan whose containers would have names that are somebody else's.

    Raises:
        NameTaken: the only one.
        SeveralFaults: several of them.
    """
    planned = {
        (name, instance.container.name)
        for name, host in plan.hosts.items()
        for instance in host.instances.values()
    }
    faults = [
        name_taken(stranger, plan.deployment, session.host(name).where)
        for name, state in states.items()
        for stranger in state.strangers
        if (name, stranger.name) in planned
    ]
    if faults:
        raise faults[0] if len(faults) == 1 else SeveralFaults(faults)


async def states(session: Session, of_generations: Collection[str] | None = None) -> str:
    """Describe what runs on every host, for messages; name a host that can't be reached as such."""

    async def of(name: str) -> str:
        label = {generations.DEPLOYMENT: session.deployment.name}
        try:
            containers = await session.host(name).docker.containers(label)
        except PdDeployError as error:
            return f"host {session.host(name).where}: {error.message}"
        chosen = [
            c
            for c in containers
            if of_generations is None or c.labels.get(generations.GENERATION) in of_generations
        ]
        listed = ", ".join(f"{c.name} {c.status}" for c in chosen) or "no containers"
        return f"host {session.host(name).where}: {listed}"

    return "; ".join(await together(of(name) for name in session.hosts))


def with_addresses(session: Session) -> list[str]:
    """List the hosts whose devices have network addresses that the engine needs to know."""
    return [name for name in session.present if _reads_addresses(session, name)]


async def device_addresses(session: Session, name: str) -> Addresses:
    """Read the network address of every device that the service uses on a host.

    Raises:
        FactsError: devices without an address; names all of them.
    """
    host, devices = session.host(name), _devices(session, name)
    command = session.engine.read_addresses_command(session.deployment, devices)
    if not devices or not command:
        return Addresses(name, {})
    result = await host.run(command)
    return Addresses(name, session.engine.parse_addresses(result.stdout, devices, host=host.where))


def _devices(session: Session, name: str) -> list[int]:
    return [d for instance in session.topology.on_host(name) for d in instance.devices]


def _reads_addresses(session: Session, name: str) -> bool:
    devices = _devices(session, name)
    return bool(devices and session.engine.read_addresses_command(session.deployment, devices))


async def resolve_image(session: Session, choice: Choice, patience: float = 0) -> ResolvedImage:
    """Look up the digest behind a tag, so that every host runs the same bytes.

    It is asked through the first proxy's host, because the controller may not reach the registry.
    With `pull: never` it is the id of the image that the hosts have, of an image in a file its id.

    Args:
        patience: seconds to wait for a registry that is out of order.

    Raises:
        ImageNotFound: no such image, or with `pull: never` not on every host.
        InvalidInput: the file holds no image.
    """
    if archive := archive_of(choice.chosen_image):
        return ResolvedImage(choice, choice.digest or (await archives.read(archive)).id)
    deployment = session.deployment.model_copy(update={"image": choice.chosen_image})
    reference = deployment.image_reference
    if deployment.pull == "never":
        return ResolvedImage(choice, await _present_everywhere(session, reference))
    name, _, digest = split_image(reference)
    if not (digest := digest or choice.digest or ""):
        digest = await _when_in_order(lambda: _digest_of(session, choice, reference), patience)
    return ResolvedImage(choice, f"{name}@{digest}")


async def _when_in_order(ask: Callable[[], Awaitable[T]], patience: float) -> T:
    """Ask a registry again while it is out of order, for `patience` seconds."""
    begin = time.monotonic()
    while True:
        try:
            return await ask()
        except RegistryUnavailable:
            if time.monotonic() - begin >= patience:
                raise
        await asyncio.sleep(ASK_AGAIN_S)


async def _digest_of(session: Session, choice: Choice, reference: str) -> str:
    """Return a tag's digest in the registry; if that can't be reached, say how to go on without."""
    host = session.registry_host
    try:
        return await host.docker.resolve(reference, session.registry_login)
    except RegistryUnavailable as error:
        name, last_digest = split_image(reference).name, choice.last_digest
        if last_digest and await _all_have(session, f"{name}@{last_digest}"):
            pinned = f"{choice.chosen_image}@{last_digest}"
            error.hint = f"every host has it: `--image {pinned}` needs no registry"
        raise


async def _all_have(session: Session, image: str) -> bool:
    return all(await together(session.host(n).docker.image(image) for n in session.present))


async def _present_everywhere(session: Session, reference: str) -> str:
    images = await together(session.host(name).docker.image(reference) for name in session.present)
    ids = {
        name: image.id if image else None
        for name, image in zip(session.present, images, strict=True)
    }
    if len(set(ids.values())) == 1 and (only := next(iter(ids.values()))):
        return only
    found_ids = ", ".join(f"{name}: {image or 'none'}" for name, image in ids.items())
    raise ImageNotFound(
        f"expected the same image {reference} on every host, because the file says `pull: never`; "
        f"found {found_ids}",
        hint="load the image on every host, or remove `pull: never`",
    )
