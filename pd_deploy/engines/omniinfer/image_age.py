"""How old an image is, as far as its tag tells. Pure.

The engine's arguments changed their meaning over time, and nothing in a tag says which one an image
wants, but for when it was built. Tags are those of `pd_deploy.tags`, and any other with a date in
it: master-202512022014-vllm, release_v0.6.0-20251111.
"""

import re
from dataclasses import dataclass
from datetime import date, datetime

_FORMS = {8: "%Y%m%d", 12: "%Y%m%d%H%M"}
_DIGITS = re.compile(r"(?<!\d)(?:\d{12}|\d{8})(?!\d)", re.ASCII)
_RELEASE = re.compile(r"(?:release_v?|v)(\d+)\.(\d+)\.(\d+)(?!\d)", re.ASCII)
_PLAUSIBLE = range(2020, 2100)  # years; other digits are build numbers and the like


@dataclass(frozen=True)
class Change:
    """When images changed: those built on `day` or later, and releases from `version` on."""

    day: date
    version: tuple[int, int, int]


def built(tag: str) -> date | None:
    """Read the day in a tag; return None if there is none, or more than one."""
    of_tag = days(tag)
    return of_tag.pop() if len(of_tag) == 1 else None


def release(tag: str) -> tuple[int, int, int] | None:
    """Read the version in a release's tag, `release_v0.4.2` or `v1.0.0`, or with a suffix."""
    match = _RELEASE.match(tag)
    return (int(match[1]), int(match[2]), int(match[3])) if match else None


def since(tag: str, change: Change) -> bool | None:
    """Tell whether an image has a change, by the day in its tag and a release's version.

    None where the tag has neither, or they contradict each other.
    """
    answers = {day >= change.day for day in days(tag)}
    if version := release(tag):
        answers.add(version >= change.version)
    return answers.pop() if len(answers) == 1 else None


def days(tag: str) -> set[date]:
    """Read all days in a tag."""
    return {day for digits in _DIGITS.findall(tag) if (day := _day(digits))}


def _day(digits: str) -> date | None:
    try:
        day = datetime.strptime(digits, _FORMS[len(digits)]).date()
    except ValueError:
        return None
    return day if day.year in _PLAUSIBLE else None
