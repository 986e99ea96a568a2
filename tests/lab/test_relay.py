"""What has a router's port with `proxy.hold`, by the start script itself and over real sockets."""

import asyncio
import os
import shlex
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from pd_deploy.cli.local_http import free_port
from pd_deploy.engines.routed import RoutedEngine
from tests.e2e.patient_clients import REFUSED, PatientClients
from tests.unit import example
from tests.waiting_rooms import HERE, PATIENCE_S, room

TESTS = Path(__file__).parents[1]
GPU = example.ROOT / "deployments/sglang-gpu-2p1d.yaml"
IMPORTS_S = 1.0
HOST = "10.0.5.1"


class Proxy:
    """A proxy's start script that runs."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def says(self, text: str) -> None:
        assert self.process.stdout
        async with asyncio.timeout(PATIENCE_S):
            while text not in (line := (await self.process.stdout.readline()).decode()):
                assert line, f"ended before it said {text!r}"

    async def goes_on(self, text: str) -> None:
        self.process.send_signal(getattr(signal, RoutedEngine.OPEN_SIGNAL))
        await self.says(text)

    async def stops(self) -> int:
        # Not SIGINT: tests that run in the background of a shell have that ignored, and their
        # children can't trap it.
        self.process.terminate()
        return await self.ended()

    async def ended(self) -> int:
        return await asyncio.wait_for(self.process.wait(), PATIENCE_S)


@asynccontextmanager
async def proxy(port: int, imports: float = 0) -> AsyncIterator[Proxy]:
    """The proxy with a router that imports so long before it listens; prepared."""
    words = [sys.executable, str(TESTS / "slow_start.py"), str(imports), sys.executable]
    router = shlex.join([*words, "-S", str(TESTS / "plain_router.py")])
    changes = {"sglang": {"router": router}, "proxy": {"c0": {"port": port, "hold": 30}}}
    text = example.plan_of(GPU, changes).instance("c0").start_script.content
    process = await asyncio.create_subprocess_exec(
        "bash", "-c", text.replace(f"until_ready {HOST}", f"until_ready {HERE}"),
        stdout=asyncio.subprocess.PIPE, env={"PATH": "/usr/bin:/bin", "HOME": "/nonexistent"},
    )  # fmt: skip
    made = Proxy(process)
    try:
        await made.says(RoutedEngine.PREPARED)
        yield made
    finally:
        if process.returncode is None:
            await made.stops()


async def test_a_router_that_is_slow_to_listen_is_replaced_and_nobody_is_refused() -> None:
    """Neither at the old one's end, nor at the new one's: over one connection, over new ones, and
    with streams, of which some are under way."""
    port = free_port()
    async with proxy(port) as old, proxy(port, IMPORTS_S) as new, room(port=port) as held:
        await old.goes_on(RoutedEngine.PROVING)
        await old.goes_on(RoutedEngine.OPENED)
        with PatientClients(f"http://{HERE}:{port}") as clients:
            await answered(clients)
            await held.takes_port()
            assert await old.stops() == 0
            await new.goes_on(RoutedEngine.PROVING)
            held.tell("SIGUSR2")
            await new.goes_on(RoutedEngine.OPENED)
            counts = await held.counts()
            await answered(clients)
        assert await held.ended() == 0
        assert await new.stops() == 0
    assert {kind: kept.lost for kind, kept in clients.kept.items()} == {
        "keep-alive": [], "new connections": [], "streams": [],
    }  # fmt: skip
    assert sum(kept.refused for kept in clients.kept.values()) == 0
    assert REFUSED not in clients.health
    assert counts["held"] >= len(clients.kept)
    assert counts["longest"] > IMPORTS_S / 2


async def answered(clients: PatientClients) -> None:
    """Wait until each kind of client has had an answer from now on."""
    before = {kind: kept.answered for kind, kept in clients.kept.items()}
    async with asyncio.timeout(PATIENCE_S):
        while any(  # noqa: ASYNC110
            kept.answered <= before[kind] for kind, kept in clients.kept.items()
        ):
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("part", ["router", "relay"])
async def test_it_is_open_to_the_smoke_test_alone_and_ends_with_either_part(part: str) -> None:
    """So that the container ends, and is seen and started again as a whole."""
    port = free_port()
    async with proxy(port) as made:
        await made.goes_on(RoutedEngine.PROVING)
        with pytest.raises(OSError, match="Connect call failed"):
            await asyncio.open_connection(HERE, port)
        await made.goes_on(RoutedEngine.OPENED)
        router, relay = children_of(made.process.pid)
        os.kill({"router": router, "relay": relay}[part], signal.SIGKILL)
        await made.says("pd-deploy: the router ended")
        assert await made.ended() == 1


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
