"""The past of a deployment on its hosts: reading it, and writing what is added to it."""

import asyncio
import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
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
from pd_deploy.errors import FactsError, InvalidInput, NoSuchGeneration
from pd_deploy.hosts.files import File
from pd_deploy.hosts.host import Host
from pd_deploy.planning.plans import Plan
from pd_deploy.records import releases
from pd_deploy.records.releases import PLAN, RECORD, RELEASE, History, Record, Release

T = TypeVar("T", bound=BaseModel)

PRIVATE = 0o600
# Names and contents come ended by NUL, so that any content is safe.
READ = r"""cd "$1" 2>/dev/null || exit 0
for f in record.json */release.json; do
  [ ! -f "$f" ] || { printf '%s\0' "$f"; tr -d '\0' <"$f"; printf '\0'; }
done
for d in */; do [ ! -d "$d" ] || printf '%s\0\0' "$d"; done"""


@dataclass(frozen=True)
class HostRecords:
    """What one host knows of a deployment's past."""

    record: Record
    releases: tuple[Release, ...]
    generations: frozenset[str]


class Saved(BaseModel):
    """All that brings a generation back: what the file said then, and the plan made of it."""

    model_config = ConfigDict(frozen=True)

    deployment: Deployment
    plan: Plan

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
                raise ValueError("expected the ranktables by their numbers") from error
        return document


def _ranktables(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The ranktables' files in a saved plan."""
    hosts = document["plan"]["hosts"].values()
    return [file for host in hosts for file in (host["ranktables"] or {}).get("files", [])]


def merged(by_host: Iterable[HostRecords]) -> History:
    """Merge what each host knows into one history."""
    records = list(by_host)
    return releases.merge(
        (known.record for known in records),
        (release for known in records for release in known.releases),
        (name for known in records for name in known.generations),
    )


async def read(host: Host, root: str) -> HostRecords:
    """Read what a host knows of the deployment whose directory is `root`.

    Raises:
        FactsError: a file of ours there cannot be understood.
    """
    output = await host.output(["sh", "-c", READ, "sh", root])
    parts = output.split("\0")[:-1]
    contents = dict(zip(parts[::2], parts[1::2], strict=True))
    record, releases = Record(), []
    for name, text in contents.items():
        path = f"{root}/{name}"
        if name == RECORD:
            record = _parse(Record, text, path, host)
        elif name.endswith(f"/{RELEASE}"):
            releases.append(_parse(Release, text, path, host))
    names = frozenset(name.rstrip("/") for name in contents if name.endswith("/"))
    return HostRecords(record, tuple(releases), names)


async def write_release(host: Host, root: str, release: Release, saved: Saved) -> list[str]:
    """Write a generation's release and plan on a host; if they are there, they stay."""
    directory = f"{root}/{release.generation}"
    if await host.read_file(f"{directory}/{RELEASE}"):
        return []
    # The plan first: a release that can be read can be brought back.
    paths = []
    account = release.model_dump_json(indent=1).encode()
    for name, content in ((PLAN, saved.content), (RELEASE, account)):
        paths += await host.write_files({f"{directory}/{name}": File(content, PRIVATE)})
    return paths


async def write_record(first: Host, others: Iterable[Host], root: str, record: Record) -> None:
    """Write what became of the releases: on the first host, which counts, then on the others."""
    files_of_record = {f"{root}/{RECORD}": File(record.model_dump_json(indent=1).encode(), PRIVATE)}
    await first.write_files(files_of_record)
    await asyncio.gather(
        *(host.write_files(files_of_record) for host in others), return_exceptions=True
    )


async def load(hosts: Mapping[str, Host], root: str, generation: str) -> Saved:
    """Load a generation as it was saved, from whichever host has it.

    Raises:
        NoSuchGeneration: no host has it, or it was written by a version of pd-deploy whose files
            this one cannot read.
    """
    path, why = f"{root}/{generation}/{PLAN}", "no host has it"
    for host in hosts.values():
        content = await host.read_file(path)
        if content is None:
            continue
        try:
            return Saved.model_validate_json(content)
        except (ValidationError, InvalidInput) as error:
            problems = error.problems if isinstance(error, InvalidInput) else None
            listed = problems or problems_of(error, Saved)  # type: ignore[arg-type]
            why = f"{path} on host {host.where} cannot be used: {listed[0]}"
    raise NoSuchGeneration(
        f"expected the saved generation {generation}, found that {why}",
        hint="`pd-deploy releases FILE` lists those that are kept",
    )


def _parse(model: type[T], text: str, path: str, host: Host) -> T:
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        raise FactsError(
            f"expected {path} as pd-deploy wrote it, found {problems_of(error, model)[0]}",
            host=host.where,
            hint="another version of pd-deploy may have written it; move it away if it is damaged",
        ) from error
