"""The engine sglang on the lab: its strict stand-in behind SGLang's real router."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from pd_deploy.flows.deploy import deploy
from pd_deploy.flows.teardown import teardown
from pd_deploy.lab import Lab, sglang
from tests.e2e.conftest import ROOT, Service, long
from tests.e2e.patient_clients import REFUSED, PatientClients

PORT = 7002
SLOW_START = ROOT / "tests/slow_start.py"
IMPORTS_S = 5
"""As long as the router's imports take on a busy host."""


@pytest.fixture
def set_of_three(lab: Lab, ssh_block: str, tmp_path: Path) -> Iterator[Service]:
    """Two prefills and a decode on two hosts, and a router that is slow to listen."""
    router = f"{sglang.ROUTER}/bin/python -m sglang_router.launch_router"
    document = {
        "extends": str(ROOT / "deployments/lab-sglang-2p1d.yaml"),
        "image": sglang.push(lab),
        "hosts": {name: host.address for name, host in lab.hosts.items()},
        "ssh": {"credentials": ssh_block},
        "sglang": {"router": f"{SLOW_START} {IMPORTS_S} {router}"},
        "proxy": {"c0": {"hold": 50, "drain": 20}},
        "gates": {"ready": 60},
        "container": {"mounts": [f"{sglang.ROUTER.parent}:ro", f"{SLOW_START.parent}:ro"]},
    }
    path = tmp_path / "test-sglang.yaml"
    path.write_text(yaml.safe_dump(document))
    service = Service(path, lab)
    try:
        yield service
    finally:
        service.clean()


@long
async def test_deploy_an_upgrade_that_loses_no_request_what_fails_and_teardown(
    set_of_three: Service,
) -> None:
    """In one test, because most of the time goes by before the router listens."""
    service = set_of_three
    state = await deploy(service.file, return_state=True)
    assert state.is_completed(), state.message
    assert "KV transfer proven by the servers' counters: p0 (a) → d0 (b)" in str(state.message)

    service.change(settings={"decode": {"arguments": {"max-running-requests": 8}}})
    with PatientClients(f"http://{service.lab.hosts['a'].address}:{PORT}") as clients:
        state = await deploy(service.file, return_state=True)
    assert state.is_completed(), state.message
    assert {kind: kept.lost for kind, kept in clients.kept.items()} == {
        "keep-alive": [], "new connections": [], "streams": [],
    }  # fmt: skip
    assert sum(kept.refused for kept in clients.kept.values()) == 0
    assert REFUSED not in clients.health
    assert re.search(r"held \d+ requests? for up to \d+\.\d s", str(state.message))
    assert epochs(service) == {"2"}

    service.change(settings={"decode": {"arguments": {"attn-dp-size": 3}}})
    state = await deploy(service.file, return_state=True)
    assert state.is_failed()
    assert "tp_size must be divisible by attn_dp_size" in str(state.message)
    assert "The service is back on generation 2-" in str(state.message)
    assert epochs(service) == {"2"}

    before = service.states()
    service.change(settings={"decode": {"arguments": {"no-such-option": 1}}})
    state = await deploy(service.file, return_state=True)
    assert state.is_failed()
    assert "an option that the image's server (sglang 0.5.23) takes" in str(state.message)
    assert service.states() == before

    state = await teardown(service.file, "lab-sglang-2p1d", return_state=True)
    assert state.is_completed(), state.message
    assert service.containers() == {}


def epochs(service: Service) -> set[str]:
    """Epochs of the containers that run."""
    running = service.containers(running=True).values()
    return {container["Config"]["Labels"]["pd-deploy.epoch"] for container in running}
