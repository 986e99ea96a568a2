"""Families of tags, and which build of a family is the newest (contract section 8.2). Pure.

    daily         20250722_26                     by date, then by the build's number
    branch-daily  master-202508191159-daily       of one branch, by time
    timestamp     202506272026                    by time
    date          20250611                        by date
    release       release_v0.4.2, release_v0.4.2_0926_2000
    release-timed release_1.2.1.post1-202607241407-vllm   of one engine, by version, then by time
    branch-engine master-202512022014-vllm, master-202601290115-daily_vllm
                                                  of one branch and engine, by time
    version       v0.23.0-a3, v0.23.0rc1-a3       of one suffix, as Python's versions are ordered
    pattern       what the user's regular expression matches, by its groups

Families are never mixed: a tag of another family, or with a further suffix (test, yes, RC1), is no
candidate. Digits in the place of a date or time must be a valid one.

Builds of a release have month, day and time in their tags, but no year. They are ordered by version
and then by this stamp, which is wrong for builds of one version made before and after New Year. The
bare tag is the final build, newer than all others of its version.
"""

import re
from collections.abc import Callable, Iterable
from datetime import date, datetime
from typing import Any, NamedTuple

from pd_deploy.config.fields import archive_of, split_image
from pd_deploy.config.models import Deployment, UpdatePolicy
from pd_deploy.engines.omniinfer.image_age import built
from pd_deploy.errors import InvalidInput, Problem

NEWEST = "newest"
"""Written instead of an image: use the newest one under the file's update policy."""
Key = tuple[Any, ...]
_TAG = r"\w[\w.-]{0,127}"
# The stamps of releases have no year; this one has a 29 February.
_ANY_YEAR = "2000"
_FORMS = {8: "%Y%m%d", 12: "%Y%m%d%H%M"}
_VERSION = re.compile(r"(?:release[_-])?v?(\d{1,5}(?:\.\d{1,5})+)(?!\d)", re.ASCII)
_RELEASES = frozenset({"release", "release-timed", "version"})  # others are builds by time


class _Family(NamedTuple):
    pattern: str
    key: Callable[[re.Match[str]], Key]
    """Raises ValueError if the digits are not a date."""


def newest_first(policy: UpdatePolicy, tags: Iterable[str]) -> list[str]:
    """Sort the tags that are builds under a policy, the newest first, each once.

    Tags of equal rank, such as 20250722_9 and 20250722_09, are sorted by their text.
    """
    keyed = {tag: key for tag in tags if (key := _key(policy, tag)) is not None}
    return sorted(keyed, key=lambda tag: (keyed[tag], tag), reverse=True)


def newer_of_other_forms(
    policy: UpdatePolicy, newest: str, all_tags: Iterable[str]
) -> tuple[str, ...]:
    """List the tags that are no builds under a policy but seem newer than its newest build, by a
    date or a version in them: whoever makes the builds may call them differently since.

    Left out are builds that are made beside those of the policy: of another branch, engine or
    suffix, and releases where the policy is for builds by time, or the other way round.
    """
    day, version = built(newest), _version(newest)
    others = (tag for tag in set(all_tags) if _key(policy, tag) is None)
    newer = [
        (built(tag) or date.min, _version(tag), tag)
        for tag in others
        if (day and (built(tag) or day) > day) or (version and _version(tag) > version)
    ]
    return tuple(tag for *_, tag in sorted(newer, reverse=True) if _may_follow(policy, tag))


def _may_follow(policy: UpdatePolicy, tag: str) -> bool:
    """Tell whether a tag may be a new name for the builds of a policy."""
    other = recognised(tag)
    if other is None:
        return True
    return (
        policy.family not in (other.family, "pattern")
        and (policy.family in _RELEASES) == (other.family in _RELEASES)
        and len({policy.branch, other.branch, None}) <= 2
        and len({policy.engine, other.engine, None}) <= 2
    )


def _version(tag: str) -> tuple[int, ...]:
    """Read the version that a tag begins with; return an empty one if it has none."""
    match = _VERSION.match(tag)
    return tuple(map(int, match[1].split("."))) if match else ()


def recognised(tag: str) -> UpdatePolicy | None:
    """Return the policy under which a tag is a build; None if no built-in family has it."""
    for name, family in _FAMILIES.items():
        match = _matched(family, tag)
        if match:
            return UpdatePolicy.model_validate({"family": name, **match.groupdict()})
    return None


