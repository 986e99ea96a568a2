"""Collecting logs: what containers printed, and the files that they wrote."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from pd_deploy.errors import FactsError, NoSuchGeneration, PdDeployError
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
    name = generation or str(generations.latest(history.generations) or "")
    if name in history.generations:
        return name
    raise NoSuchGeneration(
        f"expected {f'the generation {name}' if name else 'a generation'} on the hosts, "
        f"found {', '.join(sorted(history.generations)) or 'none'}",
        hint="`pd-deploy releases FILE` lists those that are kept",
    )


async def collect(
    session: Session, name: str, history: History, generation: str, to: Path
) -> list[Path]:
    """Copy a host's logs of a generation to a directory of its name here; return the files.

    `docker.log` of each instance is what its container printed. A generation that runs the
    servers of another has their logs there.

    Raises:
        FactsError: the host names files or instances that would lie elsewhere here.
        NotOurs: a release says that its logs are where pd-deploy puts none.
        PdDeployError: a file can't be written here.
    """
    host = session.host(name)
    to = local_path(host, to, name)
    wanted = {generation}
    if release := history.releases.get(generation):
        wanted.add(release.servers)
    containers = await host.docker.containers({generations.DEPLOYMENT: session.deployment.name})
    ours = [c for c in containers if c.labels.get(generations.GENERATION) in wanted]
    printed = {local_path(host, to, c.labels.get(generations.INSTANCE, "")): c.id for c in ours}
    await together(_copy_output(host, id, to / "docker.log") for to, id in printed.items())
    written = [to / "docker.log" for to in printed]
    releases = [history.releases[known] for known in sorted(wanted) if known in history.releases]
    for release in releases:
        release.log_root(session.deployment.name)
        written += await _copy_tree(host, release.logs, to)
    return written


def local_path(host: Host, directory: Path, path: str) -> Path:
    """Return where a host's relative path is below a directory here.

    A host may name what it likes: nothing may lead out of the directory.

    Raises:
        FactsError: the path is not a plain one.
    """
    parts = path.split("/")
    if "\0" in path or any(part in ("", ".", "..") for part in parts):
        raise FactsError(
            f"expected a name for a file or directory of logs, found {path!r}",
            host=host.where,
            hint="nothing was written there; find out who changed pd-deploy's files on the host",
        )
    return directory.joinpath(*parts)


async def _copy_output(host: Host, container: str, to: Path) -> None:
    with _opened(to) as file:
        await host.docker.copy_log(container, file.write)


async def _copy_tree(host: Host, source: str, to: Path) -> list[Path]:
    copied = []
    for path in await host.find_files(source):
        target = local_path(host, to, path.removeprefix(f"{source}/"))
        with _opened(target) as file:
            async for part in host.read_in_parts(path):
                file.write(part)
        copied.append(target)
    return copied


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """Open a file to write, with the directories above it; its faults are ours."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            yield file
    except OSError as error:
        raise PdDeployError(
            f"can't write {path}: {error.strerror}", hint="name another directory with `--to`"
        ) from error
