"""Reading what is: facts of a host, its devices' addresses, the image behind a tag.

Changes nothing.
"""

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from pd_deploy.engines.base import HostFacts, Layout
from pd_deploy.errors import FactsError, ImageNotFound, PdDeployError
from pd_deploy.hosts.host import Host
from pd_deploy.planning import placement, plans
from pd_deploy.records import generations, releases
from pd_deploy.records.releases import Choice, History, Release
from pd_deploy.registry import tags
from pd_deploy.registry.client import newest, reach
from pd_deploy.registry.repository import place_of
from pd_deploy.steps import history
from pd_deploy.steps.history import Saved
from pd_deploy.steps.rollout import Downtime, Rollout, Site, Survey, places

NEWEST = "newest"
"""In place of an image: the newest one that the file's update policy finds."""


@dataclass(frozen=True)
class Addresses:
    """Network addresses of a host's devices."""

    host: str
    of_device: dict[int, str]


@dataclass(frozen=True)
class ResolvedImage:
    """The image that will run, why that one, and its digest or id."""

    choice: Choice
    exact: str


async def look(site: Site, asked: str | None = None, by: str = "a look") -> Rollout:
    """Reads everything a plan needs, on all hosts at once.

    Args:
        asked: the image that a run names.
        by: the run.
    """
    surveys = await asyncio.gather(*(survey(site, name) for name in site.hosts))
    choice = await choose(site, surveys, asked)
    image, addresses = await asyncio.gather(
        resolve_image(site, choice),
        asyncio.gather(*(device_addresses(site, name) for name in with_addresses(site))),
    )
    return planned(site, surveys, addresses, image, by)


async def survey(site: Site, name: str) -> Survey:
    """Connects to a host and reads what a plan needs to know of it.

    Raises:
        FactsError: the host does not own the address that the file gives.
        HostError, TransientError: as the hosts layer raises them.
    """
    host, own = site.host(name), site.deployment.name
    info, containers, past, interface, listening = await asyncio.gather(
        host.engine.info(),
        host.engine.containers({generations.DEPLOYMENT: ""}),
        history.read(host, site.root),
        host.facts.interface_of(host.address),
        host.facts.listening_ports(),
    )
    if interface is None:
        raise await _not_owned(host, name)
    ours = [c for c in containers if c.labels[generations.DEPLOYMENT] == own]
    others = [c for c in containers if c not in ours and c.status in generations.RUNNING]
    entry = site.deployment.hosts.get(name)
    return Survey(
        host=name,
        interface=(entry and entry.interface) or interface,
        architecture=info.architecture,
        engine_version=info.version,
        engine_root=info.root_dir,
        containers=tuple(ours),
        others=tuple(others),
        listening=frozenset(listening),
        past=past,
    )


async def _not_owned(host: Host, name: str) -> FactsError:
    """Why no interface of a host can be the one of its address."""
    loopback = await host.facts.loopback_of(host.address)
    if loopback is None:
        message = f"expected the host to own its address {host.address}, found no interface with it"
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


def past_of(surveys: Iterable[Survey]) -> History:
    """The deployment's history from what all hosts know, containers included."""
    surveys = list(surveys)
    past = history.merged(survey.past for survey in surveys)
    labelled = {c.labels.get(generations.GENERATION, "") for s in surveys for c in s.containers}
    return releases.merge([past.record], past.releases.values(), past.found | labelled)


async def choose(site: Site, surveys: Iterable[Survey], asked: str | None) -> Choice:
    """The image that a run takes; see `releases.choose`.

    `newest` is looked up in the registry by the file's update policy, from here or, where the
    registry can't be reached from here, through the proxy's host.

    Raises:
        ImageNotFound, RegistryDenied, RegistryUnavailable, RegistryMisconfigured.
    """
    past, deployment = past_of(surveys), site.deployment
    if asked != NEWEST:
        return releases.choose(deployment.image, asked, past.serving)
    policy, place = tags.policy_of(deployment), place_of(deployment)
    via = site.host(site.topology.proxy.host)
    async with reach(place, login=site.registry_login, via=via) as reached:
        found = await newest(reached, policy, skip=past.record.quarantine)
    rule = f"the newest build of family {tags.described(policy)} that is not in quarantine"
    return Choice(f"{deployment.update_repository}:{found.tag}", found.digest, rule)


