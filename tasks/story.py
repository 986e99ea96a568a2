"""Readable logs of runs: without the lines in which Prefect repeats what our own say."""

import logging

from prefect.logging import get_run_logger

from pd_deploy.code.reading import Source
from pd_deploy.errors import Abandoned, PdDeployError, faults_of, headline, is_transient
from pd_deploy.records.releases import Choice
from pd_deploy.steps.identifying import Identified
from pd_deploy.steps.report import Report
from pd_deploy.steps.verify.smoke import Completion

_LOGGERS = ("prefect.flow_runs", "prefect.task_runs")
_REPEATS = (
    "Finished in state Completed()",
    "Finished in state Failed(",
    "Finished in state RolledBack(",
    "Finished in state NothingServes(",
    "Finished in state Crashed(",
    "Crash detected! Execution was cancelled",
)


_RETRY = "Task run failed with %s: %r - Retry %s/%s will start %s"


class _Story(logging.Filter):
    """A filter that drops each run's final state, which our own line or the error tells better, and
    shows an error of ours once, as its message: a traceback says nothing about a host."""

    def __init__(self) -> None:
        super().__init__()
        self._failed: dict[str, str] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if record.msg == _RETRY and isinstance(record.args, tuple):
            self._tell_once(record, record.args)
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, PdDeployError):
            # Of several faults, each was logged by the step that had it.
            if all(getattr(fault, "logged", False) for fault in faults_of(error)):
                return False
            error.logged = True
            record.msg, record.args = str(error), ()
            record.exc_info = record.exc_text = None
        return not record.getMessage().startswith(_REPEATS)

    def _tell_once(self, record: logging.LogRecord, args: tuple[object, ...]) -> None:
        """Show a fault that a step has again at each retry only the first time."""
        _kind, error, *retry = args
        if not isinstance(error, Exception):
            return
        of, text = str(getattr(record, "task_run_id", "")), headline(error)
        is_repeated = self._failed.get(of) == text
        self._failed[of] = text
        record.msg = "%s - retry %s of %s will start %s"
        record.args = ("the same again" if is_repeated else text, *retry)


def tell() -> None:
    """Add the filter to Prefect's loggers."""
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        if not any(isinstance(present, _Story) for present in logger.filters):
            logger.addFilter(_Story())


def log_fault(error: PdDeployError) -> None:
    """Log on a step's own page why it failed, with the last lines of a server's log; Prefect logs
    what was retried, and nothing else. What was given up because of another step is told there."""
    if error.logged or is_transient(error) or isinstance(error, Abandoned):
        return
    get_run_logger().error("%s", error)
    error.logged = True


def log(result: object) -> None:
    """Log a step's result."""
    logger = get_run_logger()
    match result:
        case Report(detail=detail, seconds=seconds):
            logger.info("%s (%.1f s)", detail, seconds)
        case Choice(chosen_image=image, rule=rule):
            logger.info("%s: %s", image, rule)
        case Source(detail=detail):
            logger.info("%s", detail)
        case Identified(detail=detail):
            logger.info("%s", detail)
        case Completion(proof=proof, remarks=remarks):
            for line in (*proof.handovers, proof):
                logger.info("%s", line)
            for remark in remarks:
                logger.warning("%s", remark)
