"""What exit codes say. Those of a service are the same wherever one is looked at."""

from collections.abc import Iterable

from pd_deploy.records.status import Verdict

FAILED, INVALID, DRIFT, ROLLED_BACK, INTERRUPTED = 1, 2, 5, 6, 130

OF_A_SERVICE = {Verdict.SERVING: 0, Verdict.DEGRADED: 3, Verdict.DOWN: 4}
_OF_A_RUN = {"RolledBack": ROLLED_BACK, "NothingServes": OF_A_SERVICE[Verdict.DOWN]}
"""By the name of its last state, which `flows/outcomes.py` gives."""


def of_a_run(state: str) -> int:
    """Return the exit code for a run that failed, by the name of its last state."""
    return _OF_A_RUN.get(state, FAILED)


def of(verdicts: Iterable[Verdict | None]) -> int:
    """Return the exit code for services: that of the worst; FAILED for one that was not asked, if
    none is worse."""
    return max((FAILED if v is None else OF_A_SERVICE[v] for v in verdicts), default=0)
