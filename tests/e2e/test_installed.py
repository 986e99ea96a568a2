"""The wheel in an environment and a directory of a user's own, away from the checkout."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import wheel as building


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the installed commands are."""
    directory = tmp_path_factory.mktemp("installed")
    building.copy_sources(directory / "pd-deploy")
    wheel = building.build(directory / "pd-deploy", directory / "wheel")
    return building.install(wheel, directory / "environment")


@pytest.mark.usefixtures("worker")
def test_prefect_deploys_from_a_users_directory(
    commands: Path, prefect_env: dict[str, str], prefect: Callable[..., str], tmp_path: Path
) -> None:
    def run(*argv: str) -> str:
        done = subprocess.run(
            [commands / argv[0], *argv[1:]],
            cwd=tmp_path,
            env=prefect_env,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
        return done.stdout

    where = run("python", "-c", "import pd_deploy.flows.deploy as flow; print(flow.__file__)")
    assert Path(where.strip()).is_relative_to(commands.parent)
    run("pd-deploy", "init", ".", "--example", "qwq-32b-a2")
    assert "The file is valid." in run("pd-deploy", "check", "qwq-32b-a2.yaml")
    run("python", "-m", "prefect", "--no-prompt", "deploy", "--all")
    shown = prefect("prefect", "deployment", "inspect", "pd-deploy/qwq-32b-a2", "-o", "json")
    made = json.loads(shown)
    assert made["entrypoint"] == "pd_deploy.flows.deploy.deploy"
    assert made["parameters"] == {"file": "qwq-32b-a2.yaml"}
    (pull,) = made["pull_steps"]
    assert list(pull.values()) == [{"directory": str(tmp_path)}]
