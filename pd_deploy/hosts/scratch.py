"""Directories for temporary files on this machine, of which killed processes leave none."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from functools import cache
from itertools import chain
from pathlib import Path

PREFIX = "pd-deploy-scratch-"
SHORT = Path("/tmp")  # noqa: S108 - what is made there is made as elsewhere
SOCKET_BYTES = 107
"""How long the path of a UNIX socket may be."""


class Scratch:
    """A directory that only this user can enter, until it is closed or the process ends.

    What a killed process leaves, the next one removes. It tells the dead from the living by a lock,
    because process ids say nothing between containers that share the place for temporary files.

    Args:
        socket: the name of a UNIX socket to be made in it; where TMPDIR is too long for one, the
            directory is in /tmp.
    """

    def __init__(self, socket: str = "") -> None:
        _remove_those_of_the_dead()
        place = Path(tempfile.gettempdir()).resolve()
        if socket and len(os.fsencode(place / f"{PREFIX}12345678" / socket)) > SOCKET_BYTES:
            place = SHORT
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=place)).resolve()
        self._lock = _lock(self.path)

    def close(self) -> None:
        """Remove it; safe to call twice."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __del__(self) -> None:
        self.close()


def _lock(directory: Path) -> int | None:
    """Lock a directory for as long as this process lives; None if another one has it."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


@cache  # once for each process
def _remove_those_of_the_dead() -> None:
    places = {Path(tempfile.gettempdir()), SHORT}
    for directory in chain.from_iterable(place.glob(f"{PREFIX}*") for place in places):
        with contextlib.suppress(OSError):
            # An empty one is just being made, and not locked yet.
            if directory.stat().st_uid == os.getuid() and any(directory.iterdir()):
                descriptor = _lock(directory)
                if descriptor is not None:
                    shutil.rmtree(directory, ignore_errors=True)
                    os.close(descriptor)