def policy_of(deployment: Deployment) -> UpdatePolicy:
    """Return the file's update policy; without one, that of its tag's family.

    Raises:
        InvalidInput: the tag belongs to no family, or the image is in a file, which has no newer
            builds; the hint says what to write.
    """
    if archive_of(deployment.image):
        raise InvalidInput(
            [
                Problem(
                    "image",
                    "expected an image of a registry, of which newer builds can be "
                    "listed, found one in a file",
                )
            ],
            source=deployment.name,
            hint="name the next file with `--image file:PATH`, or in the deployment file",
        )
    if deployment.update:
        return deployment.update
    tag = split_image(deployment.image).tag
    policy = recognised(tag)
    if policy is None:
        image = f"the tag {tag}, which belongs to none" if tag else "only a digest"
        families = ", ".join(_FAMILIES)
        raise InvalidInput(
            [Problem("update", f"expected a family of tags, found {image}")],
            source=deployment.name,
            hint=f"set `update: {{family: NAME}}` with one of {families}, or "
            r"`update: {family: pattern, pattern: 'build-(\d+)'}`",
        )
    return policy


def described(policy: UpdatePolicy) -> str:
    """Describe a policy in messages."""
    details = (policy.branch, policy.engine, policy.suffix, policy.pattern)
    detail = ", ".join(filter(None, details))
    return f"{policy.family} ({detail})" if detail else policy.family


def rule_of(policy: UpdatePolicy) -> str:
    """Say by which rule a policy chooses."""
    return f"the newest build of family {described(policy)} that is not in quarantine"


def _key(policy: UpdatePolicy, tag: str) -> Key | None:
    """Return a tag's sort key; None if the tag is no candidate."""
    if not re.fullmatch(_TAG, tag, re.ASCII):
        return None
    if policy.pattern is not None:
        groups = re.fullmatch(policy.pattern, tag, re.ASCII)
        return _by_groups(groups, policy.order) if groups else None
    family = _FAMILIES[policy.family]
    match = _matched(family, tag)
    if match is None or any(getattr(policy, key) != of for key, of in match.groupdict().items()):
        return None
    return family.key(match)


def _matched(family: _Family, tag: str) -> re.Match[str] | None:
    match = re.fullmatch(family.pattern, tag, re.ASCII)
    try:
        return match if match and family.key(match) else None
    except ValueError:
        return None


def _by_groups(match: re.Match[str], order: Iterable[int | str]) -> Key:
    groups = order or range(1, match.re.groups + 1)
    return tuple(_by_text(match[group]) for group in groups)


def _by_text(text: str | None) -> Key:
    """Sort numbers by value, below other text; a group that took no part below both."""
    if text is None:
        return 0, 0, ""
    return (1, int(text), "") if text.isdigit() else (2, 0, text)


def _time(digits: str) -> datetime:
    return datetime.strptime(digits, _FORMS[len(digits)])


def _by_version(match: re.Match[str]) -> Key:
    major, minor, patch, stamp = match.groups()
    version = int(major), int(minor), int(patch)
    if stamp is None:
        return *version, 1, _time(_ANY_YEAR + "0101")
    return *version, 0, _time(_ANY_YEAR + stamp.replace("_", ""))


# A candidate comes before what it is a candidate for, a post-release after it.
_PHASES = {"a": 0, "b": 1, "rc": 2, None: 3}


def _by_python_version(match: re.Match[str]) -> Key:
    release, phase, number, post = match.group(1, 2, 3, 4)
    numbers = [int(part) for part in release.split(".")]
    while numbers and numbers[-1] == 0:  # 1.0 is 1.0.0
        numbers.pop()
    return tuple(numbers), _PHASES[phase], int(number or 0), int(post or -1)


_ENGINE = r"(?P<engine>(?!daily$)[a-z][a-z0-9]*)"
_FAMILIES = {
    name: _Family(pattern, key)
    for name, pattern, key in (
        ("daily", r"(\d{8})_(\d+)", lambda match: (_time(match[1]), int(match[2]))),
        (
            "branch-daily",
            r"(?P<branch>\w[\w.-]{0,99})-(\d{12})-daily",
            lambda match: (_time(match[2]),),
        ),
        ("timestamp", r"(\d{12})", lambda match: (_time(match[1]),)),
        ("date", r"(\d{8})", lambda match: (_time(match[1]),)),
        ("release", r"release_v(\d+)\.(\d+)\.(\d+)(?:_(\d{4}_\d{4}))?", _by_version),
        (
            "release-timed",
            r"release_v?(\d+)\.(\d+)\.(\d+)(?:\.post(\d+))?-(\d{8}|\d{12})-" + _ENGINE,
            lambda match: (*(int(part or -1) for part in match.groups()[:4]), _time(match[5])),
        ),
        (
            "branch-engine",
            r"(?P<branch>\w[\w.-]{0,99})-(\d{12})-(?:daily[-_])?" + _ENGINE,
            lambda match: (_time(match[2]),),
        ),
        (
            "version",
            r"v(\d+(?:\.\d+)+)(?:(a|b|rc)(\d+))?(?:\.post(\d+))?(?P<suffix>-\d{0,3}[a-z][\w.-]*)?",
            _by_python_version,
        ),
    )
}
