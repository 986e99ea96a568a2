"""Taking over what the playbook has started, on real hosts."""

import asyncio
import json
from collections.abc import Callable, Iterator

import pytest
import yaml

from bench.client import Client
from bench.lab_service import INSTANCES
from pd_deploy.flows.deploy import deploy
from pd_deploy.flows.rollback import rollback
from tests.e2e.conftest import Service, long, until
from tests.playbook import NAMES, Playbook

SECRET = "hf_0123456789abcdef0123456789abcdef01"


@pytest.fixture
def playbook(service: Service, prefect: Callable[..., str]) -> Iterator[Playbook]:
    """The playbook's service on the lab, which serves."""
    service.change(container={"stop_timeout": 10, "names": NAMES})
    upstream = service.path.with_name("upstream.yaml")
    document = yaml.safe_load(service.path.read_text()) | {"name": "qwq-3p1d"}
    upstream.write_text(yaml.safe_dump({**document, "compat": "upstream"}))
    plan = json.loads(prefect("pd-deploy", "plan", str(upstream), "--format", "json"))
    playbook = Playbook(service.lab, plan, service.lab.image)
    try:
        playbook.start(HF_TOKEN=SECRET)
        until(service.completes, 120)
        yield playbook
    finally:
        playbook.clean()


@long
async def test_a_first_deployment_that_fails_gives_the_service_back_to_the_playbooks_containers(
    service: Service, playbook: Playbook, prefect: Callable[..., str]
) -> None:
    said = prefect("pd-deploy", "adopt", service.file)
    assert "differs  gpu_memory_utilization 0.88 → 0.65" in said
    taken = prefect("pd-deploy", "adopt", service.file, "--yes")
    assert "generation 0 (adopted) is 5 containers, port 7000" in taken
    before = playbook.processes()
    with Client(service.url) as client:
        failed = await deploy(
            service.file, image=service.push_bad("20250723_1", garbage=True), return_state=True
        )
        # A request that met the proxy before its servers may wait for long.
        await asyncio.to_thread(until, lambda: client.gap, 60)
    assert failed.is_failed()
    assert "The service is back on generation 0 (adopted), down for" in str(failed.message)
    assert set(playbook.states().values()) == {"running"}
    assert service.containers(running=True) == {}
    assert playbook.processes() == before
    for host in service.lab.hosts.values():
        open_to_all = ["find", "/var/lib/pd-deploy", "-type", "f", "-perm", "/077"]
        readable = host.run([*open_to_all, "-exec", "grep", "-l", SECRET, "{}", "+"], check=False)
        assert readable.stdout == ""
    assert SECRET not in f"{said}{taken}{failed.message}"
    state = await deploy(service.file, return_state=True)
    assert state.is_completed(), state.message
    assert set(playbook.states().values()) == {"exited"}
    assert set(service.containers(running=True)) == INSTANCES
    back = await rollback(service.file, generation="0", return_state=True)
    assert back.is_completed(), back.message
    assert service.completes()
    assert playbook.processes() == before
    assert service.containers(running=True) == {}
