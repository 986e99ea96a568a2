"""What became of the service when a run failed, as the name of the run's last state.

So a failure that clients notice is told from others in lists of runs, by automations, and by the
exit code of `pd-deploy`. Prefect counts each of them as Failed. Events are named after them:
`prefect.flow-run.RolledBack`.
"""

from prefect import State
from prefect.states import Failed

from pd_deploy.errors import PdDeployError, RolledBack

ROLLED_BACK = "RolledBack"
NOTHING_SERVES = "NothingServes"
FAILED = "Failed"


def failed(error: PdDeployError) -> State[None]:
    """Make the last state of a run that failed."""
    return Failed(name=name_of(error), message=str(error), data=error)


def name_of(error: PdDeployError) -> str:
    """Name what became of the service: Failed if it is as before the run."""
    if error.nothing_serves:
        return NOTHING_SERVES
    return ROLLED_BACK if isinstance(error, RolledBack) else FAILED
