"""Bringing an image to a host: room for it, its architecture, the pull or the load."""

import asyncio
from collections.abc import Callable, Iterable

from pd_deploy.config.fields import archive_of
from pd_deploy.config.models import Deployment
from pd_deploy.errors import DiskFull, HostError, ImageNotFound, NotReady, WrongArchitecture
from pd_deploy.hosts.container_values import Image, PullProgress
from pd_deploy.hosts.host import Host
from pd_deploy.registry import archives
from pd_deploy.steps.rollout import HostState
from pd_deploy.steps.session import Session

MIB = 1 << 20
GIB = 1 << 30

Room = tuple[str, str, int]
"""What for, at which path, and how many bytes at least."""
OnProgress = Callable[[PullProgress], None]


async def bring(
    session: Session,
    state: HostState,
    chosen_image: str,
    pinned_image: str,
    on_progress: OnProgress | None = None,
    *,
    room_first: bool = False,
) -> str:
    """Pull an image on a host unless it is there, or send it there from a file; wait for a turn.

    Args:
        room_first: whether to make sure that a host without it has room, where nothing else has.

    Returns:
        `pulled` or `loaded`, "" if it was there.

    Raises:
        DiskFull: there is no room.
        NotReady: it took longer than `gates.pull`.
        WrongArchitecture: its programs are for other machines.
        ImageNotFound: the file holds another image now than when it was planned.
    """
    host = session.host(state.host)
    if present := await host.docker.image(pinned_image):
        _require_architecture(host, state, pinned_image, present)
        return ""
    if room_first:
        needed = await room(session.deployment, state, chosen_image)
        for fault in await lacking(host, [needed]):
            raise fault
    archive = archive_of(chosen_image)
    verb, limit = "loaded" if archive else "pulled", session.deployment.gates.pull
    async with session.pulling:
        await session.may_change(host)
        try:
            async with asyncio.timeout(limit):
                if archive:
                    image = await _load(host, state, archive, pinned_image, on_progress)
                else:
                    login = session.registry_login
                    image = await host.docker.pull(pinned_image, login, on_progress)
        except TimeoutError as error:
            raise NotReady(
                f"expected {pinned_image} to be {verb} within {limit:g} s",
                host=host.where,
                hint="raise gates.pull, or load the image on the host by hand",
            ) from error
    _require_architecture(host, state, pinned_image, image)
    return verb


async def room(deployment: Deployment, state: HostState, chosen_image: str) -> Room:
    """Say how much room a host needs to take an image."""
    least = deployment.disk.image
    if archive := archive_of(chosen_image):
        # The engine unpacks it all, then takes the layers from there.
        least = max(least, 2 * (await archives.read(archive)).unpacked_size)
    return "the image", state.docker_root, least


async def lacking(host: Host, needed: Iterable[Room]) -> list[HostError]:
    """Find out where a host lacks room."""
    needed = list(needed)
    free = await host.facts.disk_free(*(path for _, path, _ in needed))
    return [
        DiskFull(
            f"expected {_shown(least, least)} free for {purpose} at {path}, "
            f"found {_shown(free_bytes, least)}",
            host=host.where,
            hint="free some (`pd-deploy prune FILE` removes old generations), or change `disk`",
        )
        for (purpose, path, least), free_bytes in zip(needed, free, strict=True)
        if free_bytes < least
    ]


def _shown(size: int, scale: int) -> str:
    return f"{size / GIB:.1f} GiB" if scale >= GIB else f"{size / MIB:.1f} MiB"


async def _load(
    host: Host, state: HostState, path: str, pinned_image: str, on_progress: OnProgress | None
) -> Image:
    """Send a host the image in a file of the controller's."""
    archive = await archives.read(path)
    if archive.id != pinned_image:
        raise ImageNotFound(
            f"expected the image {pinned_image[:19]} in {path}, found {archive.id[:19]}",
            host=host.where,
            hint="give each build a file of its own, or name this one with `--image`",
        )
    _require_architecture(host, state, pinned_image, archive)
    return await host.docker.load(pinned_image, archive.parts, archive.size, on_progress)


def _require_architecture(
    host: Host, state: HostState, pinned_image: str, image: Image | archives.Archive
) -> None:
    """Refuse an image whose programs the host can't run, before anything of it is started."""
    if image.architecture not in ("", state.architecture):
        raise WrongArchitecture(
            f"expected an image for {state.architecture}, the host's architecture; "
            f"found {pinned_image} for {image.architecture}",
            host=host.where,
            hint="name a tag that was built for it, or push an image for both architectures",
        )
