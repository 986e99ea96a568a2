"""The past of a deployment on its hosts: reading it, and writing what is added to it."""

import contextlib
import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_serializer,
    model_serializer,
    model_validator,
)

from pd_deploy.config.models import Deployment
from pd_deploy.config.problems import problems_of
from pd_deploy.engines.base import HostFacts
from pd_deploy.errors import (
    DiskFull,
    FactsError,
    InvalidInput,
    NoSuchGeneration,
    TransientError,
)
from pd_deploy.hosts.files import File
from pd_deploy.hosts.host import Host
from pd_deploy.planning.plans import Plan
from pd_deploy.records import releases
from pd_deploy.records.releases import PLAN, RECORD, RELEASE, History, Record, Release
from pd_deploy.steps.retry import retried

T = TypeVar("T", bound=BaseModel)

PRIVATE = 0o600
# Names and contents come ended by NUL, so that any content is safe.
READ = r"""cd "$1" 2>/dev/null || exit 0
for f in record.json */release.json; do
  [ ! -f "$f" ] || { printf '%s\0' "$f"; tr -d '\0' <"$f"; printf '\0'; }
done
for f in */plan.json .reserve; do [ ! -f "$f" ] || printf '%s\0\0' "$f"; done
for f in lease .lease.lock; do
  [ ! -f "$f" ] || { printf '%s\0' "$f"; head -n 1 "$f" | tr -d '\0\n'; printf '\0'; }
done
for d in */; do [ ! -d "$d" ] || printf '%s\0\0' "$d"; done"""
# Given up for the record when the disk is full: whoever makes room there has to write it.
RESERVE = ".reserve"
# Whose first line is the number of the lease.
LEASES = ("lease", ".lease.lock")
RESERVE_BYTES = 64 << 10


@dataclass(frozen=True)
class HostRecords:
    """What one host knows of a deployment's past.

    Attributes:
        generations: those of which anything is there.
        plans: those whose saved plan is there.
        reserve: whether it keeps room for the record.
        lease: the highest number that its lease is known to have had.
    """

    record: Record
    releases: tuple[Release, ...]
    generations: frozenset[str]
    plans: frozenset[str]
    reserve: bool
    lease: int = 0


