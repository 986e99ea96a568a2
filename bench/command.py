"""What the commands of this directory have in common."""

import signal
import sys
from collections.abc import Callable
from typing import TypeVar

from pd_deploy.lab import LabError

T = TypeVar("T")


def measured(name: str, measure: Callable[[], T], *errors: type[Exception]) -> T:
    """Measure; on SIGTERM, too, the lab is taken down.

    Args:
        name: of the command, for messages.
        errors: those that end it beside the lab's and RuntimeError.

    Raises:
        SystemExit: with 1 after an error, which is printed; with 130 after an interrupt.
    """
    known: tuple[type[Exception], ...] = (LabError, RuntimeError, *errors)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return measure()
    except known as error:
        say(f"{name}: {error}")
        raise SystemExit(1) from error
    except KeyboardInterrupt:
        say(f"{name}: interrupted; the lab was taken down")
        raise SystemExit(130) from None


def say(line: str) -> None:
    """Print a line of progress."""
    print(line, file=sys.stderr, flush=True)
