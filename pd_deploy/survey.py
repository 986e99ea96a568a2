"""Reading what is: facts of a host, its devices' addresses, the image behind a tag.

Changes nothing.
"""

import asyncio
from dataclasses import dataclass

from pd_deploy import generation
from pd_deploy.errors import FactsError, ImageNotFound
from pd_deploy.rollout import Rollout, Site, Survey


@dataclass(frozen=True)
class Addresses:
    """Network addresses of a host's devices."""

    host: str
    of_device: dict[int, str]


@dataclass(frozen=True)
class ResolvedImage:
    """The image that will run: `reference` is what the file says, `exact` its digest or id."""

    reference: str
    exact: str


async def look(site: Site) -> Rollout:
    """Reads everything a plan needs, on all hosts at once."""
    names = list(site.deployment.hosts)
    image, surveys, addresses = await asyncio.gather(
        resolve_image(site),
        asyncio.gather(*(survey(site, name) for name in names)),
        asyncio.gather(*(device_addresses(site, name) for name in with_addresses(site))),
    )
    return Rollout(
        site,
        {one.host: one for one in surveys},
        {one.host: one.of_device for one in addresses},
        image.exact,
    )


async def survey(site: Site, name: str) -> Survey:
    """Connects to a host and reads what a plan needs to know of it.

    Raises:
        FactsError: the host does not own the address that the file gives.
        HostError, TransientError: as the hosts layer raises them.
    """
    host, entry = site.host(name), site.deployment.hosts[name]
    state = f"{site.deployment.paths.state}/{site.deployment.name}"
    info, containers, directories, interface, listening = await asyncio.gather(
        host.engine.info(),
        host.engine.containers({generation.DEPLOYMENT: site.deployment.name}),
        host.list_dir(state),
        host.facts.interface_of(entry.address),
        host.facts.listening_ports(),
    )
    if interface is None:
        raise FactsError(
            f"expected the host to own its address {entry.address}, found no interface with it",
            host=host.where,
            hint=f"correct hosts.{name} in the deployment file",
        )
    names = {c.labels.get(generation.GENERATION, "") for c in containers}
    return Survey(
        host=name,
        interface=entry.interface or interface,
        architecture=info.architecture,
        engine_version=info.version,
        containers=tuple(containers),
        generations=tuple(sorted(names | set(directories))),
        listening=frozenset(listening),
    )


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
    if not devices or command is None:
        return Addresses(name, {})
    done = await host.run(command)
    return Addresses(name, site.engine.parse_addresses(done.stdout, devices, host=host.where))


def _devices(site: Site, name: str) -> list[int]:
    return [d for instance in site.topology.on_host(name) for d in instance.devices]


def _reads_addresses(site: Site, name: str) -> bool:
    devices = _devices(site, name)
    return bool(devices) and site.engine.read_addresses_command(devices) is not None


async def resolve_image(site: Site) -> ResolvedImage:
    """The digest behind the file's tag, so that every host runs the same bytes.

    Asked through the proxy's host, because the controller may not reach the registry. With
    `pull: never` it is the id of the image that the hosts have.

    Raises:
        ImageNotFound: no such image, or with `pull: never` not on every host.
    """
    deployment = site.deployment
    reference = deployment.image_reference
    if deployment.pull == "never":
        return await _present_everywhere(site, reference)
    if "@sha256:" in reference:
        return ResolvedImage(reference, reference)
    host = site.host(site.topology.proxy.host)
    digest = await host.engine.resolve(reference, site.registry_login)
    return ResolvedImage(reference, f"{reference.rpartition(':')[0]}@{digest}")


async def _present_everywhere(site: Site, reference: str) -> ResolvedImage:
    found = await asyncio.gather(
        *(site.host(name).engine.image(reference) for name in site.deployment.hosts)
    )
    ids = {
        name: image.id if image else None
        for name, image in zip(site.deployment.hosts, found, strict=True)
    }
    if len(set(ids.values())) == 1 and (only := next(iter(ids.values()))):
        return ResolvedImage(reference, only)
    seen = ", ".join(f"{name}: {image or 'none'}" for name, image in ids.items())
    raise ImageNotFound(
        f"expected the same image {reference} on every host, because the file says `pull: never`; "
        f"found {seen}",
        hint="load the image on every host, or remove `pull: never`",
    )
