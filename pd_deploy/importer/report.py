"""What became of each line of the imported files. Pure."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, NamedTuple

Kind = Literal[
    "problem",
    "not expressible",
    "unmapped",
    "secret",
    "changed",
    "preparation",
    "taken",
    "derived",
    "default",
    "implied",
]
MEANING: dict[Kind, str] = {
    "problem": "has to be answered or corrected before there is a deployment file",
    "not expressible": "pd-deploy has no such thing; what is lost is said",
    "unmapped": "not understood, and not in the deployment file: look at each",
    "secret": "left out; give it in a credentials block",
    "changed": "pd-deploy renders another value than the playbook",
    "preparation": "the playbook prepares the container so; pd-deploy does not",
    "taken": "is in the deployment file",
    "derived": "pd-deploy derives it from the topology",
    "default": "what the profile, the engine or the image has anyway",
    "implied": "pd-deploy does it in its own way",
}
WARNINGS: tuple[Kind, ...] = ("not expressible", "unmapped", "secret", "changed", "preparation")
HIDDEN = "(not shown: it may hold a secret)"

_SECRET_NAME = re.compile(
    r"(?i)(^|[^a-z])(pass|passw(or)?d|passphrase|secret|credentials?|apikey|token|auth|"
    r"(access|api|secret|private|encryption)[_-]?key)([^a-z]|$)|passw(or)?d"
)
_SECRET_VALUE = re.compile(
    r"://[^/\s@:]*:[^/\s@]*@|-----BEGIN|(?i:\bbearer\s+\S)|(?i:\bbasic\s+[a-z0-9+/]{8})|"
    r"\b(ghp|gho|glpat|hf|xox[abp])[_-]\w{16,}|\bsk-\w{16,}|\bAKIA[A-Z0-9]{12,}|"
    r"\beyJ[\w-]{10,}\.[\w-]{10,}"
)
_SECRET_COMMAND = re.compile(
    r"(?i)sshpass|\b(docker|helm|podman) login\b|\b(curl|wget)\b.*\s(-u|--user|-H|--header)\b"
)


class Place(NamedTuple):
    """A line of a file."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


class Entry(NamedTuple):
    """What became of a line: its kind, where it stands, what it says, and what that is now."""

    kind: Kind
    place: Place
    what: str
    note: str


@dataclass
class Report:
    """The entries, in the order in which they were made; the same one counts once."""

    entries: list[Entry] = field(default_factory=list)
    _seen: set[Entry] = field(default_factory=set)

    def add(self, kind: Kind, place: Place, what: str, note: str = "") -> None:
        """Enter what became of a line. Text that may hold a secret is not kept."""
        entry = Entry(kind, place, hidden(what), hidden(note, names=False))
        if entry not in self._seen:
            self._seen.add(entry)
            self.entries.append(entry)

    def of(self, *kinds: Kind) -> list[Entry]:
        """List the entries of some kinds."""
        return [entry for entry in self.entries if entry.kind in kinds]


def is_secret(name: str, value: object = "") -> bool:
    """Tell whether a name, or a value, looks like that of a password, key or token.

    Numbers and switches are none, but for a password's: `long-prefill-token-threshold` is a size.
    """
    text = str(value)
    if _SECRET_VALUE.search(text):
        return True
    harmless = re.fullmatch(r"[\d.]*|(?i:true|false|none|null)", text.strip())
    named = _SECRET_NAME.search(name)
    return bool(named) and (not harmless or bool(text and "pass" in name.lower()))


def hidden(text: str, *, names: bool = True) -> str:
    """Return a text for people, cut to one line, or a remark in place of one with a secret.

    Args:
        names: whether a name such as `password` in it means that a secret follows.
    """
    words = [word for word in re.split(r"[\s=:,\"'{}]+", text) if word]
    named = names and any(is_secret(name, value) for name, value in pairwise(words))
    if named or _SECRET_VALUE.search(text) or (names and _SECRET_COMMAND.search(text)):
        first = re.match(r"[\w./-]{1,40}(?=[\s=:]|$)", text.strip())
        return f"{first[0]} … {HIDDEN}" if first else HIDDEN
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= 400 else line[:397] + "..."


def written(report: Report) -> str:
    """Write the report: counts first, then every line, those that need somebody's eyes first."""
    counts = Counter(entry.kind for entry in report.entries)
    present = [kind for kind in MEANING if counts[kind]]
    lines = ["  ".join(f"{kind} {counts[kind]}" for kind in present) or "nothing to report"]
    for kind in present:
        lines += ["", f"{kind}: {MEANING[kind]}"]
        lines += _rows(sorted(report.of(kind), key=lambda entry: entry.place))
    return "\n".join(lines) + "\n"


def listed(report: Report, *kinds: Kind) -> str:
    """Write the entries of some kinds, a line each."""
    return "\n".join(_rows(report.of(*kinds)))


def counted(report: Report, kinds: Iterable[Kind]) -> str:
    """Write how many entries of some kinds there are, of those that there are any of."""
    counts = Counter(entry.kind for entry in report.entries)
    return ", ".join(f"{counts[kind]} {kind}" for kind in kinds if counts[kind]) or "none"


def _rows(entries: Iterable[Entry]) -> list[str]:
    return [
        f"  {entry.place}  {entry.what}" + (f"  → {entry.note}" if entry.note else "")
        for entry in entries
    ]
