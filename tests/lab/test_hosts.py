"""The hosts layer against real SSH servers and Docker engines: what works, and every fault."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncssh
import httpx
import pytest

from pd_deploy import errors
from pd_deploy.engines import ascend
from pd_deploy.engines.device_report import Ping
from pd_deploy.hosts import batch, machine, reach
from pd_deploy.hosts.container_values import (
    PullProgress,
    RegistryLogin,
    oci_architecture,
)
from pd_deploy.hosts.files import File
from pd_deploy.hosts.host import Host, Hosts
from pd_deploy.hosts.login import Jump, Login
from pd_deploy.lab import Lab, LabHost
from tests.host_contract import OURS, Create, create

__all__ = ["create"]

BASHRC = "/home/deployer/.bashrc"
PRINTS = "echo Welcome to node 1; echo Beware >&2; trap 'echo Bye; echo Bye >&2' EXIT\n"
SFTP_SERVER = "/usr/lib/openssh/sftp-server"
OTHER_PORT = 2222
REGISTRY_PORT = 5999

# A registry that wants me:open-sesame and holds nothing.
STRICT_REGISTRY = """
import base64, http.server
WANTED = "Basic " + base64.b64encode(b"me:open-sesame").decode()
class Registry(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        allowed = self.headers.get("Authorization") == WANTED
        at_root = self.path == "/v2/"
        self.send_response(200 if allowed and at_root else 404 if allowed else 401)
        if not allowed:
            self.send_header("WWW-Authenticate", 'Basic realm="r"')
        code = "MANIFEST_UNKNOWN" if allowed else "UNAUTHORIZED"
        body = ('{"errors":[{"code":"%s","message":"%s"}]}' % (code, code.lower())).encode()
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body if self.command == "GET" else b"")
    do_HEAD = do_GET
    def log_message(self, *_): pass
