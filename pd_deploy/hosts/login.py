"""Who logs in to a host, and which host keys are believed."""

import getpass
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncssh

from pd_deploy.errors import AuthenticationFailed, HostKeyMismatch
from pd_deploy.hosts.ssh_config import DEFAULT_PORT, SshConfig, usable

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Jump:
    """A host to go through; it is logged in to with the same credentials as the target."""

    host: str
    user: str | None = None
    port: int = 22


@dataclass(frozen=True)
class Login:
    """How to log in to a host by SSH.

    With neither key nor password the user's agent, `~/.ssh/config` and default keys serve; with
    either of them only these are offered. `~/.ssh/config` counts for all that is not given here.

    Args:
        user: the remote user; None takes it from `~/.ssh/config`, or is the local user's name.
        port: the SSH server's port.
        private_key: a private key in PEM or OpenSSH format (its text, not its path).
        passphrase: of the private key.
        password: tried by `password` and `keyboard-interactive`.
        known_hosts: text in the format of `known_hosts`; None reads the files that `ssh` reads.
        trust_on_first_use: believe the key of a host that is not known yet and remember it (where
            `ssh` does, or for this process where `known_hosts` is given). A changed key is refused
            all the same.
        jump: a host to go through.
        use_agent: also offer the keys of the user's SSH agent next to `private_key`/`password`.
    """

    user: str | None = None
    port: int = 22
    private_key: str | None = field(default=None, repr=False)
    passphrase: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)
    known_hosts: str | None = field(default=None, repr=False)
    trust_on_first_use: bool = False
    jump: Jump | None = None
    use_agent: bool = False

    @property
    def explicit(self) -> bool:
        """Whether it brings its own credentials."""
        return self.private_key is not None or self.password is not None

    @property
    def who(self) -> str:
        """The remote user, for messages."""
        return self.user or getpass.getuser()

    @property
    def offers(self) -> str:
        """The kinds of credentials it offers, in words."""
        kinds = [
            *(["the given private key"] if self.private_key else []),
            *(["the given password"] if self.password else []),
            *(["the SSH agent's keys"] if self.use_agent or not self.explicit else []),
            *([] if self.explicit else ["the keys in ~/.ssh"]),
        ]
        return ", ".join(kinds)

    def options(self, where: str, config: SshConfig | None = None) -> dict[str, Any]:
        """asyncssh's connect options for the credentials.

        Raises:
            AuthenticationFailed: the private key can't be read.
        """
        options: dict[str, Any] = {"username": self.user} if self.user else {}
        if self.port != DEFAULT_PORT:
            options["port"] = self.port
        if not self.explicit:
            if config and config.identities:
                keys = [str(path) for path in usable(config.identities)]
                options |= {"client_keys": keys, "ignore_encrypted": True}
            if config and config.certificates:
                # `ssh` passes over those that it can't read, too.
                readable = [str(path) for path in config.certificates if os.access(path, os.R_OK)]
                options["client_certs"] = readable
            return options
        options |= {
            "client_keys": [self._key(where)] if self.private_key else None,
            # ~/.ssh/config may rule these out, for other ways to log in.
            "preferred_auth": "publickey,keyboard-interactive,password",
            "public_key_auth": True,
            "kbdint_auth": True,
            "password_auth": True,
            "client_certs": [],
            "agent_identities": None,
            "password": self.password,
        }
        if not self.use_agent:
            options["agent_path"] = None
        return options

    def _key(self, where: str) -> asyncssh.SSHKey:
        try:
            return asyncssh.import_private_key(self.private_key or "", self.passphrase)
        except (asyncssh.KeyImportError, asyncssh.KeyEncryptionError) as exc:
            raise AuthenticationFailed(
                f"the private key for user {self.who} can't be read ({exc})",
                host=where,
                hint="give the whole key file's text and, if it is encrypted, its passphrase",
            ) from None


