"""Ordinary requests leave connections in TIME_WAIT behind, which must not keep a server from its
port: neither that of an upgrade, nor that of the way back."""

import http.client
import socket
from contextlib import closing

from pd_deploy.flows.deploy import deploy
from pd_deploy.lab import LabHost
from tests.e2e.conftest import Service, until

PORTS = {"p0": ("a", 9000), "p1": ("a", 9001), "d0": ("b", 9100)}


def waiting(host: LabHost, port: int) -> set[str]:
    """A port's connections in TIME_WAIT, by their other ends: the server closed them first."""
    filter = ["state", "time-wait", "sport", "=", f":{port}"]
    return {line.split()[-1] for line in host.run(["ss", "-Htan", *filter]).stdout.splitlines()}


def leave_connections(service: Service) -> dict[str, set[str]]:
    """What a probe, a scraper and a balancer leave at the servers' ports: the new ones, by
    instance."""
    hosts = service.lab.hosts
    before = {instance: waiting(hosts[name], port) for instance, (name, port) in PORTS.items()}
    # A health probe that asks the server to close.
    name, port = PORTS["p0"]
    with closing(http.client.HTTPConnection(hosts[name].address, port, timeout=10)) as probe:
        probe.request("GET", "/health", headers={"Connection": "close"})
        assert probe.getresponse().status == 200
    # A scraper that speaks HTTP/1.0.
    name, port = PORTS["p1"]
    with closing(socket.create_connection((hosts[name].address, port), timeout=10)) as scraper:
        scraper.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        while scraper.recv(65536):
            pass
    # The proxy keeps its connections to decode, which closes them when they have been idle.
    assert service.completes()
    left = {}
    for instance, (name, port) in PORTS.items():
        known = before[instance]
        until(lambda host=hosts[name], port=port, known=known: waiting(host, port) - known)
        left[instance] = waiting(hosts[name], port) - known
    return left


def still_waiting(service: Service, left: dict[str, set[str]]) -> bool:
    """Whether every port still has a connection of those that were left."""
    hosts = service.lab.hosts
    return all(left[i] & waiting(hosts[name], port) for i, (name, port) in PORTS.items())


async def test_lingering_connections_hold_up_neither_upgrade_nor_way_back(service: Service) -> None:
    """They outlive both, so nobody has waited for them."""
    await deploy(service.file)
    left = leave_connections(service)
    image = service.push("20250725_1", {"/etc/example": "new"})
    state = await deploy(service.file, image=image, return_state=True)
    assert state.is_completed(), state.message
    assert still_waiting(service, left)

    left = leave_connections(service)
    image = service.push_bad("20250725_2", crash_after=0.3)
    state = await deploy(service.file, image=image, return_state=True)
    assert "The service is back on generation 2-" in str(state.message)
    assert still_waiting(service, left)
    assert service.completes()
