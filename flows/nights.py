"""When a service has its turn, in the night and in the minute: those of one server must not all
start at once."""

import hashlib
from datetime import datetime, timedelta

START, MINUTES = "03:00", 120


def spread(name: str, start: str = START, minutes: int = MINUTES) -> dict[str, str]:
    """Give a service its minute of the night; a step of `build` in prefect.yaml.

    The minute follows from the name alone: it stays the same whenever prefect.yaml is applied, and
    whatever other services there are.

    Args:
        name: the service.
        start: when the first may start, as HH:MM.
        minutes: after which time all have started.

    Returns:
        `night`: for the schedule's `cron`.
    """
    number = _number(name)
    at = datetime.strptime(start, "%H:%M") + timedelta(minutes=number % minutes)
    return {"night": f"{at.minute} {at.hour} * * *"}


def spread_checks(name: str) -> dict[str, str]:
    """Give a service its second of each minute; a step of `build` in prefect.yaml.

    Args:
        name: the service.

    Returns:
        `checks`: for the schedule's `anchor_date`.
    """
    return {"checks": f"2025-01-01T00:00:{_number(name) % 60:02}+00:00"}


def _number(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8])
