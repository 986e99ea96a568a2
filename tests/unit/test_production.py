"""deploy/: what its files say is what Prefect reads; it ignores a setting that it does not know."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect.settings import Settings
from pydantic import AliasChoices, BaseModel

from demo.production import FILES, settings
from demo.services import for_workers_elsewhere

ENVIRONMENTS = sorted(FILES.glob("*.env"))
UNITS = sorted(FILES.glob("*.service"))
OURS = {"DO_NOT_TRACK"}


def known(model: type[BaseModel]) -> Iterator[str]:
    """The names by which a settings model reads its values from the environment."""
    prefix = str(model.model_config.get("env_prefix", ""))
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from known(field.annotation)
        alias = field.validation_alias
        names = alias.choices if isinstance(alias, AliasChoices) else [prefix + name]
        yield from (str(choice).upper() for choice in names)


@pytest.fixture(scope="module")
def all_known() -> set[str]:
    """Those of Prefect and of what connects it with Redis, which takes long to load."""
    from prefect_redis.cleanup_queue import RedisWorkerCleanupQueueSettings
    from prefect_redis.client import RedisMessagingSettings

    models = (Settings, RedisMessagingSettings, RedisWorkerCleanupQueueSettings)
    return {name for model in models for name in known(model)} | {"PREFECT_SERVER_ENCRYPTION_KEY"}


@pytest.mark.parametrize("path", ENVIRONMENTS, ids=lambda path: path.name)
def test_each_setting_is_known_and_its_value_valid(
    path: Path, all_known: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    values = settings(path)
    assert values.keys() - OURS <= all_known
    for name in [name for name in os.environ if name.startswith("PREFECT_")]:
        monkeypatch.delenv(name)
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    Settings()


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_each_unit_reads_files_that_are_there(path: Path) -> None:
    named = re.findall(r"^EnvironmentFile=/etc/pd-deploy/(.*)$", path.read_text(), re.MULTILINE)
    assert named
    assert all((FILES / name).exists() for name in named)


@pytest.mark.parametrize("path", ENVIRONMENTS, ids=lambda path: path.name)
def test_no_secret_is_in_a_file(path: Path) -> None:
    for name, value in settings(path).items():
        if re.search("PASSWORD|AUTH_STRING|KEY", name):
            assert not value
        assert re.search(r"//[^/]*:(?!PASSWORD@)[^/]*@", value) is None


def test_what_a_new_directory_says_of_git_is_what_prefect_takes() -> None:
    text = (FILES.parent / "cli/scaffold/prefect.yaml").read_text()
    edited = for_workers_elsewhere(text, "ssh://git@example.org/x.git", "site-b")
    pull = edited.partition("pull:")[2].partition("\n\n")[0]
    assert pull.split() == [
        "-", "prefect.deployments.steps.git_clone:",
        "repository:", "ssh://git@example.org/x.git", "branch:", "main",
    ]  # fmt: skip
    assert "name: site-b" in edited
