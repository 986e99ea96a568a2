"""The stand-in's images of each contract: what a layer over the oldest one changes."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pd_deploy.lab.errors import LabError

STANDIN = Path(__file__).with_name("standin")
FAULTS = "etc/standin.json"
_HIDDEN = "usr/local/Ascend/latest/standin"
_PACKAGES = "usr/local/lib/python3.11/dist-packages"
_SOURCES = "workspace/omniinfer"
_LAUNCHER = f"{_SOURCES}/tools/scripts/start_api_servers.py"

AGE_OF_TREE = "STANDIN_AGE"  # at the top of a source tree

Files = dict[str, str | bytes | None]  # path in the image → content, or None where it is removed


@dataclass(frozen=True)
class Contract:
    """How the images of one contract differ from those of another."""

    engine: str  # what the stand-in's own code takes it for
    built: str  # the day, in ISO's form
    versions: Mapping[str, str]  # of the installed packages, by their names
    cann: str
    commit: str  # of omni-infer's sources
    copied: Mapping[str, str] = field(default_factory=dict)  # path in the image → in `standin`
    written: Mapping[str, str] = field(default_factory=dict)  # path in the image → text
    removed: tuple[str, ...] = ()  # paths of the oldest image


def _plugin(package: str, connectors: str, function: str, revision: str) -> str:
    """Write the package that the engine loads; `revision` is what its answers tell."""
    return f"""\
\"\"\"The plug-in {package} of vLLM.\"\"\"

REVISION = "{revision}"


def register():
    from {connectors} import {function}

    {function}()
"""


def _v0_connectors(names: tuple[str, ...]) -> str:
    # The class has the name under which a later contract registers it.
    lines = [
        f'    KVConnectorFactory.register_connector(\n        "{name}",\n'
        f'        "omni.accelerators.pd.{module}",\n        "{class_name}",\n    )\n'
        for name, module, class_name in (
            ("AscendHcclConnectorV1", "llmdatadist_connector_v1", "LLMDataDistConnector"),
            ("LMCacheConnectorV1", "lmcache_connector_v1", "LMCacheConnector"),
        )
        if name in names
    ]
    factory = "from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory"
    return f"{factory}\n\n\ndef register():\n{''.join(lines)}"


_NPU_CONNECTORS = """\
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory


def register_connectors():
    KVConnectorFactory.register_connector(
        "LLMDataDistConnector",
        "omni_npu.connector.llmdatadist_connector_v1",
        "LLMDataDistConnector",
    )
"""
_NPU_CONNECTORS_OF_ROLES = f"""\
{_NPU_CONNECTORS}    KVConnectorFactory.register_connector(
        "NPUOffloadingConnector",
        "omni_npu.connector.offloading_connector",
        "NPUOffloadingConnector",
    )
