"""When in the night a service has its turn: those of one server must not all start at once."""

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
    number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8])
    at = datetime.strptime(start, "%H:%M") + timedelta(minutes=number % minutes)
    return {"night": f"{at.minute} {at.hour} * * *"}
