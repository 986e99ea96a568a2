"""Collecting logs: what containers printed, and the files that they wrote."""

from pathlib import Path

from pd_deploy.errors import NoSuchGeneration
from pd_deploy.hosts.concurrent import together
from pd_deploy.hosts.host import Host
from pd_deploy.records import generations
from pd_deploy.records.releases import History
from pd_deploy.steps.session import Session


def chosen(history: History, generation: str | None) -> str:
    """Choose the generation whose logs to collect: the youngest, unless one is named.

    Raises:
        NoSuchGeneration: nothing of it is on the hosts.
    """
    name = generation or str(generations.latest(history.found) or "")
    if name in history.found:
        return name
    raise NoSuchGeneration(
        f"expected the generation {name or 'of any name'} on the hosts, "
        f"found {', '.join(sorted(history.found)) or 'none'}",
        hint="`pd-deploy releases FILE` lists those that are kept",
    )


async def collect(
    session: Session, name: str, history: History, generation: str, to: Path
) -> list[Path]:
    """Copy a host's logs of a generation below a directory here; return the files.

    `docker.log` of each instance is what its container printed. A generation that runs the
    servers of another has their logs there.
    """
    host = session.host(name)
    wanted = {generation}
    if release := history.releases.get(generation):
        wanted.add(release.servers)
    containers = await host.docker.containers({generations.DEPLOYMENT: session.deployment.name})
    ours = [c for c in containers if c.labels.get(generations.GENERATION) in wanted]
    printed = await together(host.docker.logs(c.id, tail="all") for c in ours)
    written = []
    for container, text in zip(ours, printed, strict=True):
        written.append(to / container.labels[generations.INSTANCE] / "docker.log")
        written[-1].parent.mkdir(parents=True, exist_ok=True)
        written[-1].write_text(text)
    releases = [history.releases[known] for known in sorted(wanted) if known in history.releases]
    for release in releases:
        written += await _copy_tree(host, release.logs, to)
    return written


async def _copy_tree(host: Host, source: str, to: Path) -> list[Path]:
    copied = []
    for path in await host.find_files(source):
        target = to / path.removeprefix(f"{source}/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(await host.read_file(path) or b"")
        copied.append(target)
    return copied
