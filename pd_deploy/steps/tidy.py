"""Removing what is not needed any more: old generations, former hosts, whole deployments.

Only containers with the deployment's label and directories of its own are touched.
"""

from collections.abc import Iterable

from pd_deploy.config.fields import archive_of
from pd_deploy.engines.base import Layout
from pd_deploy.hosts.concurrent import all_ended
from pd_deploy.hosts.container_values import ContainerState
from pd_deploy.hosts.host import Host
from pd_deploy.records import generations
from pd_deploy.records.releases import History, Release, local_tag
from pd_deploy.steps import own_code, stopping, waiting_room
from pd_deploy.steps.report import Report
from pd_deploy.steps.session import LockedSession

# Left by a run that was killed while it wrote.
DRAFTS = r"""[ ! -d "$1" ] || find "$1" -xdev -type f -name '.*.tmp' -print -delete"""

# Removes a directory that is empty, and no other.
RMDIR = ("rmdir", "--")


async def prune(session: LockedSession, name: str, history: History) -> Report:
    """Remove old generations from a host: containers, files, logs, and the images and source trees
    that no kept one needs. Those stay that `History.kept` names."""
    host, kept = session.host(name), history.kept(session.deployment.keep)
    outdated = sorted(history.generations - kept)
    containers = await host.docker.containers({generations.DEPLOYMENT: session.deployment.name})
    old = [
        c
        for c in containers
        if c.labels.get(generations.GENERATION) in outdated
        or c.labels.get(generations.ROLE) == generations.PROBE
    ]
    old += await waiting_room.outdated(host, containers)
    await _remove_containers(session, host, old)
    for generation in outdated:
        await _remove_generation(session, host, history, generation)
    needed = {release.pinned_image for release in _known(history, kept)}
    images = [
        release for release in _known(history, outdated) if release.pinned_image not in needed
    ]
    await _remove_images(session, host, outdated, images)
    trees: list[str] = []
    if any(release.code for release in history.releases.values()):
        used = {digest for release in _known(history, kept) for digest in release.code}
        trees = await own_code.prune(session, host, used)
    await session.may_change(host)
    drafts = await host.output(["sh", "-c", DRAFTS, "sh", session.root])
    removed = [*outdated, *(f"source tree {digest[:12]}" for digest in trees)]
    detail = f"removed {', '.join(removed)}" if removed else "nothing to remove"
    return Report("prune", name, name, bool(removed or drafts), detail)


def _known(history: History, generations: Iterable[str]) -> list[Release]:
    return [history.releases[name] for name in generations if name in history.releases]


async def clear(session: LockedSession, name: str, history: History) -> Report:
    """Remove everything of the deployment from a host."""
    host, deployment = session.host(name), session.deployment.name
    containers = await host.docker.containers({generations.DEPLOYMENT: deployment})
    await _remove_containers(session, host, containers)
    await _remove_images(session, host, sorted(history.generations), history.releases.values())
    for release in history.releases.values():
        await _remove_logs(session, host, release)
    await session.may_change(host)
    logs = Layout.log_root_of(session.deployment)
    await host.remove_tree(logs, below=session.deployment.paths.logs)
    await session.may_change(host)
    # Last, as the lease lies in it.
    session.lease.forget(host)
    removed = await host.remove_tree(session.root, below=session.deployment.paths.state)
    detail = f"removed {len(containers)} containers and {session.root}"
    changed = bool(containers) or removed
    return Report("clear", name, name, changed, detail if changed else "nothing to remove")


async def stop(session: LockedSession, name: str) -> Report:
    """Stop all containers of the deployment on a host, proxies first, and keep them."""
    host = session.host(name)
    containers = await host.docker.containers({generations.DEPLOYMENT: session.deployment.name})
    running = [c for c in containers if c.status in generations.RUNNING]
    cut = await _stop(session, host, running)
    detail = f"stopped {', '.join(c.name for c in running)}" if running else "nothing runs"
    detail = "; ".join(filter(None, (detail, stopping.told_of(cut, session))))
    return Report("stop", name, name, bool(running), detail)


async def _remove_containers(
    session: LockedSession, host: Host, states: Iterable[ContainerState]
) -> None:
    states = list(states)
    await _stop(session, host, [s for s in states if s.status in generations.RUNNING])

    async def remove(state: ContainerState) -> None:
        await session.may_change(host)
        await host.docker.remove(state.id, deployment=session.deployment.name)

    await all_ended(remove(state) for state in states)


async def _stop(session: LockedSession, host: Host, running: Iterable[ContainerState]) -> int:
    """Stop containers, proxies first; return how many requests that has cut."""
    by_role: dict[bool, list[ContainerState]] = {True: [], False: []}
    for state in running:
        by_role[state.labels.get(generations.ROLE) == "proxy"].append(state)
    cut = 0
    for group in (by_role[True], by_role[False]):
        cut += sum(await all_ended(stopping.stop(session, host, state) for state in group))
    return cut


async def _remove_generation(
    session: LockedSession, host: Host, history: History, name: str
) -> None:
    if release := history.releases.get(name):
        await _remove_logs(session, host, release)
    await session.may_change(host)
    await host.remove_tree(f"{session.root}/{name}", below=session.root)


async def _remove_logs(session: LockedSession, host: Host, release: Release) -> None:
    """Remove a generation's logs; of a former place for logs also the directory, once it is empty.

    Raises:
        NotOurs: the release says that they are where pd-deploy puts no logs.
    """
    root = release.log_root(session.deployment.name)
    await session.may_change(host)
    await host.remove_tree(release.logs, below=root)
    if root != session.deployment.paths.logs:
        await session.may_change(host)
        await host.run([*RMDIR, f"{root}/{session.deployment.name}"], check=False)


async def _remove_images(
    session: LockedSession, host: Host, generations: Iterable[str], unneeded: Iterable[Release]
) -> None:
    """Untag the generations' images; remove those of releases that nobody needs, unless another
    deployment keeps them, or somebody else has brought them to the host (`pull: never`)."""
    deployment = session.deployment.name
    for name in generations:
        if await host.docker.image(local_tag(deployment, name)):
            await session.may_change(host)
            await host.docker.remove_image(local_tag(deployment, name))
    brought = {
        r.pinned_image: archive_of(r.chosen_image) or "@" in r.pinned_image for r in unneeded
    }
    for reference in (reference for reference, by_us in brought.items() if by_us):
        image = await host.docker.image(reference)
        if image and not any(tag.startswith("pd-deploy/") for tag in image.tags):
            await session.may_change(host)
            await host.docker.remove_image(reference)
