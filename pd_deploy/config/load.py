"""Reading a deployment file: merge it over its profile, and report all of its problems at once."""

import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pd_deploy.config import lines, yaml_files
from pd_deploy.config.fields import TAG, archive_of, shown, split_image
from pd_deploy.config.models import DERIVED, Deployment, InstanceEntry
from pd_deploy.config.problems import problems_of
from pd_deploy.errors import InvalidInput, Problem

PROFILES = Path(__file__).parent / "profiles"
# Keys of profiles that no deployment file may have.
_OF_PROFILES = (*DERIVED, "all", "upstream")


def load_deployment(path: Path, *, image: str | None = None) -> Deployment:
    """Load the deployment that a file describes, with `image` in place of the file's own if given.

    Args:
        image: a reference; a tag alone, of the repository that the file takes newer builds from;
            or `file:PATH`, relative to the deployment file.

    Raises:
        InvalidInput: all problems of the file, each with its line and the path of its key.
    """
    with naming_lines(path, image=image):
        document = yaml_files.read(path, names_file=("profile",))
        if image is not None:
            document["image"] = yaml_files.placed(_named(image, document), path.resolve())
        return parse_deployment(document, file=str(path))


def _named(image: str, document: Mapping[str, Any]) -> str:
    """Name the repository of a tag that is given alone."""
    policy = document.get("update")
    repository = policy.get("repository") if isinstance(policy, Mapping) else None
    of_file = document.get("image")
    if not repository and isinstance(of_file, str) and not archive_of(of_file):
        repository = split_image(of_file).name
    is_tag = re.fullmatch(TAG, image, re.ASCII)
    return f"{repository}:{image}" if is_tag and isinstance(repository, str) else image


def naming_lines(path: Path, *, image: str | None = None) -> AbstractContextManager[None]:
    """Name file and line in the problems that are found within.

    Args:
        path: the deployment file.
        image: what the deployment has in place of the file's own.
    """
    return lines.named(path, PROFILES, without=("image",) if image is not None else ())


def parse_deployment(document: Mapping[str, Any], *, file: str = "deployment") -> Deployment:
    """Build the deployment that a mapping describes; see `load_deployment`."""
    try:
        deployment = Deployment.model_validate(_on_profile(document, file))
    except ValidationError as error:
        raise InvalidInput(problems_of(error, Deployment), source=file) from error
    problems = list(_placed_on_unknown_hosts(deployment))
    if problems:
        raise InvalidInput(problems, source=file)
    return deployment


def profiles() -> list[str]:
    """List the names of the profiles that come with pd-deploy."""
    return sorted(path.stem for path in PROFILES.glob("*.yaml"))


def profile_document(name: str) -> Mapping[str, Any]:
    """Read a profile: one that comes with pd-deploy by its name, a user's own by its path.

    Raises:
        InvalidInput: there is none, or it can't be read.
    """
    return _profile(name, "--profile")


def _on_profile(document: Mapping[str, Any], file: str) -> dict[str, Any]:
    misplaced = [key for key in _OF_PROFILES if key in document]
    if misplaced:
        problems = [Problem(key, "is not a key of a deployment file") for key in misplaced]
        raise InvalidInput(problems, source=file)
    profile = dict(_profile(document.get("profile"), file))
    upstream = profile.pop("upstream", None)
    if document.get("compat") == "upstream":
        if not isinstance(upstream, Mapping):
            message = (
                "expected a profile with a section `upstream`, "
                f"found {document['profile']}, which has none"
            )
            raise InvalidInput([Problem("compat", message)], source=file)
        values = {key: value for key, value in upstream.items() if key != "source"}
        profile = yaml_files.merge(profile, values) | {"upstream_source": upstream.get("source")}
    settings = {key: profile.pop(key) for key in ("all", "prefill", "decode") if key in profile}
    allow = [*_listed(document, "allow"), *_listed(profile, "allow")]
    merged = yaml_files.merge(profile, document)
    if isinstance(merged.get("allow"), list):
        merged["allow"] = allow
    return {**merged, "profile_settings": settings}


def _listed(document: Mapping[str, Any], key: str) -> list[Any]:
    value = document.get(key)
    return value if isinstance(value, list) else []


def _profile(name: object, file: str) -> Mapping[str, Any]:
    """Read a profile: one that comes with pd-deploy by its name, a user's own by its path."""
    if isinstance(name, str) and name in profiles():
        return _shipped_profile(name)
    if not isinstance(name, str) or not yaml_files.is_path(name):
        expected = ", ".join(profiles())
        raise InvalidInput(
            [
                Problem(
                    "profile",
                    f"expected one of {expected}, or the path of a file such as ./my.yaml, "
                    f"found {shown(name)}",
                )
            ],
            source=file,
        )
    profile = yaml_files.read(Path(name), names_file=("profile",), named_by=("profile", file))
    base = profile.pop("profile", None)
    if base is None:
        return profile
    if base not in profiles():
        expected = f"expected one of {', '.join(profiles())}, found {shown(base)}"
        raise InvalidInput([Problem("profile", expected)], source=name)
    if isinstance(profile.get("upstream"), dict):
        profile["upstream"].setdefault("source", None)  # changed values are not the base's source
    return yaml_files.merge(_shipped_profile(base), profile)


@cache
def _shipped_profile(name: str) -> Mapping[str, Any]:
    """Read a profile of the package, once: it does not change."""
    return yaml_files.read(PROFILES / f"{name}.yaml")


def _placed_on_unknown_hosts(deployment: Deployment) -> Iterator[Problem]:
    hosts = ", ".join(deployment.hosts)
    placements = [
        (f"{group}.{name}.{'host' if entry.host else 'hosts'}", host)
        for group in ("prefill", "decode", "proxy")
        for name, entry in getattr(deployment, group).items()
        for host in (entry.on if isinstance(entry, InstanceEntry) else (entry.host,))
    ]
    for key, host in placements:
        if host not in deployment.hosts:
            yield Problem(key, f"expected one of the file's hosts ({hosts}), found {host}")
