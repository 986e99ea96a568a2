"""What ssh_config says of a host: as OpenSSH reads it, where asyncssh does not."""

import getpass
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import asyncssh
from asyncssh.config import SSHClientConfig, SSHConfig

DEFAULT_PORT = 22
SYSTEM = Path("/etc/ssh/ssh_config")
GLOBAL_KNOWN_HOSTS = ("/etc/ssh/ssh_known_hosts", "/etc/ssh/ssh_known_hosts2")
USERS_KNOWN_HOSTS = ("~/.ssh/known_hosts", "~/.ssh/known_hosts2")
ENCRYPTED = "encrypted"
# Those that asyncssh looks for, too.
IDENTITIES = ("id_ed25519_sk", "id_ecdsa_sk", "id_ed25519", "id_ecdsa", "id_rsa", "id_dsa")


@dataclass(frozen=True)
class Hop:
    """An SSH server on the way; user and port are None where its own settings say them."""

    address: str
    user: str | None = None
    port: int | None = None


@dataclass(frozen=True)
class SshConfig:
    """The settings for one host.

    Args:
        known_hosts: the files with hosts' keys; new keys are written to the first.
        accepts_new: whether the key of an unknown host is accepted.
        accepts_changed: whether a key other than the known one is accepted.
        identities: files with private keys; none where the default ones serve.
        certificates: files with certificates of these keys.
        names_ciphers: whether it says which ciphers may be used.
        names_host_key_algorithms: whether it says of which kinds the host's key may be.
        jumps: the SSH servers to go through, the first of them first.
        proxy_command: what has the connection as its input and output, as a shell takes it.
        known_as: the name and port under which the host's keys are known.
    """

    known_hosts: tuple[Path, ...]
    accepts_new: bool = False
    accepts_changed: bool = False
    identities: tuple[Path, ...] = ()
    certificates: tuple[Path, ...] = ()
    names_ciphers: bool = False
    names_host_key_algorithms: bool = False
    jumps: tuple[Hop, ...] = ()
    proxy_command: str | None = None
    known_as: tuple[str, int] = ("", DEFAULT_PORT)


class _Config(SSHClientConfig):
    """asyncssh's, with what it leaves to its callers."""

    _handlers = SSHClientConfig._handlers | {
        "stricthostkeychecking": ("StrictHostKeyChecking", SSHConfig._set_string)
    }
    _percent_expand = SSHClientConfig._percent_expand | {
        "UserKnownHostsFile",
        "GlobalKnownHostsFile",
        "ProxyJump",
    }


def files() -> list[Path]:
    """List the configurations that there are: the user's own, then the system's, whose options
    count where the user's don't say otherwise."""
    paths = (Path.home() / ".ssh" / "config", SYSTEM)
    return [path for path in paths if path.is_file() and os.access(path, os.R_OK)]


def read(address: str, user: str | None, port: int | None) -> SshConfig:
    """Read the user's and the system's configuration of a host.

    Raises:
        ValueError: it can't be read.
    """
    try:
        config = _Config.load(
            None, files(), False, False, False, getpass.getuser(), user or (), address, port or ()
        )
    except OSError as exc:
        raise ValueError(f"{exc.filename}: {exc.strerror}") from None
    strict = str(config.get("StrictHostKeyChecking", "ask")).lower()
    known_hosts = [
        *_listed(config, "UserKnownHostsFile", USERS_KNOWN_HOSTS),
        *_listed(config, "GlobalKnownHostsFile", GLOBAL_KNOWN_HOSTS),
    ]
    jumps, proxy_command = config.get("ProxyJump"), config.get("ProxyCommand")
    return SshConfig(
        known_hosts=tuple(_expanded(known_hosts)),
        accepts_new=strict in ("accept-new", "no", "off"),
        accepts_changed=strict in ("no", "off"),
        identities=tuple(_expanded(_listed(config, "IdentityFile", ()))),
        certificates=tuple(_expanded(_listed(config, "CertificateFile", ()))),
        names_ciphers=config.get("Ciphers") is not None,
        names_host_key_algorithms=config.get("HostKeyAlgorithms") is not None,
        jumps=tuple(map(_hop, str(jumps).split(","))) if jumps else (),
        proxy_command=str(proxy_command) if proxy_command else None,
        known_as=(
            str(config.get("HostKeyAlias") or config.get("Hostname") or address),
            int(str(config.get("Port") or port or DEFAULT_PORT)),
        ),
    )


def _hop(text: str) -> Hop:
    """Parse one server of ProxyJump: `user@host:port` or `ssh://user@host:port`.

    Raises:
        ValueError: it is none.
    """
    form = r"(?:ssh://)?(?:(?P<user>.+)@)?(?:\[(?P<ip>.+)\]|(?P<name>[^:@/]+))(?::(?P<port>\d+))?/?"
    match = re.fullmatch(form, text.strip())
    if not match:
        raise ValueError(f"expected `user@host:port` in ProxyJump, found {text!r}")
    port = int(match["port"]) if match["port"] else None
    return Hop(match["ip"] or match["name"], match["user"], port)


def usable(identities: tuple[Path, ...]) -> list[Path]:
    """Choose the files that hold a key, a public or an encrypted one included, as OpenSSH does."""
    return [path for path in identities if _fault(path) in (None, ENCRYPTED)]


def unreadable(identities: tuple[Path, ...]) -> list[str]:
    """Name the files with private keys that can't be read, each with why not."""
    default = [Path.home() / ".ssh" / name for name in IDENTITIES]
    paths = identities or [path for path in default if path.exists()]
    faults = [(path, _fault(path)) for path in paths]
    return [f"{path} ({fault})" for path, fault in faults if fault]


def _fault(path: Path) -> str | None:
    """Why a key can't be read; a public one is fine, as an agent may have the private one."""
    try:
        asyncssh.read_private_key(path)
    except asyncssh.KeyEncryptionError:
        return ENCRYPTED
    except asyncssh.KeyImportError as exc:
        if "passphrase" in str(exc).lower():
            return ENCRYPTED
        return None if _is_public(path) else "not a private key"
    except OSError as exc:
        return exc.strerror or type(exc).__name__
    return None


def _is_public(path: Path) -> bool:
    try:
        asyncssh.read_public_key(path)
    except asyncssh.KeyImportError:
        return False
    return True


def _listed(config: SSHConfig, option: str, default: tuple[str, ...]) -> list[str]:
    value = config.get(option)
    if value is None:
        return list(default)
    return [str(item) for item in value] if isinstance(value, list) else [str(value)]


def _expanded(paths: list[str]) -> Iterator[Path]:
    return (Path(path).expanduser() for path in paths if path.lower() != "none")
