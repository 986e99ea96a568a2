"""What exit codes say. Those of a service are the same wherever one is looked at."""

from collections.abc import Iterable

from pd_deploy.records.status import Verdict

FAILED, INVALID, DRIFT, INTERRUPTED = 1, 2, 5, 130

OF_A_SERVICE = {Verdict.SERVING: 0, Verdict.DEGRADED: 3, Verdict.DOWN: 4}


def of(verdicts: Iterable[Verdict | None]) -> int:
    """Return the exit code for services: that of the worst; FAILED for one that was not asked, if
    none is worse."""
    return max((FAILED if v is None else OF_A_SERVICE[v] for v in verdicts), default=0)
