"""Logs that tell the story: what Prefect repeats of it is left out."""

import logging

from pd_deploy.errors import PdDeployError

_LOGGERS = ("prefect.flow_runs", "prefect.task_runs")
_REPEATS = (
    "Finished in state Completed()",
    "Finished in state Failed(",
    "Finished in state Crashed(",
    "Crash detected! Execution was cancelled",
)


class _Story(logging.Filter):
    """Drops the last state of each run, which our own line or the error tells better, and shows
    an error of ours as its message, once: a traceback says nothing about a host."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, PdDeployError):
            if error.told:
                return False
            error.told = True
            record.msg, record.args = str(error), ()
            record.exc_info = record.exc_text = None
        return not record.getMessage().startswith(_REPEATS)


def tell() -> None:
    """Lets Prefect's loggers tell only the story."""
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        if not any(isinstance(one, _Story) for one in logger.filters):
            logger.addFilter(_Story())
