"""Values of the deployment file: their types, and the parsers behind them. Pure.

A parser raises ValueError saying what it expected; `problems` turns that into the file's words.
"""

import difflib
import json
import os
import re
import reprlib
from collections.abc import Mapping, Sequence
from ipaddress import IPv4Address, IPv4Network
from typing import Annotated, NamedTuple

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo

from pd_deploy.config.rule_names import ALLOWABLE, RULES

MAX_DEVICES = 64  # per host; A3 has 16, so this only stops a typo such as 0-9999 early
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}

Scalar = str | int | float | bool


class WrittenFloat(float):
    """A number that is written in another way than Python writes it; as text it would differ."""

    written: str


def parse_devices(value: object) -> tuple[int, ...]:
    """Parse device ids from `0-7`, `0,2,4-6`, `[0, 1]` or `3`, in the order given.

    Raises:
        ValueError: not numbers, a reversed range, a device twice, or an id of 64 and above.
    """
    if isinstance(value, bool):
        raise ValueError(f"expected device ids such as 0-7, found {value!r}")
    if isinstance(value, int):
        parts: Sequence[object] = [value]
    elif isinstance(value, str):
        parts = [part.strip() for part in value.split(",")]
    elif isinstance(value, list | tuple):
        parts = value
    else:
        raise ValueError(f"expected device ids such as 0-7, found {value!r}")
    devices = [device for part in parts for device in _device_range(part)]
    twice = sorted({d for d in devices if devices.count(d) > 1})
    if twice:
        raise ValueError(
            f"expected each device once, found {', '.join(map(str, twice))} more than once"
        )
    if not devices:
        raise ValueError("expected at least one device")
    return tuple(devices)


def parse_pod_devices(value: object) -> object:
    """Parse device ids, or a mapping of hosts to device ids; see `parse_devices`."""
    if isinstance(value, Mapping):
        odd = [host for host in value if not isinstance(host, str)]
        if odd:
            raise ValueError(f"expected hosts of the file, found {shown(odd[0])}")
        return {host: parse_devices(devices) for host, devices in value.items()}
    return parse_devices(value)


def parse_pod_port(value: object) -> object:
    """Parse a port, or a mapping of hosts to ports."""
    ports = value.values() if isinstance(value, Mapping) else (value,)
    for port in ports:
        if isinstance(port, bool) or not isinstance(port, int) or not 1 <= port <= 65535:
            raise ValueError(f"expected a port, or one for each host, found {shown(port)}")
    return value


def _device_range(part: object) -> range:
    match = re.fullmatch(r"(\d{1,4})(?:\s*-\s*(\d{1,4}))?", str(part), re.ASCII)
    if isinstance(part, bool) or not match:
        raise ValueError(f"expected device ids such as 0-7 or 0,1,2, found {part!r}")
    first, last = int(match[1]), int(match[2] or match[1])
    if last < first:
        raise ValueError(f"expected a range that runs upwards, {last}-{first}, found {part!r}")
    if last >= MAX_DEVICES:
        raise ValueError(f"expected device ids below {MAX_DEVICES}, found {last}")
    return range(first, last + 1)


def parse_size(value: object) -> int:
    """Parse bytes from `500g`, `64m`, `1024k` or a number of bytes."""
    match = re.fullmatch(r"(\d{1,15})([kmg]?)b?", str(value).strip().lower(), re.ASCII)
    if isinstance(value, bool) or not match:
        raise ValueError(f"expected a size such as 500g, found {value!r}")
    return int(match[1]) * _UNITS[match[2]]


def parse_mount(value: object) -> object:
    """Parse a mount from `/host/path`, `/host/path:/container/path` or the same with `:ro`."""
    if not isinstance(value, str):
        return value
    source, _, rest = value.partition(":")
    target, _, mode = rest.partition(":")
    if target in ("ro", "rw") and not mode:
        target, mode = "", target
    if mode not in ("", "ro", "rw"):
        raise ValueError(f"expected SOURCE[:TARGET][:ro], found {value!r}")
    return {"source": source, "target": target or source, "read_only": mode == "ro"}


def _absolute(value: str) -> str:
    if not value.startswith("/") or os.path.normpath(value) != value or value == "/":
        raise ValueError(
            f"expected an absolute path without '..' or a trailing '/', found {value!r}"
        )
    return value


def _ipv4(value: object) -> object:
    try:
        return str(IPv4Address(value)) if isinstance(value, str) else value
    except ValueError as error:
        raise ValueError(
            f"expected an IPv4 address (ranktables hold nothing else), found {value!r}"
        ) from error


# Networks that contain no host's address → what they are instead. The first match counts.
_NOT_OF_A_HOST = {
    IPv4Network("0.0.0.0/8"): "is not an address of a machine, but means any or all of them",
    IPv4Network("127.0.0.0/8"): "is a machine's own loopback, which no other machine can reach",
    IPv4Network("224.0.0.0/4"): "is a multicast address, for groups of machines",
    IPv4Network("255.255.255.255/32"): "is the broadcast address, for all machines of a network",
    IPv4Network("240.0.0.0/4"): "is reserved and belongs to no machine",
}