class HostKeys:
    """Decides whether a host's key is believed, and remembers why not.

    One per host, so that a key trusted on first use stays the only one for the host's life.
    """

    def __init__(self, where: str, login: Login) -> None:
        self._where = where
        self._login = login
        self._pinned: dict[tuple[str, int], asyncssh.SSHKey] = {}
        self._refused: tuple[str, str, int, asyncssh.SSHKey] | None = None
        self._config = SshConfig(())

    def option(self, config: SshConfig | None = None) -> dict[str, Any]:
        """asyncssh's connect options for the keys of a host.

        Raises:
            HostKeyMismatch: the known_hosts text can't be read.
        """
        config = config or SshConfig(())
        known = self._known(config)
        options = {"client_factory": self._client_factory(config), "known_hosts": known}
        keys, authorities = _matching(known, *config.known_as)
        if authorities and not keys and not config.names_host_key_algorithms:
            # asyncssh would ask for certificates alone, and a host without one would hang up.
            options["server_host_key_algs"] = "default"
        return options

    def error(self, reason: str) -> HostKeyMismatch:
        """Make the error for the key that was refused last."""
        if self._refused is None:
            return HostKeyMismatch(
                f"its host key is refused ({reason})",
                host=self._where,
                hint="compare the host's keys with the known_hosts entries for it",
            )
        name, address, port, key = self._refused
        offered = f"found {key.get_algorithm()} {key.get_fingerprint()}"
        line = known_hosts_line(name, port, key)
        known_keys = self._known_keys(self._config, name, address, port)
        if known_keys:
            shown = [
                f"{known_key.get_algorithm()} {known_key.get_fingerprint()}"
                for known_key in known_keys
            ]
            # A host known by name and by address has each key twice.
            expected = " or ".join(dict.fromkeys(shown))
            return HostKeyMismatch(
                f"its host key has changed: expected {expected}, {offered}",
                host=self._where,
                hint="this may be a man-in-the-middle attack; if the host was reinstalled, check "
                "the fingerprint on its console and replace the known_hosts line with: "
                f"{line}",
            )
        return HostKeyMismatch(
            f"its host key is not known: {offered}",
            host=self._where,
            hint="check the fingerprint on the host's console "
            f"(ssh-keygen -lf /etc/ssh/ssh_host_*_key.pub) and add to known_hosts: {line}",
        )

    def _client_factory(self, config: SshConfig) -> Callable[[], asyncssh.SSHClient]:
        believe = self._believe

        class Client(asyncssh.SSHClient):
            def validate_host_public_key(
                self, host: str, addr: str, port: int, key: asyncssh.SSHKey
            ) -> bool:
                return believe(config, host, addr, port, key)

        return Client

    def _believe(
        self, config: SshConfig, host: str, address: str, port: int, key: asyncssh.SSHKey
    ) -> bool:
        """Decide on a key that known_hosts does not have for the host."""
        has_text = self._login.known_hosts is not None
        trusting = self._login.trust_on_first_use or (config.accepts_new and not has_text)
        known_keys = self._known_keys(config, host, address, port)
        if key in known_keys:
            return True
        if known_keys and config.accepts_changed and not has_text:
            log.warning("%s: a changed host key, as ssh_config allows", self._where)
            return True
        if known_keys or not trusting:
            self._config = config
            self._refused = (host, address, port, key)
            return False
        log.warning("trusting %s on first use: %s", self._where, key.get_fingerprint())
        self._pinned[host, port] = key
        if not has_text and config.known_hosts:
            try:
                _remember(config.known_hosts[0], known_hosts_line(host, port, key))
            except OSError as exc:  # `ssh` goes on, too
                log.warning("%s can't be written: %s", config.known_hosts[0], exc.strerror)
        return True

    def _known_keys(
        self, config: SshConfig, host: str, address: str, port: int
    ) -> list[asyncssh.SSHKey]:
        """Look up the host's keys as far as they are known: as asyncssh looks for them, too."""
        if pinned := self._pinned.get((host, port)):
            return [pinned]
        return list(_matching(self._known(config), host, port, address)[0])

    def _known(self, config: SshConfig) -> asyncssh.SSHKnownHosts:
        text = self._login.known_hosts
        if text is None:
            return asyncssh.import_known_hosts("\n".join(map(_readable_lines, config.known_hosts)))
        try:
            return asyncssh.import_known_hosts(text)
        except ValueError as exc:
            # What follows is the line itself, of whatever file it was.
            reason = str(exc).partition(":")[0]
            raise HostKeyMismatch(
                f"the known_hosts text can't be read ({reason})",
                host=self._where,
                hint="give lines as ssh-keyscan prints them",
            ) from None


def _matching(
    known: asyncssh.SSHKnownHosts, host: str, port: int, address: str = ""
) -> tuple[Sequence[asyncssh.SSHKey], Sequence[asyncssh.SSHKey]]:
    """Look up the keys of a host, and those of authorities that may vouch for it."""
    keys, authorities, *_ = known.match(host, address, port if port != DEFAULT_PORT else None)
    return keys, authorities


def known_hosts_line(address: str, port: int, key: asyncssh.SSHKey) -> str:
    """Write the line of known_hosts that makes `key` the known one for `address`."""
    name = address if port == 22 else f"[{address}]:{port}"
    algorithm, data = key.export_public_key("openssh").decode().split()[:2]
    return f"{name} {algorithm} {data}"


def _readable_lines(path: Path) -> str:
    """Read the lines of a known_hosts file that make sense: `ssh` passes over the others."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return ""
    return "\n".join(filter(_is_readable, lines))


def _is_readable(line: str) -> bool:
    try:
        asyncssh.import_known_hosts(line)
    except ValueError:
        return False
    return True


def _remember(path: Path, line: str) -> None:
    path.parent.mkdir(mode=0o700, exist_ok=True)
    path.touch(mode=0o600)
    with path.open("ab+") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
        # A last line that has no end would take in the new one, and neither could be read.
        start = "" if file.read() in (b"", b"\n") else "\n"
        file.write(f"{start}{line}\n".encode())
