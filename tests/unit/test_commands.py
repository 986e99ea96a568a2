"""Commands on a host, through an SSH server in this process."""

import asyncio
import subprocess
from collections.abc import AsyncIterator

import asyncssh
import pytest

from pd_deploy.hosts import sessions, shell
from pd_deploy.hosts.host import Host
from pd_deploy.hosts.link import Link
from pd_deploy.hosts.login import Login


class Server(asyncssh.SSHServer):
    """An SSH server that lets everybody in."""

    def begin_auth(self, username: str) -> bool:
        return False


def refuses(process: "asyncssh.SSHServerProcess[bytes]") -> None:
    """What a command does that ends without reading its input."""
    process.stdout.write(shell.MARK + b"held")
    process.stderr.write(shell.MARK)
    process.exit(3)


@pytest.fixture
async def host() -> AsyncIterator[Host]:
    listener = await asyncssh.listen(
        "127.0.0.1",
        0,
        server_factory=Server,
        process_factory=refuses,
        encoding=None,
        server_host_keys=[asyncssh.generate_private_key("ssh-ed25519")],
    )
    port = listener.get_port()
    login = Login("root", port, password="x", known_hosts="", trust_on_first_use=True)
    host = Host("a", "127.0.0.1", login)
    yield host
    await host.aclose()
    listener.close()


@pytest.mark.parametrize("has_ended", [False, True])
async def test_a_command_may_end_without_reading_its_input(
    host: Host, monkeypatch: pytest.MonkeyPatch, has_ended: bool
) -> None:
    """A lease that is held is told at once; this side may come to write only after that."""
    begin = sessions.begin

    async def slow(link: Link, process: sessions.Process) -> bool:
        noisy = await begin(link, process)
        if has_ended:
            await process.wait_closed()
        return noisy

    monkeypatch.setattr(sessions, "begin", slow)
    async with asyncio.timeout(20):
        result = await host.run(["true"], input="x" * 100_000, check=False)
    assert (result.exit_status, result.stdout) == (3, "held")


@pytest.mark.parametrize("argument", ["plain", "two\nlines"])
@pytest.mark.parametrize("sh", ["sh", "bash"])
def test_what_start_up_files_leave_for_the_end_of_the_shell_is_not_printed(
    sh: str, argument: str
) -> None:
    """As those do that end the SSH agent which they have started."""
    left = "trap 'echo bye; echo bye >&2' EXIT; sh() { echo mine; }\n"
    command = [sh, "-c", left + shell.line(["printf", "%s", argument])]
    done = subprocess.run(command, capture_output=True, check=True)
    assert (done.stdout, done.stderr) == (shell.MARK + argument.encode(), shell.MARK)
