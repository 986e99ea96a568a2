"""Which runs recovery leaves alone."""

from datetime import UTC, datetime
from uuid import uuid4

import pytest
from prefect.client.schemas.objects import FlowRun

from pd_deploy.flows.dead import why_untouched

NOW = datetime.now(UTC)


@pytest.mark.parametrize(
    ("run", "why"),
    [
        ({"run_count": 1}, ""),
        ({"run_count": 1, "parameters": {"dry_run": False}}, ""),
        ({"run_count": 1, "parameters": {"dry_run": True}}, "run 'x' was a dry run"),
        ({"start_time": NOW}, "run 'x' never started"),
    ],
)
def test_a_run_that_cannot_have_changed_a_host_is_known(run: dict[str, object], why: str) -> None:
    """A run that ends has a start time even if it was never running: Prefect sets it then."""
    assert why_untouched(FlowRun(flow_id=uuid4(), name="x", **run)) == why