def planned(
    site: Site,
    surveys: Sequence[Survey],
    addresses: Sequence[Addresses],
    image: ResolvedImage,
    by: str,
) -> Rollout:
    """The rollout of the deployment file with an image.

    Args:
        by: the run, and who or what started it.

    Raises:
        FactsError: several devices have the same address.
        InvalidInput: the file breaks a rule with this image.
    """
    file_image, past = site.deployment.image, past_of(surveys)
    deployment = site.deployment.model_copy(update={"image": image.choice.image})
    placement.build(deployment)  # its rules depend on the image
    site = site.turned_to(deployment)
    interfaces = {survey.host: survey.interface for survey in surveys}
    known = {one.host: one.of_device for one in addresses}
    site.engine.check_addresses(known)
    made = plans.make(
        deployment,
        site.topology,
        site.engine,
        facts={name: HostFacts(interfaces[name], known.get(name, {})) for name in deployment.hosts},
        image=image.exact,
        history=past,
    )
    release = past.releases.get(made.plan.generation) or Release(
        generation=made.plan.generation,
        servers=made.plan.servers,
        servers_fingerprint=made.servers_fingerprint,
        image=image.choice.image,
        exact=image.exact,
        file_image=file_image,
        hosts=places(deployment),
        logs=Layout.of(deployment, made.plan.generation).log_root,
        created=datetime.now(UTC),
        started_by=by,
    )
    by_host = {survey.host: survey for survey in surveys}
    past = past.with_release(release)
    down = Downtime(past.record.closed)
    return Rollout(site, by_host, past, made.plan, release, image.choice.rule, down=down)


async def saved(site: Site, name: str) -> tuple[Site, Saved]:
    """A kept generation, and the site as it was for it; survey that one for `restored`.

    Raises:
        NoSuchGeneration: it is not kept.
    """
    loaded = await history.load(site.hosts, site.root, name)
    return site.turned_to(loaded.deployment), loaded


def restored(site: Site, saved: Saved, surveys: Sequence[Survey]) -> Rollout:
    """The rollout that brings a saved generation back as it was."""
    past = past_of(surveys)
    return Rollout(
        site,
        {survey.host: survey for survey in surveys},
        past,
        saved.plan,
        past.releases[saved.plan.generation],
        "as it was saved",
        down=Downtime(past.record.closed),
    )


async def states(site: Site) -> str:
    """What runs on every host, in words, for messages; a host out of reach is named as such."""

    async def of(name: str) -> str:
        label = {generations.DEPLOYMENT: site.deployment.name}
        try:
            found = await site.host(name).engine.containers(label)
        except PdDeployError as error:
            return f"host {site.host(name).where}: {error.message}"
        shown = ", ".join(f"{c.name} {c.status}" for c in found) or "no containers"
        return f"host {site.host(name).where}: {shown}"

    return "; ".join(await asyncio.gather(*(of(name) for name in site.hosts)))


def with_addresses(site: Site) -> list[str]:
    """The hosts whose devices have network addresses that the engine needs to know."""
    return [name for name in site.deployment.hosts if _reads_addresses(site, name)]


async def device_addresses(site: Site, name: str) -> Addresses:
    """Reads the address of every device that the service uses on a host.

    Raises:
        FactsError: devices without an address; names all of them.
    """
    host, devices = site.host(name), _devices(site, name)
    command = site.engine.read_addresses_command(devices)
    if not devices or not command:
        return Addresses(name, {})
    done = await host.run(command)
    return Addresses(name, site.engine.parse_addresses(done.stdout, devices, host=host.where))


def _devices(site: Site, name: str) -> list[int]:
    return [d for instance in site.topology.on_host(name) for d in instance.devices]


def _reads_addresses(site: Site, name: str) -> bool:
    devices = _devices(site, name)
    return bool(devices and site.engine.read_addresses_command(devices))


async def resolve_image(site: Site, choice: Choice) -> ResolvedImage:
    """The digest behind a tag, so that every host runs the same bytes.

    Asked through the proxy's host, because the controller may not reach the registry. With
    `pull: never` it is the id of the image that the hosts have.

    Raises:
        ImageNotFound: no such image, or with `pull: never` not on every host.
    """
    deployment = site.deployment.model_copy(update={"image": choice.image})
    reference = deployment.image_reference
    if deployment.pull == "never":
        return ResolvedImage(choice, await _present_everywhere(site, reference))
    if "@sha256:" in reference:
        return ResolvedImage(choice, reference)
    digest = choice.digest
    if digest is None:
        host = site.host(site.topology.proxy.host)
        digest = await host.engine.resolve(reference, site.registry_login)
    return ResolvedImage(choice, f"{reference.rpartition(':')[0]}@{digest}")


async def _present_everywhere(site: Site, reference: str) -> str:
    found = await asyncio.gather(
        *(site.host(name).engine.image(reference) for name in site.deployment.hosts)
    )
    ids = {
        name: image.id if image else None
        for name, image in zip(site.deployment.hosts, found, strict=True)
    }
    if len(set(ids.values())) == 1 and (only := next(iter(ids.values()))):
        return only
    seen = ", ".join(f"{name}: {image or 'none'}" for name, image in ids.items())
    raise ImageNotFound(
        f"expected the same image {reference} on every host, because the file says `pull: never`; "
        f"found {seen}",
        hint="load the image on every host, or remove `pull: never`",
    )
