"""What a step did: the rows of a run's report."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Report:
    """One finished step.

    Attributes:
        step: the verb, such as `launch`.
        subject: the instance, or the host for steps of a whole host.
        host: where it happened.
        changed: whether anything on the host is different now.
        detail: what was done or found, in a few words.
        seconds: how long it took.
    """

    step: str
    subject: str
    host: str
    changed: bool
    detail: str
    seconds: float = 0.0


@dataclass(frozen=True)
class Gate:
    """Where steps on many hosts have come together.

    Attributes:
        name: what is so from there on.
    """

    name: str
