"""A run of the flow that kills itself, as kill -9 would, at one of the moments when it changes a
host: `python -m tests.e2e.killed FILE MOMENT`.

Moments count from 1: before and after each change, in the order in which they come. It prints how
many there were when it was not killed.
"""

import asyncio
import functools
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from pd_deploy.flows.deploy import deploy
from pd_deploy.hosts.docker_client import DockerClient
from pd_deploy.hosts.host import Host

CHANGES = {
    DockerClient: ("create", "start", "stop", "kill", "remove", "tag", "pull", "remove_image"),
    Host: ("write_files", "make_dirs", "remove_tree"),
}


class Moments:
    """Counts the moments of a run; the last one is that of its death."""

    def __init__(self, last: int) -> None:
        self.last = last
        self.count = 0

    def passes(self, what: str) -> None:
        self.count += 1
        if self.count == self.last:
            print(f"killed at {self.count}: {what}", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

    def watched(self, name: str, change: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(change)
        async def run(*args: Any, **kwargs: Any) -> Any:
            self.passes(f"before {name} {args[1:2]}")
            result = await change(*args, **kwargs)
            self.passes(f"after {name} {args[1:2]}")
            return result

        return run


def main(file: str, last: int) -> None:
    moments = Moments(last)
    for kind, names in CHANGES.items():
        for name in names:
            setattr(kind, name, moments.watched(name, getattr(kind, name)))
    asyncio.run(deploy(file, return_state=True))  # type: ignore[arg-type, call-overload]
    print(f"ended after {moments.count}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
