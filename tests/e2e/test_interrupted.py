"""Ctrl-C and SIGTERM at `pd-deploy deploy`: what served before serves again."""

import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from bench.lab_service import INSTANCES
from pd_deploy.flows.deploy import deploy
from pd_deploy.flows.recover import recover
from tests.e2e.conftest import BIN, ROOT, Service, local_server_of, long, until

CHANGED = {"all": {"environment": {"EXAMPLE": "1"}}}
Start = Callable[[dict[str, str]], subprocess.Popen[bytes]]


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """Where the command prints to."""
    return tmp_path / "output"


@pytest.fixture
def printed(output: Path) -> Callable[[], str]:
    """What the command has printed."""
    return output.read_text


@pytest.fixture
def start(service: Service, output: Path) -> Iterator[Start]:
    """Starts `pd-deploy deploy` as a terminal does, in a process group of its own."""
    started = list[subprocess.Popen[bytes]]()

    def run(env: dict[str, str]) -> subprocess.Popen[bytes]:
        with output.open("wb") as to:
            process = subprocess.Popen(
                [f"{BIN}/pd-deploy", "deploy", service.file],
                env=env, cwd=ROOT, stdout=to, stderr=to, start_new_session=True,
            )  # fmt: skip
        started.append(process)
        return process

    yield run
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@long
async def test_a_signal_after_the_cut_over_goes_back_and_a_second_one_ends_that_at_once(
    service: Service, start: Start, printed: Callable[[], str], prefect_env: dict[str, str]
) -> None:
    await deploy(service.file)
    service.change(settings=CHANGED)
    service.faults("p1", load_seconds=60)

    process = start(prefect_env)
    until(lambda: epoch(service, "p1") == "2", 60)
    process.send_signal(signal.SIGTERM)
    until(lambda: re.search("SIGTERM: this run stops, and brings back", printed()))
    until(lambda: epoch(service, "p1") == "1", 60)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == 143
    assert f"ends at once; then run `pd-deploy recover {service.file}`" in printed()
    assert "Cancelled: Interrupted again, so ended at once" in printed()
    assert not service.completes()

    service.faults("p1")
    await recover(service.file)
    assert {epoch(service, name) for name in INSTANCES} == {"1"}
    assert service.completes()


async def test_ctrl_c_goes_back_to_what_served_and_says_so(
    service: Service, start: Start, printed: Callable[[], str], without_a_server: dict[str, str]
) -> None:
    """It does not end the server that the command started, which the next one uses."""
    await deploy(service.file)
    service.change(settings=CHANGED, ssh={"credentials": None, "user": "root"})
    service.faults("p1", load_seconds=60)
    process = start(without_a_server)
    until(lambda: epoch(service, "p1") == "2", 120)
    service.faults("p1")
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(120) == 130
    said = printed()
    assert "Cancelled: new generation 2-" in said
    assert "The service is back on generation 1-" in said
    assert {epoch(service, name) for name in INSTANCES} == {"1"}
    assert service.completes()
    ends = {name.partition("-")[0]: o["result"] for name, o in service.record()["outcomes"].items()}
    assert ends == {"1": "good", "2": "interrupted"}
    server = local_server_of(without_a_server)
    path = f"{server.api}/flow_runs/filter"
    async with httpx.AsyncClient() as client:
        assert (await client.post(path, json={})).status_code == 401
        known = httpx.BasicAuth(*server.password.split(":"))
        runs = (await client.post(path, json={}, auth=known)).json()
    assert [run["state_type"] for run in runs] == ["CANCELLED"]


def epoch(service: Service, instance: str) -> str | None:
    """Of an instance's running container."""
    found = service.containers(running=True).get(instance)
    return found["Config"]["Labels"]["pd-deploy.epoch"] if found else None
