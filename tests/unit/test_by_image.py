"""What is read from an image's files, and which contract follows from it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pd_deploy.engines.image_facts import QUESTIONS, ImageFacts, rows
from pd_deploy.engines.omniinfer import by_image, in_image
from pd_deploy.engines.omniinfer.in_image import MARK, look
from pd_deploy.engines.vllm import Vllm
from pd_deploy.errors import UnknownImage
from pd_deploy.hosts.host import Hosts
from pd_deploy.records.releases import Choice
from pd_deploy.steps import surveying
from pd_deploy.steps.session import Session
from pd_deploy.steps.surveying import ResolvedImage
from tests.memory import answers
from tests.unit import example

LAUNCHER = """
import argparse
parser = argparse.ArgumentParser()
parser.add_argument("--gpu-util", "--gpu-memory-utilization", type=float, help="--not one")
add = parser.add_argument
add("--tp", type=int)
command = ["vllm", "--port", str(8000)]
command.extend(["--load-format", "auto"])
"""
PROXY = """
while [ $# -gt 0 ]; do
    case "$1" in
        --listen-port) port=$2; shift 2 ;;
        -c | --core-num) cores=$2; shift 2 ;;
        --dry-run)
            dry=1 ;;
        *) echo "unknown $1, not --known)" ;;
    esac
done
"""
REGISTER = """
KVConnectorFactory.register_connector(
    "AscendHcclConnectorV1", ("a" if old else "b"), "LLMDataDistConnector")
_safe_register("CcConnector", "omni.cc", "CcConnector")
"""
CANN = "# version: 1.0\nruntime_running_version=[7.7.0.1.238:8.2.RC1]\n"
COMMIT = "0fb5786d" + "0" * 32


def tree(root: Path, **changes: str | None) -> Path:
    """An image's files; changes by path, `None` for what it lacks."""
    omni, packages = "workspace/omniinfer", "usr/lib/python3/dist-packages"
    files: dict[str, str | None] = {
        f"{omni}/tools/scripts/start_api_servers.py": LAUNCHER,
        f"{omni}/tests/start_api_servers.py": "",
        f"{omni}/omni/accelerators/sched/global_proxy/global_proxy.sh": PROXY,
        f"{omni}/tools/scripts/global_proxy.sh": 'exec bash ../global_proxy.sh "$@"',
        f"{omni}/omni/accelerators/pd/__init__.py": REGISTER,
        f"{omni}/omni/accelerators/pd/manager.py": "decode_tp_size = config.kv_parallel_size",
        f"{omni}/omni/accelerators/pd/table.py": 'NAME = "GLOBAL_RANK_TABLE_FILE_PATH"',
        f"{omni}/infer_engines/vllm/factory.py": 'register_connector("NixlConnector", "x")',
        f"{omni}/.git/HEAD": "ref: refs/heads/release",
        f"{omni}/.git/packed-refs": f"# pack\n{COMMIT} refs/heads/release\n",
        f"{packages}/vllm-0.9.0.dist-info/METADATA": "Name: vllm\nVersion: 0.9.0\n",
        f"{packages}/omni_infer-0.1.0.dist-info/METADATA": "Name: omni_infer\nVersion: 0.1.0\n",
        f"{packages}/numpy-1.26.dist-info/METADATA": "Name: numpy\nVersion: 1.26\n",
        "usr/local/Ascend/latest/version.cfg": CANN,
        "usr/local/nginx/modules/ngx_http_omni_proxy_module.so": "",
        **changes,
    }
    for path, content in files.items():
        if content is not None:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(content)
    nginx = root / "usr/local/nginx/nginx"
    nginx.write_text("#!/bin/sh\necho nginx version: nginx/1.24.0 --add-module=/x/lb_module >&2\n")
    nginx.chmod(0o755)
    return root


def test_an_image_is_read_from_its_files(tmp_path: Path) -> None:
    scripts = "/workspace/omniinfer/tools/scripts"
    assert look(tree(tmp_path)) == {
        "script_directory": scripts,
        "programs": {
            "start_api_servers.py": f"{scripts}/start_api_servers.py",
            "global_proxy.sh": f"{scripts}/global_proxy.sh",
        },
        "flags": {
            "start_api_servers.py": ["--gpu-memory-utilization", "--gpu-util", "--tp"],
            "global_proxy.sh": ["--core-num", "--dry-run", "--listen-port"],
        },
        "packages": {"omni-infer": "0.1.0", "vllm": "0.9.0", "CANN": "8.2.RC1"},
        "connectors": ["AscendHcclConnectorV1", "CcConnector"],
        "kv_parallel_size": "decode's tensor parallel size",
        "ranktables": True,
        "nginx": "1.24.0",
        "nginx_modules": ["lb_module", "ngx_http_omni_proxy_module"],
        "commit": COMMIT,
    }


def test_an_image_without_any_of_it_is_read_as_well(tmp_path: Path) -> None:
    said = look(tmp_path)
    assert not any(said.values())
    facts = ImageFacts.model_validate(said)
    assert {value for _, value in rows(facts)} == {"not known"}
    assert by_image.candidates(facts) == frozenset()


