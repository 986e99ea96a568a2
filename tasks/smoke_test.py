"""Ask the service, before clients can."""

from prefect.logging import get_run_logger

from pd_deploy.steps.rollout import Rollout
from pd_deploy.steps.verify import smoke
from pd_deploy.steps.verify.smoke import Completion
from pd_deploy.tasks.step import step


@step("smoke test")
async def smoke_test(rollout: Rollout) -> Completion:
    """Asks every prefill and decode and the proxy, and follows the KV."""
    completion = await smoke.smoke_test(rollout)
    for line in (*completion.proof.handovers, completion.proof):
        get_run_logger().info("%s", line)
    for remark in completion.remarks:
        get_run_logger().warning("%s", remark)
    return completion
