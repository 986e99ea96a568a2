"""`pd-deploy plan --format shell`: what it prints is the same service, made by hand."""

from collections.abc import Callable

from bench.lab_service import INSTANCES
from pd_deploy.flows.deploy import deploy
from tests.e2e.conftest import Service
from tests.e2e.test_main_job import described


async def test_the_printed_scripts_bring_up_the_same_service(
    service: Service, prefect: Callable[..., str]
) -> None:
    """Run by hand on both hosts they end in a completion, and pd-deploy has only to record it."""
    plan = ["pd-deploy", "plan", service.file, "--format", "shell", "--host"]
    running = {}
    for name, host in service.lab.hosts.items():
        host.run(["tee", "/tmp/by-hand.sh"], input=prefect(*plan, name))
        running[name] = host.popen(["sh", "/tmp/by-hand.sh"])
    output = {name: process.communicate(timeout=120)[0] for name, process in running.items()}
    assert [process.returncode for process in running.values()] == [0, 0], output
    assert set(service.containers(running=True)) == INSTANCES
    assert service.port_open()
    by_hand = described(service)
    state = await deploy(service.file, return_state=True)
    assert "changed by 3 steps" in str(state.message)
    assert service.record()["serving"] in str(state.message)
    assert described(service) == by_hand
