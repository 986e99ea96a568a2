"""Python's search for garbage, which costs a process more than it gains."""

import atexit
import functools
import gc

OBJECTS_BETWEEN_COLLECTIONS = 200_000


@functools.cache
def collect_seldom() -> None:
    """Look for garbage seldom while this process runs, and not at all when it ends.

    What a command or a run makes mostly lives until it ends. At Python's own threshold, looking
    through that took a tenth of the time that `status` takes; the last look, when nothing needs the
    memory any more, a sixth, and three quarters of a second of each check of `pd-health`.
    """
    gc.set_threshold(OBJECTS_BETWEEN_COLLECTIONS)
    atexit.register(gc.freeze)
