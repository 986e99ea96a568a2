"""The Docker engine of a host."""

import asyncio
import contextlib
import math
import time
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import replace
from datetime import datetime
from typing import Any, Literal, TypeVar

import requests
import urllib3
from docker import APIClient
from docker import errors as sdk
from docker.utils import parse_repository_tag

from pd_deploy.errors import (
    ConnectionDropped,
    ContainerMissing,
    DockerRefused,
    ImageNotFound,
    NameTaken,
    NotOurs,
    PdDeployError,
    TimedOut,
    TransientError,
)
from pd_deploy.hosts import docker_create
from pd_deploy.hosts.concurrent import together
from pd_deploy.hosts.container_values import (
    DEPLOYMENT_LABEL,
    Adopted,
    ContainerSpec,
    ContainerState,
    DockerInfo,
    Image,
    ListedContainer,
    Owner,
    PullMeter,
    PullProgress,
    RegistryLogin,
    image_of,
    listed,
    oci_architecture,
    state_of,
)
from pd_deploy.hosts.docker_errors import (
    container_error,
    explanation,
    load_error,
    pull_error,
)
from pd_deploy.hosts.docker_socket import DockerSocket
from pd_deploy.hosts.docker_stream import WholeStreams
from pd_deploy.hosts.settled import settled
from pd_deploy.hosts.threads import in_thread
from pd_deploy.hosts.tunnel import Tunnel

T = TypeVar("T")
LogWait = Literal["seen", "ended", "timeout"]

# Short calls at once per host; each has a thread while it runs.
MAX_CALLS = 8
CALL_TIMEOUT_S = 60  # the SDK's own; an engine that removes large containers is slow to answer
FIRST_ANSWER_S = 20  # for its version, which a busy engine says at once, and one that hangs never
POLL_S = 0.5
# A start is over soon, and others wait for it; its first line takes some milliseconds.
LOG_POLL_S, LOG_POLL_MOST_S = 0.03, 0.25
LOG_LINES = 100  # more than come between two looks, as a rule
PATIENCE_S = 60.0  # for an engine that restarts while one waits
PROGRESS_EVERY_S = 1.0  # the engine reports each layer many times a second

_BROKEN = (requests.exceptions.RequestException, urllib3.exceptions.HTTPError, OSError)


