"""One SSH connection to a host: opened on first use, shared, re-made when it dropped."""

import asyncio
import os
import socket
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

import asyncssh

from pd_deploy.errors import (
    AuthenticationFailed,
    ConnectionDropped,
    HostError,
    HostUnreachable,
    PdDeployError,
    SessionRefused,
)
from pd_deploy.hosts import ssh_config
from pd_deploy.hosts.login import HostKeys, Login
from pd_deploy.hosts.ssh_config import DEFAULT_PORT, Hop, SshConfig

T = TypeVar("T")

KEEPALIVE_INTERVAL_S = 5  # with the count: a host that went away is noticed after some 15 s
KEEPALIVE_COUNT = 3
CLOSE_TIMEOUT_S = 5.0  # a host that went away does not confirm the end
FAST_CIPHERS = "^aes128-gcm@openssh.com,aes256-gcm@openssh.com"
"""Tried first, where ssh_config names no ciphers: asyncssh's first choice, ChaCha20, costs it five
times as much for each packet, a fifth of what a run on many hosts takes."""
SESSION_PATIENCE_S = 1.0  # sshd frees a session within milliseconds, unless it is very busy
SESSION_POLL_S = 0.02


class Link:
    """One SSH connection, shared by all callers of one event loop.

    Args:
        where: the host's name for messages.
        address: an IP address or name.
        login: the credentials.
        keys: which host keys are believed.
        connect_timeout: seconds for TCP, key exchange and login together.
    """

    def __init__(
        self, where: str, address: str, login: Login, keys: HostKeys, connect_timeout: float
    ) -> None:
        self.where = where
        self._address = address
        self._login = login
        self._keys = keys
        self._connect_timeout = connect_timeout
        self._connecting: asyncio.Task[asyncssh.SSHClientConnection] | None = None
        self._connections: list[asyncssh.SSHClientConnection] = []
        self._closed = False
        self.connects = 0

    @property
    def command(self) -> str:
        """The command that logs in by hand, for messages."""
        return f"ssh -p {self._login.port} {self._login.who}@{self._address}"

    async def connect(self) -> None:
        """Connect, unless it is connected."""
        await self._connection()

    async def open(self, start: Callable[[asyncssh.SSHClientConnection], Awaitable[T]]) -> T:
        """Start something on the connection.

        If the connection turns out to be dead before anything started, it is re-made and the start
        is tried once more.

        Raises:
            ConnectionDropped: the connection was lost while the start was under way.
            SessionRefused: the server does not allow it.
            HostError, HostUnreachable: as in connecting.
        """
        try:
            return await self._start(start)
        except _NotStarted:
            pass
        try:
            return await self._start(start)
        except _NotStarted:
            raise self.dropped("the connection was lost twice in a row") from None

    async def open_session(
        self, start: Callable[[asyncssh.SSHClientConnection], Awaitable[T]]
    ) -> T:
        """Start a session as `open` does; be patient with a server that allows no further one."""
        # sshd counts a session for a moment after it has confirmed its end.
        deadline = time.monotonic() + SESSION_PATIENCE_S
        while True:
            try:
                return await self.open(start)
            except SessionRefused:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(SESSION_POLL_S)

    def dropped(self, what: str) -> ConnectionDropped:
        """Make the error for a call that was under way when the connection was lost."""
        return ConnectionDropped(
            what,
            host=self.where,
            hint="check the network, then run again; steps that are done already are skipped",
        )

    async def aclose(self) -> None:
        """Close the connection; safe to call twice and while being cancelled."""
        self._closed = True
        if self._connecting:
            self._connecting.cancel()
            await asyncio.wait([self._connecting])
        connections, self._connections = self._connections[::-1], []
        for connection in connections:
            connection.close()
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                for connection in connections:
                    await connection.wait_closed()
        except (TimeoutError, asyncio.CancelledError) as exc:
            for connection in connections:
                connection.abort()
            if isinstance(exc, asyncio.CancelledError):
                raise

    async def _start(self, start: Callable[[asyncssh.SSHClientConnection], Awaitable[T]]) -> T:
        connection = await self._connection()
        try:
            return await start(connection)
        except asyncssh.ChannelOpenError as exc:
            if not connection.is_closed():
                raise SessionRefused(
                    f"the SSH server refuses to open another channel ({exc.reason})",
                    host=self.where,
                    hint="raise MaxSessions in its sshd_config",
                ) from None
            if exc.code == asyncssh.OPEN_CONNECT_FAILED:
                raise _NotStarted from None
            raise self.dropped("the connection was lost as a command started") from None
        except (asyncssh.DisconnectError, asyncssh.SFTPConnectionLost, ConnectionError) as exc:
            raise self.dropped(f"the connection was lost ({exc})") from None

    async def _connection(self) -> asyncssh.SSHClientConnection:
        if self._closed:
            raise HostError("is closed already", host=self.where)
        if self._connections and not self._connections[-1].is_closed():
            return self._connections[-1]
        # One attempt for all who wait, so that an unreachable host costs them one timeout.
        if self._connecting is None or self._connecting.done():
            self._connecting = asyncio.ensure_future(self._connect())
            self._connecting.add_done_callback(_retrieve)
        return await asyncio.shield(self._connecting)

    def _abandon(self) -> None:
        for connection in self._connections:
            connection.abort()
        self._connections = []

    async def _connect(self) -> asyncssh.SSHClientConnection:
        """Make the connections of the hosts on the way, if any, then the host's own."""
        self._abandon()
        login, tunnel = self._login, None
        try:
            if jump := login.jump:
                hop = Hop(jump.host, jump.user or login.who, jump.port)
                tunnel = await self._dial(hop, login, self._keys)
            port = login.port if login.port != DEFAULT_PORT else None
            await self._dial(Hop(self._address, login.user, port), login, self._keys, tunnel)
        except BaseException:
            self._abandon()
            raise
        self.connects += 1
        return self._connections[-1]

    async def _dial(
        self,
        to: Hop,
        login: Login,
        keys: HostKeys,
        tunnel: asyncssh.SSHClientConnection | None = None,
        on_the_way_to: tuple[Hop, ...] = (),
    ) -> asyncssh.SSHClientConnection:
        """Connect to an SSH server, by way of those that ssh_config names, unless there is a way.

        Args:
            tunnel: a connection to go through.
            on_the_way_to: the servers for which this one is needed.
        """
        config = SshConfig(())
        try:
            config = ssh_config.read(to.address, to.user, to.port)
            if tunnel is None:
                for jump in config.jumps:
                    tunnel = await self._jump(jump, tunnel, (*on_the_way_to, to))
            options = login.options(self.where, config) | keys.option(config)
            options |= {"username": to.user} if to.user else {}
            options |= {"port": to.port} if to.port else {}
            options |= {} if config.names_ciphers else {"encryption_algs": FAST_CIPHERS}
            if config.proxy_command and not tunnel:
                options["sock"] = await _connected_by(config.proxy_command)
            connection = await asyncssh.connect(
                to.address,
                connect_timeout=self._connect_timeout,
                login_timeout=self._connect_timeout,
                keepalive_interval=KEEPALIVE_INTERVAL_S,
                keepalive_count_max=KEEPALIVE_COUNT,
                config=ssh_config.files(),
                # asyncssh would go through hosts without looking at their settings.
                tunnel=tunnel,
                # A configuration may ask for these, for those who log in by hand.
                request_pty=False,
                command=None,
                send_env=[],
                **options,
            )
        except (asyncssh.Error, OSError, ValueError) as exc:
            raise self._cannot_connect(exc, to, login, keys, config) from None
        self._connections.append(connection)
        return connection

    async def _jump(
        self, to: Hop, tunnel: asyncssh.SSHClientConnection | None, on_the_way_to: tuple[Hop, ...]
    ) -> asyncssh.SSHClientConnection:
        """Connect to a server that ssh_config names on the way, with the user's own credentials."""
        if to in on_the_way_to:
            raise HostError(
                f"ProxyJump of ssh_config leads from {to.address} to itself",
                host=self.where,
                hint=f"set `ProxyJump none` for it, before other lines (`Host {to.address}`)",
            )
        login = Login()
        keys = HostKeys(f"{self.where}, on the way to it: {to.address}", login)
        return await self._dial(to, login, keys, tunnel, on_the_way_to)

    def _cannot_connect(
        self, exc: Exception, to: Hop, login: Login, keys: HostKeys, config: SshConfig
    ) -> PdDeployError:
        target = f"{to.address}:{to.port or login.port}"
        if isinstance(exc, asyncssh.HostKeyNotVerifiable):
            return keys.error(exc.reason)
        if isinstance(exc, asyncssh.PermissionDenied) or "authentication failures" in str(exc):
            unread = [] if login.explicit else ssh_config.unreadable(config.identities)
            but = f", but can't read {', '.join(unread)}" if unread else ""
            if "Too many authentication failures" in str(exc):
                return AuthenticationFailed(
                    f"{target} let user {login.who} try no further key; tried {login.offers}{but}",
                    host=self.where,
                    hint="name the right key in ssh_config (`IdentityFile`, with "
                    "`IdentitiesOnly yes` if an SSH agent has many), or raise MaxAuthTries in its "
                    "sshd_config",
                )
            return AuthenticationFailed(
                f"{target} does not let user {login.who} in; tried {login.offers}{but}",
                host=self.where,
                hint=("load encrypted keys into an SSH agent (ssh-add), or " if but else "")
                + _login_hint(login, self.command),
            )
        if isinstance(exc, asyncssh.KeyExchangeFailed):
            return HostError(
                f"{target} and this machine have no SSH algorithm in common ({exc.reason})",
                host=self.where,
                hint="if it names the host key, add the host's current keys to known_hosts",
            )
        if isinstance(exc, ValueError) and not isinstance(exc, UnicodeError):
            return HostError(
                f"invalid SSH options ({exc})",
                host=self.where,
                hint="change that line of ssh_config; a comment needs a line of its own",
            )
        return HostUnreachable(
            f"no SSH connection to {target}: {_reason(exc, self._connect_timeout)}",
            host=self.where,
            hint=f"`{self.command}` must work: ssh_config has a ProxyCommand for it"
            if config.proxy_command
            else "check address, port, firewall and that sshd runs",
        )


