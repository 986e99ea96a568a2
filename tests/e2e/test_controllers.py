"""Who runs the controller, and where: not only root on a third machine."""

import os
from pathlib import Path

import pytest

from bench.lab_service import INSTANCES
from pd_deploy.blocks.ssh import SshCredentials
from pd_deploy.flows.deploy import deploy
from tests.e2e.conftest import BIN, ROOT, Service

HOME = "/home/deployer"


@pytest.fixture
async def as_deployer(service: Service) -> Service:
    """The service deployed by a user without root, who is in the docker group."""
    block = SshCredentials(
        private_key=service.lab.ssh_key.read_text(),
        known_hosts=service.lab.known_hosts.read_text(),
    )
    await block.save("test-deployer", overwrite=True)
    service.change(
        ssh={"user": "deployer", "credentials": "test-deployer"},
        paths={"state": f"{HOME}/pd-deploy", "logs": f"{HOME}/logs"},
    )
    return service


async def test_a_user_in_the_docker_group_needs_no_root(as_deployer: Service) -> None:
    """Everything of pd-deploy lies in directories of that user."""
    service = as_deployer
    await deploy(service.file)
    assert set(service.containers(running=True)) == INSTANCES
    for host in service.lab.hosts.values():
        found = host.run(["find", f"{HOME}/pd-deploy", "!", "-user", "deployer"]).stdout
        assert found == ""
        assert host.run(["ls", "/var/lib/pd-deploy"], check=False).returncode != 0
        host.run(["rm", "-rf", f"{HOME}/pd-deploy", f"{HOME}/logs"])


def test_the_controller_may_be_one_of_the_hosts(service: Service, tmp_path: Path) -> None:
    """`pd-deploy deploy` run on p0's host, with a Prefect server of its own, which stays there."""
    host = service.lab.hosts["a"]
    work = "/root/controller"
    service.change(
        extends=str(ROOT / "deployments/lab-qwq-3p1d.yaml"),
        ssh={"credentials": None, "user": "root"},
    )
    host.run(["mkdir", "-p", "/root/.ssh", work])
    for path, content in {
        f"{work}/file.yaml": service.path.read_text(),
        "/root/.ssh/id_ed25519": service.lab.ssh_key.read_text(),
        "/root/.ssh/known_hosts": service.lab.known_hosts.read_text(),
    }.items():
        host.run(["install", "-m", "600", "/dev/stdin", path], input=content)
    env = {"HOME": "/root", "PATH": os.environ["PATH"], "PREFECT_HOME": f"{work}/prefect",
           "DO_NOT_TRACK": "1", "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}  # fmt: skip
    command = [f"{BIN}/pd-deploy", "deploy", f"{work}/file.yaml"]
    done = host.run(command, env=env, check=False, timeout=180)
    assert "stopped pid" in host.run([f"{BIN}/pd-deploy", "server", "stop"], env=env).stdout
    host.run(["rm", "-rf", work, "/root/.ssh/id_ed25519"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "serves at http://" in done.stdout
    assert set(service.containers(running=True)) == INSTANCES
