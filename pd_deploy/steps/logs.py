"""Collecting logs: what containers printed, and the files that they wrote."""

import asyncio
import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from pd_deploy.config.fields import shown
from pd_deploy.errors import (
    FactsError,
    FileMissing,
    InvalidInput,
    NoSuchGeneration,
    PdDeployError,
    Problem,
    TransientError,
)
from pd_deploy.hosts.concurrent import together
from pd_deploy.hosts.container_values import ContainerState
from pd_deploy.hosts.host import Host
from pd_deploy.records import generations
from pd_deploy.records.adopted import GENERATION as ADOPTED
from pd_deploy.records.adopted import SHOWN
from pd_deploy.records.releases import History
from pd_deploy.steps.asking import promptly
from pd_deploy.steps.session import Session

FOLLOW_S = 1.0
FIRST_LINES = 10
FIRST_BYTES = 2000
MOST_AT_ONCE = 16 << 20
"""How many bytes of a file are shown in one look: a file may be new and large."""


def chosen(history: History, generation: str | None) -> str:
    """Choose the generation whose logs to collect: the youngest, unless one is named.

    Raises:
        NoSuchGeneration: nothing of it is on the hosts, or it was adopted.
    """
    name = generation or str(generations.latest(history.generations) or "")
    if name in history.generations:
        return name
    if name == ADOPTED or (not name and history.record.adopted_serving):
        raise NoSuchGeneration(
            f"expected a generation that pd-deploy has started, found generation {SHOWN}",
            hint="its logs are where the playbook has put them: `pd-deploy exec FILE INSTANCE -- "
            "sh -c 'ls -R $LOG_PATH'` lists them",
        )
    raise NoSuchGeneration(
        f"expected {f'the generation {name}' if name else 'a generation'} on the hosts, "
        f"found {', '.join(sorted(history.generations)) or 'none'}",
        hint="`pd-deploy releases FILE` lists those that are kept",
    )


def require_instances(session: Session, instances: Collection[str]) -> None:
    """Refuse names that are no instance's.

    Raises:
        InvalidInput: each of them.
    """
    names = session.topology.names
    problems = [
        Problem("instance", f"expected one of {', '.join(names)}; found {shown(name)}")
        for name in instances
        if name not in names
    ]
    if problems:
        raise InvalidInput(problems)


async def collect(
    session: Session,
    name: str,
    history: History,
    generation: str,
    containers: Iterable[ContainerState],
    to: Path,
    instances: Collection[str] = (),
) -> list[Path]:
    """Copy a host's logs of a generation to a directory of its name here; return the files.

    `docker.log` of each instance is what its container printed. A generation that runs the
    servers of another has their logs there.

    Args:
        containers: what of the generation the host has.
        instances: copy the logs of these alone.

    Raises:
        FactsError: the host names files or instances that would lie elsewhere here.
        NotOurs: a release says that its logs are where pd-deploy puts none.
        PdDeployError: a file can't be written here.
    """
    host = session.host(name)
    to = local_path(host, to, name)
    ours = [
        c for c in containers if not instances or c.labels.get(generations.INSTANCE) in instances
    ]
    printed = {local_path(host, to, c.labels.get(generations.INSTANCE, "")): c.id for c in ours}
    await together(_copy_output(host, id, to / "docker.log") for to, id in printed.items())
    written = [to / "docker.log" for to in printed]
    releases = [
        history.releases[known]
        for known in sorted(_wanted(history, generation))
        if known in history.releases
    ]
    for release in releases:
        release.log_root(session.deployment.name)
        written += await _copy_tree(host, release.logs, to, instances)
    return written


def _wanted(history: History, generation: str) -> set[str]:
    """Name a generation, and that whose servers it runs."""
    release = history.releases.get(generation)
    return {generation, release.servers} if release else {generation}


async def containers(
    session: Session, name: str, history: History, generation: str
) -> list[ContainerState]:
    """List what a host has of a generation, and of the one whose servers it runs."""
    labels = {generations.DEPLOYMENT: session.deployment.name}
    listed = await session.host(name).docker.containers(labels)
    wanted = _wanted(history, generation)
    return [c for c in listed if c.labels.get(generations.GENERATION) in wanted]


