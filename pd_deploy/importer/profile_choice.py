"""Choosing the profile that a deployment file begins with, and what the file then says itself. Pure
but for reading the profiles of the package.

A setting is a path, such as `("environment", "HCCL_BUFFSIZE")`, with a value.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pd_deploy.config import load, yaml_files
from pd_deploy.errors import InvalidInput, Problem
from pd_deploy.importer.source import Role, Server, common

PLAIN = "omniinfer"
"""The profile without any settings: everything is in the file."""

Path = tuple[str, ...]
Settings = dict[Path, Any]
_KEYS = {"engine", "devices_per_host", "model", "supports", "all", "prefill", "decode", "upstream"}


@dataclass(frozen=True)
class Choice:
    """A profile, with what a file on it has to say.

    Attributes:
        levels: settings of `all`, of a role, and of pods by their names.
        corrected: what the profile has in place of a value of upstream's files: role and path.
    """

    profile: str
    document: Mapping[str, Any]
    levels: Mapping[str, Settings]
    corrected: frozenset[tuple[Role, Path]]

    @property
    def cost(self) -> int:
        """The number of settings to write."""
        return sum(len(settings) for settings in self.levels.values())


def settings_of(server: Server) -> Settings:
    """Return a server's settings by path."""
    settings: Settings = {("environment", k): v for k, v in server.environment.items()}
    settings |= {("arguments", k): v for k, v in server.arguments.items()}
    settings |= dict(_flat(server.additional_config or {}, ("additional_config",)))
    settings |= {("gpu_memory_utilization",): server.gpu_memory_utilization}
    if server.tensor_parallel not in (None, len(server.devices)):
        settings["tensor_parallel",] = server.tensor_parallel
    return {path: value for path, value in settings.items() if value is not None}


def nested(settings: Settings) -> dict[str, Any]:
    """Return settings as the file has them."""
    result: dict[str, Any] = {}
    for path, value in settings.items():
        below = result
        for key in path[:-1]:
            below = below.setdefault(key, {})
        below[path[-1]] = value
    return result


def choose(pods: Mapping[str, Server], engine: str, profile: str | None, *, compat: bool) -> Choice:
    """Return the profile with which a file has the least to say, or what it has to say on a named
    one. Profiles that set variables which the source doesn't have can't be taken.

    Args:
        pods: the master of each pod, by the pod's name.
        compat: whether the file is to have upstream's values where a profile corrects them.

    Raises:
        InvalidInput: the named one can't be taken.
    """
    names = load.profiles() if profile is None else [profile]
    choices = [
        choice
        for name in names
        if (choice := _on(name, load.profile_document(name), pods, compat)) is not None
        and choice.document.get("engine") == engine
    ]
    if not choices and profile is not None:
        message = f"expected one that sets no variable which the files don't have, found {profile}"
        raise InvalidInput([Problem("--profile", message)])
    if not choices:
        return choose(pods, engine, PLAIN, compat=compat)
    return min(choices, key=lambda choice: (choice.cost, choice.profile != PLAIN))


def _on(
    name: str, document: Mapping[str, Any], pods: Mapping[str, Server], compat: bool
) -> Choice | None:
    if not set(document) <= _KEYS:
        return None
    corrected: set[tuple[Role, Path]] = set()
    needed: dict[str, Settings] = {}
    for pod, server in pods.items():
        upstream = _of_upstream(document, server.role)
        has = upstream if compat else _of_profile(document, server.role)
        target = settings_of(server)
        for path in {*has, *upstream}:
            if has.get(path) != upstream.get(path) and _same(target, upstream, path):
                corrected.add((server.role, path))
                target.pop(path, None)
                target |= {path: has[path]} if path in has else {}
        needed[pod] = {path: value for path, value in target.items() if has.get(path) != value}
        for path in has.keys() - target.keys():
            if path[0] == "environment":
                return None
            needed[pod][path] = False if path[0] == "arguments" else None
    return Choice(name, document, _levels(needed, pods), frozenset(corrected))


def _same(target: Settings, upstream: Settings, path: Path) -> bool:
    return target.get(path) == upstream.get(path)


def _of_profile(document: Mapping[str, Any], role: Role) -> Settings:
    merged = yaml_files.merge(document.get("all") or {}, document.get(role) or {})
    return {path: _as_given(path, value) for path, value in _flat(merged, ())}


def _of_upstream(document: Mapping[str, Any], role: Role) -> Settings:
    upstream = document.get("upstream") or {}
    below = {key: upstream[key] for key in ("all", role) if key in upstream}
    return _of_profile(yaml_files.merge(document, below), role)


def _as_given(path: Path, value: Any) -> Any:
    """Write a profile's value as scripts do: variables are text there."""
    return str(value) if path[0] == "environment" else value


def _flat(value: Mapping[str, Any], path: Path) -> Iterator[tuple[Path, Any]]:
    for key, below in value.items():
        if isinstance(below, Mapping) and below:
            yield from _flat(below, (*path, key))
        else:
            yield (*path, key), below


def _levels(needed: Mapping[str, Settings], pods: Mapping[str, Server]) -> dict[str, Settings]:
    """Put what all pods need into `all`, what all of a role need into the role, the rest into the
    pods."""
    levels: dict[str, Settings] = {"all": common(list(needed.values()))}
    for role in ("prefill", "decode"):
        of_role = [needed[pod] for pod, server in pods.items() if server.role == role]
        levels[role] = _without(common(of_role), levels["all"]) if of_role else {}
    for pod, settings in needed.items():
        above = {**levels["all"], **levels[pods[pod].role]}
        levels[pod] = _without(settings, above)
    return levels


def _without(settings: Mapping[Any, Any], others: Mapping[Any, Any]) -> Settings:
    return {path: value for path, value in settings.items() if path not in others}
