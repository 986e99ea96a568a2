"""ssh_config counts as OpenSSH has it: the user's, and where that says nothing the system's."""

import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import asyncssh
import pytest

from pd_deploy.errors import AuthenticationFailed, HostError, HostKeyMismatch, HostUnreachable
from pd_deploy.hosts import ssh_config
from pd_deploy.hosts.host import Host
from pd_deploy.hosts.login import Login

CLIENT = Path("/usr/bin/ssh")


class Server(asyncssh.SSHServer):
    """An SSH server that lets everybody in, and on to others, and remembers whom."""

    def __init__(self, users: list[str]) -> None:
        self._users = users

    def begin_auth(self, username: str) -> bool:
        self._users.append(username)
        return False

    def connection_requested(self, *_: object) -> bool:
        return True


class Ciphers(asyncssh.SSHServer):
    """An SSH server that remembers by which cipher it was spoken to."""

    def __init__(self, ciphers: list[str]) -> None:
        self._ciphers = ciphers

    def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
        self._connection = conn

    def begin_auth(self, username: str) -> bool:
        self._ciphers.append(self._connection.get_extra_info("recv_cipher"))
        return False


# Prints something, and nothing after it; then carries a connection.
RELAY = """
import os, socket, sys, threading
os.write(2, b"Warning: new key")
os.close(2)
server = socket.create_connection((sys.argv[1], int(sys.argv[2])))

def copy(read, write):
    while data := read():
        write(data)

to_us = lambda: server.recv(4096), lambda data: os.write(1, data)
threading.Thread(target=copy, args=to_us, daemon=True).start()
copy(lambda: os.read(0, 4096), server.sendall)
"""


def talk(process: "asyncssh.SSHServerProcess[str]") -> None:
    """Answer each command with its environment, in which nothing of ours should be."""
    process.stdout.write("pd-deploy-begins\n" + ",".join(sorted(process.env)))
    process.stderr.write("pd-deploy-begins\n")
    process.exit(0)


@pytest.fixture
async def server() -> AsyncIterator[tuple[int, list[str]]]:
    """A server's port, and the users that have logged in."""
    users: list[str] = []
    listener = await asyncssh.listen(
        "127.0.0.1",
        0,
        server_factory=lambda: Server(users),
        process_factory=talk,
        server_host_keys=[asyncssh.generate_private_key("ssh-ed25519")],
    )
    yield listener.get_port(), users
    listener.close()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's directory; the system's configuration is `system` in it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(ssh_config, "SYSTEM", tmp_path / "system")
    (tmp_path / ".ssh").mkdir()
    return tmp_path


