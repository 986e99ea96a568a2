"""Many small commands in one session of a host, some side by side. Pure.

Each is a plain command, so anybody can run it by hand, and a capture of what it prints can stand
for the host. One that is missing, fails or hangs is no error: what it printed says so.
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Argv = Sequence[str]
Lane = Sequence[Argv]
"""Commands that run one after the other."""

LIMIT_S = 20
"""How long a lane may take; a device that hangs keeps its tool waiting for ever."""

# One lane: each command, what it prints, and how it ends.
RUN = r"""while IFS= read -r command; do
  printf '\036%s\n' "$command"
  eval "$command" </dev/null 2>&1
  printf '\n\036=%s\n' "$?"
done <<END
$1
END"""
# $1 is the limit, $2 what runs a lane, $3 the last lane, $4 the first. The others run beside that
# and print little enough to be written at once, so that nothing comes in between: a pipe takes 4096
# bytes.
BATCH = r"""limit=$1; run=$2; last=$3; first=$4; shift 4
for lane; do
  (printed=$(timeout -k 1 "$limit" sh -c "$run" sh "$lane"); printf '%.4000s\n' "$printed") &
done
printed=$(timeout -k 1 "$limit" sh -c "$run" sh "$first")
wait
printf '%s\n' "$printed"
if [ "$last" ]; then timeout -k 1 "$limit" sh -c "$run" sh "$last"; fi"""


@dataclass(frozen=True)
class Printed:
    """What a command printed, on both streams.

    Attributes:
        exit_status: None if it was cut, because it took too long or printed too much.
    """

    text: str
    exit_status: int | None = 0

    @property
    def shown(self) -> str:
        """It in a few words, for messages."""
        words = " ".join(self.text.split())
        if not words:
            return "nothing" if self.exit_status is not None else "nothing in time"
        return repr(words if len(words) <= 120 else f"{words[:120]} …")


Batch = Mapping[str, Printed]
"""By command, as a shell writes it."""


def command(
    first: Lane, lanes: Sequence[Lane] = (), limit: float = LIMIT_S, last: Lane = ()
) -> list[str]:
    """Make the command that runs lanes side by side; what those after the first print is cut at
    4000 characters each.

    Args:
        last: runs when all others have ended.
    """
    lanes = [last, first, *filter(None, lanes)]
    if any("\n" in word for lane in lanes for argv in lane for word in argv):
        raise ValueError("a command of a batch has to be one line")
    texts = ["\n".join(map(shlex.join, lane)) for lane in lanes]
    return ["sh", "-c", BATCH, "sh", f"{limit:g}", RUN, *texts]


def parse(output: str) -> dict[str, Printed]:
    """Parse what such a command printed."""
    printed: dict[str, Printed] = {}
    for section in re.split(r"^\x1e(?!=)", output, flags=re.MULTILINE)[1:]:
        name, _, rest = section.partition("\n")
        text, mark, status = rest.partition("\n\x1e=")
        status = status.strip()
        ended = int(status) if mark and status.isdecimal() else None
        printed[name] = Printed(text, ended)
    return printed


def of(batch: Batch, argv: Argv) -> Printed:
    """Return what a command printed; nothing in time, if it did not get that far."""
    return batch.get(shlex.join(argv), Printed("", None))
