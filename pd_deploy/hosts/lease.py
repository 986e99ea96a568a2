"""Leases: one run at a time works on a deployment's hosts.

A lease is a file on each host, changed only under the host's own file lock. It carries a number
that counts up with every taking and never goes back: its lock file has it too, and other hosts'
numbers count as well, should somebody delete it. Before each change on a host the run looks whether
the lease there is still its own, so that a run that was paused and overtaken changes nothing more.

Its age counts from when it was last renewed, by the time since the host's start: a clock that is
set does not change it. It is written in place, into the one block that it has: that works on a full
disk, and a write that fails leaves what was there.
"""

import asyncio
import contextlib
import json
import os
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from pd_deploy.errors import HostError, LeaseHeld, LeaseLost, TransientError
from pd_deploy.hosts.concurrent import all_ended
from pd_deploy.hosts.files import disk_error
from pd_deploy.hosts.host import Host
from pd_deploy.hosts.processes import machine, started
from pd_deploy.hosts.settled import carried_out, settled

POLL_S = 0.5
RENEWALS = 4
"""How often a lease is renewed in the time after which it would be given up for dead."""

# $1 directory, $2 verb, $3 token, $4 after which time a lease is dead, $5 token of an owner that
# is known to be gone, $6 seconds to wait for the file lock, $7 the highest number elsewhere. A
# lease is four lines, filled up with NUL to one block: its number, its token (none when it was
# given back), its owner as JSON, and when it was renewed: which start of the host, and the time
# since then. Times are in 1/100 s.
SCRIPT = r"""
export LC_ALL=C
dir=$1; lease=$1/lease; token=$3
[ "$2" != take ] || mkdir -p "$dir" || exit 1
umask 077
[ -d "$dir" ] || { [ "$2" != renew ] || echo gone; exit 0; }
[ "$2" = look ] || exec 9>>"$dir/.lease.lock" || exit 1
[ "$2" = look ] || flock -w "$6" 9 || { echo "its file lock is held" >&2; exit 1; }
start=$(cat /proc/sys/kernel/random/boot_id)
read -r now rest </proc/uptime
now=${now%.*}${now#*.}; now=${now#0}; now=${now#0}
line() { sed -n "$2p" "$1" | tr -d '\0'; }
age() {
  renewed=$(line "$1" 4)
  since=${renewed#"$start "}
  if [ "$since" != "$renewed" ] && [ "$since" -le "$now" ]
  then echo $((now - since))
  else echo "$now"; fi
}
number=0; holder=; owner=
at_least() { case $1 in ''|*[!0-9]*) ;; *) [ "$number" -ge "$1" ] || number=$1 ;; esac; }
if [ -s "$lease" ]; then
  number=$(line "$lease" 1); holder=$(line "$lease" 2); owner=$(line "$lease" 3)
fi
show() { printf '%s\n' "$number" "$holder" "$owner"; }
put() {
  new=; [ -e "$lease" ] || new=1
  printf '%s\n' "$number" "$1" "$2" "$start $now" |
    dd of="$lease" bs=4096 count=1 iflag=fullblock conv="sync,notrunc$3" status=none && return
  [ -z "$new" ] || rm -f "$lease"
  return 1
}
case $2 in
take)
  if [ -n "$holder" ] && [ "$holder" != "$token" ] && [ "$holder" != "$5" ] &&
    [ "$(age "$lease")" -lt "$4" ]
  then echo "held $(($(age "$lease") / 100))"; show; exit 0; fi
  dead=; [ -z "$holder" ] || [ "$holder" = "$token" ] || dead=$owner
  at_least "$(line "$dir/.lease.lock" 1)"; at_least "$7"
  number=$((number + 1)); put "$token" "$(cat)" ,fsync || exit 1
  printf '%s\n' "$number" |
    dd of="$dir/.lease.lock" bs=4096 count=1 conv=sync,notrunc status=none 2>&-
  printf '%s\n' "taken $number $dead"
  for other in "$dir"/../*/lease; do
    [ "$other" -ef "$lease" ] || [ ! -s "$other" ] || [ -z "$(line "$other" 2)" ] ||
      printf '%s\n' "$(($(age "$other") / 100)) $(line "$other" 3)"
  done ;;
renew)
  if [ ! -s "$lease" ]; then echo gone
  elif [ "$holder" != "$token" ]; then echo lost; show
  else put "$token" "$owner" || exit 1; echo kept; fi ;;
release) [ "$holder" != "$token" ] || put "" "" ,fsync ;;
look) [ -z "$holder" ] || { echo "held $(($(age "$lease") / 100))"; show; } ;;
esac
"""
CALL_TIMEOUT_S = 60.0
RELEASE_TIMEOUT_S = 10.0


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


@dataclass(frozen=True)
class Holding:
    """A lease that is held: by whom, and the seconds since it was renewed."""

    owner: Owner | None
    age: int

    def __str__(self) -> str:
        return _held(self.owner, self.age)


