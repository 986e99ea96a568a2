"""What is said of an instance that ended by itself."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import pytest

from pd_deploy.hosts.container_values import ContainerState, state_of
from pd_deploy.hosts.host import Host, Hosts
from pd_deploy.steps import containers, host_faults
from tests.unit.test_dry_run import rollout

RUNNING = {
    "Id": "0123",
    "Name": "/p0",
    "Image": "sha256:0",
    "Config": {"Image": "image"},
    "State": {"Status": "running", "ExitCode": 0, "OOMKilled": False},
}


class Docker:
    """An engine whose container ends while it is waited for."""

    def __init__(self, **ended: Any) -> None:
        self.ended = {"Status": "exited", **ended}
        self.state = dict(RUNNING)

    async def inspect(self, container: str) -> ContainerState:
        return state_of(self.state)

    async def find(self, name: str, **_: str) -> ContainerState:
        return await self.inspect(name)

    async def wait(self, container: str) -> int:
        self.state = {**RUNNING, "State": self.ended}
        return int(self.ended["ExitCode"])

    async def logs(self, container: str, **_: Any) -> str:
        return "the last words\n"


async def tail(*_: Any, **__: Any) -> dict[str, str]:
    return {}


async def no_fault(*_: Any) -> None: ...


async def message_of(docker: Docker) -> str:
    of = rollout({})
    host = SimpleNamespace(docker=docker, where="a (10.0.0.1)", facts=SimpleNamespace(tail=tail))
    hosts = Hosts.of({name: cast(Host, host) for name in of.session.deployment.hosts})
    of = replace(of, session=of.session.with_hosts(hosts))
    with mock.patch.object(host_faults, "of_instance", no_fault):
        return str(await containers.died(of, "p0"))


@pytest.mark.parametrize(("code", "killed"), [(137, True), (0, True), (137, False), (0, False)])
async def test_the_exit_code_and_whether_memory_ran_out_are_said(code: int, killed: bool) -> None:
    said = await message_of(Docker(ExitCode=code, OOMKilled=killed))
    assert f"a (10.0.0.1), instance p0: ended with exit code {code}" in said
    assert ("was killed because the host ran out of memory" in said) is killed
    assert "the last words" in said


async def test_an_end_without_an_error_code_is_no_success() -> None:
    said = (await message_of(Docker(ExitCode=0, OOMKilled=False))).splitlines()[0]
    assert said.endswith(
        "ended with exit code 0, although it should keep running: one of its processes may have "
        "failed"
    )