http.server.ThreadingHTTPServer(("127.0.0.1", %d), Registry).serve_forever()
""".replace("%d", str(REGISTRY_PORT))


@pytest.fixture
def box(lab: Lab) -> LabHost:
    return lab.hosts["a"]


ECHO_ADDRESS, ECHO_PORT = "127.77.0.1", 7311
ECHO = f"""
import http.server
class Echo(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
http.server.ThreadingHTTPServer(("{ECHO_ADDRESS}", {ECHO_PORT}), Echo).serve_forever()
"""


HOLDING = """
import pathlib, socket, time
bound = socket.socket()
bound.bind(("127.0.0.1", 7391))
listening = socket.socket()
listening.bind(("127.0.0.1", 7390))
listening.listen()
outbound = socket.create_connection(("127.0.0.1", 7390), source_address=("127.0.0.1", 7392))
over = socket.socket()
over.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
over.bind(("127.0.0.1", 7393))
over.connect(("127.0.0.1", 7390))
over.close()
listening.accept()[0].close()
listening.accept()[0].close()
pathlib.Path("/tmp/held").touch()
time.sleep(600)
"""


@pytest.fixture
def login(lab: Lab) -> Login:
    return Login(
        "root", private_key=lab.ssh_key.read_text(), known_hosts=lab.known_hosts.read_text()
    )


@pytest.fixture
async def connect(box: LabHost) -> AsyncIterator[Callable[..., Host]]:
    """Makes hosts that are closed after the test."""
    made: list[Host] = []

    def make(login: Login, address: str | None = None, timeout: float = 10.0) -> Host:
        made.append(Host("a", address or box.address, login, connect_timeout=timeout))
        return made[-1]

    yield make
    for host in made:
        await host.aclose()


@pytest.fixture
def host(connect: Callable[..., Host], login: Login) -> Host:
    return connect(login)


@pytest.fixture
async def image(host: Host, lab: Lab) -> str:
    if await host.docker.image(lab.image) is None:
        await host.docker.pull(lab.image)
    return lab.image


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The empty home of a user without an agent."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    return tmp_path


@pytest.fixture
def ssh(home: Path) -> Path:
    """The user's ~/.ssh."""
    directory = home / ".ssh"
    directory.mkdir(mode=0o700)
    return directory


FORWARDS_NOTHING = ("AllowStreamLocalForwarding no", "AllowTcpForwarding no")


@pytest.fixture
def another_sshd(box: LabHost) -> Iterator[Callable[..., int]]:
    """Starts a further SSH server on the host, with other options; returns its port."""
    pid_file, config, other = "/run/sshd-other.pid", "/etc/ssh/sshd_config", "/run/sshd-other.conf"

    def start(*options: str, without: str = "nothing") -> int:
        usual = box.run(["cat", config]).stdout.splitlines()
        lines = [
            f"Port {OTHER_PORT}",
            f"PidFile {pid_file}",
            *options,
            *(line for line in usual if not line.startswith(without)),
        ]
        box.run(["sh", "-c", f"cat >{other}"], input="\n".join([*lines, ""]))
        box.run(["/usr/sbin/sshd", "-f", other])
        until(lambda: listening(box, OTHER_PORT), "sshd listens")
        return OTHER_PORT

    yield start
    box.run(["sh", "-c", f"kill $(cat {pid_file})"], check=False)
    until(lambda: not listening(box, OTHER_PORT), "sshd is gone")


@pytest.fixture
def no_forwarding(another_sshd: Callable[..., int]) -> int:
    """The port of a further SSH server on the host, which forwards nothing."""
    return another_sshd(*FORWARDS_NOTHING)


@pytest.fixture
def strict_registry(box: LabHost) -> Iterator[str]:
    process = box.popen(["python3", "-c", STRICT_REGISTRY])
    until(lambda: listening(box, REGISTRY_PORT), "the registry listens")
    yield f"127.0.0.1:{REGISTRY_PORT}/some/image:1"
    process.kill()
    process.wait()


class TestCommands:
    async def test_arguments_arrive_as_they_are(self, host: Host) -> None:
        awkward = ["a b", "$HOME", "'\"", "*", "ünï", "", "-n", "x\ny"]
        done = await host.run(["printf", "%s|", *awkward])
        assert done.stdout == "|".join(awkward) + "|"

    async def test_failure_is_an_error_with_the_commands_words(self, host: Host) -> None:
        with pytest.raises(errors.CommandFailed, match="No such file") as caught:
            await host.run(["ls", "/no/such"])
        assert caught.value.exit_status == 2
        assert caught.value.argv == ["ls", "/no/such"]
        assert caught.value.host == host.where

    async def test_a_slow_command_times_out_and_is_ended(self, host: Host, box: LabHost) -> None:
        nap = a_nap()
        with pytest.raises(errors.TimedOut, match=rf"{' '.join(nap)}.*within 0\.3 s"):
            await host.run(nap, timeout=0.3)
        until(lambda: not running(box, " ".join(nap)), "the command is gone")

    async def test_many_calls_share_one_connection(self, host: Host, box: LabHost) -> None:
        before = connections(box)
        calls = [host.run(["sh", "-c", "sleep 0.1; echo $SSH_CONNECTION"]) for _ in range(20)]
        done, *_ = await asyncio.gather(
            asyncio.gather(*calls), host.docker.info(), host.read_file("/etc/hostname")
        )
        assert len({one.stdout for one in done}) == 1
        assert host.connects == 1
        assert connections(box) == before + 1

    async def test_many_short_calls_fit_the_servers_sessions(self, host: Host) -> None:
        calls = [host.run(["echo", str(n)]) for n in range(60)]
        reads = [host.read_file("/etc/hostname") for _ in range(20)]
        done, _ = await asyncio.gather(asyncio.gather(*calls), asyncio.gather(*reads))
        assert [one.stdout for one in done] == [f"{n}\n" for n in range(60)]


class TestLoginFaults:
    async def test_wrong_key(self, connect: Callable[..., Host], login: Login) -> None:
        stranger = asyncssh.generate_private_key("ssh-ed25519").export_private_key().decode()
        host = connect(replace(login, private_key=stranger))
        with pytest.raises(errors.AuthenticationFailed, match=r"user root.*private key"):
            await host.run(["true"])

    async def test_wrong_password(self, connect: Callable[..., Host], login: Login) -> None:
        host = connect(replace(login, user="deployer", private_key=None, password="guessed"))
        with pytest.raises(errors.AuthenticationFailed, match="user deployer") as caught:
            await host.run(["true"])
        assert "guessed" not in str(caught.value)

    async def test_password(self, connect: Callable[..., Host], login: Login, lab: Lab) -> None:
        password = lab.password_file.read_text()
        host = connect(replace(login, user="deployer", private_key=None, password=password))
        assert (await host.run(["id", "-un"])).stdout == "deployer\n"

    async def test_wrong_passphrase(self, connect: Callable[..., Host], login: Login) -> None:
        key = asyncssh.generate_private_key("ssh-rsa", key_size=2048)
        locked = key.export_private_key("pkcs1-pem", passphrase="right").decode()
        host = connect(replace(login, private_key=locked, passphrase="wrong"))
        with pytest.raises(errors.AuthenticationFailed, match="can't be read"):
            await host.run(["true"])

    async def test_unknown_host_key(
        self, connect: Callable[..., Host], login: Login, lab: Lab, box: LabHost
    ) -> None:
        host = connect(replace(login, known_hosts=""))
        with pytest.raises(errors.HostKeyMismatch, match=r"not known: found .*SHA256:") as caught:
            await host.run(["true"])
        line = str(caught.value.hint).rpartition("known_hosts: ")[2]
        assert (await connect(replace(login, known_hosts=line)).run(["true"])).exit_status == 0

    async def test_changed_host_key(
        self, connect: Callable[..., Host], login: Login, box: LabHost
    ) -> None:
        other = asyncssh.generate_private_key("ssh-ed25519").export_public_key().decode()
        changed = replace(login, known_hosts=f"{box.address} {other}")
        for trusting in (False, True):
            host = connect(replace(changed, trust_on_first_use=trusting))
            with pytest.raises(errors.HostKeyMismatch, match=r"has changed: expected .*SHA256"):
                await host.run(["true"])

    async def test_trust_on_first_use_is_asked_for(
        self, connect: Callable[..., Host], login: Login
    ) -> None:
        host = connect(replace(login, known_hosts="", trust_on_first_use=True))
        assert (await host.run(["true"])).exit_status == 0

    async def test_trust_on_first_use_is_remembered(
        self, connect: Callable[..., Host], login: Login, box: LabHost, home: Path
    ) -> None:
        own = replace(login, known_hosts=None)
        with pytest.raises(errors.HostKeyMismatch, match="not known"):
            await connect(own).run(["true"])
        await connect(replace(own, trust_on_first_use=True)).run(["true"])
        known = home / ".ssh" / "known_hosts"
        assert known.read_text().startswith(f"{box.address} ssh-ed25519 ")
        assert known.stat().st_mode & 0o777 == 0o600
        await connect(own).run(["true"])

    async def test_without_credentials_the_users_own_serve(
        self, connect: Callable[..., Host], lab: Lab, ssh: Path
    ) -> None:
        (ssh / "known_hosts").write_text(lab.known_hosts.read_text())
        with pytest.raises(errors.AuthenticationFailed, match=r"keys in ~/\.ssh"):
            await connect(Login("root")).run(["true"])
        (ssh / "id_ed25519").write_text(lab.ssh_key.read_text())
        (ssh / "id_ed25519").chmod(0o600)
        assert (await connect(Login("root")).run(["true"])).exit_status == 0

    async def test_ssh_config_counts_as_for_ssh(
        self,
        connect: Callable[..., Host],
        login: Login,
        lab: Lab,
        box: LabHost,
        another_sshd: Callable[..., int],
        ssh: Path,
    ) -> None:
        """Name, port, terminal, identities, files with known hosts, strictness; with credentials
        of the deployment's own, all but these."""
        port = another_sshd()
        key = box.run(["cat", "/etc/ssh/ssh_host_ed25519_key.pub"]).stdout
        (ssh / "known_of_b").write_text(f"not a line\nnode-1 {key}")
        (ssh / "key").write_text(lab.ssh_key.read_text())
        (ssh / "key").chmod(0o600)
        settings = [
            "Host node",
            f"HostName {box.address}",
            f"Port {port}",
            "RequestTTY force",
            "RemoteCommand tmux",
            "IdentityFile ~/.ssh/missing",
            "IdentityFile ~/.ssh/key",
            "UserKnownHostsFile ~/.ssh/known_of_a ~/.ssh/known_of_b",
        ]

        async def runs(login: Login, *more: str) -> None:
            (ssh / "config").write_text("\n".join([*settings, *more, ""]))
            host = connect(login, address="node")
            done = await host.run(["sh", "-c", "echo out; echo err >&2"])
            assert (done.stdout, done.stderr) == ("out\n", "err\n")
            assert await host.read_file("/etc/hostname")

        await runs(Login("root"), "HostKeyAlias node-1")
        await runs(replace(login, known_hosts=None), "HostKeyAlias node-1", "IdentityFile /none")
        with pytest.raises(errors.HostKeyMismatch, match="not known"):
            await runs(Login("root"))
        other = asyncssh.generate_private_key("ssh-ed25519").export_public_key().decode()
        (ssh / "known_of_a").write_text(f"[{box.address}]:{port} {other}")
        with pytest.raises(errors.HostKeyMismatch, match=r"has changed: expected (\S+ \S+), found"):
            await runs(Login("root"), "StrictHostKeyChecking accept-new")
        await runs(Login("root"), "StrictHostKeyChecking no")
        (ssh / "known_of_a").unlink()
        await runs(Login("root"), "StrictHostKeyChecking accept-new")
        assert (ssh / "known_of_a").read_text().startswith(f"[{box.address}]:{port} ssh-ed25519 ")
        await runs(Login("root"))

    async def test_keys_that_cannot_be_read_are_named(
        self, connect: Callable[..., Host], lab: Lab, ssh: Path
    ) -> None:
        (ssh / "known_hosts").write_text(lab.known_hosts.read_text())
        key = asyncssh.generate_private_key("ssh-rsa", key_size=2048)
        encrypted = key.export_private_key("pkcs1-pem", passphrase="right")
        for name in ("id_rsa", "other"):
            (ssh / name).write_bytes(encrypted)
        with pytest.raises(errors.AuthenticationFailed, match=r"can't read \S+/id_rsa \(encrypted"):
            await connect(Login("root")).run(["true"])
        (ssh / "garbage").write_text("garbage")
        lines = [f"IdentityFile ~/.ssh/{name}" for name in ("other", "garbage", "missing")]
        (ssh / "config").write_text("\n".join([*lines, ""]))
        with pytest.raises(
            errors.AuthenticationFailed,
            match=r"/other \(encrypted\), \S+/garbage \(not a private key\), \S+/missing \(No such",
        ):
            await connect(Login("root")).run(["true"])

    async def test_through_a_jump_host(
        self, connect: Callable[..., Host], login: Login, lab: Lab
    ) -> None:
        jump = lab.hosts["b"].address
        host = connect(replace(login, jump=Jump(jump)))
        done = await host.run(["sh", "-c", "echo $SSH_CONNECTION"])
        assert done.stdout.startswith(f"{jump} ")
        assert (await host.docker.info()).version

    async def test_unreachable(self, connect: Callable[..., Host], login: Login, lab: Lab) -> None:
        nobody = str(lab.subnet[99])
        host = connect(login, address=nobody, timeout=1)
        with pytest.raises(errors.HostUnreachable, match=f"{nobody}:22"):
            await host.run(["true"])

    async def test_unreachable_costs_all_callers_one_timeout(
        self, connect: Callable[..., Host], login: Login, lab: Lab
    ) -> None:
        host = connect(login, address=str(lab.subnet[99]), timeout=1)
        began = time.monotonic()
        calls = [host.run(["true"]) for _ in range(20)]
        answers = await asyncio.gather(*calls, host.docker.info(), return_exceptions=True)
        assert {type(answer) for answer in answers} == {errors.HostUnreachable}
        assert time.monotonic() - began < 10

    async def test_a_cancelled_caller_does_not_break_the_others_login(self, host: Host) -> None:
        first, second = (asyncio.ensure_future(host.run(["echo", "x"])) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        assert (await second).stdout == "x\n"
        assert host.connects == 1

    async def test_refused(self, connect: Callable[..., Host], login: Login) -> None:
        with pytest.raises(errors.HostUnreachable, match=":23"):
            await connect(replace(login, port=23)).run(["true"])


class TestLoginShells:
    @pytest.fixture
    def user(self, login: Login, box: LabHost) -> Iterator[Login]:
        """A user whose shell and start-up files are as before after the test."""
        yield replace(login, user="deployer")
        box.run(["usermod", "-s", "/bin/bash", "deployer"])
        box.run(["rm", "-f", BASHRC])

    async def works(self, host: Host) -> None:
        """Commands with awkward arguments, scripts, files and the engine."""
        awkward = [
            "a b",
            "$HOME",
            "'\"",
            "*",
            "ünï",
            "",
            "-n",
            "x\ny",
            "!!",
            "a\\b\\\\",
            "`id`",
            "~",
        ]
        done = await host.run(["printf", "%s|", *awkward])
        assert (done.stdout, done.stderr) == ("|".join(awkward) + "|", "")
        assert (await host.run(["cat"], input="x\n" * 9000)).stdout == "x\n" * 9000
        assert await host.facts.missing_paths(["/no/such", "/etc"]) == ["/no/such"]
        await host.write_files({"/tmp/of-a-shell": File(b"content")})
        assert await host.read_file("/tmp/of-a-shell") == b"content"
        await host.run(["rm", "/tmp/of-a-shell"])
        assert (await host.docker.info()).version

    @pytest.mark.parametrize("forwarded", [True, False])
    async def test_csh(
        self,
        connect: Callable[..., Host],
        user: Login,
        box: LabHost,
        no_forwarding: int,
        forwarded: bool,
    ) -> None:
        box.run(["usermod", "-s", "/bin/tcsh", "deployer"])
        await self.works(connect(user if forwarded else replace(user, port=no_forwarding)))

    @pytest.mark.parametrize("forwarded", [True, False])
    async def test_start_up_files_that_print(
        self,
        connect: Callable[..., Host],
        user: Login,
        box: LabHost,
        no_forwarding: int,
        forwarded: bool,
    ) -> None:
        """To both streams; the SSH server's SFTP subsystem can't be used with it."""
        box.run(["sh", "-c", f"cat >{BASHRC}"], input=PRINTS)
        await self.works(connect(user if forwarded else replace(user, port=no_forwarding)))

    @pytest.mark.parametrize(
        ("bashrc", "shell", "found"),
        [
            ("echo no terminal; exit 0\n", "/bin/bash", "ended with 0.*'no terminal'"),
            ("exit 3\n", "/bin/bash", "ended with 3.*''"),
            ("", "/usr/sbin/nologin", "ended with 1.*not available"),
        ],
    )
    async def test_a_shell_that_runs_nothing_is_quoted(
        self,
        connect: Callable[..., Host],
        user: Login,
        box: LabHost,
        bashrc: str,
        shell: str,
        found: str,
    ) -> None:
        box.run(["sh", "-c", f"cat >{BASHRC}"], input=bashrc)
        box.run(["usermod", "-s", shell, "deployer"])
        host = connect(user)
        for call in (host.run(["true"]), host.read_file("/etc/hostname")):
            with pytest.raises(errors.NoShell, match=found):
                await call


class TestServersOfOtherKinds:
    async def test_files_without_an_sftp_subsystem(
        self,
        connect: Callable[..., Host],
        login: Login,
        box: LabHost,
        another_sshd: Callable[..., int],
    ) -> None:
        other = replace(login, port=another_sshd(without="Subsystem"))
        host = connect(other)
        await host.write_files({"/tmp/without-sftp": File(b"content")})
        assert await host.read_file("/tmp/without-sftp") == b"content"
        await host.remove_tree("/tmp/without-sftp", below="/tmp")
        box.run(["mv", SFTP_SERVER, f"{SFTP_SERVER}.away"])
        try:
            for credentials in (other, login):
                with pytest.raises(errors.NoSftp, match="Subsystem sftp internal-sftp"):
                    await connect(credentials).read_file("/etc/hostname")
        finally:
            box.run(["mv", f"{SFTP_SERVER}.away", SFTP_SERVER])

    @pytest.mark.parametrize("most", [1, 2])
    async def test_further_connections_where_sessions_run_out(
        self,
        connect: Callable[..., Host],
        login: Login,
        another_sshd: Callable[..., int],
        create: Create,
        most: int,
    ) -> None:
        port = another_sshd(f"MaxSessions {most}", *FORWARDS_NOTHING)
        host = connect(replace(login, port=port))
        assert await host.read_file("/etc/hostname")
        id = await create()
        await host.docker.start(id)
        waits = [asyncio.ensure_future(host.docker.wait(id)) for _ in range(5)]
        await eventually(lambda: threads("wait for") == 5)
        calls = [host.run(["echo", str(n)]) for n in range(20)]
        reads = [host.read_file("/etc/hostname") for _ in range(5)]
        done, _ = await asyncio.gather(asyncio.gather(*calls), asyncio.gather(*reads))
        assert [one.stdout for one in done] == [f"{n}\n" for n in range(20)]
        await host.docker.kill(id, deployment=OURS)
        assert await asyncio.gather(*waits) == [137] * 5

    async def test_no_session_at_all_is_told(
        self, connect: Callable[..., Host], login: Login, another_sshd: Callable[..., int]
    ) -> None:
        host = connect(replace(login, port=another_sshd("MaxSessions 0")))
        with pytest.raises(errors.SessionRefused, match="MaxSessions"):
            await host.run(["true"])


class TestLostConnections:
    async def test_sshd_restarted(self, host: Host, box: LabHost) -> None:
        await host.run(["true"])
        box.stop_sshd()
        try:
            with pytest.raises(errors.HostUnreachable):
                await host.run(["true"])
        finally:
            box.start_sshd()
        assert (await host.run(["echo", "back"])).stdout == "back\n"
        assert host.connects == 2

    async def test_engine_calls_come_back_too(self, host: Host, box: LabHost) -> None:
        await host.docker.info()
        box.stop_sshd()
        box.start_sshd()
        assert (await host.docker.info()).version
        assert host.connects == 2

    async def test_a_running_command_is_not_run_again(self, host: Host, box: LabHost) -> None:
        script = "echo once >>/tmp/ran; sleep 60"
        call = asyncio.ensure_future(host.run(["sh", "-c", script]))
        await eventually(lambda: "once" in (box.run(["cat", "/tmp/ran"], check=False).stdout))
        await asyncio.to_thread(box.stop_sshd)
        box.start_sshd()
        with pytest.raises(errors.ConnectionDropped):
            await call
        assert (await host.read_file("/tmp/ran")) == b"once\n"
        box.run(["rm", "/tmp/ran"])

    async def test_cut_and_mended(
        self, connect: Callable[..., Host], login: Login, box: LabHost
    ) -> None:
        host, nap = connect(login, timeout=2), a_nap()
        call = asyncio.ensure_future(host.run(nap, timeout=600))
        await eventually(lambda: running(box, " ".join(nap)))
        began = time.monotonic()
        box.cut()
        try:
            with pytest.raises(errors.ConnectionDropped):
                await call
            # Three keepalives, five seconds apart.
            assert time.monotonic() - began < 30
            with pytest.raises(errors.HostUnreachable):
                await host.run(["true"])
        finally:
            box.mend()
        assert (await host.run(["echo", "back"])).stdout == "back\n"
        assert host.connects == 2

    async def test_a_closed_host_says_so(self, host: Host) -> None:
        await host.run(["true"])
        await host.aclose()
        with pytest.raises(errors.HostError, match="closed"):
            await host.run(["true"])

    async def test_hosts_close_when_cancelled(self, login: Login, box: LabHost) -> None:
        before, nap = connections(box), a_nap()

        async def work() -> None:
            async with Hosts([Host("a", box.address, login)]) as hosts:
                await hosts["a"].docker.info()
                await hosts["a"].run(nap)

        task = asyncio.ensure_future(work())
        await eventually(lambda: running(box, " ".join(nap)))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await eventually(lambda: connections(box) == before)


async def cancel_everything(call: asyncio.Task[Any]) -> None:
    """Cancels all tasks on the loop, those of libraries too, and waits for the call's end."""
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()
    async with asyncio.timeout(20):
        await asyncio.wait({call})
    assert call.cancelled()


class TestCancelled:
    @pytest.fixture
    async def place(self, host: Host, box: LabHost) -> AsyncIterator[str]:
        place = "/var/lib/hosts-test"
        box.run(["sh", "-c", f"mkdir {place} && mkfifo {place}/pipe"])
        yield place
        await host.aclose()
        # Whoever waits at the pipe's other end goes on.
        box.run(["sh", "-c", f"timeout 5 sh -c ': >{place}/pipe'; rm -r {place}"])
        until(lambda: not sftp_servers(box), "no SFTP server is left")

    async def test_a_read_that_gets_no_answer(self, host: Host, place: str) -> None:
        """The SFTP server hangs in opening a pipe; another serves the next call."""
        for everything in (False, True):
            await host.read_file("/etc/hostname")
            call = asyncio.ensure_future(host.read_file(f"{place}/pipe"))
            await asyncio.sleep(0.1)
            if everything:
                await cancel_everything(call)
            else:
                call.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await call
            assert await host.read_file("/etc/hostname")

    async def test_a_write_in_the_middle(self, host: Host, box: LabHost, place: str) -> None:
        files = {f"{place}/large": File(bytes(60_000_000))}
        call = asyncio.ensure_future(host.write_files(files))
        await eventually(lambda: ".tmp" in box.run(["ls", "-A", place]).stdout)
        await cancel_everything(call)
        assert await host.read_file(f"{place}/large") is None
        assert await host.write_files({f"{place}/small": File(b"1")})

    async def test_a_start_is_known_afterwards(self, host: Host, create: Create) -> None:
        made = await create()
        call = asyncio.ensure_future(host.docker.start(made))
        await eventually(lambda: threads(f"start {made}") == 1)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert (await host.docker.inspect(made)).running


class TestPorts:
    async def test_what_no_server_could_bind_is_taken(self, host: Host, box: LabHost) -> None:
        """A bind alone and an outbound connection, too; not what is over."""
        holding = box.popen(["python3", "-c", HOLDING])
        try:
            await eventually(lambda: box.run(["ls", "/tmp/held"], check=False).returncode == 0)
            taken = await host.facts.ports_taken([7391, 7392, 7393])
            assert (taken[7391], taken[7392].partition(" ")[0]) == ("", "python3")
            assert 7393 not in taken
            over = await host.facts.ports_taken([7393, 7394], reused=False)
            assert list(over) == [7393], "for who binds without SO_REUSEADDR"
        finally:
            holding.kill()
            holding.wait()
            box.run(["rm", "-f", "/tmp/held"])


class TestFiles:
    @pytest.fixture
    async def place(self, host: Host) -> AsyncIterator[str]:
        yield "/var/lib/hosts-test"
        await host.remove_tree("/var/lib/hosts-test", below="/var/lib")

    async def test_all_files_go_over_one_session(self, host: Host, box: LabHost) -> None:
        await asyncio.gather(*(host.read_file("/etc/hostname") for _ in range(20)))
        await host.make_dirs(["/etc"])
        assert len(sftp_servers(box)) == 1

    async def test_an_ended_file_server_comes_back(
        self, host: Host, box: LabHost, place: str
    ) -> None:
        path = f"{place}/file"
        await host.write_files({path: File(b"kept")})
        box.run(["kill", *sftp_servers(box)])
        until(lambda: not sftp_servers(box), "the SFTP server ends")
        with pytest.raises(errors.ConnectionDropped):
            await host.read_file(path)
        assert await host.read_file(path) == b"kept"
        assert host.connects == 1

    async def test_a_user_without_rights(self, connect: Callable[..., Host], login: Login) -> None:
        host = connect(replace(login, user="deployer"))
        with pytest.raises(errors.FileDenied, match="/etc/new"):
            await host.write_files({"/etc/new": File(b"")})
        with pytest.raises(errors.FileDenied, match="/etc/passwd"):
            await host.make_dirs(["/etc/passwd"])

    async def test_removing_follows_no_links(self, host: Host, place: str) -> None:
        await host.write_files({f"{place}/keep/file": File(b"x"), f"{place}/gone/f": File(b"")})
        await host.run(["ln", "-s", f"{place}/keep", f"{place}/gone/link"])
        with pytest.raises(errors.NotOurs, match="leads out"):
            await host.remove_tree(f"{place}/gone/link/file", below=f"{place}/gone")
        assert await host.remove_tree(f"{place}/gone/link", below=f"{place}/gone")
        await host.run(["ln", "-s", f"{place}/keep", f"{place}/gone/link"])
        assert await host.remove_tree(f"{place}/gone", below=place)
        assert await host.read_file(f"{place}/keep/file") == b"x"


class TestDocker:
    async def test_info(self, host: Host, box: LabHost) -> None:
        info = await host.docker.info()
        assert int(info.version.split(".")[0]) >= 20
        assert info.architecture == oci_architecture(box.run(["uname", "-m"]).stdout.strip())

    async def test_clients_of_a_port_are_counted(self, host: Host) -> None:
        await host.run(["true"])
        assert await host.facts.connections(22)
        assert await host.facts.connections(9) == []

    async def test_pull_gives_the_registrys_digest(self, host: Host, lab: Lab) -> None:
        seen: list[PullProgress] = []
        digest = lab.push_variant(f"t{uuid4().hex[:8]}", {"/etc/marker": uuid4().hex})
        ref = f"{lab.image.rpartition(':')[0]}@{digest}"
        image = await host.docker.pull(ref, on_progress=seen.append)
        assert image.digest == ref
        assert seen
        found = await host.docker.image(ref)
        assert found is not None
        assert (found.id, found.digest) == (image.id, ref)

    async def test_both_output_streams_are_logged(self, host: Host, create: Create) -> None:
        id = await create("sh", "-c", "echo out; echo err >&2; sleep 600")
        await host.docker.start(id)
        assert await host.docker.wait_log(id, "err", 30) == "seen"
        assert set((await host.docker.logs(id)).split()) == {"out", "err"}

    async def test_wait_survives_a_reconnect(
        self, host: Host, box: LabHost, create: Create
    ) -> None:
        id = await create("sh", "-c", "while ! [ -e /tmp/go ]; do sleep 0.1; done; exit 7")
        await host.docker.start(id)
        waiting = asyncio.ensure_future(host.docker.wait(id))
        await eventually(lambda: threads("wait for") == 1)
        await asyncio.to_thread(box.stop_sshd)
        await eventually(lambda: threads("wait for") == 0)
        await asyncio.to_thread(box.start_sshd)
        box.run(["docker", "exec", id, "touch", "/tmp/go"])
        assert await waiting == 7

    async def test_a_cancelled_wait_leaves_nothing_behind(self, host: Host, create: Create) -> None:
        id = await create()
        await host.docker.start(id)
        waiting = asyncio.ensure_future(host.docker.wait(id))
        await eventually(lambda: threads("wait for") == 1)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await eventually(lambda: threads("wait for") == 0)
        assert (await host.docker.inspect(id)).running

    async def test_more_waits_than_sessions(self, host: Host, create: Create) -> None:
        id = await create()
        await host.docker.start(id)
        waits = [asyncio.ensure_future(host.docker.wait(id)) for _ in range(20)]
        await eventually(lambda: threads("wait for") == 20)
        assert (await host.run(["echo", "still here"])).stdout == "still here\n"
        await host.docker.kill(id, deployment=OURS)
        assert await asyncio.gather(*waits) == [137] * 20
        assert host.connects == 1


class TestEngineFaults:
    async def test_user_with_docker_group(self, connect: Callable[..., Host], login: Login) -> None:
        assert (await connect(replace(login, user="deployer")).docker.info()).version

    async def test_user_without_docker_group(
        self, connect: Callable[..., Host], login: Login
    ) -> None:
        host = connect(replace(login, user="nodocker"))
        with pytest.raises(errors.DockerAccessDenied, match="usermod -aG docker nodocker"):
            await host.docker.info()

    async def test_engine_down_and_up_again(self, host: Host, box: LabHost) -> None:
        await host.docker.info()
        before = await host.facts.docker_age(host.docker_socket)
        await asyncio.to_thread(box.stop_engine)
        try:
            with pytest.raises(errors.DockerDown):
                await host.docker.info()
        finally:
            await asyncio.to_thread(box.start_engine)
        assert (await host.docker.info()).version
        assert host.connects == 1
        after = await host.facts.docker_age(host.docker_socket)
        assert 0 < after.seconds < after.now - before.now

    async def test_wrong_socket(self, box: LabHost, login: Login) -> None:
        async with Hosts([Host("a", box.address, login, docker_socket="/run/no.sock")]) as hosts:
            with pytest.raises(errors.DockerDown, match=r"/run/no\.sock"):
                await hosts["a"].docker.info()

    async def test_forwarding_refused(
        self,
        connect: Callable[..., Host],
        login: Login,
        no_forwarding: int,
        create: Create,
    ) -> None:
        host = connect(replace(login, port=no_forwarding))
        assert (await host.docker.info()).version
        id = await create()
        await host.docker.start(id)
        waits = [asyncio.ensure_future(host.docker.wait(id)) for _ in range(12)]
        await eventually(lambda: threads("wait for") == 12)
        await host.docker.kill(id, deployment=OURS)
        assert await asyncio.gather(*waits) == [137] * 12

    @pytest.mark.parametrize("forwarded", [True, False])
    async def test_port_on_the_hosts_loopback_network(
        self,
        connect: Callable[..., Host],
        login: Login,
        no_forwarding: int,
        box: LabHost,
        forwarded: bool,
    ) -> None:
        """Where the proxy is proven before clients can reach it; with large bodies both ways."""
        host = connect(login if forwarded else replace(login, port=no_forwarding))
        server = box.popen(["python3", "-c", ECHO])
        try:
            await eventually(lambda: listening(box, ECHO_PORT))
            async with host.http(ECHO_ADDRESS, ECHO_PORT) as client:
                url = f"http://{ECHO_ADDRESS}:{ECHO_PORT}"
                body = b"0123456789abcdef" * 65536
                answers = [await client.post(url, content=body) for _ in range(2)]
                assert all(answer.content == body for answer in answers)
        finally:
            server.kill()
            server.wait()
        async with host.http(ECHO_ADDRESS, ECHO_PORT) as client:
            with pytest.raises(httpx.TransportError):
                await client.get(f"http://{ECHO_ADDRESS}:{ECHO_PORT}")

    async def test_a_host_that_serves_at_another_address_than_it_is_logged_in_to(
        self, login: Login, no_forwarding: int, box: LabHost
    ) -> None:
        """Here nothing is known of its service network, so all goes through the host."""
        service = "192.0.2.7"
        box.run(["ip", "address", "add", f"{service}/32", "dev", "lo"])
        server = box.popen(["python3", "-c", ECHO.replace(ECHO_ADDRESS, service)])
        try:
            await eventually(lambda: listening(box, ECHO_PORT))
            for port in (login.port, no_forwarding):
                host = Host("a", service, replace(login, port=port), ssh_address=box.address)
                async with Hosts([host]), host.http(service, ECHO_PORT) as client:
                    answer = await client.post(f"http://{service}:{ECHO_PORT}", content=b"x")
                    assert answer.content == b"x"
                    assert service in host.where
        finally:
            server.kill()
            server.wait()
            box.run(["ip", "address", "del", f"{service}/32", "dev", "lo"])

    async def test_forwarding_refused_and_engine_down(
        self, connect: Callable[..., Host], login: Login, no_forwarding: int, box: LabHost
    ) -> None:
        host = connect(replace(login, port=no_forwarding))
        await host.docker.info()
        await asyncio.to_thread(box.stop_engine)
        try:
            with pytest.raises(errors.DockerDown):
                await host.docker.info()
        finally:
            await asyncio.to_thread(box.start_engine)
        assert (await host.docker.info()).version

    async def test_forwarding_refused_and_no_docker_group(
        self, connect: Callable[..., Host], login: Login, no_forwarding: int
    ) -> None:
        host = connect(replace(login, user="nodocker", port=no_forwarding))
        with pytest.raises(errors.DockerAccessDenied):
            await host.docker.info()

    async def test_registry_wants_credentials(self, host: Host, strict_registry: str) -> None:
        with pytest.raises(errors.RegistryDenied):
            await host.docker.pull(strict_registry)
        with pytest.raises(errors.RegistryDenied):
            await host.docker.resolve(strict_registry)
        with pytest.raises(errors.RegistryDenied) as caught:
            await host.docker.pull(strict_registry, RegistryLogin("me", "wr0ng-one"))
        assert "wr0ng-one" not in str(caught.value)
        with pytest.raises(errors.ImageNotFound):
            await host.docker.pull(strict_registry, RegistryLogin("me", "open-sesame"))

    async def test_no_such_command(self, host: Host, create: Create) -> None:
        id = await create("no-such-command", init=False)
        with pytest.raises(errors.DockerRefused, match="no-such-command"):
            await host.docker.start(id)


def until(condition: Callable[[], bool], what: str, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.05)


async def eventually(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not await asyncio.to_thread(condition):
        assert time.monotonic() < deadline, f"not within {seconds} s"
        await asyncio.sleep(0.05)


def threads(name: str) -> int:
    return sum(name in thread.name for thread in threading.enumerate())


def a_nap() -> list[str]:
    """A long sleep unlike any other, to be found among the processes."""
    return ["sleep", f"600.{uuid4().int % 10**9}"]


def sftp_servers(box: LabHost) -> list[str]:
    return box.run(["pgrep", "-x", "sftp-server"], check=False).stdout.split()


def listening(box: LabHost, port: int) -> bool:
    return bool(box.run(["ss", "-Hltn", f"sport = :{port}"]).stdout)


def connections(box: LabHost) -> int:
    """How many SSH connections the host has."""
    established = box.run(["ss", "-Htn", "state", "established", "sport = :22"])
    return len(established.stdout.splitlines())


def running(box: LabHost, command: str) -> bool:
    return box.run(["pgrep", "-fx", command], check=False).returncode == 0


class TestChecks:
    """What preflight asks of hosts, on real ones: their tools are the stand-in's."""

    async def test_what_a_host_says_of_itself_is_read(self, host: Host, box: LabHost) -> None:
        model, devices = "/data/models/QwQ-32B", range(16)
        of_all, of_each = ascend.lanes(devices, full=True)
        pings = [Ping(d, f"192.168.{box.address.rpartition('.')[2]}.100", "b") for d in devices]
        lanes = [[*e, *p] for e, p in zip(of_each, ascend.ping_lanes(pings), strict=True)]
        first = [*machine.COMMANDS, *machine.model_commands(model), machine.parts_command(model)]
        command = batch.command([*first, *of_all], lanes, last=[machine.DATE_LAST])
        printed = batch.parse((await host.run(command, check=False)).stdout)
        assert {name for name, said in printed.items() if said.exit_status} <= {
            " ".join(machine.GOVERNOR)
        }
        said = machine.parse(printed, box.address)
        assert said.unread == ()
        assert said.first
        assert said.last
        assert said.first < said.last
        assert said.memory
        assert said.mtu == 1500
        files = machine.parse_model(printed, model)
        assert files.unread == ()
        assert files.digests.keys() == files.sizes.keys() >= {"config.json"}
        report = ascend.parse(printed, devices, full=True)
        assert report.unread == ()
        assert report.driver == report.installed_driver == "24.1.rc3.5"
        assert report.firmware == "7.5.0.5.220"
        assert {(d.health, d.link, d.tls) for d in report.devices.values()} == {("OK", "UP", "0")}
        assert all(d.address == d.stored_address for d in report.devices.values())
        assert ascend.lost(printed, pings) == []

    async def test_ports_are_tried_both_ways_and_nothing_is_left(
        self, lab: Lab, connect: Callable[..., Host], login: Login
    ) -> None:
        """Also where one way is closed: b drops what it would answer a."""
        a, b = (lab.hosts[name].address for name in "ab")
        hosts = [connect(login, a), connect(login, b)]
        commands = [
            reach.command(a, {7301: 1}, [(b, 7302)], window=2),
            reach.command(b, {7302: 1}, [(a, 7301)], window=2),
        ]

        async def tried() -> list[reach.Calls]:
            work = (h.output(c) for h, c in zip(hosts, commands, strict=True))
            return [reach.parse(output) for output in await asyncio.gather(*work)]

        assert [call.results for call in await tried()] == [{f"{b}:7302": ""}, {f"{a}:7301": ""}]
        assert [call.listened for call in await tried()] == [{7301}, {7302}]
        closed = ["ip", "route", "add", "blackhole", f"{a}/32"]
        lab.hosts["b"].run(closed)
        try:
            to_b, to_a = (call.results for call in await tried())
        finally:
            lab.hosts["b"].run([*closed[:2], "del", *closed[3:]])
        assert to_b == {f"{b}:7302": "ETIMEDOUT"}
        assert to_a[f"{a}:7301"] not in ("", "ECONNREFUSED")
        for name in "ab":
            sockets = lab.hosts[name].run(["ss", "-Htan", "sport = :7301 or sport = :7302"])
            assert sockets.stdout == ""
