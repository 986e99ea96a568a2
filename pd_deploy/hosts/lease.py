"""Leases: one run at a time works on a deployment's hosts.

A lease is a file on each host, changed only under the host's own file lock and aged by the host's
own clock. It carries a number that counts up with every taking: before each change on a host the
run looks whether the lease there is still its own, so that a run that was paused and overtaken
changes nothing more.
"""

import asyncio
import contextlib
import json
import os
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from pd_deploy.errors import HostError, LeaseHeld, LeaseLost, PdDeployError
from pd_deploy.hosts.host import Host

POLL_S = 0.5
RENEWALS = 4
"""How often a lease is renewed in the time after which it would be given up for dead."""

# $1 directory, $2 verb, $3 token, $4 seconds after which a lease is dead, $5 token of an owner that
# is known to be gone. A lease is three lines: its number, its token (none when it was given back),
# and its owner as JSON.
SCRIPT = r"""
dir=$1; lease=$1/lease; token=$3
[ "$2" != take ] || mkdir -p "$dir" || exit 1
umask 077
[ -d "$dir" ] || { [ "$2" = release ] && exit 0; echo lost; exit 0; }
exec 9>>"$dir/.lease.lock" || exit 1
flock -w 20 9 || { echo "its file lock is held" >&2; exit 1; }
number=0; holder=; age=0
if [ -s "$lease" ]; then
  number=$(sed -n 1p "$lease"); holder=$(sed -n 2p "$lease")
  age=$(( $(date +%s) - $(stat -c %Y "$lease") ))
fi
put() {
  { printf '%s\n%s\n' "$number" "$1"; cat; } >"$dir/.lease.new" || return 1
  mv "$dir/.lease.new" "$lease"
}
case $2 in
take)
  if [ -n "$holder" ] && [ "$holder" != "$token" ] && [ "$holder" != "$5" ] && [ "$age" -lt "$4" ]
  then echo "held $age"; cat "$lease"; exit 0; fi
  dead=; [ -z "$holder" ] || [ "$holder" = "$token" ] || dead=$(sed -n 3p "$lease")
  number=$((number + 1)); put "$token" || exit 1
  echo "taken $number $dead"
  for other in "$dir"/../*/lease; do
    [ "$other" -ef "$lease" ] || [ ! -s "$other" ] || [ -z "$(sed -n 2p "$other")" ] || {
      echo "$(( $(date +%s) - $(stat -c %Y "$other") )) $(sed -n 3p "$other")"; }
  done ;;
renew)
  [ "$holder" = "$token" ] && touch "$lease" && echo kept && exit 0
  echo lost; cat "$lease" ;;
release) [ "$holder" != "$token" ] || put "" </dev/null ;;
esac
"""


class Owner(BaseModel):
    """Who holds a lease, and what it is going to use on the host.

    Attributes:
        deployment: name of the deployment.
        run: name of the run, and its address in the UI if there is one.
        flow_run: its id at the Prefect server.
        machine: the controller's host name and boot.
        pid: its process there, with its start time so that no other is taken for it.
        ports, devices: what the deployment uses on this host.
    """

    model_config = ConfigDict(frozen=True)

    deployment: str
    run: str
    machine: str
    pid: int
    started: str
    flow_run: str = ""
    ports: tuple[int, ...] = ()
    devices: tuple[int, ...] = ()


@dataclass(frozen=True)
class Other:
    """Another deployment's lease on the same host, and its age in seconds."""

    owner: Owner
    age: int


