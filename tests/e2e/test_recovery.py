"""Killed at any moment: the next run, or pd-recover, ends in one coherent generation."""

import os
import random
import re
import subprocess
import sys
from typing import Any

import pytest
from prefect.client.schemas.objects import State

from bench.lab_service import INSTANCES
from pd_deploy.flows.deploy import deploy
from pd_deploy.flows.recover import recover
from tests.e2e.conftest import ROOT, Service, long, until
from tests.samples import ALL

CHANGED = {"all": {"environment": {"EXAMPLE": "1"}}}
SEED = int(os.environ.get("PD_TEST_SEED", "1"))
PARTS = 3
# A run that upgrades the 3P1D passes about so many; the last test looks how many it really are.
MOMENTS = 116


def chosen(count: int, *parts: int) -> list[int]:
    """All moments, or one in each of some parts of the run."""
    if ALL:
        return list(range(1, count + 1))
    width = count // PARTS
    pick = random.Random(SEED)
    moments = [part * width + pick.randint(1, width) for part in range(PARTS)]
    return [moments[part] for part in parts]


def run_until(service: Service, moment: int) -> str:
    """A run in a process of its own that ends itself at a moment; what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.e2e.killed", service.file, str(moment)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode in (-9, 0), done.stdout + done.stderr
    return done.stdout


def assert_coherent(service: Service) -> str:
    """One whole generation serves, and nothing is left that is not of a kept one; its name."""
    running = service.containers(running=True)
    assert set(running) == INSTANCES
    labels = {c["Config"]["Labels"]["pd-deploy.generation"] for c in running.values()}
    assert len(labels) == 1
    serving = labels.pop()
    assert service.record()["serving"] == serving
    assert service.completes()
    for host in service.lab.hosts.values():
        root = "/var/lib/pd-deploy/qwq-3p1d"
        assert host.run(["sed", "-n", "2p", f"{root}/lease"]).stdout.strip() == ""
        drafts = host.run(["find", root, "/data/log_path", "-name", "*.tmp"]).stdout
        assert drafts == ""
        kept = set(host.run(["sh", "-c", f"cd {root} && ls -d */ | tr -d /"]).stdout.split())
        script = '{{.Label "pd-deploy.generation"}}'
        found = host.run(["docker", "ps", "-a", "--format", script]).stdout.split()
        assert set(found) <= kept
        assert len(kept) <= 2
        assert host.run(["pgrep", "-f", "[d]ial-stdio"], check=False).stdout == ""
    return serving


@pytest.fixture
def upgrading(service: Service) -> Service:
    """A service whose file has just changed; leases of dead runs do not last long."""
    service.change(gates={"lease_lasts": 2, "ready": 20}, container={"stop_timeout": 5})
    return service


@pytest.mark.parametrize("moment", chosen(MOMENTS, 2))
async def test_killed_upgrade_is_completed_by_the_next_run(upgrading: Service, moment: int) -> None:
    """Whatever the moment was."""
    await deploy(upgrading.file)
    upgrading.change(settings=CHANGED)
    print(run_until(upgrading, moment))
    state: State[Any] = await deploy(upgrading.file, return_state=True)
    assert state.is_completed(), state.message
    assert assert_coherent(upgrading).startswith("2-")


@pytest.mark.parametrize("moment", chosen(MOMENTS, 1))
async def test_killed_upgrade_is_put_right_by_recovery(upgrading: Service, moment: int) -> None:
    """Completed if it was promoted, else the generation before serves."""
    await deploy(upgrading.file)
    upgrading.change(settings=CHANGED)
    print(run_until(upgrading, moment))
    promoted = upgrading.record()["serving"]
    state: State[Any] = await recover(upgrading.file, return_state=True)
    assert state.is_completed(), state.message
    assert assert_coherent(upgrading) == promoted


@long
@pytest.mark.parametrize("moment", chosen(48, 2))
async def test_killed_first_run_is_stopped_by_recovery_and_completed_by_the_next_run(
    upgrading: Service, moment: int
) -> None:
    """There is nothing to go back to."""
    print(run_until(upgrading, moment))
    state: State[Any] = await recover(upgrading.file, return_state=True)
    assert state.is_completed(), state.message
    assert upgrading.containers(running=True) == {}
    await deploy(upgrading.file)
    assert assert_coherent(upgrading).startswith("1-")


async def test_the_moments_are_all_counted(upgrading: Service) -> None:
    """An upgrade has as many as are tried."""
    await deploy(upgrading.file)
    upgrading.change(settings=CHANGED)
    said = re.search(r"ended after (\d+)", run_until(upgrading, 0))
    assert said
    assert abs(int(said[1]) - MOMENTS) <= 12


@pytest.mark.parametrize("when", [pytest.param("loading", marks=long), "serving"])
async def test_a_host_that_reboots_is_put_right(upgrading: Service, when: str) -> None:
    """Its containers are gone from one moment to the next; the whole set starts anew."""
    await deploy(upgrading.file)
    host = upgrading.lab.hosts["b"]
    if when == "loading":
        upgrading.change(settings=CHANGED)
        upgrading.faults("p0", load_seconds=20)
        running = subprocess.Popen(  # noqa: ASYNC220  ended below
            [sys.executable, "-m", "tests.e2e.killed", upgrading.file, "0"],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        until(lambda: _epoch(upgrading, "p2") == "2", 120)
        running.kill()
        running.wait()
        upgrading.faults("p0")
    host.reboot()
    state: State[Any] = await recover(upgrading.file, return_state=True)
    assert state.is_completed(), state.message
    assert assert_coherent(upgrading).startswith("1-")


def _epoch(service: Service, instance: str) -> str | None:
    running = service.containers(running=True)
    found = running.get(instance)
    return found["Config"]["Labels"]["pd-deploy.epoch"] if found else None