"""
_PLUGIN_OF_V0 = f"{_SOURCES}/omni/__init__.py"
# What an editable installation leaves: where Python looks for the package.
_EDITABLE_OF_V0 = f"{_PACKAGES}/__editable__.omni_infer.pth"
_PROJECT_OF_V0 = f"{_SOURCES}/setup.py"
_SOURCES_OF_NPU = f"{_SOURCES}/components/omni-npu/src"
_PROXY = "later/omni_proxy.sh"
_LATER_BENCH = {f"{_PACKAGES}/vllm/benchmarks/serve.py": "later/vllm_bench.py"}
_MODULES = {"usr/local/nginx/modules/ngx_http_omni_proxy_module.so": "of the stand-in: unread\n"}
_BUILT_NGINX = "usr/local/nginx/nginx"  # an RPM's is /usr/sbin/nginx
_CONNECTORS_OF_V0 = f"{_SOURCES}/omni/accelerators/pd/__init__.py"
_V1_VERSIONS = {"omni-npu": "0.2.0", "vllm": "0.14.0+empty", "torch": "2.9.0"}

CONTRACTS = {
    "v0-early": Contract(
        engine="v0",
        built="2025-07-22",
        versions={
            "omni_infer": "0.3.0",
            "vllm": "0.9.0+empty",
            "torch": "2.5.1",
            "torch-npu": "2.5.1",
            "numpy": "1.26.0",
        },
        cann="8.2.RC1",
        commit="0fb5786d00000000000000000000000000000001",
        written={
            _CONNECTORS_OF_V0: _v0_connectors(("AscendHcclConnectorV1",)),
            _PLUGIN_OF_V0: _plugin("omni", "omni.accelerators.pd", "register", "0.3.0"),
            _PROJECT_OF_V0: 'from setuptools import setup\n\nsetup(name="omni_infer")\n',
            _EDITABLE_OF_V0: f"/{_SOURCES}\n",
        },
    ),
    "v0": Contract(
        engine="v0",
        built="2026-03-26",
        versions={
            "omni_infer": "0.7.1",
            "vllm": "0.9.0+empty",
            "torch": "2.5.1",
            "torch-npu": "2.5.1",
            "numpy": "1.26.4",
        },
        cann="8.3.RC1",
        commit="ba90be7600000000000000000000000000000002",
        copied={f"{_SOURCES}/omni/accelerators/sched/omni_proxy/omni_proxy.sh": _PROXY},
        written={
            **_MODULES,
            _CONNECTORS_OF_V0: _v0_connectors(("AscendHcclConnectorV1", "LMCacheConnectorV1")),
            _PLUGIN_OF_V0: _plugin("omni", "omni.accelerators.pd", "register", "0.7.1"),
        },
        removed=(_BUILT_NGINX,),
    ),
    "v1": Contract(
        engine="v1",
        built="2026-06-29",
        versions={"omni_infer": "1.2.1", **_V1_VERSIONS, "torch-npu": "2.9.0.post3"},
        cann="8.5.0",
        commit="c29cdcda00000000000000000000000000000003",
        copied={
            f"{_SOURCES}/components/omni-proxy/omni_proxy/omni_proxy.sh": _PROXY,
            **_LATER_BENCH,
        },
        written={
            **_MODULES,
            f"{_PACKAGES}/omni_npu/__init__.py": _plugin(
                "omni_npu", "omni_npu.connector", "register_connectors", "1.2.1"
            ),
            f"{_PACKAGES}/omni_npu/connector/__init__.py": _NPU_CONNECTORS,
        },
        removed=(
            _BUILT_NGINX,
            _EDITABLE_OF_V0,
            _PLUGIN_OF_V0,
            _PROJECT_OF_V0,
            f"{_SOURCES}/omni/accelerators/pd",
        ),
    ),
    "roles": Contract(
        engine="roles",
        built="2026-07-24",
        versions={"omni_infer": "1.2.1.post1", **_V1_VERSIONS, "torch-npu": "2.9.0.post3"},
        cann="8.5.0",
        commit="41da2e3f00000000000000000000000000000004",
        copied={
            **_LATER_BENCH,
            f"{_SOURCES}/components/omni-proxy/omni_proxy/omni_proxy.sh": _PROXY,
            f"{_SOURCES}/tools/deploy/start_server/start_api_servers.py": f"image/{_LAUNCHER}",
        },
        written={
            **_MODULES,
            f"{_PACKAGES}/__editable__.omni_npu.pth": f"/{_SOURCES_OF_NPU}\n",
            f"{_SOURCES}/components/omni-npu/pyproject.toml": '[project]\nname = "omni-npu"\n',
            f"{_SOURCES_OF_NPU}/omni_npu/__init__.py": _plugin(
                "omni_npu", "omni_npu.connector.register", "register_connectors", "1.2.1.post1"
            ),
            f"{_SOURCES_OF_NPU}/omni_npu/connector/register.py": _NPU_CONNECTORS_OF_ROLES,
        },
        removed=(
            _BUILT_NGINX,
            _EDITABLE_OF_V0,
            _PROJECT_OF_V0,
            f"{_SOURCES}/omni",
            f"{_SOURCES}/tools/scripts",
        ),
    ),
}
OLDEST = "v0-early"  # that of the stand-in's own tree


def layer(name: str) -> Files:
    """List what makes the oldest image, without its own metadata, one of this contract.

    Raises:
        LabError: there is no such contract.
    """
    if name not in CONTRACTS:
        raise LabError(f"expected a contract ({', '.join(CONTRACTS)}), found {name!r}")
    contract = CONTRACTS[name]
    outdated = _package_directories(CONTRACTS[OLDEST]) - _package_directories(contract)
    return {
        **dict.fromkeys(outdated),
        **_metadata(contract),
        **contract.written,
        **{path: (STANDIN / source).read_bytes() for path, source in contract.copied.items()},
        **dict.fromkeys(contract.removed),
    }


def sources(name: str) -> Files:
    """List the source tree of a contract's image, by path in it: what developers check out. Its
    code goes by its own age in whichever image it is mounted.

    Raises:
        LabError: there is no such contract.
    """
    image = STANDIN / "image"
    files: Files = {
        str(path.relative_to(image)): path.read_bytes()
        for path in (image / _SOURCES).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    for change in (layer(OLDEST), layer(name)):
        gone = [path for path, content in change.items() if content is None]
        kept = {
            p: c for p, c in files.items() if not any(f"{p}/".startswith(f"{g}/") for g in gone)
        }
        files = kept | {path: content for path, content in change.items() if content is not None}
    below, of = f"{_SOURCES}/", CONTRACTS[name]
    tree = {p[len(below) :]: c for p, c in files.items() if p.startswith(below)}
    checked_out = {path: content for path, content in tree.items() if not path.startswith(".git/")}
    return {**checked_out, AGE_OF_TREE: f"{of.engine} {of.built}\n"}


def build(name: str, tag: str, faults: Mapping[str, object]) -> Files:
    """List what makes the oldest image a build of this contract, with faults of its engines.

    No two tags have the same digest.

    Raises:
        LabError: there is no such contract.
    """
    changes: Files = {} if name == OLDEST else layer(name)
    changes[f"{_HIDDEN}/build"] = f"{tag}\n"
    if faults:
        changes[FAULTS] = json.dumps(faults)
    return changes


def known_faults() -> dict[str, object]:
    """List the faults of the stand-in's engines, with their values without a fault."""
    defaults = json.loads((STANDIN / "image" / _HIDDEN / "faults.json").read_bytes())
    return dict(defaults)


