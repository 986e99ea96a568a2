"""Ordinary requests leave connections in TIME_WAIT behind, which must not keep a server from its
port: neither that of an upgrade, nor that of the way back."""

import http.client
import socket
from contextlib import closing

from flows.deploy import deploy
from lab import LabHost
from tests.e2e.conftest import Service, until

PORTS = {"p0": ("a", 9000), "p1": ("a", 9001), "d0": ("b", 9100)}


def waiting(host: LabHost, port: int) -> bool:
    """Whether a port of a host has connections in TIME_WAIT: its server closed them first."""
    filter = ["state", "time-wait", "sport", "=", f":{port}"]
    return bool(host.run(["ss", "-Htan", *filter]).stdout.strip())


def leave_connections(service: Service) -> None:
    """What a probe, a scraper and a balancer leave at the servers' ports."""
    hosts = service.lab.hosts
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
    for name, port in PORTS.values():
        until(lambda host=hosts[name], port=port: waiting(host, port))


def all_wait(service: Service) -> bool:
    return all(waiting(service.lab.hosts[name], port) for name, port in PORTS.values())


async def test_lingering_connections_hold_up_neither_upgrade_nor_way_back(service: Service) -> None:
    """They outlive both, so nobody has waited for them."""
    await deploy(service.file)
    leave_connections(service)
    image = service.push("20250725_1", {"/etc/example": "new"})
    state = await deploy(service.file, image=image, return_state=True)
    assert state.is_completed(), state.message
    assert all_wait(service)

    leave_connections(service)
    image = service.push_bad("20250725_2", crash_after=0.3)
    state = await deploy(service.file, image=image, return_state=True)
    assert "The service is back on generation 2-" in str(state.message)
    assert all_wait(service)
    assert service.completes()
