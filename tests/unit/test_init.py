"""`pd-deploy init`: what a user's own directory is made of."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from pd_deploy.cli.init import examples, scaffold
from pd_deploy.config.load import load_deployment
from pd_deploy.errors import InvalidInput

ROOT = Path(__file__).resolve().parents[2]


def prefect_file(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load(path.read_text())
    return document


@pytest.mark.parametrize("example", examples())
def test_each_example_makes_a_directory_that_is_whole(tmp_path: Path, example: str) -> None:
    written = scaffold(tmp_path / "new/one", example)
    assert sorted((tmp_path / "new/one").iterdir()) == sorted(written)
    original = load_deployment(ROOT / "deployments" / f"{example}.yaml")
    assert load_deployment(written[0]) == original
    told = prefect_file(tmp_path / "new/one/prefect.yaml")["deployments"]
    kinds = ("", "-nightly", "-health", "-rollback", "-preflight", "-teardown", "-recover")
    assert [one["name"] for one in told] == [f"{example}{kind}" for kind in kinds]
    assert [one for one in told if one["tags"] != [example, original.engine]] == []
    assert {one["parameters"]["file"] for one in told} == {written[0].name}
    readme = (tmp_path / "new/one/README.md").read_text()
    assert f"pd-deploy check {written[0].name}" in readme
    assert f"credentials ssh {original.ssh.credentials} " in readme


def test_prefect_is_told_the_same_as_in_the_checkout(tmp_path: Path) -> None:
    """Besides where the file lies and what people read."""
    scaffold(tmp_path, "qwq-3p1d")
    made, ours = prefect_file(tmp_path / "prefect.yaml"), prefect_file(ROOT / "prefect.yaml")
    wanted = [one for one in ours["deployments"] if one["tags"][0] == "qwq-3p1d"]
    for one in (*wanted, *made["deployments"]):
        del one["tags"]
        one.pop("description", None)
        one["parameters"]["file"] = Path(one["parameters"]["file"]).name
    assert made["deployments"] == wanted


def test_what_exists_is_named_and_left_and_nothing_is_written(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "prefect.yaml").symlink_to("nowhere")
    with pytest.raises(InvalidInput) as refused:
        scaffold(tmp_path, "lab-qwq-3p1d")
    told = str(refused.value)
    assert f"{tmp_path}/README.md: exists already" in told
    assert f"{tmp_path}/prefect.yaml: exists already" in told
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "prefect.yaml"}
    assert (tmp_path / "README.md").read_text() == "mine"


def test_an_unknown_example_is_told_the_known(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"--example: expected one of .*qwq-3p1d.*, found x"):
        scaffold(tmp_path, "x")


def test_a_directory_that_cannot_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InvalidInput, match=r"file/qwq-3p1d\.yaml: cannot be written: "):
        scaffold(tmp_path / "file", "qwq-3p1d")