class DockerClient:
    """The Docker engine of a host, through the host's SSH connection.

    Every method may raise DockerDown, DockerAccessDenied, DockerMissing, ConnectionDropped,
    TimedOut, DockerRefused and what connecting raises.

    Args:
        socket: opens streams to the engine.
        where: the host's name for messages.
    """

    def __init__(self, socket: DockerSocket, where: str) -> None:
        self._socket = socket
        self._where = where
        self._shared: tuple[Tunnel, APIClient] | None = None
        self._opening = asyncio.Lock()
        self._calls = asyncio.Semaphore(MAX_CALLS)

    async def info(self) -> DockerInfo:
        """Version, architecture, and place of the engine's data."""
        info = await self._read("info", lambda c: c.info())
        security = " ".join(info.get("SecurityOptions") or ())
        return DockerInfo(
            version=info["ServerVersion"],
            root_dir=info["DockerRootDir"],
            architecture=oci_architecture(info["Architecture"]),
            remaps_users="name=userns" in security,
            is_rootless="name=rootless" in security and "BuildahVersion" not in info,
        )

    async def image(self, ref: str) -> Image | None:
        """Return the image `ref` as the host has it; None if the host doesn't have it."""

        def look(client: APIClient) -> Image | None:
            try:
                return _inspect_image(client, ref)
            except sdk.NotFound:
                return None

        return await self._read(f"image {ref}", look)

    async def pull(
        self,
        ref: str,
        auth: RegistryLogin | None = None,
        on_progress: Callable[[PullProgress], None] | None = None,
    ) -> Image:
        """Pull an image; its digest is the one the registry gave for `ref`.

        Args:
            ref: `repository[:tag][@digest]`.
            auth: credentials for the registry.
            on_progress: called on the event loop, about once a second.

        Raises:
            ImageNotFound, RegistryDenied, RegistryUnavailable, RegistryMisconfigured, DiskFull.
        """
        meter = PullMeter()
        report = _reporter(on_progress)

        def pull(client: APIClient) -> Image:
            for message in client.pull(ref, stream=True, decode=True, auth_config=_login(auth)):
                if "error" in message:
                    raise pull_error(message["error"], ref, self._where)
                report(meter.read(message))
            return _inspect_image(client, ref)

        def refused(exc: sdk.APIError) -> PdDeployError:
            return pull_error(explanation(exc), ref, self._where)

        image = await self._long(f"pull {ref}", pull, refused)
        if meter.digest is None:
            return image
        repository = parse_repository_tag(ref.split("@", maxsplit=1)[0])[0]
        return replace(image, digest=f"{repository}@{meter.digest}")

    async def load(
        self,
        id: str,
        parts: Callable[[], Iterable[bytes]],
        total: int,
        on_progress: Callable[[PullProgress], None] | None = None,
    ) -> Image:
        """Load an image from an archive, all of it at once; return the image.

        Args:
            id: the image's id.
            parts: gives the archive from its beginning, in parts; called on another thread.
            total: bytes, for the progress.
            on_progress: called on the event loop, about once a second.

        Raises:
            ImageNotFound: the engine has no image with that id after it.
            DiskFull, DockerRefused: as they say.
        """
        report = _reporter(on_progress)

        def send() -> Iterator[bytes]:
            sent = 0
            for part in parts():
                yield part
                sent += len(part)
                report(PullProgress(0, 0, sent, total))

        def load(client: APIClient) -> Image | None:
            messages = client.load_image(send())  # type: ignore[no-untyped-call]
            for message in messages:
                if "error" in message:
                    raise load_error(message["error"], what, self._where)
            try:
                return _inspect_image(client, id)
            except sdk.NotFound:
                return None

        what = f"load {id[:19]}"
        if image := await self._long(what, load):
            return image
        raise ImageNotFound(
            f"expected the image {id[:19]} after the archive was loaded, found none with that id",
            host=self._where,
            hint="Docker with the containerd image store gives images other ids: load the archive "
            "by hand on every host, and set `pull: never`",
        )

    async def resolve(self, ref: str, auth: RegistryLogin | None = None) -> str:
        """Ask the registry for the digest (`sha256:…`) of `ref`; pull nothing.

        Raises:
            ImageNotFound, RegistryDenied, RegistryUnavailable, RegistryMisconfigured.
        """

        return str((await self._distribution(ref, auth))["Descriptor"]["digest"])

    async def architectures(self, ref: str, auth: RegistryLogin | None = None) -> frozenset[str]:
        """Ask the registry what `ref` is for, in the names of OCI; empty if it does not say.

        Raises:
            ImageNotFound, RegistryDenied, RegistryUnavailable, RegistryMisconfigured.
        """
        platforms = (await self._distribution(ref, auth)).get("Platforms") or []
        names = {str(platform.get("architecture") or "") for platform in platforms}
        return frozenset(names - {"", "unknown"})

    async def _distribution(self, ref: str, auth: RegistryLogin | None) -> dict[str, Any]:
        def refused(exc: sdk.APIError) -> PdDeployError:
            return pull_error(explanation(exc), ref, self._where)

        return await self._long(
            f"resolve {ref}",
            lambda c: c.inspect_distribution(  # type: ignore[no-untyped-call]
                ref, auth_config=_login(auth)
            ),
            refused,
        )

    async def tag(self, ref: str, name: str) -> None:
        """Give the image `ref` the further name `repository:tag`, so that no prune takes it."""
        repository, tag = parse_repository_tag(name)
        await self._change(f"tag {ref} as {name}", lambda c: c.tag(ref, repository, tag))

    async def remove_image(self, name: str) -> None:
        """Take a name from an image, and the image with its last one, if no container uses it."""

        def remove(client: APIClient) -> None:
            # 409: a container still uses it, and its own removal comes first.
            try:
                client.remove_image(name, noprune=False)
            except sdk.APIError as error:
                if error.status_code not in (404, 409):
                    raise

        await self._long(f"remove image {name}", remove)

    async def containers(self, labels: Mapping[str, str]) -> list[ContainerState]:
        """All containers, running or not, that carry all the labels, sorted by name.

        An empty value stands for any.
        """
        filters = {"label": [f"{key}={v}" if v else key for key, v in labels.items()]}
        entries = await self._read(
            "list containers", lambda c: c.containers(all=True, filters=filters)
        )
        return await self.states(entry["Id"] for entry in entries)

    async def states(self, ids: Iterable[str]) -> list[ContainerState]:
        """Return the states of containers, sorted by name; leave out those that are gone."""
        states = await together(map(self._inspect_if_there, ids))
        return sorted((state for state in states if state), key=lambda state: state.name)

    async def listed(self) -> list[ListedContainer]:
        """All containers, running or not, of whoever."""
        entries = await self._read("list all containers", lambda c: c.containers(all=True))
        return [listed(entry) for entry in entries]

    async def find(self, name: str, *, deployment: str) -> ContainerState | None:
        """Find the deployment's container by its name; return None if no container has it.

        Raises:
            NameTaken: somebody else's container has it.
        """
        try:
            state = await self.inspect(name)
        except ContainerMissing:
            return None
        if state.labels.get(DEPLOYMENT_LABEL) != deployment:
            raise name_taken(
                ListedContainer(state.id, state.name, state.labels, state.status, state.image),
                deployment,
                self._where,
            )
        return state

    async def inspect(self, container: str) -> ContainerState:
        """Return the state of a container, by its name or id.

        Raises:
            ContainerMissing: there is none.
        """
        what = f"container {container}"
        return await self._read(what, lambda c: state_of(c.inspect_container(container)))

    async def create(self, spec: ContainerSpec) -> str:
        """Create a container; return its id.

        Raises:
            ImageNotFound, NameTaken: as they say.
            FileMissing: the source of a mount does not exist.
        """
        request = docker_create.request(spec)
        created = await self._change(
            f"create {spec.name}",
            lambda c: c.create_container_from_config(**request),  # type: ignore[no-untyped-call]
        )
        return str(created["Id"])

    async def start(self, container: str) -> None:
        """Start a container; nothing happens if it runs.

        Raises:
            FileMissing: a device does not exist.
        """
        await self._change(f"start {container}", lambda c: c.start(container))

    async def stop(self, container: str, *, deployment: Owner, timeout: int = 30) -> None:
        """Stop a container of the deployment; nothing happens if it does not run.

        Args:
            timeout: seconds between the stop signal and SIGKILL.

        Raises:
            NotOurs: it does not carry the deployment's label.
        """
        state = await self._own(container, deployment)
        await self._long(f"stop {state.name}", lambda c: c.stop(state.id, timeout=timeout))

    async def kill(self, container: str, signal: str = "SIGKILL", *, deployment: str) -> None:
        """Send a signal to a container of the deployment; NotOurs as in `stop`."""
        state = await self._own(container, deployment)
        await self._change(f"kill {state.name}", lambda c: c.kill(state.id, signal))

    async def remove(self, container: str, *, deployment: Owner, force: bool = False) -> bool:
        """Remove a container of the deployment; False if it was gone. NotOurs as in `stop`."""
        try:
            state = await self._own(container, deployment)
            await self._change(
                f"remove {state.name}", lambda c: c.remove_container(state.id, v=True, force=force)
            )
        except ContainerMissing:
            return False
        return True

    async def wait(self, container: str, *, patience: float = PATIENCE_S) -> int:
        """Wait until a container has ended; return its exit code.

        Survives dropped connections and engine restarts: it looks again.

        Args:
            patience: seconds for which the host may be out of reach before the wait gives up.

        Raises:
            ContainerMissing: it does not exist, or was removed meanwhile.
        """

        async def look() -> int | None:
            state = await self.inspect(container)
            if state.exit_code is not None:
                return state.exit_code
            if state.status == "created":
                await asyncio.sleep(POLL_S)
            else:
                await self._long(f"wait for {container}", lambda c: c.wait(state.id))
            return None

        return await self._persist(look, patience)

    async def logs(
        self, container: str, tail: int | Literal["all"] = 50, *, since: datetime | None = None
    ) -> str:
        """Read the last lines of a container's output, of those that came after `since`."""
        after = since.timestamp() if since else None

        def read(client: APIClient) -> str:
            return str(client.logs(container, tail=tail, since=after).decode(errors="replace"))

        return await self._read(f"logs of {container}", read)

    async def copy_log(self, container: str, write: Callable[[bytes], object]) -> None:
        """Hand all of a container's output to `write`, bit by bit, on a thread of its own."""

        def copy(client: APIClient) -> None:
            for part in client.logs(container, stream=True, follow=False):
                write(part)

        await self._long(f"log of {container}", copy)

    async def output_after(self, container: str, place: str, first: int) -> list[str]:
        """Read the lines of a container's output that follow a place, each with its time; the last
        `first` ones where there is no place yet. The last of them is the next place."""
        if place:
            return await self._lines(container, place)
        return await self._timed_lines(container, first)

    async def execute(
        self,
        container: str,
        argv: Sequence[str],
        write: Callable[[bytes, bytes], object],
        *,
        deployment: Owner,
        environment: Mapping[str, str] | None = None,
        attended: bool = False,
    ) -> int:
        """Run a command in a container of the deployment; return its exit code.

        If the call is cut, the command runs on: Docker has no means to end it. Its standard input
        is at its end from the start, or with `attended` once the call is over or cut: a command
        that looks there can end itself.

        Args:
            write: given its standard output and standard error bit by bit, on a thread.
            environment: over that of the container; it is in no process's arguments.

        Raises:
            NotOurs: it does not carry the deployment's label.
            DockerRefused: it does not run, or has no such program.
        """
        state = await self._own(container, deployment)

        def run(client: APIClient) -> int:
            made = client.exec_create(
                state.id, list(argv), stdin=attended, environment=dict(environment or {})
            )
            for out, err in client.exec_start(made["Id"], stream=True, demux=True):
                write(out or b"", err or b"")
            return int(client.exec_inspect(made["Id"])["ExitCode"])

        return await self._long(f"run {argv[0]} in {state.name}", run)

    async def spawn(
        self,
        container: str,
        argv: Sequence[str],
        *,
        deployment: Owner,
        environment: Mapping[str, str],
        directory: str,
    ) -> None:
        """Start a command in a container of the deployment, and leave it there.

        Args:
            environment: over that of the container. It is told to the engine, so it is in no
                process's arguments.

        Raises:
            NotOurs: it does not carry the deployment's label.
            DockerRefused: it does not run, or has no such program or directory.
        """
        state = await self._own(container, deployment)

        def start(client: APIClient) -> None:
            made = client.exec_create(
                state.id, list(argv), environment=dict(environment), workdir=directory
            )
            client.exec_start(made["Id"], detach=True)

        await self._change(f"start {argv[0]} in {state.name}", start)

    async def log_end(self, container: str) -> str:
        """Return the place where a container's output ends so far, for `wait_log`: the last line
        with its time, "" while there is none."""
        return "".join((await self._timed_lines(container, 1))[-1:])

    async def wait_log(
        self,
        container: str,
        text: str,
        timeout: float,
        *,
        after: str = "",
        patience: float = PATIENCE_S,
    ) -> LogWait:
        """Wait until a container's output has `text`, the container ends, or time is up.

        Args:
            timeout: seconds.
            after: only output after this place counts, whatever the host's clock says meanwhile.
            patience: as in `wait`.
        """
        place, pause = after, LOG_POLL_S

        async def look() -> LogWait | None:
            nonlocal place, pause
            running = (await self.inspect(container)).running
            lines = await self._lines(container, place)
            if any(text in line for line in lines):
                return "seen"
            if lines:
                place = lines[-1]
            if not running:
                return "ended"
            await asyncio.sleep(pause)
            pause = min(pause * 1.5, LOG_POLL_MOST_S)
            return None

        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                return await self._persist(look, patience)
        # The look that was cut short: a slow engine is not the container's fault.
        return await look() or "timeout"

    async def aclose(self) -> None:
        """Cut all calls under way."""
        shared, self._shared = self._shared, None
        if shared:
            await shared[0].aclose()
            shared[1].close()
        await self._socket.aclose()

    async def _lines(self, container: str, place: str) -> list[str]:
        """Read the output that follows a place, in the log's own order: as many lines from its end
        as it takes, or all that are left when the place has been rotated away."""
        if not place:
            return await self._timed_lines(container, "all")
        count = LOG_LINES
        while True:
            lines = await self._timed_lines(container, count)
            # The line at the place may have gone on since.
            matches = [number for number, line in enumerate(lines) if line.startswith(place)]
            if matches:
                return lines[matches[-1] + 1 :]
            if len(lines) < count:
                return lines
            count *= 8

    async def _timed_lines(self, container: str, tail: int | Literal["all"]) -> list[str]:
        """Read the last lines of a container's output, each with the time that Docker gave it."""

        def read(client: APIClient) -> str:
            logs = client.logs(container, tail=tail, timestamps=True)
            return str(logs.decode(errors="replace"))

        return [
            line for line in (await self._read(f"logs of {container}", read)).split("\n") if line
        ]

    async def _own(self, container: str, deployment: Owner) -> ContainerState:
        state = await self.inspect(container)
        if isinstance(deployment, Adopted):
            _require_adopted(state, deployment, self._where)
        elif state.labels.get(DEPLOYMENT_LABEL) != deployment:
            raise NotOurs(
                f"container {state.name} is not of deployment {deployment}: expected the label "
                f"{DEPLOYMENT_LABEL}={deployment}, found "
                f"{state.labels.get(DEPLOYMENT_LABEL) or 'none'}",
                host=self._where,
                hint="stop or remove it by hand if it is in the way",
            )
        return state

    async def _inspect_if_there(self, container: str) -> ContainerState | None:
        try:
            return await self.inspect(container)
        except ContainerMissing:
            return None

    async def _persist(self, look: Callable[[], Awaitable[T | None]], patience: float) -> T:
        """Look until there is an answer, through faults that pass."""
        lost_at: float | None = None
        while True:
            try:
                answer = await look()
                lost_at = None
            except TransientError:
                lost_at = lost_at or time.monotonic()
                if time.monotonic() - lost_at > patience:
                    raise
                await asyncio.sleep(POLL_S)
                continue
            if answer is not None:
                return answer

    async def _read(self, what: str, call: Callable[[APIClient], T]) -> T:
        """Make a call that changes nothing; make it again if its connection is lost."""
        try:
            return await self._do(what, call)
        except ConnectionDropped:
            return await self._do(what, call)

    async def _change(self, what: str, call: Callable[[APIClient], T]) -> T:
        """Make a short call that changes the host; if cancelled, wait for its end."""
        return await settled(self._do(what, call))

    async def _do(self, what: str, call: Callable[[APIClient], T]) -> T:
        tunnel, client = await self._client()
        async with self._calls:
            with self._errors(what, tunnel):
                return await in_thread(lambda: call(client), f"{self._where}: {what}")

    async def _long(
        self,
        what: str,
        call: Callable[[APIClient], T],
        refused: Callable[[sdk.APIError], PdDeployError] | None = None,
    ) -> T:
        """Make a call that may last, on a tunnel of its own; if cancelled, cut the tunnel."""
        _, shared = await self._client()
        async with self._tunnel() as (tunnel, path):
            with self._errors(what, tunnel, refused):
                return await in_thread(
                    lambda: _with_client(path, shared.api_version, call), f"{self._where}: {what}"
                )

    async def _client(self) -> tuple[Tunnel, APIClient]:
        async with self._opening:
            if self._shared is None:
                tunnel = Tunnel(self._socket.stream)
                try:
                    path = await tunnel.start()
                    what = "ask for its version"
                    with self._errors(what, tunnel, timeout=FIRST_ANSWER_S):
                        client = await in_thread(
                            lambda: _new_client(path, "auto", FIRST_ANSWER_S),
                            f"{self._where}: {what}",
                        )
                        client.timeout = CALL_TIMEOUT_S
                except BaseException:
                    await tunnel.aclose()
                    raise
                self._shared = tunnel, client
            return self._shared

    @contextlib.asynccontextmanager
    async def _tunnel(self) -> AsyncIterator[tuple[Tunnel, str]]:
        tunnel = Tunnel(self._socket.stream)
        try:
            yield tunnel, await tunnel.start()
        finally:
            await tunnel.aclose()

    @contextlib.contextmanager
    def _errors(
        self,
        what: str,
        tunnel: Tunnel,
        refused: Callable[[sdk.APIError], PdDeployError] | None = None,
        timeout: int = CALL_TIMEOUT_S,
    ) -> Iterator[None]:
        try:
            yield
        except sdk.APIError as exc:
            error = refused(exc) if refused else container_error(exc, what, self._where)
            raise error from None
        except (*_BROKEN, sdk.DockerException) as exc:
            # The SDK wraps what happens while it asks for the version.
            if isinstance(exc.__cause__ or exc, requests.exceptions.ReadTimeout):
                raise TimedOut(
                    f"{what}: Docker did not answer within {timeout} s",
                    host=self._where,
                    hint="check Docker's log (`journalctl -u docker`) and the host's load",
                ) from None
            raise self._broken(exc, what, tunnel) from None

    def _broken(self, exc: Exception, what: str, tunnel: Tunnel) -> PdDeployError:
        if fault := tunnel.broken():
            return fault
        if isinstance(exc, sdk.DockerException) and not isinstance(exc.__cause__, _BROKEN):
            return DockerRefused(f"{what}: {exc}", host=self._where)
        return ConnectionDropped(
            f"{what}: the connection to the Docker engine was lost",
            host=self._where,
            hint="run again; steps that are done already are skipped",
        )


