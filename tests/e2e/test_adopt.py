"""Taking over what the playbook has started, on real hosts."""

import asyncio

from bench.client import Client
from bench.lab_service import INSTANCES
from pd_deploy.cli import adopt
from pd_deploy.config.load import load_deployment
from pd_deploy.flows.deploy import deploy
from pd_deploy.flows.rollback import rollback
from tests.e2e.conftest import SECRET, Service, long, until
from tests.playbook import Playbook


@long
async def test_a_first_deployment_that_fails_gives_the_service_back_to_the_playbooks_containers(
    service: Service, playbook: Playbook
) -> None:
    taken = await adopt.adopted(load_deployment(service.path), service.path, {}, yes=True)
    before = playbook.processes()
    with Client(service.url, pause=0.2) as client:
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
    assert SECRET not in f"{taken}{failed.message}"
    state = await deploy(service.file, return_state=True)
    assert state.is_completed(), state.message
    assert set(playbook.states().values()) == {"exited"}
    assert set(service.containers(running=True)) == INSTANCES
    back = await rollback(service.file, generation="0", return_state=True)
    assert back.is_completed(), back.message
    assert service.completes()
    assert playbook.processes() == before
    assert service.containers(running=True) == {}