def _of_a_host(address: str) -> str:
    for network, meaning in _NOT_OF_A_HOST.items():
        if IPv4Address(address) in network:
            raise ValueError(
                f"expected the address at which the other hosts reach this one, found {address}, "
                f"which {meaning}"
            )
    return address


def parse_host(value: object) -> object:
    return {"address": value} if isinstance(value, str) else value


def like(pattern: str, expected: str) -> BeforeValidator:
    """Accept only text of a given form; `expected` describes the form to people."""

    def check(value: object) -> object:
        if not isinstance(value, str) or not re.fullmatch(pattern, value, re.ASCII):
            raise ValueError(f"expected {expected}, found {shown(value)}")
        return value

    return BeforeValidator(check)


def _scalar(value: object) -> object:
    if not isinstance(value, str | int | float):
        raise ValueError(f"expected text, a number, true or false, found {shown(value)}")
    if isinstance(value, WrittenFloat) and str(value) != value.written:
        raise ValueError(
            f"expected text in quotes ('{value.written}') or {value}, found {value.written}, which "
            f"would be given on as {value}"
        )
    if "\0" in str(value):
        raise ValueError(f"expected text without NUL characters, found {shown(value)}")
    return value


def without_login(pattern: str) -> BeforeValidator:
    """Refuse text in which `pattern` finds a user or password; the message never repeats it."""

    def check(value: object) -> object:
        if isinstance(value, str) and re.search(pattern, value):
            raise ValueError("expected no user or password in the file, found one (not shown)")
        return value

    return BeforeValidator(check)


def parse_json(value: object) -> object:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"expected values that JSON can hold, found one it can't: {error}"
        ) from error
    return value


def parse_kv_parallel_size(value: object) -> object:
    known = ("by-image", "prefill-pods-plus-one", "decode-tensor-parallel")
    number = isinstance(value, int) and not isinstance(value, bool) and value > 0
    if not number and value not in known:
        raise ValueError(f"expected {', '.join(known)} or a number, found {shown(value)}")
    return value


def parse_engine_id(value: object) -> object:
    number = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    if not number and value != "kv-rank":
        raise ValueError(f"expected kv-rank or a number of at least 0, found {shown(value)}")
    return value


def parse_rule(value: object) -> object:
    names = (*RULES, *ALLOWABLE)
    if not isinstance(value, str) or value not in names:
        near = difflib.get_close_matches(str(value), names, n=1)
        expected = f"did you mean {near[0]}?" if near else f"the rules are {', '.join(names)}"
        raise ValueError(f"expected the name of a rule, found {shown(value)}; {expected}")
    return value