class Saved(BaseModel):
    """All that brings a generation back: what the file said then, and the plan made of it.

    Attributes:
        facts: what the hosts said then, by name; empty if an older version has saved it.
    """

    model_config = ConfigDict(frozen=True)

    deployment: Deployment
    plan: Plan
    facts: dict[str, HostFacts] = {}

    @cached_property
    def content(self) -> bytes:
        """The file that has it, made once for all hosts."""
        return self.model_dump_json(indent=1).encode()

    @field_serializer("deployment")
    def _as_given(self, deployment: Deployment) -> dict[str, Any]:
        """Leave out what was not given: it has to come from the level below again."""
        return deployment.model_dump(mode="json", exclude_unset=True)

    @model_serializer(mode="wrap")
    def _with_each_text_once(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Every host has the merged ranktable, which grows with the hosts: keep it once."""
        document: dict[str, Any] = dump(self)
        numbers: dict[str, int] = {}
        for file in _ranktables(document):
            file["content"] = numbers.setdefault(file["content"], len(numbers))
        return {**document, "ranktables": list(numbers)}

    @model_validator(mode="before")
    @classmethod
    def _with_texts_in_place(cls, document: Any) -> Any:
        """Put each text where its number is; older versions saved it there."""
        if isinstance(document, dict) and "ranktables" in document:
            document = copy.deepcopy(document)
            texts = document.pop("ranktables")
            try:
                for file in _ranktables(document):
                    file["content"] = texts[file["content"]]
            except (AttributeError, LookupError, TypeError) as error:
                raise ValueError(
                    "expected each ranktable's number in the list of their texts"
                ) from error
        return document


def _ranktables(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """List the ranktables' files in a saved plan."""
    hosts = document["plan"]["hosts"].values()
    return [file for host in hosts for file in (host["ranktables"] or {}).get("files", [])]


def merged(by_host: Iterable[HostRecords]) -> History:
    """Merge what each host knows into one history."""
    all_records = list(by_host)
    return releases.merge(
        (records.record for records in all_records),
        (release for records in all_records for release in records.releases),
        (name for records in all_records for name in records.generations),
        max((records.lease for records in all_records), default=0),
    )


async def read(host: Host, root: str) -> HostRecords:
    """Read what a host knows of the deployment whose directory is `root`.

    Raises:
        FactsError: a file of ours there cannot be understood.
    """
    return parse(await host.output(command(root)), host, root)


def command(root: str) -> list[str]:
    """Make the command whose output `parse` takes."""
    return ["sh", "-c", READ, "sh", root]


def parse(output: str, host: Host, root: str) -> HostRecords:
    """Parse what a host knows of a deployment; see `read`."""
    parts = output.split("\0")[:-1]
    contents = dict(zip(parts[::2], parts[1::2], strict=True))
    record, releases = Record(), []
    for name, text in contents.items():
        path = f"{root}/{name}"
        if name == RECORD:
            record = _parse(Record, text, path, host)
        elif name.endswith(f"/{RELEASE}"):
            releases.append(_parse(Release, text, path, host))
    return HostRecords(
        record,
        tuple(releases),
        frozenset(name.rstrip("/") for name in contents if name.endswith("/")),
        frozenset(name.removesuffix(f"/{PLAN}") for name in contents if name.endswith(f"/{PLAN}")),
        RESERVE in contents,
        max(_number(contents.get(name, "")) for name in LEASES),
    )


def _number(text: str) -> int:
    return int(text) if text.isascii() and text.isdecimal() else 0


async def write_release(host: Host, root: str, release: Release, saved: Saved) -> list[str]:
    """Write a generation's own account of itself on a host; one that is there stays."""
    directory = f"{root}/{release.generation}"
    if await host.read_file(f"{directory}/{RELEASE}"):
        return []
    await host.write_files(_reserve(root))
    # The plan first: a release that can be read can be brought back.
    paths = []
    account = release.model_dump_json(indent=1).encode()
    for name, content in ((PLAN, saved.content), (RELEASE, account)):
        paths += await host.write_files({f"{directory}/{name}": File(content, PRIVATE)})
    return paths


async def write_record(host: Host, root: str, record: Record) -> None:
    """Write on a host what became of the releases; on a full disk into the room kept for it."""
    file = {f"{root}/{RECORD}": File(record.model_dump_json(indent=1).encode(), PRIVATE)}
    try:
        await host.write_files(file)
    except DiskFull:
        if not await host.remove_tree(f"{root}/{RESERVE}", below=root):
            raise
        await host.write_files(file)
        await keep_reserve(host, root)


async def keep_reserve(host: Host, root: str) -> None:
    """Keep room for the record on a host, if there is any left."""
    with contextlib.suppress(DiskFull):
        await host.write_files(_reserve(root))


def _reserve(root: str) -> dict[str, File]:
    return {f"{root}/{RESERVE}": File(bytes(RESERVE_BYTES), PRIVATE)}


async def load(hosts: Mapping[str, Host], root: str, generation: str) -> Saved:
    """Load a generation as it was saved, from whichever host has it.

    Raises:
        NoSuchGeneration: no host has it, or it was written by a version of pd-deploy whose files
            this one cannot read.
    """
    path, why = f"{root}/{generation}/{PLAN}", "no host has it"
    out_of_reach: TransientError | None = None
    for host in hosts.values():
        try:
            content = await retried(partial(host.read_file, path))
        except TransientError as fault:
            out_of_reach = fault
            continue
        if content is None:
            continue
        try:
            return Saved.model_validate_json(content)
        except (ValidationError, InvalidInput) as error:
            problems = error.problems if isinstance(error, InvalidInput) else None
            listed = problems or problems_of(error, Saved)  # type: ignore[arg-type]
            why = f"{path} on host {host.where} cannot be used: {listed[0]}"
    if out_of_reach:
        raise out_of_reach
    raise NoSuchGeneration(
        f"expected the saved generation {generation}, found that {why}",
        hint="`pd-deploy releases FILE` lists those that are kept",
    )


def _parse(model: type[T], text: str, path: str, host: Host) -> T:
    if not text:
        raise FactsError(
            f"expected {path} as pd-deploy wrote it, found that it is empty, or that this SSH user "
            "can't read it",
            host=host.where,
            hint="log in as the user by whom the service was deployed (`ssh.user`)",
        )
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        raise FactsError(
            f"expected {path} as pd-deploy wrote it, found {problems_of(error, model)[0]}",
            host=host.where,
            hint="another version of pd-deploy may have written it; move it away if it is damaged",
        ) from error