def test_scripts_of_the_newer_directory_come_first(tmp_path: Path) -> None:
    newer = "workspace/omniinfer/tools/deploy/start_server"
    root = tree(tmp_path, **{f"{newer}/start_api_servers.py": LAUNCHER})
    assert look(root)["script_directory"] == f"/{newer}"


def test_the_command_prints_the_answer_below_any_noise(tmp_path: Path) -> None:
    """As in a container, but on this machine: there is nothing of an engine here."""
    (tmp_path / ".bashrc").write_text("echo welcome\necho oh >&2\n")
    environment = {**os.environ, "HOME": str(tmp_path)}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    run = subprocess.run(
        by_image.probe_command(), capture_output=True, text=True, check=True, env=environment
    )
    assert run.stdout.startswith(MARK)
    facts = by_image.parse_probe(f"noise\n{run.stdout}\nnoise after it\n")
    assert facts.questions == QUESTIONS
    # An engine would say so on the standard error.
    assert run.stderr == ""


def test_what_is_sent_needs_nothing_of_ours() -> None:
    source = Path(in_image.__file__).read_text()
    assert "pd_deploy" not in source


def said(kind: str, **changes: Any) -> ImageFacts:
    """What an image of a kind says, with changes."""
    answer = json.loads(answers.of(kind).removeprefix(MARK))
    return ImageFacts.model_validate({**answer, **changes})


@pytest.mark.parametrize("kind", ["v0-early", "v0", "v1", "roles"])
def test_each_contract_is_known_by_what_its_images_say(kind: str) -> None:
    assert by_image.candidates(said(kind)) == {kind}


@pytest.mark.parametrize(
    ("facts", "possible"),
    [
        (said("unknown"), set()),
        (said("v0", programs={}), set()),
        (said("v0", programs={"start_api_servers.py": "/x"}), set()),
        (said("roles", programs={"start_api_servers.py": "/x", "global_proxy.sh": "/y"}), set()),
        (said("roles", connectors=["AscendHcclConnectorV1"]), set()),
        (said("by its tag"), {"v0", "v0-early"}),
        (said("v1", connectors=[]), {"v1"}),
        (said("v1", connectors=["LLMDataDistConnector", "AscendHcclConnectorV1"]), {"v1"}),
        (said("v0", connectors=["LLMDataDistConnector", "AscendHcclConnectorV1"]), {"v0"}),
        (said("v1", flags={}), {"v1"}),
        (said("v0", kv_parallel_size=None), {"v0", "v0-early"}),
    ],
    ids=[
        "a connector of later", "no launcher", "no proxy", "roles without omni_proxy",
        "roles with the old connector", "no sources", "renumbers, no sources",
        "both connectors, renumbers", "both connectors", "does not renumber", "no meaning",
    ],
)  # fmt: skip
def test_what_else_images_say(facts: ImageFacts, possible: set[str]) -> None:
    assert by_image.candidates(facts) == possible


@pytest.mark.parametrize(
    ("tag", "version", "contract"),
    [
        ("20250722_26", "0.7.1", "v0-early"),
        ("20260722_26", "0.3.0", "v0"),
        ("mine", "0.3.0", "v0-early"),
        ("mine", "0.7.1", "v0"),
        ("mine", "0.1.0", "by-image"),  # as the sources of all releases have it
    ],
)
def test_the_tag_decides_only_what_the_image_leaves_open_and_the_version_the_rest(
    tag: str, version: str, contract: str
) -> None:
    deployment = example.service({"image": f"r/o:{tag}"})
    facts = said("by its tag", packages={"omni-infer": version})
    assert by_image.for_image(deployment, facts).contract == contract
    assert by_image.for_image(deployment, said("v1")).contract == "v1"


def test_an_unknown_image_is_named_with_what_it_is() -> None:
    deployment = example.service({"image": "r/o:new"})
    with pytest.raises(UnknownImage, match=r"r/o:new with scripts in .*NextConnector.*vllm 0\.30"):
        by_image.for_image(deployment, said("unknown"))
    named = deployment.model_copy(update={"contract": "v1"})
    assert by_image.for_image(named, said("unknown")) is named


def test_builds_that_follow_two_contracts_are_refused_by_the_architectures_they_are_for() -> None:
    session = Session(example.service({}), Hosts())
    image = ResolvedImage(Choice("r/o:new", "sha256:1", "named by the run"), "r/o@sha256:1")
    expected = r"r/o:new to follow the same contract on all hosts, found v0 for arm64, v1 for amd64"
    with pytest.raises(UnknownImage, match=expected):
        surveying.fitted(session, image, {"arm64": said("v0"), "amd64": said("v1")})
    alike = {"arm64": said("v0"), "amd64": said("v0")}
    assert surveying.fitted(session, image, alike).contract == "v0"


def test_vllm_asks_no_image() -> None:
    assert Vllm().probe_command() == []