def parse_group(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError(f"expected the name or number of a group, found {shown(value)}")
    return value


def require_with(
    info: ValidationInfo, families: Sequence[str], value: str | None, expected: str
) -> None:
    """Demand a key that only some families have where one is given, and refuse it elsewhere."""
    file_family = info.data.get("family")
    if file_family is None:
        return  # The family itself is wrong; one problem is enough.
    if file_family in families and value is None:
        raise ValueError(f"expected {expected}, because the family is {file_family}; found none")
    if file_family not in families and value is not None:
        raise ValueError(
            f"expected none, because the family is {file_family} and not {' or '.join(families)}, "
            f"found {shown(value)}"
        )


def compile_pattern(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern, re.ASCII)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(
            f"expected a regular expression, found {shown(pattern)} ({error})"
        ) from error


def parse_pattern(value: str | None) -> str | None:
    if value is not None:
        compile_pattern(value)
    return value


def parse_prompt_tokens(value: object) -> object:
    number = isinstance(value, int) and not isinstance(value, bool) and value > 0
    if value is not None and value != "limit" and not number:
        raise ValueError(f"expected `limit` or a number of tokens, found {shown(value)}")
    return value


def parse_code(value: object) -> object:
    if value == "image":
        return value
    if not isinstance(value, str) or not value.startswith("/"):
        raise ValueError(
            "expected `image` (the code in the image), an absolute path on the hosts, or "
            f"`{{source: …}}`, found {shown(value)}"
        )
    return _absolute(value)


_URL = r"[a-z][a-z0-9+.-]*://"
_GIT_URL = rf"({_URL}|[^/\s]+@[\w.-]+:)\S+"


def is_git_url(value: str) -> bool:
    """Tell whether a text is a repository's URL, not a path."""
    return bool(re.match(_GIT_URL, value))


def split_code_source(value: str) -> tuple[str, str]:
    """Split where source code is into a repository's URL and a commit; of a directory the second is
    empty."""
    url, at, commit = value.rpartition("@")
    is_url = at and re.fullmatch(_GIT_URL, url) and re.fullmatch(r"[0-9a-f]{40}", commit)
    return (url, commit) if is_url else (value, "")


def parse_code_source(value: object) -> object:
    if not isinstance(value, str) or not is_git_url(value):
        return value
    url = re.sub(r"@[0-9a-f]{40}$", "", value)
    if re.match(r"https?://[^/]*@|[a-z+]+://[^/@]*:[^/]*@|[^/@:]*:[^/@]*@", url):
        raise ValueError(
            "expected a URL without user and password, for which git has its own configuration; "
            "found one with them (not shown)"
        )
    if not re.match(r"(https?|git|ssh|file)://|[^/]*:(?!//)", value):
        raise ValueError(f"expected a URL by http, https, ssh, git or file, found {shown(value)}")
    if not split_code_source(value)[1]:
        raise ValueError(
            f"expected URL@COMMIT with all 40 digits of the commit, found {shown(value)}"
        )
    return value


def shown(value: object) -> str:
    """Write a value for a message, cut so that it stays on the message's line."""
    text = reprlib.repr(value)
    return text if len(text) < 80 else text[:77] + "..."


Name = Annotated[
    str,
    like(
        # Part of container names, labels, directories and artifact keys; 40 leaves room for all.
        r"[a-z0-9](?:[a-z0-9-]{0,38}[a-z0-9])?",
        "lowercase letters, digits and '-' (at most 40, no '-' at either end)",
    ),
]
Sha256 = Annotated[str, like(r"[0-9a-f]{64}", "64 hexadecimal digits, as sha256sum prints them")]
ContainerName = Annotated[
    str,
    like(
        r"[A-Za-z0-9][A-Za-z0-9_.-]{1,63}",  # Docker's own pattern, but for the length
        "letters, digits, '_', '.' and '-' (2 to 64, the first a letter or digit)",
    ),
]
Text = Annotated[
    str, like(r"(?s:[^\x00-\x1f\x7f]+)", "text, not empty and without control characters")
]
Word = Annotated[str, like(r"[^\x00-\x20\x7f]+", "text without spaces")]
FILE = "file:"
"""What an image begins with that is in a file of the controller's."""
TAG = r"[\w][\w.-]{0,127}"
Image = Annotated[
    str,
    like(
        rf"{FILE}/[^\s@]+|"
        rf"[^\s:@]([^\s@]*[^\s:@])?(:{TAG}|@sha256:[0-9a-f]{{64}})",
        "an image with a tag or a digest, NAME:TAG, NAME@sha256:… or both, or file:PATH",
    ),
]
_COMPONENT = r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*"
REPOSITORY = rf"{_COMPONENT}(?:/{_COMPONENT})*"  # a repository's path in its registry
_REPOSITORY_NAME = rf"(?:[A-Za-z0-9.-]+(?::\d{{1,5}})?/)?{REPOSITORY}"
AbsolutePath = Annotated[Text, AfterValidator(_absolute)]
Address = Annotated[str, BeforeValidator(_ipv4)]
HostAddress = Annotated[Address, AfterValidator(_of_a_host)]
Port = Annotated[int, Field(ge=1, le=65535, strict=True)]
PodDevices = Annotated[
    tuple[int, ...] | dict[str, tuple[int, ...]], BeforeValidator(parse_pod_devices)
]
PodPort = Annotated[int | dict[str, int], BeforeValidator(parse_pod_port)]
Seconds = Annotated[float, Field(gt=0, le=86400)]  # a day: more is milliseconds by mistake
Value = Annotated[Scalar, BeforeValidator(_scalar), without_login(r"://[^/@]*@")]
Environment = dict[
    Annotated[str, like(r"[A-Za-z_][A-Za-z0-9_]*", "letters, digits and '_'")], Value
]


Arguments = dict[
    Annotated[str, like(r"[a-z0-9][a-z0-9_-]*", "an option without its leading dashes")], Value
]


def split_registry(name: str) -> tuple[str, str]:
    """Split an image's name into the registry in front of it, empty if there is none, and the
    rest."""
    first, slash, rest = name.partition("/")
    if slash and ("." in first or ":" in first or first == "localhost"):
        return first, rest
    return "", name


def parse_repositories(value: object) -> tuple[str, ...]:
    """Parse the name of a repository, or a list of such names."""
    if value is None:
        return ()
    names = tuple(value) if isinstance(value, list | tuple) else (value,)
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(_REPOSITORY_NAME, name, re.ASCII):
            raise ValueError(
                "expected a repository without a tag, such as omni-ci/daily_omniinfer, found "
                + shown(name)
            )
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"expected each repository once, found {', '.join(twice)} more than once")
    return names


def archive_of(image: str) -> str | None:
    """Return the path of the archive that an image is in; None for one of a registry."""
    return image.removeprefix(FILE) if image.startswith(FILE) else None


class ImageParts(NamedTuple):
    """An image's name, and its tag and digest (`sha256:…`), each empty where it has none."""

    name: str
    tag: str
    digest: str


def split_image(image: str) -> ImageParts:
    """Take an image's reference apart. With both, the digest says which image it is, and the tag
    is what its author called it."""
    if image.startswith(FILE):
        return ImageParts(image, "", "")
    name, _, digest = image.partition("@")
    head, _, tag = name.rpartition(":")
    if not head or "/" in tag:
        return ImageParts(name, "", digest)
    return ImageParts(head, tag, digest)
