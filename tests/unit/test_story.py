"""A run's log tells its story: each fault once, as its message, and nothing twice."""

import inspect
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect import task_engine

from pd_deploy.errors import Abandoned, HostError, HostUnreachable, InstanceDied, SeveralFaults
from pd_deploy.tasks import story

RETRY = "Task run failed with %s: %r - Retry %s/%s will start %s"  # as Prefect words it


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[logging.Logger]:
    """A logger of Prefect's, filtered as in a run."""
    logger = logging.getLogger("prefect.task_runs")
    before = logger.filters, logger.handlers
    logger.filters, logger.handlers = [], [caplog.handler]
    story.tell()
    story.tell()
    assert len(logger.filters) == 1, "added once"
    with caplog.at_level(logging.INFO, logger.name):
        yield logger
    logger.filters, logger.handlers = before


def test_a_fault_of_ours_is_told_once_without_a_traceback(
    log: logging.Logger, caplog: pytest.LogCaptureFixture
) -> None:
    fault = HostError("the disk is full", host="a (10.0.0.1)")
    for _ in range(2):
        log.error("Task run failed", exc_info=(type(fault), fault, None))
    (record,) = set(caplog.records)
    assert record.getMessage() == "host a (10.0.0.1): the disk is full"
    assert record.exc_info is None


def test_of_several_faults_only_those_that_no_step_has_told_are_told(
    log: logging.Logger, caplog: pytest.LogCaptureFixture
) -> None:
    faults = [HostError(what, host="a (10.0.0.1)") for what in ("the disk is full", "no device")]
    several = SeveralFaults(faults)
    log.error("Task run failed", exc_info=(HostError, faults[0], None))
    log.error("Flow run failed", exc_info=(SeveralFaults, several, None))
    assert [r.getMessage().count("no device") for r in dict.fromkeys(caplog.records)] == [0, 1]
    caplog.clear()
    for fault in faults:
        fault.logged = True
    log.error("Flow run failed", exc_info=(SeveralFaults, SeveralFaults(faults), None))
    assert caplog.records == []


def test_a_fault_of_others_keeps_its_traceback(
    log: logging.Logger, caplog: pytest.LogCaptureFixture
) -> None:
    fault = ValueError("a bug")
    log.error("Task run failed", exc_info=(ValueError, fault, None))
    assert caplog.records[0].exc_info == (ValueError, fault, None)


def test_what_is_told_better_elsewhere_is_left_out(
    log: logging.Logger, caplog: pytest.LogCaptureFixture
) -> None:
    log.info("Finished in state Completed()")
    assert caplog.records == []


def test_a_retry_says_its_fault_unless_it_is_the_same_again(
    log: logging.Logger, caplog: pytest.LogCaptureFixture
) -> None:
    away = HostUnreachable("no route to host", host="a (10.0.0.1)")
    refused = HostUnreachable("connection refused", host="a (10.0.0.1)")
    for count, fault in enumerate((away, away, refused), 1):
        log.warning(RETRY, "exception", fault, count, 3, "in 3 s", extra={"task_run_id": "1"})
    said = list(dict.fromkeys(record.getMessage() for record in caplog.records))
    assert ["no route" in text for text in said] == [True, False, False]
    assert "the same again - retry 2 of 3" in said[1]
    assert "connection refused" in said[2]


def test_the_end_of_the_retries_says_the_fault(
    log: logging.Logger, caplog: pytest.LogCaptureFixture
) -> None:
    away = HostUnreachable("no route to host", host="a (10.0.0.1)")
    for end in (" - Retries are exhausted", ""):
        text = f"Task run failed with exception: {away!r}{end}"
        log.error(text, exc_info=(HostUnreachable, away, None))
    (record,) = set(caplog.records)
    assert record.getMessage() == "host a (10.0.0.1): no route to host"


def test_a_step_says_on_its_own_page_why_it_failed_and_nothing_else_says_it_again(
    log: logging.Logger, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefect says nothing of a failure that it does not retry."""
    monkeypatch.setattr(story, "get_run_logger", lambda: log)
    died = InstanceDied("ended with exit code 1\n  ValueError: no KV", instance="p1")
    for fault in (died, died, Abandoned("given up because …"), HostUnreachable("is retried")):
        story.log_fault(fault)
    log.error("Encountered exception", exc_info=(InstanceDied, died, None))
    (record,) = set(caplog.records)
    assert record.getMessage() == str(died)


def test_prefect_words_a_retry_so() -> None:
    assert f'"{RETRY}"' in Path(inspect.getfile(task_engine)).read_text()
