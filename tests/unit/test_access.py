"""How hosts are reached: from the file to connections, and again from a release's record."""

from pd_deploy.blocks import opening
from pd_deploy.records.releases import HostAccess
from pd_deploy.steps.session import host_accesses
from tests.unit import example


def test_a_host_is_logged_in_to_at_its_ssh_address_and_has_its_docker_socket() -> None:
    changes = {
        "hosts": {
            "a": {
                "address": "10.0.0.1",
                "ssh": {"address": "node-a.management", "port": 2222},
                "docker_socket": "/run/podman/podman.sock",
            }
        }
    }
    deployment = example.service(changes)
    accesses = host_accesses(deployment)
    a = HostAccess.model_validate_json(accesses["a"].model_dump_json())
    host = opening.host_of("a", a, {}, deployment)
    assert (host.address, host.where) == ("10.0.0.1", "a (10.0.0.1)")
    assert host._link.command.startswith("ssh -p 2222 ")
    assert host._link.command.endswith("@node-a.management")
    assert host.docker._socket._path == "/run/podman/podman.sock"
    b = opening.host_of("b", accesses["b"], {}, deployment)
    assert b._link.command.endswith("@10.0.0.2")
    assert b.docker._socket._path == "/var/run/docker.sock"
