"""Parsing a registry's WWW-Authenticate headers: how to log in. Pure."""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

_CHALLENGE_PART = re.compile(
    r"""([\w!#$%&'*+.^`|~-]+)(?:\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,"]*)))?""", re.ASCII
)


class Challenge(NamedTuple):
    """One way to log in that a registry offers; the scheme is in lowercase."""

    scheme: str
    parameters: Mapping[str, str]


def parse_challenges(headers: Iterable[str]) -> list[Challenge]:
    """Parse the challenges in an answer's WWW-Authenticate headers, in their order."""
    challenges: list[Challenge] = []
    for header in headers:
        for match in _CHALLENGE_PART.finditer(header):
            name, quoted, bare = match.groups()
            if quoted is None and bare is None:
                challenges.append(Challenge(name.lower(), {}))
            elif challenges:
                value = bare if quoted is None else re.sub(r"\\(.)", r"\1", quoted)
                last = challenges[-1]
                challenges[-1] = last._replace(parameters={**last.parameters, name.lower(): value})
    return challenges
