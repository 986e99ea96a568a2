"""A host whose connection leads to a machine in memory."""

import asyncio
import contextlib
import shlex
import ssl
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import httpx
from docker import errors as sdk

from pd_deploy.errors import ConnectionDropped, HostUnreachable, PdDeployError
from pd_deploy.hosts.docker_client import DockerClient
from pd_deploy.hosts.host import CommandResult, Host
from pd_deploy.hosts.login import Login
from pd_deploy.hosts.sftp import SftpSession
from pd_deploy.hosts.tunnel import Tunnel
from tests.memory import commands
from tests.memory.calls import Calls, Way, hang
from tests.memory.client import MemoryClient, NotYet
from tests.memory.machine import Machine
from tests.memory.sftp import MemorySftp

T = TypeVar("T")

LOOK_EVERY_S = 0.05
CHANGES = ("create", "start", "stop", "kill", "remove", "tag", "pull", "load")


class MemoryHost(Host):
    """A `Host` without SSH. What it shares with the real one: all but the transport."""

    def __init__(
        self,
        name: str,
        machine: Machine,
        calls: Calls | None = None,
        connect_timeout: float = 10.0,
    ) -> None:
        super().__init__(name, machine.address, Login("root"), connect_timeout=connect_timeout)
        self.machine = machine
        self.calls = calls or Calls()
        self.docker = MemoryDocker(self)
        self._connected = False
        self._connects = 0

    @property
    def connects(self) -> int:
        """How often the connection was made."""
        return self._connects

    @asynccontextmanager
    async def passing(self, what: str, *, changes: bool, way: Way) -> AsyncIterator[None]:
        """Around what a call does: the moments before and after it, if it gets there and back."""
        await self.reached(what)
        async with self.calls.passing(self.machine.name, what, changes=changes, way=way):
            await self.reached(what)
            if way in self.machine.hanging:
                await hang(self.where)
            yield
        await self.reached(what)

    async def reached(self, what: str) -> None:
        """Wait for an unplugged machine as a connection does, or as one that is to be made.

        Raises:
            ConnectionDropped: it took too long.
            HostUnreachable: so it did, without a connection.
        """
        now = self.machine.clock.seconds
        deadline = now() + (self.machine.silence if self._connected else self.connect_timeout)
        while self.machine.unplugged:
            if now() >= deadline:
                if not self._connected:
                    raise HostUnreachable("no SSH connection", host=self.where)
                self._connected = False
                raise ConnectionDropped(f"the connection was lost: {what}", host=self.where)
            await asyncio.sleep(min(max(deadline - now(), LOOK_EVERY_S), 1))
        if not self._connected:
            self._connected = True
            self._connects += 1

    @asynccontextmanager
    async def http(  # type: ignore[override]
        self,
        address: str,
        port: int,
        *,
        tls: ssl.SSLContext | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> AsyncIterator[httpx.AsyncClient]:
        """A client that reaches what listens at an address of the machine."""
        transport = _Transport(self, address, port)
        async with httpx.AsyncClient(
            transport=transport, trust_env=False, headers=headers
        ) as client:
            yield client

    async def aclose(self) -> None:
        """Ends the SFTP session; nothing else is open."""
        if session := self._sftp[1]:
            session.drop()

    async def _sftp_session(self) -> SftpSession:
        _, session = self._sftp
        if session is None or not session.usable:
            client: Any = MemorySftp(self)
            session = SftpSession(client, self.where)
            self._sftp = None, session
        return session

    async def _run(self, argv: Sequence[str], data: bytes | None, timeout: float) -> CommandResult:
        asked = commands.asked(argv)
        async with asyncio.timeout(timeout):
            await asyncio.sleep(self.machine.answers_after)
        what = ", ".join(dict.fromkeys(each.name for each in asked))
        async with self.passing(what, changes=any(each.changes for each in asked), way="session"):
            return commands.run(asked, self.machine, data or b"")


class MemoryDocker(DockerClient):
    """A `DockerClient` whose client is in memory; calls that last are asked again and again."""

    def __init__(self, host: MemoryHost) -> None:
        super().__init__(None, host.where)  # type: ignore[arg-type]
        self._host = host
        self._api: Any = MemoryClient(host.machine)
        self._no_tunnel = Tunnel(None)  # type: ignore[arg-type]

    async def aclose(self) -> None:
        """Nothing is open."""

    async def _do(self, what: str, call: Callable[[Any], T]) -> T:
        try:
            return await self._long(what, call)
        except asyncio.CancelledError:
            # The request is out: the engine carries it out all the same.
            gone = self._host.calls.dead or self._host.machine.unplugged
            if not gone and self._changes(what):
                with contextlib.suppress(sdk.APIError):
                    call(self._api)
            raise

    def _changes(self, what: str) -> bool:
        return what.startswith(CHANGES)

    async def _long(
        self,
        what: str,
        call: Callable[[Any], T],
        refused: Callable[[sdk.APIError], PdDeployError] | None = None,
    ) -> T:
        async with self._host.passing(what, changes=self._changes(what), way="docker"):
            while True:
                with self._errors(what, self._no_tunnel, refused):
                    try:
                        return call(self._api)
                    except NotYet:
                        pass
                await asyncio.sleep(LOOK_EVERY_S)
                await self._host.reached(what)


class _Transport(httpx.AsyncBaseTransport):
    """Hands requests to the program that listens."""

    def __init__(self, host: MemoryHost, address: str, port: int) -> None:
        self._host = host
        self._address = address
        self._port = port

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """The program's answer."""
        machine, path = self._host.machine, request.url.path
        what = shlex.join([request.method, f"{self._address}:{self._port}{path}"])
        limit = request.extensions.get("timeout", {}).get("read")
        async with _in_time(limit), self._host.passing(what, changes=False, way="http"):
            body = _json(await request.aread())
            while True:
                program = machine.cluster.listener(machine, self._address, self._port)
                if program is None:
                    raise httpx.ConnectError("connection refused")
                key, given = program.api_key, request.headers.get("authorization")
                if key and path.startswith("/v1/") and given != f"Bearer {key}":
                    return httpx.Response(401, json={"error": "Unauthorized"})
                with contextlib.suppress(NotYet):
                    return program.answer(path, body)
                await asyncio.sleep(LOOK_EVERY_S)


@asynccontextmanager
async def _in_time(seconds: float | None) -> AsyncIterator[None]:
    """Give a request up as the client does.

    Raises:
        httpx.ReadTimeout: it took longer.
    """
    limit = asyncio.timeout(seconds)
    try:
        async with limit:
            yield
    except TimeoutError:
        if not limit.expired():
            raise
        raise httpx.ReadTimeout(f"no answer within {seconds} s") from None


def _json(content: bytes) -> dict[str, Any]:
    import json

    return dict(json.loads(content)) if content else {}
