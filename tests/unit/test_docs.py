"""The documentation says what is so."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from pd_deploy.config import yaml_files
from pd_deploy.config.load import parse_deployment
from pd_deploy.config.models import Deployment
from pd_deploy.config.rule_names import RULES
from pd_deploy.engines.omniinfer import corrections
from pd_deploy.hosts.container_values import ContainerSpec
from pd_deploy.planning import placement

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/deployment-file.md").read_text()
EXAMPLE = re.search(r"```yaml\n(.*?)```", PAGE, re.DOTALL)


VLLM = re.search(r"```yaml\n(vllm:\n.*?)```", PAGE, re.DOTALL)
# Of the containers' options, those that only the other engine uses have an example here.
EXAMPLES = {"container": {"gpus"}}


def documented() -> dict[str, Any]:
    assert EXAMPLE
    document: dict[str, Any] = yaml.safe_load(EXAMPLE[1])
    del document["extends"]
    return document


def documented_of_vllm() -> dict[str, Any]:
    assert VLLM
    document: dict[str, Any] = yaml.safe_load(VLLM[1])
    return document


def models(kind: type[BaseModel]) -> set[type[BaseModel]]:
    """The models below a model."""
    found = {kind}
    pending: list[Any] = [field.annotation for field in kind.model_fields.values()]
    while pending:
        one = pending.pop()
        if isinstance(one, type) and issubclass(one, BaseModel):
            found |= models(one)
        pending += getattr(one, "__args__", ())
    return found


def keys(document: object) -> set[str]:
    if isinstance(document, dict):
        return set(document).union(*(keys(value) for value in document.values()))
    if isinstance(document, list):
        return set[str]().union(*(keys(value) for value in document))
    return set()


def test_the_documented_file_is_valid() -> None:
    placement.build(parse_deployment(documented()))
    of_vllm = yaml_files.read(ROOT / "deployments/vllm-gpu-3p1d.yaml")
    placement.build(parse_deployment(of_vllm | documented_of_vllm()))


def test_every_key_is_documented() -> None:
    written = keys(documented()) | keys(documented_of_vllm()) | {"source", "target", "read_only"}
    fields = {field for model in models(Deployment) for field in model.model_fields}
    assert fields - written == {"profile_settings", "upstream_source"}


@pytest.mark.parametrize("section", ["supports", "ports", "paths", "container", "gates", "smoke"])
def test_documented_defaults_are_the_defaults(section: str) -> None:
    default = Deployment.model_fields[section].default
    given = {k: v for k, v in documented()[section].items() if k not in EXAMPLES.get(section, ())}
    assert type(default).model_validate(given) == default


def test_every_rule_is_documented_as_it_is() -> None:
    section = PAGE.partition("## Rules")[2]
    table = re.findall(r"^\| `([a-z-]+)` \| (.*) \|$", section, re.MULTILINE)
    assert dict(table) == RULES


def test_the_list_of_corrections_has_the_bounds_of_logs_that_containers_get() -> None:
    spec = ContainerSpec(name="x", image="x")
    (found,) = [c for c in corrections.CORRECTIONS if c.name == "log-rotation"]
    size = spec.log_max_size.replace("m", " MB")
    assert f"the last {spec.log_max_file} files of {size}" in found.ours


def test_the_list_of_corrections_names_each_once() -> None:
    names = [c.name for c in corrections.CORRECTIONS]
    assert sorted(set(names)) == sorted(names)


def test_the_list_of_corrections_is_the_one_in_code() -> None:
    page = (ROOT / "docs/corrections.md").read_text()
    assert page == corrections.as_markdown()
