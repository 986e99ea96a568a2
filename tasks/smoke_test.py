"""Ask the service for a completion."""

from prefect.logging import get_run_logger

from pd_deploy import probes
from pd_deploy.probes import Completion
from pd_deploy.rollout import Rollout
from tasks.step import step


@step("smoke test")
async def smoke_test(rollout: Rollout) -> Completion:
    """Asks the proxy for completions, as a client would, and follows their KV."""
    completion = await probes.smoke_test(rollout)
    for line in (*completion.proof.handovers, completion.proof):
        get_run_logger().info("%s", line)
    return completion
