"""What differs between two states of a deployment file, and between what they make. Pure."""

import difflib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from pd_deploy.config.models import DERIVED, Deployment
from pd_deploy.planning.plans import HostPlan, Plan

NOT_SET = "(not set)"
# Of the present form of the file alone, or of every generation its own.
_INTERNAL = frozenset(DERIVED)
_OF_EACH = ("pd-deploy.generation", "pd-deploy.epoch")
_GENERATION = "GENERATION"


def of_files(before: Deployment, after: Deployment) -> dict[str, tuple[str, str]]:
    """List the keys whose values differ, with both, as JSON."""
    old, new = dict(_flat(_document(before))), dict(_flat(_document(after)))
    return {
        key: (old.get(key, NOT_SET), new.get(key, NOT_SET))
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    }


def of_plans(before: Plan, after: Plan) -> dict[str, list[str]]:
    """List what differs of each instance and of each host's ranktables, as lines that begin with
    `-` and `+`; generations' own names are left out."""
    old, new = _texts(before), _texts(after)
    return {
        name: changed
        for name in dict.fromkeys([*old, *new])
        if (changed := _changed(old.get(name, []), new.get(name, [])))
    }


def _document(deployment: Deployment) -> dict[str, Any]:
    return deployment.model_dump(mode="json", exclude=set(_INTERNAL))


def _flat(document: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in document.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _flat(value, f"{path}.")
        elif value not in (None, []):  # an empty list says as little as none
            yield path, json.dumps(value, ensure_ascii=False)


def _texts(plan: Plan) -> dict[str, list[str]]:
    """Write each part of a plan as lines, by name."""
    names = {plan.generation, plan.servers}
    return {
        name: [_without(line, names) for line in lines]
        for host_name, host in plan.hosts.items()
        for name, lines in _of_host(host_name, host)
    }


def _of_host(name: str, host: HostPlan) -> Iterator[tuple[str, list[str]]]:
    for instance_name, instance in host.instances.items():
        container = instance.container.model_dump(mode="json")
        for label in _OF_EACH:
            container["labels"].pop(label, None)
        lines = [f"{key}: {value}" for key, value in _flat(container)]
        script = instance.start_script.content.splitlines()
        yield f"{instance_name} on {name}", [*lines, *script]
    if host.ranktables:
        files = host.ranktables.files
        yield (
            f"ranktables on {name}",
            [f"{file.path}: {line}" for file in files for line in file.content.splitlines()],
        )


def _without(line: str, generations: set[str]) -> str:
    for generation in generations:
        line = line.replace(generation, _GENERATION)
    return line


def _changed(before: list[str], after: list[str]) -> list[str]:
    marked = difflib.unified_diff(before, after, lineterm="", n=0)
    return [line for line in marked if not line.startswith(("---", "+++", "@@"))]
