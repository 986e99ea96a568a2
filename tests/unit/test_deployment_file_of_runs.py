"""Which files the parameter `file` of a run may name."""

from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from prefect.client.schemas.objects import FlowRun
from prefect.context import FlowRunContext

from pd_deploy.errors import InvalidInput
from pd_deploy.flows import deployment_file
from tests.unit import example

REFUSED = "file: expected a deployment file (.yaml) in the worker's directory or below it, found "


def load(file: object, *, by_a_worker: bool = True) -> Any:
    run = FlowRun(flow_id=uuid4(), deployment_id=uuid4() if by_a_worker else None)
    with FlowRunContext.model_construct(flow_run=run, parameters={}):
        return deployment_file.load(str(file))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A worker's directory, with a deployment file below it and one beside it."""
    text = f"extends: {example.FILE}\n"
    for name in ("work/deployments/x.yaml", "work/x.yml", "work/.env", "beside/x.yaml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "work/link.yaml").symlink_to(tmp_path / "beside/x.yaml")
    (tmp_path / "work/loop.yaml").symlink_to("loop.yaml")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


def test_deployment_files_in_the_workers_directory_are_read(place: Path) -> None:
    for file in ("deployments/x.yaml", "x.yml", "./deployments/../x.yml", place / "work/x.yml"):
        assert load(file).name == "qwq-3p1d"


@pytest.mark.parametrize(
    "file",
    [
        "../beside/x.yaml", "{0}/beside/x.yaml", "link.yaml", ".env", "", ".", "/", "/etc/passwd",
        "/dev/zero", "/dev/stdin", "/none.yaml", "../none.yaml", "a\0b.yaml", "~/x.yaml/..",
    ],
)  # fmt: skip
def test_nothing_else_is_opened_and_nobody_learns_whether_it_is_there(
    place: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    def opened(*_: object, **__: object) -> None:
        raise AssertionError("opened")

    monkeypatch.setattr(deployment_file, "load_deployment", opened)
    with pytest.raises(InvalidInput) as caught:
        load(file.format(place))
    assert REFUSED in str(caught.value)


@pytest.mark.parametrize("file", ["x" * 300 + ".yaml", "d/" * 3000 + "x.yaml", "loop.yaml"])
def test_a_name_that_no_file_can_have_is_told_as_such(place: Path, file: str) -> None:
    for by_a_worker in (True, False):
        with pytest.raises(InvalidInput):
            load(file, by_a_worker=by_a_worker)


def test_the_workers_own_configuration_allows_more(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(deployment_file.DIRECTORIES, f"/nowhere:{place}/beside")
    assert load("../beside/x.yaml").name == "qwq-3p1d"
    assert load("link.yaml").name == "qwq-3p1d"
    with pytest.raises(InvalidInput, match="PD_DEPLOY_DIRECTORIES of the worker allows"):
        load("../besides/x.yaml")


def test_at_a_prompt_any_file_may_be_given(place: Path) -> None:
    assert load(place / "beside/x.yaml", by_a_worker=False).name == "qwq-3p1d"


def test_images_in_files_lie_where_deployment_files_may(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "work/link.tar").symlink_to(place / "beside/x.yaml")
    file = place / "work/x.yml"
    for image, allowed in (("image.tar", True), ("../beside/i.tar", False), ("link.tar", False)):
        file.write_text(f"extends: {example.FILE}\nimage: file:{image}\n")
        assert load(file, by_a_worker=False).image == f"file:{(place / 'work' / image).resolve()}"
        if allowed:
            assert load(file).image == f"file:{place}/work/image.tar"
            continue
        with pytest.raises(InvalidInput, match="image: expected an image archive in the worker's"):
            load(file)
    monkeypatch.setenv(deployment_file.DIRECTORIES, str(place / "beside"))
    assert load(file).image == f"file:{place}/beside/x.yaml"
