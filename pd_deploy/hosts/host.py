"""A host: commands, files, its Docker engine and facts, over one SSH connection."""

import asyncio
import contextlib
import posixpath
import secrets
import shlex
import ssl
from collections.abc import (
    AsyncIterator,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self, TypeVar

import asyncssh
import httpx

from pd_deploy.errors import CommandFailed, HostError, HostUnreachable, SessionRefused, TimedOut
from pd_deploy.hosts.concurrent import together
from pd_deploy.hosts.docker_client import DockerClient
from pd_deploy.hosts.docker_socket import DockerSocket
from pd_deploy.hosts.facts import Facts
from pd_deploy.hosts.files import TRY, File, Files, sftp_error
from pd_deploy.hosts.link import Link
from pd_deploy.hosts.login import HostKeys, Login
from pd_deploy.hosts.sessions import MAX_SESSIONS, Sessions
from pd_deploy.hosts.settled import carried_out
from pd_deploy.hosts.sftp import SftpSession, by_command
from pd_deploy.hosts.tunnel import Stream, Tunnel

T = TypeVar("T")

STDERR_TAIL = 2000  # characters; a message has to stay readable
PART_BYTES = 4 << 20  # of a file that is streamed: bounds the memory, for few round trips
SFTP_OPEN_TIMEOUT_S = 60.0  # a host under load takes long to start a process
# Trusts nobody. httpx would read the machine's certificates for every client, 40 ms on the event
# loop, though SSH is what secures these requests.
_NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


# The host's own way to one of its ports, where its SSH server forwards none.
RELAY = 'exec 3<>"/dev/tcp/$1/$2" || exit; cat <&3 & exec cat >&3'


@dataclass(frozen=True)
class CommandResult:
    """What a command did; a negative exit status is the signal that ended it."""

    exit_status: int
    stdout: str
    stderr: str


class Host:
    """A host reached by SSH.

    Nothing is opened before the first call. All calls share one connection, which is re-made when
    it dropped; a call that was under way then raises ConnectionDropped. A host belongs to the
    event loop of its first call.

    Args:
        name: the host's name in the deployment.
        address: IP address or DNS name.
        login: the credentials.
        ssh_address: where it is logged in to; by default, its address.
        docker_socket: path of the Docker socket on the host.
        connect_timeout: seconds for TCP, key exchange and login together.
    """

    def __init__(
        self,
        name: str,
        address: str,
        login: Login,
        *,
        ssh_address: str | None = None,
        docker_socket: str = "/var/run/docker.sock",
        connect_timeout: float = 10.0,
    ) -> None:
        self.name = name
        self.address = address
        self.login = login
        self._ssh_address = ssh_address or address
        self.connect_timeout = connect_timeout
        self._keys = HostKeys(self.where, login)
        self._link = self._new_link()
        self._link_for_files = self._link
        self._sftp: tuple[asyncssh.SSHClientConnection | None, SftpSession | None] = (None, None)
        self._sftp_opening = asyncio.Lock()
        self._without_subsystem = False
        self._commands = Sessions(self._new_link, self._link, most=MAX_SESSIONS)
        socket = DockerSocket(
            self._link,
            self._commands,
            Sessions(self._new_link),
            docker_socket,
            self.where,
            login.who,
        )
        self.docker = DockerClient(socket, self.where)
        self.docker_socket = docker_socket
        self.facts = Facts(self)

    def __repr__(self) -> str:
        return self.name

    @property
    def where(self) -> str:
        """Name and address, for messages."""
        return f"{self.name} ({self.address})"

    @property
    def connects(self) -> int:
        """How often the connection was made."""
        return self._link.connects

    async def run(
        self,
        argv: Sequence[str],
        *,
        input: bytes | str | None = None,
        check: bool = True,
        timeout: float = 60.0,
    ) -> CommandResult:
        """Run a command.

        Args:
            argv: the command and its arguments; no shell interprets them. Never a secret: others
                on the host can see them.
            input: for its standard input; the place for secrets.
            check: whether an exit status other than 0 is an error.
            timeout: seconds until it is killed.

        Raises:
            CommandFailed: it failed and `check` is set.
            TimedOut: it did not end in time.
            ConnectionDropped: the connection was lost while it ran.
        """
        data = input.encode() if isinstance(input, str) else input
        try:
            result = await self._run(argv, data, timeout)
        except TimeoutError:
            raise TimedOut(
                f"`{shlex.join(argv)}` did not end within {timeout:g} s",
                host=self.where,
                hint="see on the host what it is waiting for",
            ) from None
        if check and result.exit_status != 0:
            raise self._failed(argv, result)
        return result

    async def output(self, argv: Sequence[str]) -> str:
        """Return the standard output of a command that succeeds; raise as `run` does."""
        return (await self.run(argv)).stdout

    async def outputs(self, *commands: Sequence[str], timeout: float = 60.0) -> list[str]:
        """Run commands one after the other in one session; return each's standard output.

        A session costs the host a process and a login shell, which may be slow to start.

        Args:
            timeout: seconds for all of them.

        Raises:
            CommandFailed, TimedOut, ConnectionDropped: as in `run`; none runs after one that
                failed.
        """
        if not commands:
            return []
        end = secrets.token_hex(16)  # no command's output has it
        script = "\n".join(f"{shlex.join(argv)} || exit\necho {end}" for argv in commands)
        done = await self.run(["sh", "-c", script], check=False, timeout=timeout)
        *outputs, rest = done.stdout.split(f"{end}\n")
        if done.exit_status != 0:
            raise self._failed(commands[len(outputs)], replace(done, stdout=rest))
        return outputs

    async def write_files(self, files: Mapping[str, File], *, dir_mode: int = 0o755) -> list[str]:
        """Write the files that differ in content or mode, each atomically.

        Args:
            files: absolute path → file.
            dir_mode: mode of directories that have to be created.

        Returns:
            The paths of the files written.

        Raises:
            FileDenied, DiskFull, DiskReadOnly: a file can't be written.
        """
        if not files:
            return []
        await self.make_dirs({posixpath.dirname(path) for path in files}, dir_mode)
        written = await together(self._write(path, file) for path, file in files.items())
        return sorted(filter(None, written))

    async def read_file(self, path: str) -> bytes | None:
        """Read a file's content; return None if it does not exist."""
        return await self._with_files(lambda remote: remote.read(path))

    async def read_in_parts(self, path: str, offset: int = 0) -> AsyncIterator[bytes]:
        """Yield a file's content in parts; only one is in memory at a time.

        Args:
            offset: where to begin, in bytes.

        Raises:
            FileMissing: it does not exist.
        """
        while part := await self._read_part(path, offset):
            yield part
            offset += len(part)

    async def make_dirs(self, paths: Iterable[str], mode: int = 0o755) -> list[str]:
        """Create directories with their parents; return those that did not exist before."""
        return await self._with_files(lambda remote: remote.make_dirs(paths, mode))

    async def find_files(self, path: str) -> list[str]:
        """List all files below a directory by path, sorted; follow no links."""
        result = await self.run(["find", path, "-xdev", "-type", "f", "-print0"], check=False)
        return sorted(result.stdout.split("\0")[:-1])

    async def remove_tree(self, path: str, *, below: str) -> bool:
        """Remove a file or directory that lies strictly below `below`; follow no links.

        Returns:
            False if it did not exist.

        Raises:
            NotOurs: it lies elsewhere, or a link leads elsewhere.
            FileDenied: something in it may not be removed.
        """
        return await self._with_files(lambda remote: remote.remove_tree(path, below))

    @contextlib.asynccontextmanager
    async def http(
        self,
        address: str,
        port: int,
        *,
        tls: ssl.SSLContext = _NO_TLS,
        headers: Mapping[str, str] | None = None,
    ) -> AsyncIterator[httpx.AsyncClient]:
        """Give an HTTP client whose requests all go to a port as the host sees it, over SSH, with
        these headers.

        If the SSH server forwards no TCP connections, it connects directly from this machine or,
        for a loopback address of the host or if it is logged in to at another address, through a
        command there. Without `tls`, only plain HTTP is possible.

        A request raises httpx's errors for what the service does, such as to refuse or to hang up,
        and a PdDeployError, mostly a transient one, if the way to the host is lost.
        """
        tunnel = Tunnel(lambda: self._tcp(address, port))
        try:
            transport = _ToHost(tunnel, await tunnel.start(), tls)
            async with httpx.AsyncClient(
                transport=transport, trust_env=False, headers=headers
            ) as client:
                yield client
        finally:
            await tunnel.aclose()

    async def aclose(self) -> None:
        """Cut calls under way and close the connection."""
        if session := self._sftp[1]:
            session.drop()
        try:
            await self.docker.aclose()
        finally:
            await self._commands.aclose()
            await self._link_for_files.aclose()
            await self._link.aclose()

    def _new_link(self) -> Link:
        return Link(self.where, self._ssh_address, self.login, self._keys, self.connect_timeout)

    @contextlib.asynccontextmanager
    async def _tcp(self, address: str, port: int) -> AsyncIterator[Stream]:
        async def dial(connection: asyncssh.SSHClientConnection) -> Stream:
            try:
                return await connection.open_connection(address, port)
            except asyncssh.ChannelOpenError as exc:
                if exc.code == asyncssh.OPEN_CONNECT_FAILED and not connection.is_closed():
                    raise _NobodyListens from None
                if exc.code != asyncssh.OPEN_ADMINISTRATIVELY_PROHIBITED:
                    raise
            if address.startswith("127.") or self._ssh_address != self.address:
                raise _ForwardingOff
            try:
                return await asyncio.open_connection(address, port)
            except ConnectionRefusedError:
                raise _NobodyListens from None

        try:
            reader, writer = await self._link.open(dial)
        except _ForwardingOff:
            async with self._relayed(address, port) as stream:
                yield stream
            return
        except _NobodyListens:
            raise ConnectionRefusedError from None
        except OSError as exc:
            raise HostUnreachable(f"port {port}: {exc.strerror}", host=self.where) from None
        try:
            yield reader, writer
            self._require_link(writer, port)
        finally:
            writer.close()

    @contextlib.asynccontextmanager
    async def _relayed(self, address: str, port: int) -> AsyncIterator[Stream]:
        """Open a stream to a port that only the host itself reaches, through a command there."""
        command = ["bash", "-c", RELAY, "bash", address, str(port)]
        async with self._commands.process(command) as process:
            yield process.stdout, process.stdin
            self._require_link(process, port)

    def _require_link(self, stream: Any, port: int) -> None:
        """Raise ConnectionDropped if a stream ended because its SSH connection did."""
        connection = stream.get_extra_info("connection")
        if connection and connection.is_closed():
            raise self._link.dropped(f"the connection was lost during a request to port {port}")

    async def _read_part(self, path: str, offset: int) -> bytes:
        return await self._with_files(lambda remote: remote.read_part(path, offset, PART_BYTES))

    async def _write(self, path: str, file: File) -> str | None:
        return path if await self._with_files(lambda remote: remote.write(path, file)) else None

    async def _with_files(self, call: Callable[[Files], Coroutine[Any, Any, T]]) -> T:
        session = await self._sftp_session()
        return await session.result(call(Files(session.client, self.where, self._try_to_write)))

    async def _try_to_write(self, path: str, size: int) -> str:
        return (await self.run(["sh", "-c", TRY, "sh", path, str(size)], check=False)).stderr

    async def _sftp_session(self) -> SftpSession:
        try:
            async with self._sftp_opening, asyncio.timeout(SFTP_OPEN_TIMEOUT_S):
                try:
                    return await self._link_for_files.open_session(self._sftp_of)
                except SessionRefused:
                    if self._link_for_files is not self._link:
                        raise
                    self._link_for_files = self._new_link()
                    return await self._link_for_files.open_session(self._sftp_of)
        except asyncssh.SFTPError as exc:
            raise sftp_error(exc, "its SFTP server", self.where) from None
        except TimeoutError:
            raise TimedOut(
                f"its SFTP server did not start within {SFTP_OPEN_TIMEOUT_S:g} s", host=self.where
            ) from None

    async def _sftp_of(self, connection: asyncssh.SSHClientConnection) -> SftpSession:
        """Return the connection's one SFTP session; each session costs a process on the host."""
        sftp_connection, session = self._sftp
        if session is None or sftp_connection is not connection or not session.usable:
            if session:
                session.drop()
            session = SftpSession(await self._start_sftp(connection), self.where)
            self._sftp = connection, session
        return session

    async def _start_sftp(self, connection: asyncssh.SSHClientConnection) -> asyncssh.SFTPClient:
        """Start the SSH server's SFTP subsystem or, where it has none, the program by a command.

        A login shell that prints something does so before the subsystem's first answer, too.
        """
        if self._commands.noisy is None:
            async with self._commands.process(["true"]):
                pass
        if not self._commands.noisy and not self._without_subsystem:
            try:
                return await connection.start_sftp_client()
            except asyncssh.ChannelOpenError as exc:
                if exc.code != asyncssh.OPEN_REQUEST_SESSION_FAILED or connection.is_closed():
                    raise
            except (asyncssh.SFTPError, asyncssh.SFTPConnectionLost):
                if connection.is_closed():
                    raise
        self._without_subsystem = True
        return await by_command(connection, self._link_for_files)

    async def _run(self, argv: Sequence[str], data: bytes | None, timeout: float) -> CommandResult:
        stdin = asyncssh.PIPE if data else asyncssh.DEVNULL
        async with self._commands.process(_bounded(argv, timeout), stdin=stdin) as process:
            async with asyncio.timeout(timeout):
                if data:
                    # It may have ended already, without reading: its status tells what that means.
                    with contextlib.suppress(BrokenPipeError):
                        process.stdin.write(data)
                        process.stdin.write_eof()
                stdout, stderr = await process.communicate()
        if process.returncode is None:
            raise self._link.dropped(f"the connection was lost while `{shlex.join(argv)}` ran")
        return CommandResult(process.returncode, _text(stdout), _text(stderr))

    def _failed(self, argv: Sequence[str], result: CommandResult) -> HostError:
        output = (result.stderr or result.stdout).strip()[-STDERR_TAIL:]
        return CommandFailed(
            f"`{shlex.join(argv)}` exited with {result.exit_status}: "
            f"{output or 'it printed nothing'}",
            argv=argv,
            exit_status=result.exit_status,
            stderr=output,
            host=self.where,
            hint="run it by hand on the host",
        )


_AS_MANY_AS_ASKED = httpx.Limits()
"""By default, httpx lets requests beyond 100 at a time wait."""


class _ToHost(httpx.AsyncHTTPTransport):
    """Tells what the service does from what becomes of the way to its host."""

    def __init__(self, tunnel: Tunnel, path: str, tls: ssl.SSLContext) -> None:
        super().__init__(uds=path, verify=tls, limits=_AS_MANY_AS_ASKED)
        self._tunnel = tunnel

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        with _fault_of(self._tunnel):
            response = await super().handle_async_request(request)
        assert isinstance(response.stream, httpx.AsyncByteStream)
        response.stream = _FromHost(self._tunnel, response.stream)
        return response


class _FromHost(httpx.AsyncByteStream):
    """A response's body as it comes; the way to its host may be lost in the middle."""

    def __init__(self, tunnel: Tunnel, body: httpx.AsyncByteStream) -> None:
        self._tunnel = tunnel
        self._body = body

    async def __aiter__(self) -> AsyncIterator[bytes]:
        with _fault_of(self._tunnel):
            async for chunk in self._body:
                yield chunk

    async def aclose(self) -> None:
        await self._body.aclose()


@contextlib.contextmanager
def _fault_of(tunnel: Tunnel) -> Iterator[None]:
    """Raise a tunnel's own fault in place of what an HTTP client makes of it."""
    try:
        yield
    except httpx.TransportError:
        if fault := tunnel.broken():
            raise fault from None
        raise


class _NobodyListens(Exception):
    """Nothing takes connections at a port of the host."""


class _ForwardingOff(Exception):
    """The server forwards no TCP connections."""


class Hosts(Mapping[str, Host]):
    """Several hosts by name; closes all of them at the end, also when cancelled.

    Example:
        async with Hosts([Host("a", "10.0.0.1", login)]) as hosts:
            await hosts["a"].run(["true"])
    """

    def __init__(self, hosts: Iterable[Host] = ()) -> None:
        self._hosts = {host.name: host for host in hosts}

    @classmethod
    def of(cls, named: Mapping[str, Host]) -> "Hosts":
        """Hosts under other names than their own."""
        hosts = cls()
        hosts._hosts = dict(named)
        return hosts

    def add(self, host: Host) -> None:
        """One more host, closed with the others."""
        self._hosts[host.name] = host

    def __getitem__(self, name: str) -> Host:
        return self._hosts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._hosts)

    def __len__(self) -> int:
        return len(self._hosts)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await carried_out(self.aclose)

    async def aclose(self) -> None:
        """Close all hosts; a second cancellation does not leave connections behind."""
        closing = asyncio.gather(*(host.aclose() for host in self.values()))
        await asyncio.shield(closing)


def _bounded(argv: Sequence[str], timeout: float) -> list[str]:
    """Wrap the command, so that the host itself ends it if nobody waits any more.

    sshd lets a command run on when its connection is lost, and passes on no signals for root.
    """
    return ["timeout", "-k", "5", f"{timeout + 1:.1f}", *argv]


def _text(output: bytes | str | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""
