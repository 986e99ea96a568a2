"""The lab's hosts, reached by SSH, keep the contract that hosts in memory are held to."""

import asyncio
import shlex
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from uuid import uuid4

import pytest

from pd_deploy.hosts.host import Host
from pd_deploy.hosts.login import Login
from pd_deploy.lab import Lab, LabHost
from tests.host_contract import *  # noqa: F403  all of its tests, and their fixtures
from tests.host_contract import OURS, Create

LISTEN = """
import signal, socket
listener = socket.create_server(("", {}))
print("listens", flush=True)
signal.pause()
"""


ATTENDED = """
echo $$ >/tmp/attended
sleep 600 & sleeping=$!
cat >/dev/null
kill $sleeping
rm /tmp/attended
"""


async def test_an_attended_command_sees_the_end_of_its_call(host: Host, create: Create) -> None:
    """However that ends: what looks at its standard input does not stay behind."""
    docker = host.docker
    id = await create()
    await docker.start(id)

    async def is_there() -> bool:
        look = ["test", "-e", "/tmp/attended"]
        return not await docker.execute(id, look, lambda *_: None, deployment=OURS)

    command = ["sh", "-c", ATTENDED]
    call = asyncio.ensure_future(
        docker.execute(id, command, lambda *_: None, deployment=OURS, attended=True)
    )
    async with asyncio.timeout(30):
        while not await is_there():
            assert not call.done()
        call.cancel()
        while await is_there():
            pass
    with pytest.raises(asyncio.CancelledError):
        await call


class Console:
    """Hands on a host of the lab, past SSH."""

    interface = "eth0"

    def __init__(self, lab: Lab, box: LabHost) -> None:
        self.lab = lab
        self.box = box

    def modes(self, directory: str) -> dict[str, str]:
        script = f"cd {shlex.quote(directory)} && ls -A | xargs -r stat -c '%n %a'"
        lines = self.box.run(["sh", "-c", script]).stdout.splitlines()
        return {name: mode for name, _, mode in (line.rpartition(" ") for line in lines)}

    def date(self, path: str, seconds: int) -> None:
        self.box.run(["sh", "-c", f"touch -d @$(($(date +%s) - {seconds})) {shlex.quote(path)}"])

    @contextmanager
    def small_disk(self, directory: str) -> Iterator[None]:
        self.box.run(["mkdir", "-p", directory])
        self.box.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", directory])
        try:
            yield
        finally:
            self.box.run(["umount", directory])

    def fill(self, directory: str) -> None:
        script = f"head -c 1M /dev/zero >{shlex.quote(directory)}/rest"
        assert "No space left" in self.box.run(["sh", "-c", script], check=False).stderr

    def make_read_only(self, directory: str) -> None:
        self.box.run(["mount", "-o", "remount,ro", directory])

    @contextmanager
    def unplugged(self) -> Iterator[None]:
        self.box.cut()
        try:
            yield
        finally:
            self.box.mend()

    @contextmanager
    def listening(self, port: int) -> Iterator[None]:
        process = self.box.popen(["python3", "-c", LISTEN.format(port)])
        try:
            assert process.stdout is not None
            assert process.stdout.readline()
            yield
        finally:
            process.kill()
            process.wait()

    def run_container(self, name: str) -> None:
        command = ["docker", "run", "-d", "--name", name, "--network=host", self.lab.image]
        self.box.run([*command, "sleep", "60"])

    def remove_container(self, name: str) -> None:
        self.box.run(["docker", "rm", "-f", name])

    def push(self, tag: str) -> str:
        return self.lab.push_variant(tag, {"/etc/marker": uuid4().hex})


@pytest.fixture
def console(lab: Lab) -> Console:
    return Console(lab, lab.hosts["a"])


@pytest.fixture
async def host(lab: Lab) -> AsyncIterator[Host]:
    key, known = lab.ssh_key.read_text(), lab.known_hosts.read_text()
    login = Login("root", private_key=key, known_hosts=known)
    host = Host("a", lab.hosts["a"].address, login, connect_timeout=3)
    yield host
    await host.aclose()


@pytest.fixture
async def image(host: Host, lab: Lab) -> str:
    if await host.docker.image(lab.image) is None:
        await host.docker.pull(lab.image)
    return lab.image