def _require_adopted(state: ContainerState, adopted: Adopted, where: str) -> None:
    if (state.id, state.name) != (adopted.id, adopted.name) or DEPLOYMENT_LABEL in state.labels:
        raise NotOurs(
            f"expected the container {adopted.name} ({adopted.id[:12]}) that was adopted, found "
            f"{state.name} ({state.id[:12]})",
            host=where,
            hint="stop or remove it by hand if it is in the way",
        )


def name_taken(container: ListedContainer, deployment: str, where: str) -> NameTaken:
    """Make the error for a container that has a name of the deployment's, but not its label."""
    return NameTaken(
        f"expected the name {container.name} to be free, or of a container of deployment "
        f"{deployment}; found container {container} without the label "
        f"{DEPLOYMENT_LABEL}={deployment}",
        host=where,
        hint=f"`docker rename {container.id[:12]} OTHER-NAME` or `docker rm {container.id[:12]}`, "
        "then run again",
    )


def _new_client(path: str, version: str, timeout: int = CALL_TIMEOUT_S) -> APIClient:
    return WholeStreams(f"unix://{path}", version=version, timeout=timeout)


def _with_client(path: str, version: str, call: Callable[[APIClient], T]) -> T:
    with contextlib.closing(_new_client(path, version)) as client:
        return call(client)


def _login(auth: RegistryLogin | None) -> dict[str, str]:
    # Empty and not None, with which the SDK sends the controller's own credentials.
    return {"username": auth.username, "password": auth.password} if auth else {}


def _inspect_image(client: APIClient, ref: str) -> Image:
    inspected = client.inspect_image(ref)  # type: ignore[no-untyped-call]
    return image_of(inspected, parse_repository_tag(ref)[0])


def _reporter(
    on_progress: Callable[[PullProgress], None] | None,
) -> Callable[[PullProgress], None]:
    """Hand progress from the pull's thread to the event loop, not too often."""
    loop = asyncio.get_running_loop()
    reported_at = -math.inf

    def report(progress: PullProgress) -> None:
        nonlocal reported_at
        if on_progress and time.monotonic() - reported_at >= PROGRESS_EVERY_S:
            reported_at = time.monotonic()
            loop.call_soon_threadsafe(on_progress, progress)

    return report