def _package_directories(contract: Contract) -> set[str]:
    return {_package_directory(*package) for package in contract.versions.items()}


def _package_directory(name: str, version: str) -> str:
    return f"{_PACKAGES}/{name.replace('-', '_')}-{version}.dist-info"


def _metadata(contract: Contract) -> Files:
    """Write what says which versions are in an image, as its builders would have left it."""
    packages: Files = {}
    for name, version in contract.versions.items():
        directory = _package_directory(name, version)
        packages[f"{directory}/METADATA"] = (
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
        if name == "omni-npu":
            packages[f"{directory}/entry_points.txt"] = (
                "[vllm.platform_plugins]\nomni-npu = omni_npu:register\n\n"
                "[vllm.general_plugins]\nomni_npu_patches = omni_npu.patches:register\n"
                "omni_custom_models = omni_npu.models:register\n"
            )
    return {
        **packages,
        "usr/local/Ascend/latest/version.cfg": (
            f"# version: 1.0\nruntime_running_version=[0.0.0.0:{contract.cann}]\n"
            f"toolkit_running_version=[0.0.0.0:{contract.cann}]\n"
        ),
        f"{_SOURCES}/.git/HEAD": f"{contract.commit}\n",
        f"{_HIDDEN}/contract": f"{contract.engine}\n",
        f"{_HIDDEN}/built": f"{contract.built}\n",
    }
