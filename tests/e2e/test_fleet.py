"""Several services on the same hosts, rolled through as real runs of their deployments."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterTags

from bench.lab_service import write_file
from pd_deploy.flows.fleet import fleet
from pd_deploy.flows.run import FLEET
from pd_deploy.lab import Lab
from tests.e2e.conftest import ROOT, Service

NAMES = ("canary", "other")
PREFECT_YAML = """\
pull:
  - prefect.deployments.steps.set_working_directory: {{directory: {root}}}
deployments:
{deployments}"""
ENTRY = """\
  - name: {name}
    entrypoint: pd_deploy.flows.deploy.deploy
    work_pool: {{name: pd-pool, work_queue_name: "{{{{ queue }}}}"}}
    build: [{{pd_deploy.flows.queues.of_hosts: {{file: {file}}}}}]
    parameters: {{file: {file}}}
"""


@pytest.fixture
def services(
    lab: Lab, ssh_block: str, worker: None, prefect: Callable[..., str], tmp_path: Path
) -> Any:
    """Two services of 1P1D side by side on the lab's hosts, each a deployment of its own."""
    made = {name: _described(lab, ssh_block, tmp_path, name) for name in NAMES}
    entries = [ENTRY.format(name=name, file=service.file) for name, service in made.items()]
    config = tmp_path / "prefect.yaml"
    config.write_text(PREFECT_YAML.format(root=ROOT, deployments="".join(entries)))
    prefect("prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(config))
    yield made
    for service in made.values():
        service.clean()


def _described(lab: Lab, block: str, directory: Path, name: str) -> Service:
    first = 8 * NAMES.index(name)
    devices, step = f"{first}-{first + 7}", 100 * NAMES.index(name)
    path = write_file(
        lab,
        directory / f"{name}.yaml",
        name=name,
        ssh={"credentials": block},
        container={"stop_timeout": 10},
        gates={"ready": 60},
        ports={"master": 8000 + 2 * step, "api": 9000 + 2 * step, "zmq": 5568 + 2 * step},
        prefill={"p0": {"host": "a", "devices": devices}, "p1": None, "p2": None},
        decode={"d0": {"host": "b", "devices": devices}},
        proxy={"c0": {"port": 7000 + step}},
    )
    return Service(path, lab)


@pytest.mark.minutes
async def test_a_canary_that_fails_keeps_the_others_from_starting_and_then_all_are_deployed(
    services: dict[str, Service], prefect: Callable[..., str]
) -> None:
    """Each service is deployed by a run of its own, from the queue of their hosts."""
    files = [service.file for service in services.values()]
    services["canary"].change(settings={"all": {"arguments": {"no-such-flag": "1"}}})
    waves = [["canary"], ["other"]]
    failed = await fleet(waves, image=None, return_state=True)
    assert failed.is_failed()
    assert "canary failed" in str(failed.message)
    assert "not started: other" in str(failed.message)
    assert not services["canary"].containers(running=True)

    services["canary"].change(settings={})
    state = await fleet(waves, image=None, return_state=True)
    assert state.is_completed(), state.message
    rows = json.loads(prefect("pd-deploy", "fleet", "status", *files, "--json"))
    assert [(row["deployment"], row["serves"]) for row in rows] == [(n, True) for n in NAMES]
    async with get_client() as client:
        tagged = FlowRunFilter(tags=FlowRunFilterTags(all_=[FLEET]))
        runs = await client.read_flow_runs(flow_run_filter=tagged)
    addresses = "-".join(host.address for host in services["canary"].lab.hosts.values())
    assert [run.work_queue_name for run in runs] == [f"hosts-{addresses}"] * 3