def look_command(root: str) -> list[str]:
    """Make the command whose output `parse_look` takes; it changes nothing and waits for nobody."""
    return ["sh", "-c", SCRIPT, "sh", root, "look", "", "", "", "", ""]


def parse_look(output: str) -> Holding | None:
    """Parse who holds a lease; return None if nobody does."""
    head, _, rest = output.partition("\n")
    _, _, age = head.partition(" ")
    return Holding(_owner(_lines(rest)[2]), int(age)) if head else None


@dataclass
class Lease:
    """The leases of one run.

    Args:
        root: the deployment's directory on the hosts.
        owner: the run.
        floor: the highest number that a lease of the deployment is known to have had.
        lasts: seconds without renewal after which others take a lease for abandoned.

    Attributes:
        numbers: by host address, how often that lease was taken, this time included.
        others: by host address, the leases of other deployments that were found there.
        dead: runs that held one of the leases without renewing it.
        dead_token: of the leases of a run that is known to be gone.
        addresses_asked: addresses of hosts that were asked for theirs; it is given back there.
        watchers: told when a lease is lost.
        renewing: the task that renews the lease of each host.
    """

    root: str
    owner: Owner
    lasts: float
    floor: int = 0
    token: str = field(default_factory=lambda: secrets.token_hex(8))
    numbers: dict[str, int] = field(default_factory=dict)
    others: dict[str, list[Other]] = field(default_factory=dict)
    dead: set[Owner] = field(default_factory=set)
    dead_token: str = ""
    addresses_asked: set[str] = field(default_factory=set)
    watchers: list[Callable[[str], None]] = field(default_factory=list)
    lost: LeaseLost | None = None
    renewing: "dict[Host, asyncio.Task[None]]" = field(default_factory=dict)

    async def take(
        self,
        hosts: Sequence[tuple[Host, Owner]],
        wait: float,
        waiting: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Take the lease of each host.

        Who waits for one holds only those that come before it in the order of addresses, so two
        runs can't hold one each and wait for the other. All that come after it are asked for at
        once.

        Args:
            hosts: each with what the run is going to use there.
            wait: seconds to wait for those that others hold.
            waiting: told once for whom it waits.

        Raises:
            LeaseHeld: another run holds one and does not give it back in time.
        """
        deadline = time.monotonic() + wait
        in_order = sorted(hosts, key=lambda pair: pair[0].address)
        missing = [pair for pair in in_order if pair[0].address not in self.numbers]
        while missing:
            first, *others = missing
            await self._take(*first, deadline, waiting)
            held = await all_ended(settled(self._ask(*pair)) for pair in others)
            got = next((place for place, holding in enumerate(held) if holding), len(others))
            missing = others[got:]
            await all_ended(
                self._return(host) for host, _ in missing if host.address in self.numbers
            )

    async def check(self, host: Host) -> None:
        """Look, before a change, whether the lease of a host is still this run's.

        Raises:
            LeaseLost: it is not.
        """
        if self.lost:
            raise self.lost
        content = await host.read_file(f"{self.root}/lease")
        if content is None:
            raise self._lose(host, None)
        lines = _lines(content.decode(errors="replace"))
        if lines[:2] != [str(self.numbers.get(host.address)), self.token]:
            raise self._lose(host, lines[2])

    def forget(self, host: Host) -> None:
        """Renew a host's lease no longer: its file is about to be removed."""
        self.numbers.pop(host.address, None)
        self.addresses_asked.discard(host.address)

    @contextlib.asynccontextmanager
    async def held(self, hosts: Mapping[str, Host]) -> AsyncIterator[None]:
        """Renew the leases while the body runs, and give them back at its end.

        Each host has a task of its own: one that is slow keeps no other waiting.
        """
        self.renewing = {host: asyncio.ensure_future(self._keep(host)) for host in hosts.values()}
        try:
            yield
        finally:
            await carried_out(lambda: self._give_back(hosts))

    def renew_again(self) -> None:
        """Go on renewing where that was cancelled, as it is with everything on the event loop."""
        for host, task in self.renewing.items():
            if task.done() or task.cancelling():
                self.renewing[host] = asyncio.ensure_future(self._keep(host))

    async def release(self, hosts: Mapping[str, Host]) -> None:
        """Give back the leases taken; where that can't be done they die of age."""
        hosts_asked = [host for host in hosts.values() if host.address in self.addresses_asked]
        self.numbers.clear()
        await asyncio.gather(*map(self._return, hosts_asked), return_exceptions=True)
        self.addresses_asked.clear()

    async def _give_back(self, hosts: Mapping[str, Host]) -> None:
        for task in self.renewing.values():
            task.cancel()
        await asyncio.gather(*self.renewing.values(), return_exceptions=True)
        await self.release(hosts)

    async def _take(
        self, host: Host, claim: Owner, deadline: float, waiting: Callable[[str], None]
    ) -> None:
        logged = False
        while True:
            held = await settled(self._ask(host, claim))
            if held is None:
                return
            token, holder, age = held
            if holder and token != self.dead_token and _is_gone(holder):
                self.dead_token = token
                continue
            message = _held(holder, age)
            if time.monotonic() > deadline:
                raise LeaseHeld(
                    message,
                    host=host.where,
                    hint="wait for it, or cancel it; a dead run loses its lease after "
                    f"{self.lasts:g} s",
                )
            if not logged:
                waiting(f"host {host.where}: {message}; waiting for it")
                logged = True
            await asyncio.sleep(POLL_S)

    async def _ask(self, host: Host, claim: Owner) -> tuple[str, Owner | None, int] | None:
        """Take a host's lease unless another run holds it; that one's token, owner and age."""
        self.addresses_asked.add(host.address)
        answer = await self._call(host, "take", claim.model_dump_json())
        head, _, rest = answer.partition("\n")
        verb, _, number = head.partition(" ")
        if verb == "taken":
            number, _, dead = number.partition(" ")
            self.numbers[host.address] = int(number)
            self.dead.update(filter(None, [_owner(dead)]))
            self.others[host.address] = list(filter(None, map(_other, rest.splitlines())))
            return None
        _, token, owner, *_ = _lines(rest)
        return token, _owner(owner), int(number)

    async def _return(self, host: Host) -> None:
        """Give back the lease of a host."""
        self.numbers.pop(host.address, None)
        await self._call(host, "release", timeout=RELEASE_TIMEOUT_S)

    async def _keep(self, host: Host) -> None:
        """Renew a host's lease again and again.

        A call that takes too long is given up before the next one is due. A host out of reach
        changes nothing: nobody takes its lease without reaching it.
        """
        interval = self.lasts / RENEWALS
        due = time.monotonic()
        while True:
            due = max(due + interval, time.monotonic())
            await asyncio.sleep(due - time.monotonic())
            if host.address not in self.numbers:
                continue
            with contextlib.suppress(TransientError, HostError):
                answer = await self._call(host, "renew", timeout=interval * 0.8)
                verb, *held = _lines(answer)
                if verb in ("lost", "gone") and host.address in self.numbers:
                    self._lose(host, held[2] if verb == "lost" else None)

    async def _call(
        self,
        host: Host,
        verb: str,
        content: str = "",
        timeout: float = CALL_TIMEOUT_S,
    ) -> str:
        script = ["sh", "-c", SCRIPT, "sh", self.root, verb, self.token]
        arguments = [
            f"{self.lasts * 100:.0f}",
            self.dead_token,
            f"{timeout / 3:.2f}",
            f"{self.floor}",
        ]
        result = await host.run(
            [*script, *arguments],
            input=f"{content}\n" if content else None,
            check=False,
            timeout=timeout,
        )
        if result.exit_status:
            path, stderr = f"{self.root}/lease", result.stderr.strip()
            raise disk_error(stderr, path, host.where) or HostError(
                f"expected to {verb} the lease {path}, found: {stderr}",
                host=host.where,
                hint="the SSH user needs a directory that it can write to: set `paths.state`",
            )
        return result.stdout

    def _lose(self, host: Host, content: str | None) -> LeaseLost:
        """Note that a lease is another's now, or None if its file is gone."""
        holder = _owner(content) if content else None
        nobody = "none" if content is not None else "that somebody deleted the file"
        self.lost = LeaseLost(
            f"expected this run's lease {self.root}/lease, found "
            + (f"that of {holder.run}" if holder else nobody),
            is_overtaken=content is not None,
            host=host.where,
            hint="this run makes no more changes, because another run may be working there by now: "
            "check for one, then run again",
        )
        for tell in self.watchers:
            tell(str(self.lost))
        return self.lost


def this_process() -> dict[str, Any]:
    """Return what identifies this process, for `Owner`."""
    return {"machine": machine(), "pid": os.getpid(), "started": started(os.getpid())}


def _held(holder: Owner | None, age: int) -> str:
    if holder is None:
        return "another run holds the lease of the deployment"
    return (
        f"{holder.run} is working on {holder.deployment} (renewed {age} s ago, "
        f"from {holder.machine.split()[0]})"
    )


def _is_gone(holder: Owner) -> bool:
    """Tell whether the owner's process has provably ended: it was on this very machine and boot."""
    return holder.machine == machine() and started(holder.pid) != holder.started


def _lines(text: str) -> list[str]:
    """Split a lease into its lines; add empty ones for those that it lacks."""
    return [*text.split("\n"), "", "", "", ""]


def _owner(text: str) -> Owner | None:
    try:
        return Owner.model_validate(json.loads(text))
    except (ValueError, ValidationError):
        return None


def _other(line: str) -> Other | None:
    age, _, text = line.partition(" ")
    owner = _owner(text)
    return Other(owner, int(age)) if owner else None