@dataclass
class Lease:
    """The leases of one run.

    Args:
        root: the deployment's directory on the hosts.
        owner: the run.
        lasts: seconds without renewal after which others take a lease for abandoned.

    Attributes:
        numbers: by host address, how often that lease was taken, this time included.
        others: by host address, the leases of other deployments that were found there.
        dead: runs that held one of the leases without renewing it.
        watchers: told when a lease is lost.
    """

    root: str
    owner: Owner
    lasts: float
    token: str = field(default_factory=lambda: secrets.token_hex(8))
    numbers: dict[str, int] = field(default_factory=dict)
    others: dict[str, list[Other]] = field(default_factory=dict)
    dead: set[Owner] = field(default_factory=set)
    watchers: list[Callable[[str], None]] = field(default_factory=list)
    lost: PdDeployError | None = None

    async def take(
        self,
        hosts: Sequence[tuple[Host, Owner]],
        wait: float,
        waiting: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Takes the lease of each host, in the order of their addresses, so that two runs can't
        hold one each and wait for the other.

        Args:
            hosts: each with what the run is going to use there.
            wait: seconds to wait for those that others hold.
            waiting: told once for whom it waits.

        Raises:
            LeaseHeld: another run holds one and does not give it back in time.
        """
        deadline = time.monotonic() + wait
        for host, claim in sorted(hosts, key=lambda pair: pair[0].address):
            if host.address not in self.numbers:
                await self._take(host, claim, deadline, waiting)

    async def check(self, host: Host) -> None:
        """Looks, before a change, whether the lease of a host is still this run's.

        Raises:
            LeaseLost: it is not.
        """
        if self.lost:
            raise self.lost
        content = (await host.read_file(f"{self.root}/lease") or b"").decode(errors="replace")
        lines = [*content.split("\n"), "", ""]
        if lines[:2] != [str(self.numbers.get(host.address)), self.token]:
            raise self._lose(host, lines[2])

    def forget(self, host: Host) -> None:
        """Renews a host's lease no longer: its file is about to be removed."""
        self.numbers.pop(host.address, None)

    @contextlib.asynccontextmanager
    async def held(self, hosts: Mapping[str, Host]) -> AsyncIterator[None]:
        """Renews the leases while the body runs, and gives them back at its end."""
        renewing = asyncio.ensure_future(self._renew(hosts))
        try:
            yield
        finally:
            renewing.cancel()
            await asyncio.gather(renewing, return_exceptions=True)
            await asyncio.shield(self.release(hosts))

    async def release(self, hosts: Mapping[str, Host]) -> None:
        """Gives back the leases taken; where that can't be done they die of age."""
        taken = [host for host in hosts.values() if host.address in self.numbers]
        await asyncio.gather(
            *(self._call(host, "release") for host in taken), return_exceptions=True
        )
        self.numbers.clear()

    async def _take(
        self, host: Host, claim: Owner, deadline: float, waiting: Callable[[str], None]
    ) -> None:
        gone, told = "", False
        while True:
            answer = await self._call(host, "take", gone, claim.model_dump_json())
            head, _, rest = answer.partition("\n")
            verb, _, number = head.partition(" ")
            if verb == "taken":
                number, _, dead = number.partition(" ")
                self.numbers[host.address] = int(number)
                self.dead.update(filter(None, [_owner(dead)]))
                self.others[host.address] = list(filter(None, map(_other, rest.splitlines())))
                return
            token, holder = rest.split("\n")[1], _owner(rest.split("\n")[2])
            if holder and token != gone and _is_gone(holder):
                gone = token
                continue
            message = _held(holder, int(number))
            if time.monotonic() > deadline:
                raise LeaseHeld(
                    message,
                    host=host.where,
                    hint="wait for it, or cancel it; a run that is dead is given up after "
                    f"{self.lasts:g} s",
                )
            if not told:
                waiting(f"host {host.where}: {message}; waiting for it")
                told = True
            await asyncio.sleep(POLL_S)

    async def _renew(self, hosts: Mapping[str, Host]) -> None:
        while True:
            await asyncio.sleep(self.lasts / RENEWALS)
            taken = [host for host in hosts.values() if host.address in self.numbers]
            answers = await asyncio.gather(
                *(self._call(host, "renew") for host in taken), return_exceptions=True
            )
            for host, answer in zip(taken, answers, strict=True):
                # A host out of reach changes nothing: nobody takes its lease without reaching it.
                if isinstance(answer, str) and answer.startswith("lost"):
                    self._lose(host, [*answer.split("\n"), "", "", ""][3])

    async def _call(self, host: Host, verb: str, gone: str = "", content: str = "") -> str:
        argv = ["sh", "-c", SCRIPT, "sh", self.root, verb, self.token, f"{self.lasts:.0f}", gone]
        done = await host.run(argv, input=f"{content}\n" if content else None, check=False)
        if done.exit_status:
            raise HostError(
                f"expected to {verb} the lease {self.root}/lease, found: {done.stderr.strip()}",
                host=host.where,
                hint="the SSH user needs a directory of its own: set `paths.state`",
            )
        return done.stdout

    def _lose(self, host: Host, content: str) -> PdDeployError:
        holder = _owner(content)
        self.lost = LeaseLost(
            f"expected this run's lease on {self.root}, found "
            + (f"that of {holder.run}" if holder else "none"),
            host=host.where,
            hint="this run was taken for dead and changes nothing more; look at that one",
        )
        for tell in self.watchers:
            tell(str(self.lost))
        return self.lost


def this_process() -> dict[str, Any]:
    """What tells this process from any other, for `Owner`."""
    return {"machine": _machine(), "pid": os.getpid(), "started": _started(os.getpid())}


def _held(holder: Owner | None, age: int) -> str:
    if holder is None:
        return "another run holds the deployment"
    return (
        f"{holder.run} works on {holder.deployment} (renewed {age} s ago, "
        f"from {holder.machine.split()[0]})"
    )


def _is_gone(holder: Owner) -> bool:
    """Whether the owner's process has provably ended: it was on this very machine and boot."""
    return holder.machine == _machine() and _started(holder.pid) != holder.started


def _machine() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id")
    namespace = Path("/proc/self/ns/pid")
    return f"{os.uname().nodename} {boot.read_text().strip()} {namespace.readlink()}"


def _started(pid: int) -> str:
    """When a process started, in clock ticks since boot; empty if it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]


def _owner(text: str) -> Owner | None:
    try:
        return Owner.model_validate(json.loads(text))
    except (ValueError, ValidationError):
        return None


def _other(line: str) -> Other | None:
    age, _, text = line.partition(" ")
    owner = _owner(text)
    return Other(owner, int(age)) if owner else None
