"""Ask the service for a completion."""

from pd_deploy import probes
from pd_deploy.probes import Completion
from pd_deploy.rollout import Rollout
from tasks.step import step


@step("smoke test")
async def smoke_test(rollout: Rollout) -> Completion:
    """Asks the proxy for a completion, as a client would."""
    return await probes.smoke_test(rollout)
