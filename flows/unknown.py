"""Parameters that a flow does not have: Prefect's engine ends before the flow begins."""

import difflib
from typing import Any

from prefect import Flow, State
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactCreate
from prefect.client.schemas.objects import FlowRun
from prefect.states import Failed

from pd_deploy.errors import InvalidInput, Problem

NEXT = "Next: start it again, with parameters that the flow has."


async def tell(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Say of a run that crashed which of its parameters its flow does not have, if any.

    All that Prefect says in its state is the exit code of the run's process.
    """
    problems = unknown(list(flow.parameters.properties), flow_run.parameters)
    if problems:
        message = str(InvalidInput(problems, source="parameters of the run"))
        failed: State[Any] = Failed(message=message)
        async with get_client() as client:
            await client.set_flow_run_state(flow_run.id, failed, force=True)
            # Without a key it is on the run's own page alone: the last run that did anything stays.
            text = f"**Failed:**\n\n```\n{message}\n```\n\nNothing was touched. {NEXT}"
            await client.create_artifact(
                ArtifactCreate(type="markdown", data=text, flow_run_id=flow_run.id)
            )


def unknown(known: list[str], given: dict[str, Any]) -> list[Problem]:
    """List the parameters that are not among the known ones."""
    problems = []
    for name in sorted(given.keys() - set(known)):
        near = difflib.get_close_matches(name, known, n=1)
        advice = f"did you mean {near[0]}?" if near else f"the flow has {', '.join(known)}"
        problems.append(Problem(name, f"is not a parameter of the flow; {advice}"))
    return problems
