"""`pd-deploy config`: the resolved file, and the schema for editors."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from pd_deploy.cli import config
from pd_deploy.config import schema
from pd_deploy.config.load import load_deployment
from tests.unit import example
from tests.unit.test_docs import EXAMPLE, OF_ENGINES

FILES = sorted((example.ROOT / "deployments").glob("*.yaml"))
VALIDATOR = Draft202012Validator(schema.of_file())


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_resolved_file_is_the_same_deployment(file: Path, tmp_path: Path) -> None:
    deployment = load_deployment(file)
    text = config.resolved(deployment)
    resolved = tmp_path / file.name
    resolved.write_text(text)
    assert load_deployment(resolved) == deployment
    assert "extends" not in yaml.safe_load(text)


def test_what_the_profile_sets_is_told(tmp_path: Path) -> None:
    text = config.resolved(load_deployment(example.FILE))
    (head,) = [line for line in text.splitlines() if "those of profile qwq-32b-a3" in line]
    assert "#     arguments:" in text.partition(head)[2].splitlines()


def errors(document: Any) -> list[str]:
    return [error.json_path for error in VALIDATOR.iter_errors(document)]


def test_the_schema_is_one() -> None:
    Draft202012Validator.check_schema(schema.of_file())


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_schema_takes_all_examples(file: Path) -> None:
    assert errors(yaml.safe_load(file.read_text())) == []
    assert errors(yaml.safe_load(config.resolved(load_deployment(file)))) == []


def test_the_schema_takes_what_is_documented() -> None:
    assert EXAMPLE
    for text in (EXAMPLE[1], *OF_ENGINES):
        assert errors(yaml.safe_load(text)) == []


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"unknown": 1}, "$"),
        ({"engine": "trt"}, "$.engine"),
        ({"model": {"pth": "/x"}}, "$.model"),
        ({"keep": "many"}, "$.keep"),
        ({"profile_settings": {}}, "$"),
    ],
)
def test_the_schema_refuses_what_an_editor_should_mark(changes: Any, path: str) -> None:
    assert errors(changes) == [path]


def test_the_schema_lets_null_remove_a_key() -> None:
    assert errors({"prefill": {"p2": None}, "registry": None}) == []
