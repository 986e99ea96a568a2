"""What one run has done with a generation so far; all else about a rollout is fixed."""

from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime

from pd_deploy.records.benchmark import Figures
from pd_deploy.records.releases import Record

DRAINED_S = 1.0
"""A proxy without requests stops sooner, which is not worth a word."""


@dataclass
class Downtime:
    """From when clients could not connect until they could again, by the controller's clock.

    `since` may lie before this run: an earlier one may have left the service down.

    Attributes:
        drain: seconds of it in which the proxies had their last requests answered.
        proof: seconds of it that went into the smoke test.
        benchmark: seconds of it that went into the benchmark.
    """

    since: datetime | None = None
    until: datetime | None = None
    drain: float = 0.0
    proof: float = 0.0
    benchmark: float = 0.0

    def begin(self, lost: datetime | None = None) -> None:
        """Note that the proxy is about to close, or that the service was lost before by itself; one
        that is down already stays so."""
        now = datetime.now(UTC)
        self.since = self.since or min(lost or now, now)

    def end(self) -> None:
        """Note that clients can connect."""
        self.until = datetime.now(UTC)

    def never(self) -> None:
        """Note that nothing was down after all."""
        self.since = None

    @property
    def seconds(self) -> float:
        """How long; up to now if it still lasts."""
        return ((self.until or datetime.now(UTC)) - self.since).total_seconds() if self.since else 0

    def __str__(self) -> str:
        drain = self.drain if self.drain >= DRAINED_S else 0
        parts = {"drain": drain, "smoke test": self.proof, "benchmark": self.benchmark}
        spent = [f"{took:.1f} s of it for the {part}" for part, took in parts.items() if took]
        return ", ".join([f"down for {self.seconds:.1f} s", *spent])


@dataclass
class Attempt:
    """What has been started, stopped and recorded.

    Attributes:
        record: the deployment's record as it was read, or as this run has last written it.
        downtime: since when clients can't connect, and until when.
        started: instances that this run has started, and not stopped again.
        starts: how often this run has started each instance, also if it has stopped it again.
        log_ends: by id of each container that this run has started, or opened further: where its
            log ended before.
        was_down: whether clients could not connect before this run stopped anything.
        stopped: whether this run has stopped anything that ran: from then on a failure is undone.
        cut: how many requests of clients were cut when their time was up.
        waiting_rooms: by proxy, the id of the container that holds requests for this run.
        held: what became of these requests, in words, by proxy.
        connects: by host, how often its connection had been made when the attempt began.
        figures: what the benchmark found, if there was one; not recorded before the attempt ends.
        unjudged: what of them could not be judged, and why.
        interrupted: whether the run was cancelled; it undoes what it did, unless that is cancelled
            as well.
        is_mend: whether health makes it: then it counts, until somebody else makes one.
    """

    record: Record
    downtime: Downtime
    started: set[str] = field(default_factory=set)
    starts: Counter[str] = field(default_factory=Counter)
    log_ends: dict[str, str] = field(default_factory=dict)
    was_down: bool = False
    stopped: bool = False
    cut: int = 0
    waiting_rooms: dict[str, str] = field(default_factory=dict)
    held: dict[str, str] = field(default_factory=dict)
    connects: dict[str, int] = field(default_factory=dict)
    figures: Figures | None = None
    unjudged: tuple[str, ...] = ()
    interrupted: bool = False
    is_mend: bool = False

    @property
    def said_of_held(self) -> str:
        """What became of held requests, of each proxy that has held any; empty if none has."""
        return "; ".join(told for _, told in sorted(self.held.items()) if told)

    @classmethod
    def begin(cls, record: Record, lost: datetime | None = None) -> "Attempt":
        """Begin an attempt; the service may be down from an earlier one, or lost since then."""
        since = record.closed or lost
        return cls(record, Downtime(since), was_down=since is not None)
