"""Servers on this machine: ports for them, and whether a Prefect server answers.

The demo, the benches and the tests use it too.
"""

import socket
from pathlib import Path

import httpx

from pd_deploy.blocks.server import trust

ANSWER_TIMEOUT_S = 10.0


def free_ports(count: int) -> list[int]:
    """Return so many different ports of 127.0.0.1 that nobody listens on."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody listens on."""
    return free_ports(1)[0]


def is_healthy(api: str, path: str = "/health", authority: Path | None = None) -> bool:
    """Tell whether the Prefect server with this API URL answers, past any proxy.

    Args:
        path: what to ask of the API; "/ready" also asks for its database.
        authority: the CA of its certificate, by default those of the system.
    """
    try:
        answer = httpx.get(
            f"{api}{path}", trust_env=False, timeout=ANSWER_TIMEOUT_S, verify=trust(authority)
        )
    except httpx.TransportError:
        return False
    return answer.is_success