async def follow(
    session: Session,
    name: str,
    history: History,
    generation: str,
    instances: Collection[str],
    write: Callable[[str], object],
) -> None:
    """Write what comes to a host's logs of a generation, line by line, until it is cancelled.

    It looks again every second: that needs nothing on the host, and goes on after a lost
    connection.

    Args:
        instances: those whose logs to follow; all if empty.
    """
    host = session.host(name)
    follower = _Follower(host, instances, write)
    places = [
        history.releases[g].logs for g in _wanted(history, generation) & history.releases.keys()
    ]
    while True:
        try:
            listed = containers(session, name, history, generation)
            await follower.look(await promptly(host, listed))
            for place in places:
                await follower.look_at_files(place)
        except TransientError as error:
            write(f"{name} | {error.headline}")
        await asyncio.sleep(FOLLOW_S)


class _Follower:
    """Knows up to where the logs of one host have been written."""

    def __init__(
        self, host: Host, instances: Collection[str], write: Callable[[str], object]
    ) -> None:
        self._host = host
        self._instances = instances
        self._write = write
        self._places: dict[str, str] = {}
        self._offsets: dict[str, int] = {}
        self._begun: set[str] = set()

    async def look(self, containers: Iterable[ContainerState]) -> None:
        """Write what containers have printed since the last look; first, their last lines."""
        for container in containers:
            instance = container.labels.get(generations.INSTANCE, "")
            if self._instances and instance not in self._instances:
                continue
            place = self._places.get(container.id, "")
            lines = await self._host.docker.output_after(container.id, place, FIRST_LINES)
            for line in lines:
                self._write(f"{instance} | {line.partition(' ')[2]}")
            if lines:
                self._places[container.id] = lines[-1]

    async def look_at_files(self, directory: str) -> None:
        """Write the whole lines that files have got since the last look; first, their ends."""
        sizes = await self._host.facts.sizes(directory)
        for path, size in sorted(sizes.items()):
            inner = path.removeprefix(f"{directory}/")
            instance = inner.partition("/")[0]
            if self._instances and instance not in self._instances:
                continue
            at_first = max(size - FIRST_BYTES, 0) if directory not in self._begun else 0
            begin = self._offsets.get(path, at_first)
            if size < begin:
                begin = 0  # it was written anew
            if size > begin:
                with contextlib.suppress(FileMissing):  # it has gone since
                    begin += await self._write_lines(inner, path, begin, cut=begin == at_first > 0)
            self._offsets[path] = begin
        self._begun.add(directory)

    async def _write_lines(self, inner: str, path: str, begin: int, cut: bool) -> int:
        """Write the whole lines of a file from a place on; return their bytes.

        Args:
            cut: whether the first of them is only the end of a line.
        """
        content = b""
        async for part in self._host.read_in_parts(path, begin):
            content += part
            if len(content) >= MOST_AT_ONCE:
                break  # the next look goes on there
        whole = content[: content.rfind(b"\n") + 1]
        if not whole and len(content) >= MOST_AT_ONCE:
            whole = content
        for line in whole.decode(errors="replace").splitlines()[1 if cut else 0 :]:
            self._write(f"{inner} | {line}")
        return len(whole)


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


async def _copy_tree(host: Host, source: str, to: Path, instances: Collection[str]) -> list[Path]:
    copied = []
    for path in await host.find_files(source):
        instance = path.removeprefix(f"{source}/").partition("/")[0]
        if instances and instance not in instances:
            continue
        target = local_path(host, to, path.removeprefix(f"{source}/"))
        try:
            with _opened(target) as file:
                async for part in host.read_in_parts(path):
                    file.write(part)
        except FileMissing:
            target.unlink()  # it has gone since, as logs do that are rotated
            continue
        copied.append(target)
    return copied


@contextlib.contextmanager
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
