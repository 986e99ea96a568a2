"""Trying the ways between hosts: the program that does it, and who calls whom."""

import socket
import subprocess
from collections.abc import Mapping, Sequence

import pytest

from pd_deploy.hosts import reach
from pd_deploy.hosts.reach import Calls
from pd_deploy.lab.lifecycle import host_names
from pd_deploy.planning import peers
from tests.unit import example

Call = tuple[str, int]


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    numbers = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return numbers


def together(
    *parts: tuple[str, Mapping[int, int], Sequence[Call]], window: float = 10
) -> list[Calls]:
    """What hosts say that run their parts at the same time; they are addresses of this machine."""
    commands = [reach.command(*part, window=window) for part in parts]
    running = [subprocess.Popen(c, stdout=subprocess.PIPE, text=True) for c in commands]
    return [reach.parse(each.communicate()[0]) for each in running]


def test_hosts_reach_each_other_and_nothing_is_left() -> None:
    here, there = free_ports(2)
    a, b = "127.0.0.1", "127.0.0.2"
    one, other = together((a, {here: 1}, [(b, there)]), (b, {there: 1}, [(a, here)]))
    assert one == Calls(frozenset({here}), {f"{b}:{there}": ""})
    assert other == Calls(frozenset({there}), {f"{a}:{here}": ""})
    # A server that sets no SO_REUSEADDR binds both at once: no connection is in TIME_WAIT.
    for address, port in ((a, here), (b, there)):
        with socket.socket() as server:
            server.bind((address, port))


def test_a_port_in_use_is_not_listened_at_and_what_has_it_is_not_disturbed() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        one, other = together(
            ("127.0.0.1", {port: 1}, []), ("127.0.0.2", {}, [("127.0.0.1", port)])
        )
    assert one == Calls(frozenset(), {})
    assert other == Calls(frozenset(), {f"127.0.0.1:{port}": ""})


def test_a_call_that_nobody_takes_says_so_when_the_time_is_over() -> None:
    (port,) = free_ports(1)
    (one,) = together(("127.0.0.2", {}, [("127.0.0.1", port)]), window=0.3)
    assert one.results == {f"127.0.0.1:{port}": "ECONNREFUSED"}


@pytest.mark.parametrize(("printed", "unread"), [("no python3\n", "no python3"), ("", "nothing")])
def test_what_is_no_answer_is_told(printed: str, unread: str) -> None:
    assert reach.parse(printed) == Calls(results={}, unread=unread)


def test_few_hosts_call_each_other_and_many_a_bounded_number() -> None:
    """In both directions, and each reaches the proxy's host."""
    for count in (1, 2, 9):
        called = peers.neighbours(host_names(count))
        assert all(len(others) == count - 1 for others in called.values())
    hosts = host_names(48)
    called = peers.neighbours(hosts, {hosts[3]})
    assert set(called[hosts[3]]) == set(hosts) - {hosts[3]}
    assert {len(others) for name, others in called.items() if name != hosts[3]} <= {8, 9}
    for name, others in called.items():
        assert name not in others
        assert all(name in called[other] for other in others)


def test_ports_are_those_that_others_call() -> None:
    topology = example.place()
    ports = peers.ports(topology, "a")
    assert topology.proxies[0].port in ports
    for instance in topology.on_host("a"):
        assert {instance.api_ports[0], instance.zmq_port} & set(ports)
    assert len(ports) <= peers.MOST_PORTS
