"""A parameter that a flow does not have is told in words."""

from typing import Any
from uuid import uuid4

import pytest
from prefect.client.schemas.actions import ArtifactCreate
from prefect.client.schemas.objects import FlowRun
from prefect.states import Crashed

from pd_deploy.flows import unknown
from pd_deploy.flows.deploy import deploy
from pd_deploy.flows.prune import prune
from pd_deploy.flows.recover import recover
from pd_deploy.flows.rollback import rollback
from pd_deploy.flows.teardown import teardown


class Server:
    """Keeps the states that runs are given."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.reports: list[str] = []

    async def __aenter__(self) -> "Server":
        return self

    async def __aexit__(self, *_: object) -> None: ...

    async def set_flow_run_state(self, _: object, state: Any, *, force: bool) -> None:
        assert force  # Prefect lets no crashed run go on
        self.messages.append(f"{state.name}: {state.message}")

    async def create_artifact(self, artifact: ArtifactCreate) -> None:
        assert artifact.key is None  # the report of the last run that did anything stays
        self.reports.append(str(artifact.data))


@pytest.mark.parametrize(
    "flow", [deploy, rollback, recover, prune, teardown], ids=lambda flow: flow.name
)
@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"fil": 1}, "fil: is not a parameter of the flow; did you mean file?"),
        ({"zzz": 1, "file": ""}, "zzz: is not a parameter of the flow; the flow has file"),
        ({"file": ""}, ""),
    ],
)
async def test_a_run_that_crashed_of_it_says_so(
    monkeypatch: pytest.MonkeyPatch, flow: Any, given: dict[str, Any], says: str
) -> None:
    server = Server()
    monkeypatch.setattr(unknown, "get_client", lambda: server)
    run = FlowRun(flow_id=uuid4(), parameters=given)
    for hook in flow.on_crashed_hooks:
        await hook(flow, run, Crashed())
    assert len(server.messages) == len(server.reports) == bool(says)
    assert says in "".join(server.messages)
    assert says in "".join(server.reports)
