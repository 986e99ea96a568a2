"""`pd-deploy metrics`: what Prometheus is to scrape, and the file in which it reads that."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pd_deploy.cli import metrics
from pd_deploy.cli.main import app
from pd_deploy.config.load import load_deployment, parse_deployment
from pd_deploy.config.models import Deployment
from pd_deploy.config.yaml_files import merge, read
from pd_deploy.errors import InvalidInput
from pd_deploy.flows import targets
from pd_deploy.flows.deploy import deploy
from pd_deploy.flows.teardown import teardown
from pd_deploy.planning import placement, scraping
from tests.memory.machine import Faults
from tests.memory.world import NAME, World
from tests.unit import example

FILES = sorted((example.ROOT / "deployments").glob("*.yaml"))
GPU = example.ROOT / "deployments/vllm-gpu-3p1d.yaml"
LABEL = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")


def proxies(deployment: Deployment) -> list[dict[str, Any]]:
    return [g for g in metrics.of_file(deployment) if g["labels"]["role"] == "proxy"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_server_is_a_target_that_its_labels_tell_from_all_others(path: Path) -> None:
    """Prometheus drops samples of targets that have the same labels."""
    deployment = load_deployment(path)
    groups = json.loads(scraping.text(metrics.of_file(deployment)))
    servers = [s for pod in placement.build(deployment).pods for s in pod.servers]
    targets = [t for g in groups if g["labels"]["role"] != "proxy" for t in g["targets"]]
    assert targets == servers
    assert len({json.dumps(group["labels"], sort_keys=True) for group in groups}) == len(groups)
    for group in groups:
        assert group["targets"] == [group["labels"]["server"]]
        assert group["labels"]["deployment"] == deployment.name
        for name, value in group["labels"].items():
            assert LABEL.fullmatch(name)
            assert isinstance(value, str)


def test_labels_say_what_a_server_is() -> None:
    assert metrics.of_file(example.service())[-1] == {
        "targets": ["10.0.0.2:9100"],
        "labels": {
            "deployment": "qwq-3p1d",
            "role": "decode",
            "instance": "d0",
            "host": "b",
            "server": "10.0.0.2:9100",
        },
    }


def test_omni_proxy_is_a_target_and_global_proxy_is_none() -> None:
    image = {"image": "omni:20251201_1"}  # of v0, which has both programs
    assert proxies(example.service(image)) == []
    omni = example.service(merge(image, {"proxy": {"c0": {"program": "omni"}}}))
    (group,) = proxies(omni)
    assert group["targets"] == ["10.0.0.1:7000"]
    assert group["labels"]["instance"] == "c0"
    assert group["labels"]["__metrics_path__"] == "/omni_proxy/metrics"


def test_the_router_is_a_target_where_it_can_be_reached() -> None:
    def gpu(**options: object) -> Deployment:
        return parse_deployment(merge(read(GPU), {"vllm": options}))

    assert proxies(gpu()) == []
    (group,) = proxies(gpu(router_metrics_open=True, router_metrics_port=29001))
    (proxy,) = gpu().proxy.values()
    address = gpu().hosts[proxy.host].address
    assert group["targets"] == [f"{address}:29001"]
    made = example.plan_of(GPU, {"vllm": {"router_metrics_open": True}})
    assert f"--prometheus-host {address} " in made.instance("c0").start_script.content
    closed = example.plan_of(GPU).instance("c0").start_script.content
    assert "--prometheus-host 127.0.0.1 " in closed


def test_what_serves_has_its_generation_and_the_ports_that_it_was_deployed_with(
    tmp_path: Path,
) -> None:
    world = World(tmp_path)
    deployment = load_deployment(world.path)
    assert world.asked(metrics._of_what_serves(deployment)) == ([], [])
    assert world.run(deploy).completed
    of_file = metrics.of_file(deployment)
    world.change(ports={"api": 9500})
    changed = load_deployment(world.path)
    assert metrics.of_file(changed) != of_file
    serving, _ = world.asked(metrics._of_what_serves(changed))
    assert {group["labels"].pop("generation") for group in serving} == {world.serving()}
    assert serving == of_file


def test_whoever_reads_the_file_gets_the_old_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if it can't be written to the end: then nothing is left beside it."""
    path = tmp_path / "qwq.json"
    command = ["metrics", str(example.FILE)]
    done = CliRunner().invoke(app, [*command, "--output", str(path)])
    assert (done.exit_code, done.stdout) == (0, f"wrote 4 targets to {path}\n")
    assert path.read_text() == CliRunner().invoke(app, command).stdout
    assert path.stat().st_mode & 0o777 == targets.READABLE
    held = path.open()
    metrics.write(path, [])
    assert len(json.load(held)) == 4
    assert path.read_text() == "[]\n"

    def full(draft: Path, _: int) -> None:
        assert not draft.match("*.json")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "chmod", full)
    with pytest.raises(InvalidInput, match=r"--output: .*qwq\.json cannot be written: No space"):
        metrics.write(path, [{}])
    assert [file.name for file in tmp_path.iterdir()] == ["qwq.json"]
    assert path.read_text() == "[]\n"


def test_a_directory_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"none/x\.json cannot be written: No such file"):
        metrics.write(tmp_path / "none" / "x.json", [])


class TestRuns:
    """With a directory for them, runs keep the targets as what serves is."""

    def written(self, directory: Path) -> set[str]:
        groups = json.loads((directory / f"{NAME}.json").read_text())
        return {group["labels"]["generation"] for group in groups}

    def test_the_targets_are_those_of_the_generation_that_serves(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        directory = tmp_path / "targets"
        directory.mkdir()
        monkeypatch.setenv(targets.DIRECTORY, str(directory))
        world = World(tmp_path)
        assert world.run(deploy).completed
        first = world.serving()
        assert self.written(directory) == {first}
        bad = world.push("20250724_1", {"d0": Faults(garbage=True)})
        assert world.run(deploy, image=bad).error
        assert self.written(directory) == {first}
        assert world.run(deploy, image=world.push("20250725_1")).completed
        assert self.written(directory) == {world.serving()} != {first}
        (directory / f"{NAME}.json").unlink()
        assert world.run(deploy).completed
        assert self.written(directory) == {world.serving()}
        assert world.run(teardown, name=NAME).completed
        assert not list(directory.iterdir())

    def test_a_directory_that_is_not_there_fails_no_run(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(targets.DIRECTORY, str(tmp_path / "none"))
        world = World(tmp_path)
        assert world.run(deploy).completed
        assert "none/qwq-3p1d.json of PD_DEPLOY_METRICS cannot be written" in targets._told(
            NAME, ""
        )
