"""What a machine is like: its clock, memory, network and processors, and the files of a model.
Pure.
"""

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field

from pd_deploy.hosts import facts
from pd_deploy.hosts.batch import Argv, Batch, Lane, Printed, of

DATE = ["date", "+%s.%N"]
DATE_LAST = ["date", "-u", "+%s.%N"]
"""To be asked after all else, so that a clock is known as well as the way there and back allows,
however long a machine's tools take."""
_SECONDS = r"^(\d+(?:\.\d+)?)$"
MEMORY = ["cat", "/proc/meminfo"]
SHARED_MEMORY = ["df", "-P", "-k", "/dev/shm"]  # noqa: S108 - looked at, not written to
_FREQUENCY = "/sys/devices/system/cpu/cpu0/cpufreq"
GOVERNOR = ["cat", f"{_FREQUENCY}/scaling_driver", f"{_FREQUENCY}/scaling_governor"]
COMMANDS: Lane = (DATE, MEMORY, SHARED_MEMORY, GOVERNOR, facts.ADDRESSES)

SMALL = "4096k"
"""Files up to this size are compared by content in every check, larger ones by size."""
# Hidden directories have what downloaded the model, and nothing that an engine reads.
_PASSED_OVER = ["(", "-name", ".*", "-o", "-name", "__pycache__", ")", "-prune", "-o"]


@dataclass(frozen=True)
class Machine:
    """A machine's facts; None where it did not tell them.

    Attributes:
        first, last: its clock, in seconds, as it was asked first and last.
        memory, available: in bytes.
        huge_pages: the memory that is kept for them, in bytes.
        shared_memory: what /dev/shm takes of the memory, in bytes.
        mtu: of the interface that owns its address.
        governor: how the first processor chooses its frequency, and for which driver.
        unread: what commands printed that nobody understands.
    """

    first: float | None = None
    last: float | None = None
    memory: int | None = None
    available: int | None = None
    huge_pages: int | None = None
    shared_memory: int | None = None
    mtu: int | None = None
    governor: tuple[str, str] | None = None
    unread: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelFiles:
    """The files of a model's directory, by their path in it, but hidden ones.

    Attributes:
        sizes: in bytes.
        digests: sha256 of small files.
        unread: what was printed that is no file.
    """

    sizes: Mapping[str, int] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)
    unread: tuple[str, ...] = ()


def parse(batch: Batch, address: str) -> Machine:
    """Parse what `COMMANDS` and `DATE_LAST` printed on the machine with an address."""
    unread: list[str] = []

    def read(argv: Argv, pattern: str) -> re.Match[str] | None:
        printed = of(batch, argv)
        match = re.search(pattern, printed.text, re.MULTILINE)
        if not match:
            unread.append(not_read(argv, printed))
        return match

    memory = _meminfo(of(batch, MEMORY).text)
    if "MemTotal" not in memory:
        unread.append(not_read(MEMORY, of(batch, MEMORY)))
    first = read(DATE, _SECONDS)
    last = re.search(_SECONDS, of(batch, DATE_LAST).text, re.MULTILINE)  # a capture has none
    shared = read(SHARED_MEMORY, r"\s\d+\s+(\d+)\s+\d+\s+\d+%\s")
    # Virtual machines and containers have no such files.
    governor = re.match(r"(\S+)\n(\S+)$", of(batch, GOVERNOR).text.strip())
    mtu = _mtu(of(batch, facts.ADDRESSES), address)
    if mtu is None:
        unread.append(not_read(facts.ADDRESSES, of(batch, facts.ADDRESSES)))
    return Machine(
        first=float(first[1]) if first else None,
        last=float(last[1]) if last else None,
        memory=memory.get("MemTotal"),
        available=memory.get("MemAvailable"),
        huge_pages=memory.get("HugePages_Total", 0) // 1024 * memory.get("Hugepagesize", 0),
        shared_memory=int(shared[1]) * 1024 if shared else None,
        mtu=mtu,
        governor=(governor[2], governor[1]) if governor else None,
        unread=tuple(unread),
    )


def model_commands(directory: str) -> Lane:
    """List the commands that tell the files of a model's directory; links are followed."""
    files = _files(directory)
    return (
        [*files, "-printf", "%s %P\\n"],
        [*files, "-size", f"-{SMALL}", "-exec", "sha256sum", "{}", "+"],
    )


def parts_command(directory: str) -> Argv:
    """Make the command that prints digests of the first and the last MiB of each large file."""
    return [*_files(directory), "-size", f"+{SMALL}", "-exec", "sh", "-c", _PARTS, "sh", "{}", "+"]


_PARTS = (
    'for file; do digest=$({ head -c 1048576 "$file"; tail -c 1048576 "$file"; } | sha256sum); '
    'printf \'%s  %s\\n\' "${digest%% *}" "$file"; done'
)


def _files(directory: str) -> list[str]:
    return ["find", "-L", f"{directory}/", "-mindepth", "1", *_PASSED_OVER, "-type", "f"]


def parse_model(batch: Batch, directory: str) -> ModelFiles:
    """Parse what `model_commands` printed."""
    listing, hashing = model_commands(directory)
    printed = of(batch, listing)
    sizes: dict[str, int] = {}
    unread = []
    for line in printed.text.splitlines():
        size, _, path = line.partition(" ")
        if size.isdecimal() and path:
            sizes[path] = int(size)
        elif line:
            unread.append(line)
    if not sizes or printed.exit_status is None:
        # Half a list would differ from that of every other host.
        return ModelFiles(unread=(not_read(listing, printed),))
    return ModelFiles(sizes, parse_digests(of(batch, hashing).text, directory), tuple(unread[:3]))


def parse_digests(output: str, directory: str) -> dict[str, str]:
    """Parse digests of files in a directory, as `sha256sum` prints them, by their path in it."""
    found = re.findall(r"^([0-9a-f]{64}) [ *](.+)$", output, re.MULTILINE)
    return {path.removeprefix(directory).lstrip("/"): digest for digest, path in found}


def not_read(argv: Argv, printed: Printed) -> str:
    """Say that what a command printed can't be read."""
    return f"`{shlex.join(argv)}` printed {printed.shown}"


def _meminfo(text: str) -> dict[str, int]:
    """Parse /proc/meminfo, in bytes; counts are multiplied as well."""
    found = re.findall(r"^(\w+):\s+(\d+)", text, re.MULTILINE)
    return {name: int(number) * 1024 for name, number in found}


def _mtu(printed: Printed, address: str) -> int | None:
    try:
        for interface in json.loads(printed.text):
            if any(info.get("local") == address for info in interface.get("addr_info", [])):
                return int(interface["mtu"])
    except (ValueError, TypeError, KeyError, AttributeError):
        pass
    return None