async def _connected_by(command: str) -> socket.socket:
    """Start what has a connection as its input and output, as `ssh` does; return our end.

    asyncssh would take it without a shell, and what it prints to its error stream for the server's
    words.
    """
    ours, theirs = socket.socketpair()
    with theirs:
        shell = os.environ.get("SHELL") or "/bin/sh"
        argv, end = [shell, "-c", f"exec {command}"], theirs.fileno()
        process = await asyncio.create_subprocess_exec(
            *argv, stdin=end, stdout=end, start_new_session=True
        )
    # It ends with the connection.
    process_end = asyncio.ensure_future(process.wait())
    _proxies.add(process_end)
    process_end.add_done_callback(_proxies.discard)
    return ours


_proxies = set[asyncio.Task[int]]()
"""The ends of commands that carry connections: a task that nobody holds may vanish."""


class _NotStarted(Exception):
    """The connection was dead before anything started on it."""


def _retrieve(connecting: "asyncio.Task[asyncssh.SSHClientConnection]") -> None:
    """Look at the outcome, as those who waited for it may all be gone."""
    if not connecting.cancelled():
        connecting.exception()


def _login_hint(login: Login, command: str) -> str:
    if login.private_key or not login.explicit:
        place = f"~{login.who}/.ssh/authorized_keys"
        return f"the public key belongs in {place} on the host; `{command}` must work"
    return f"check user and password, and that sshd allows passwords; `{command}` must work"


def _reason(exc: Exception, timeout: float) -> str:
    if isinstance(exc, TimeoutError):
        return f"no answer within {timeout:g} s"
    if isinstance(exc, asyncssh.Error):
        return exc.reason
    if isinstance(exc, OSError) and exc.errno:
        # asyncio says which call failed in place of why; a name that is not known has no such why.
        why = os.strerror(exc.errno) if exc.errno > 0 else exc.strerror or ""
        return why.lower()
    return str(exc) or type(exc).__name__
