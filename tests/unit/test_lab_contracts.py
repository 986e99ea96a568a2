"""The stand-in's images of each contract, as files: what a look into one finds."""

import importlib.metadata
import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pd_deploy.lab import contracts, images
from pd_deploy.lab.cli import app
from pd_deploy.lab.errors import LabError
from pd_deploy.lab.standin.processes import STANDIN

SOURCES = Path("workspace/omniinfer")
SITE = Path("usr/local/lib/python3.11/dist-packages")
OLD_SCRIPTS = SOURCES / "tools/scripts/start_api_servers.py"
NEW_SCRIPTS = SOURCES / "tools/deploy/start_server/start_api_servers.py"
GLOBAL_PROXY = SOURCES / "omni/accelerators/sched/global_proxy/global_proxy.sh"
OMNI_PROXY = {
    "v0": SOURCES / "omni/accelerators/sched/omni_proxy/omni_proxy.sh",
    "v1": SOURCES / "components/omni-proxy/omni_proxy/omni_proxy.sh",
    "roles": SOURCES / "components/omni-proxy/omni_proxy/omni_proxy.sh",
}


@pytest.fixture(params=contracts.CONTRACTS)
def contract(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def tree(contract: str, tmp_path: Path) -> Path:
    """The files of a contract's image, without those of Debian."""
    top = tmp_path / "image"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(STANDIN / "image", top, ignore=ignored, symlinks=True)
    apply(contracts.layer(contracts.OLDEST), top)
    if contract != contracts.OLDEST:
        apply(contracts.layer(contract), top)
    return top


def apply(layer: contracts.Files, top: Path) -> None:
    for path, content in layer.items():
        target = top / path
        if content is None:
            shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content.encode() if isinstance(content, str) else content)


def test_roles_alone_has_its_scripts_elsewhere(contract: str, tree: Path) -> None:
    assert (tree / OLD_SCRIPTS).exists() == (contract != "roles")
    assert (tree / OLD_SCRIPTS.parent).exists() == (contract != "roles")
    assert (tree / NEW_SCRIPTS).exists() == (contract == "roles")


def test_the_first_has_the_global_proxy_alone_and_the_last_the_omni_proxy(
    contract: str, tree: Path
) -> None:
    assert (tree / GLOBAL_PROXY).exists() == (contract != "roles")
    found = [path.relative_to(tree) for path in tree.rglob("omni_proxy.sh")]
    assert found == ([OMNI_PROXY[contract]] if contract in OMNI_PROXY else [])


def test_the_packages_say_their_versions_without_those_of_another_contract(
    contract: str, tree: Path
) -> None:
    installed = importlib.metadata.distributions(path=[str(tree / SITE)])
    assert {item.name: item.version for item in installed} == dict(
        contracts.CONTRACTS[contract].versions
    )


def test_the_versions_of_release_1_2_1_do_not_tell_v1_from_roles() -> None:
    v1, roles = (dict(contracts.CONTRACTS[name].versions) for name in ("v1", "roles"))
    assert v1 | {"omni_infer": "1.2.1.post1"} == roles
    assert (roles["omni-npu"], roles["vllm"]) == ("0.2.0", "0.14.0+empty")


def test_sources_register_the_connectors_of_the_contract_only(contract: str, tree: Path) -> None:
    sources = [*(tree / SOURCES).rglob("*.py"), *(tree / SITE).rglob("*.py")]
    text = "".join(path.read_text() for path in sources).replace("\n", "").replace(" ", "")
    connectors = ("AscendHcclConnectorV1", "LMCacheConnectorV1", "LLMDataDistConnector")
    registered = [name for name in connectors if f'register_connector("{name}"' in text]
    assert registered == {
        "v0-early": ["AscendHcclConnectorV1"],
        "v0": ["AscendHcclConnectorV1", "LMCacheConnectorV1"],
    }.get(contract, ["LLMDataDistConnector"])


def test_cann_and_the_commit_are_recorded(contract: str, tree: Path) -> None:
    wanted = contracts.CONTRACTS[contract]
    assert f":{wanted.cann}]" in (tree / "usr/local/Ascend/latest/version.cfg").read_text()
    assert (tree / SOURCES / ".git/HEAD").read_text() == f"{wanted.commit}\n"
    assert len(wanted.commit) == 40


def test_a_build_is_a_small_layer_that_no_other_tag_has(contract: str) -> None:
    first, second = (images.tar_files(contracts.build(contract, tag, {})) for tag in ("a", "b"))
    assert first != second
    assert first == images.tar_files(contracts.build(contract, "a", {}))
    assert len(first) < 100_000


def test_faults_of_a_build_are_those_of_the_engines() -> None:
    build = contracts.build("roles", "bad", {"unhealthy": True})
    assert json.loads(str(build["etc/standin.json"])) == {"unhealthy": True}
    assert "etc/standin.json" not in contracts.build("roles", "good", {})


def test_an_unknown_contract_is_named() -> None:
    with pytest.raises(LabError, match=r"expected a contract \(v0-early, v0, v1, roles\), found"):
        contracts.build("v2", "x", {})


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("unwell=true", "expected one of load_seconds, crash_after,"),
        ("unhealthy", "expected KEY=VALUE, such as unhealthy=false"),
        ("unhealthy=yes", "--fault unhealthy: expected a number, true, false or null, found 'yes'"),
    ],
)
def test_a_fault_that_there_is_not_is_told_before_anything_is_pushed(
    fault: str, message: str
) -> None:
    done = CliRunner().invoke(app, ["push", "20250723_27", "--fault", fault])
    assert done.exit_code == 1
    assert message in done.stderr