async def test_the_systems_options_count_where_the_users_say_nothing(
    home: Path, server: tuple[int, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    port, users = server
    monkeypatch.setenv("LANG", "de_DE.UTF-8")
    (home / "system").write_text(
        f"Host node\nHostName 127.0.0.1\nPort {port}\nUser of-all\nStrictHostKeyChecking no\n"
        "Ciphers no-such@example,aes256-ctr\nKexAlgorithms no-such,curve25519-sha256\n"
        "Host *\nSendEnv LANG LC_*\nGSSAPIAuthentication yes\nHashKnownHosts yes\n"
    )
    for config, user, expected in (
        (None, None, "of-all"),
        ("Host node\nUser mine\n", None, "mine"),
        ("Host other\nUser mine\n", None, "of-all"),
        ("Host node\nUser mine\n", "given", "given"),
    ):
        if config:
            (home / ".ssh/config").write_text(config)
        host = Host("a", "node", Login(user))
        assert (await host.run(["env"])).stdout == ""
        await host.aclose()
        assert users.pop() == expected


@pytest.mark.parametrize(
    ("config", "offered", "expected"),
    [
        ("", None, "aes128-gcm@openssh.com"),
        ("", ["chacha20-poly1305@openssh.com"], "chacha20-poly1305@openssh.com"),
        ("Ciphers aes256-ctr,aes128-gcm@openssh.com\n", None, "aes256-ctr"),
    ],
)
async def test_the_cheapest_cipher_is_taken_unless_the_configuration_or_the_host_says_otherwise(
    home: Path, config: str, offered: list[str] | None, expected: str
) -> None:
    ciphers: list[str] = []
    listener = await asyncssh.listen(
        "127.0.0.1",
        0,
        server_factory=lambda: Ciphers(ciphers),
        process_factory=talk,
        server_host_keys=[asyncssh.generate_private_key("ssh-ed25519")],
        encryption_algs=offered or (),
    )
    (home / ".ssh/config").write_text(f"{config}StrictHostKeyChecking no\n")
    host = Host("a", "127.0.0.1", Login(port=listener.get_port()))
    await host.run(["true"])
    await host.aclose()
    listener.close()
    assert ciphers == [expected]


@pytest.mark.parametrize(
    ("settings", "passed"),
    [
        ("ProxyJump jump", ["jumper"]),
        ("ProxyJump ssh://me@jump:{port}", ["me"]),
        ("ProxyJump far", ["jumper", "far"]),
        ("ProxyJump me@127.0.0.1:{port},you@[127.0.0.1]:{port}", ["me", "you"]),
        ("ProxyJump none", []),
        ("ProxyCommand $RELAY %h %p || exit", []),
    ],
)
async def test_ways_over_other_hosts_have_these_hosts_settings(
    home: Path,
    server: tuple[int, list[str]],
    monkeypatch: pytest.MonkeyPatch,
    settings: str,
    passed: list[str],
) -> None:
    """Identities that are not there, keys that are not known yet, and further hosts to go over."""
    port, users = server
    (home / "relay.py").write_text(RELAY)
    monkeypatch.setenv("RELAY", f"{sys.executable} {home}/relay.py")
    (home / ".ssh/config").write_text(
        f"Host node\nUser last\n{settings.format(port=port)}\n"
        "Host jump\nUser jumper\nIdentityFile ~/.ssh/missing\n"
        "Host far\nUser far\nProxyJump jump\nCertificateFile ~/.ssh/missing\n"
        f"Host *\nHostName 127.0.0.1\nPort {port}\nUserKnownHostsFile ~/.ssh/new\n"
        "StrictHostKeyChecking accept-new\n"
    )
    host = Host("a", "node", Login())
    assert (await host.run(["env"])).stdout == ""
    await host.aclose()
    assert users == [*passed, "last"]
    assert len((home / ".ssh/new").read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("settings", "kind", "says"),
    [
        ("ProxyJump jump", HostKeyMismatch, r"a \(node\), on the way to it: jump: .*not known"),
        ("ProxyJump node", HostError, "ProxyJump of ssh_config leads from node to itself"),
        ("ProxyJump a b", HostError, r"config line 2: .*change that line of ssh_config"),
        ("ProxyJump a:b:c", HostError, "expected `user@host:port` in ProxyJump, found 'a:b:c'"),
        ("ProxyCommand exit 1", HostUnreachable, "`ssh -p 22 .*node` must work: .*ProxyCommand"),
        ("HostName 127.0.0.1 # me", HostError, "a comment needs a line of its own"),
    ],
)
async def test_ways_that_lead_nowhere_are_told(
    home: Path, server: tuple[int, list[str]], settings: str, kind: type[HostError], says: str
) -> None:
    (home / ".ssh/config").write_text(
        f"Host node\n{settings}\nHost jump\nHostName 127.0.0.1\nPort {server[0]}\n"
    )
    with pytest.raises(kind, match=says):
        await Host("a", "node", Login()).run(["true"])


async def test_an_authority_for_all_hosts_hides_no_host_that_has_no_certificate(
    home: Path, server: tuple[int, list[str]]
) -> None:
    """Its key is not known, or known, as without the authority."""
    authority = asyncssh.generate_private_key("ssh-ed25519").export_public_key().decode()
    known = home / ".ssh/known_hosts"
    known.write_text(f"@cert-authority * {authority}")
    login = Login(port=server[0])
    with pytest.raises(HostKeyMismatch, match="not known: found") as caught:
        await Host("a", "127.0.0.1", login).run(["true"])
    with known.open("a") as file:
        file.write(str(caught.value.hint).rpartition("known_hosts: ")[2])
    host = Host("a", "127.0.0.1", login)
    assert (await host.run(["env"])).stdout == ""
    await host.aclose()


async def test_known_hosts_that_cannot_be_written_keep_nobody_out(
    home: Path, server: tuple[int, list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    port, _ = server
    (home / "file").touch()
    (home / ".ssh/config").write_text(
        f"Port {port}\nStrictHostKeyChecking accept-new\nUserKnownHostsFile {home}/file/known\n"
    )
    host = Host("a", "127.0.0.1", Login("me"))
    assert (await host.run(["env"])).stdout == ""
    await host.aclose()
    assert f"{home}/file/known can't be written: " in caplog.text


@pytest.mark.parametrize(
    ("refusal", "says"),
    [
        (asyncssh.PermissionDenied("no"), r"does not let user me in.*authorized_keys"),
        (
            asyncssh.ProtocolError("Too many authentication failures"),
            r"let user me try no further key; tried the SSH agent's keys.*IdentitiesOnly yes",
        ),
    ],
)
async def test_a_login_that_fails_of_too_many_keys_is_told_from_a_wrong_key(
    monkeypatch: pytest.MonkeyPatch, refusal: Exception, says: str
) -> None:
    async def connect(*_: object, **__: object) -> None:
        raise refusal

    monkeypatch.setattr(asyncssh, "connect", connect)
    with pytest.raises(AuthenticationFailed, match=says):
        await Host("a", "127.0.0.1", Login("me")).run(["true"])


async def test_a_configuration_that_may_not_be_read_is_passed_over(home: Path) -> None:
    (home / ".ssh/config").mkdir()
    assert ssh_config.files() == []


@pytest.mark.skipif(not CLIENT.exists(), reason="there is no OpenSSH client")
@pytest.mark.parametrize(
    ("users", "systems"),
    [
        ("", ""),
        ("Host node\nUserKnownHostsFile {home}/mine\n", "UserKnownHostsFile {home}/theirs\n"),
        ("", "StrictHostKeyChecking accept-new\nGlobalKnownHostsFile {home}/a {home}/b\n"),
        ("Host other\nStrictHostKeyChecking no\n", "StrictHostKeyChecking yes\n"),
        ("Host node\nStrictHostKeyChecking off\nHost *\nStrictHostKeyChecking yes\n", ""),
        ("IdentityFile {home}/one\n", "Host n*\nIdentityFile {home}/two\n"),
        ("User u\nHostName name.example\n", "UserKnownHostsFile {home}/%h-%r\n"),
        ("Match host node user me\nUserKnownHostsFile {home}/x\n", "UserKnownHostsFile {home}/y\n"),
    ],
)
def test_files_and_strictness_are_those_of_an_openssh_client(
    home: Path, users: str, systems: str
) -> None:
    """Which reads both files one after the other, as if they were one."""
    texts = [text.format(home=home) for text in (users, systems)]
    (home / ".ssh/config").write_text(texts[0])
    (home / "system").write_text(texts[1])
    (home / "both").write_text("\nMatch all\n".join(texts))
    config = ssh_config.read("node", "me", None)
    asked = [str(CLIENT), "-G", "-F", str(home / "both"), "-l", "me", "node"]
    said: dict[str, list[str]] = {}
    for line in subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    ):
        option, _, value = line.partition(" ")
        said.setdefault(option, []).extend(value.split(" "))
    strict = said["stricthostkeychecking"][0]
    assert config.accepts_new is (strict in ("accept-new", "false"))
    assert config.accepts_changed is (strict == "false")
    known = said["userknownhostsfile"] + said["globalknownhostsfile"]
    assert [path.name for path in config.known_hosts] == [Path(path).name for path in known]
    identities = [Path(path).name for path in said["identityfile"]]
    assert [path.name for path in config.identities] in (identities, [])
    assert bool(config.identities) == ("IdentityFile" in users + systems)
