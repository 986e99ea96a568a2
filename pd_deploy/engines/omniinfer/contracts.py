"""What images of each age expect of their deployer. Pure.

v0-early   until 2025-08-12: vLLM 0.9, ranktables, kv_parallel_size = prefill pods + 1
v0         until March 2026: the same, kv_parallel_size = decode's tensor parallel size
v1         from February 2026: vLLM 0.12 and later, no ranktables, devices renumbered by the
           launcher unless it is told not to
roles      from July 2026: as v1, with other script directories and omni_proxy alone

Here are the values in which they differ; what is made of each is said where it is rendered.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import date
from typing import Literal, get_args

from pd_deploy.config.fields import Scalar, split_image
from pd_deploy.config.models import ContractName, Deployment, ProxyProgram
from pd_deploy.engines.base import Finding
from pd_deploy.engines.omniinfer import image_age
from pd_deploy.errors import Problem

_SCRIPTS = "tools/scripts"
_OMNI_PROXY = "omni/accelerators/sched/omni_proxy"
_SUBMODULE = "components/omni-proxy/omni_proxy"  # the same proxy, since it has sources of its own


# As upstream's playbooks do it, without fetching anything; vLLM only where it is in the tree.
_PIP = "pip install --no-deps --no-build-isolation"
_INSTALL = (
    '[ ! -e "$tree/infer_engines/vllm/setup.py" ] || SETUPTOOLS_SCM_PRETEND_VERSION=0.9.0 '
    f'VLLM_TARGET_DEVICE=empty {_PIP} -e "$tree/infer_engines/vllm"',
    f'{_PIP} -e "$tree"',
)
_INSTALL_NPU = (
    "pip uninstall -y omni-npu",
    f'TORCH_DEVICE_BACKEND_AUTOLOAD=0 {_PIP} --force-reinstall -e "$tree/components/omni-npu"',
)


@dataclass(frozen=True)
class Contract:
    """What an image of one age expects of its deployer. Directories are below the source tree.

    Attributes:
        scripts: where the launcher is, and the script of global_proxy.
        proxies: program → directories where its script may be; the first program is the default.
        package: what servers import of omni-infer.
        install: commands that install a source tree, whose place is `$tree`.
        connector: what moves KV.
        has_ranktables: whether the engine reads them, and all link to all while loading: in an
            order, and with one decode pod.
        kv_parallel_size: what the engine takes the number for.
        engine_id: how the KV configuration has it; None leaves it out, and the engine takes a
            random one.
        kv_buffer_device: what the KV configuration says of it.
        kv_load_failure_policy: what becomes of a request whose KV does not arrive.
        binds_kv_ports: whether every worker binds `kv_port` + its rank on the host.
        fixed_ports: the first of those that a prefill binds whatever the configuration says: one
            for messages, and one per worker.
        renumbers_devices: whether the launcher counts devices from 0 unless it is told not to.
        splits_prompts: whether a prompt above the budget of a step takes several, as long as
            chunked prefill is not switched off.
        server_offset: what the launcher counts `--server-offset` in.
        announces_route: whether an engine tells others the address of its host's default route,
            not the one it is given.
        renamed: variables with a second name, old → new. Which one a component reads depends on
            its age, so both are set.
        environment: variables that upstream's files for these images all set.
    """

    name: ContractName
    scripts: str = _SCRIPTS
    proxies: Mapping[ProxyProgram, tuple[str, ...]] = field(default_factory=dict)
    package: str = "omni"
    install: tuple[str, ...] = _INSTALL
    connector: str = "AscendHcclConnectorV1"
    has_ranktables: bool = True
    kv_parallel_size: Literal["prefill-pods-plus-one", "decode-tensor-parallel"] = (
        "prefill-pods-plus-one"
    )
    engine_id: Literal["number", "text"] | None = "number"
    kv_buffer_device: str | None = "npu"
    kv_load_failure_policy: str | None = None
    binds_kv_ports: bool = False
    fixed_ports: int | None = None
    renumbers_devices: bool = False
    splits_prompts: bool = False
    server_offset: Literal["servers", "devices"] = "servers"
    announces_route: bool = False
    renamed: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, Scalar] = field(default_factory=dict)

    def program(self, deployment: Deployment) -> ProxyProgram:
        """Return the program that a deployment's proxy runs: the file's, or the default here."""
        program = deployment.first_proxy.program
        return next(iter(self.proxies)) if program == "by-image" else program


_EARLY = Contract("v0-early", proxies={"global": (_SCRIPTS,)})
_V0 = replace(
    _EARLY,
    name="v0",
    proxies={"global": (_SCRIPTS,), "omni": (_OMNI_PROXY,)},
    kv_parallel_size="decode-tensor-parallel",
)
_V1 = Contract(
    "v1",
    proxies={"omni": (_SUBMODULE, _OMNI_PROXY), "global": (_SCRIPTS,)},
    package="omni_npu",
    install=_INSTALL_NPU,
    connector="LLMDataDistConnector",
    has_ranktables=False,
    engine_id="text",  # vLLM 0.12 checks types, and wants text
    kv_load_failure_policy="fail",
    binds_kv_ports=True,
    fixed_ports=15566,
    renumbers_devices=True,
    splits_prompts=True,
    server_offset="devices",
    announces_route=True,
    renamed={
        "ROLE": "OMNI_PD_ROLE",
        "PREFILL_POD_NUM": "OMNI_PD_PREFILL_POD_NUM",
        "DECODE_POD_NUM": "OMNI_PD_DECODE_POD_NUM",
        "VLLM_LLMDATADIST_ZMQ_PORT": "OMNI_LLMDATADIST_ZMQ_PORT",
    },
    environment={
        "VLLM_PLUGINS": "omni-npu,omni_npu_patches,omni_custom_models",
        "OMNI_VLLM_PATCHES": "ALL",
    },
)
_ROLES = replace(
    _V1,
    name="roles",
    scripts="tools/deploy/start_server",
    proxies={"omni": (_SUBMODULE,)},
    engine_id=None,
    kv_buffer_device=None,
    fixed_ports=None,
)
CONTRACTS: dict[ContractName, Contract] = {c.name: c for c in (_EARLY, _V0, _V1, _ROLES)}

NEW_KV_PARALLEL_SIZE = image_age.Change(day=date(2025, 8, 13), version=(0, 4, 0))
"""When the engine began to read `kv_parallel_size` as decode's tensor parallel size."""
_FIRST_OF_V1 = date(2026, 2, 1)
# The roles' playbooks are of July; the first public release of their engine is dated 2026-06-29.
_FIRST_OF_ROLES = date(2026, 6, 1)


def possible(tag: str) -> frozenset[ContractName]:
    """Return the contracts that an image may have, as far as its tag tells.

    Releases below 1.0 are of v0, later ones are not. Of a day since February 2026 the tag alone
    does not tell: for some months, images of several lines were built. A tag that contradicts
    itself tells nothing.
    """
    every = frozenset[ContractName](get_args(ContractName))
    left = every
    for day in image_age.days(tag):
        left &= _of_day(day)
    if version := image_age.release(tag):
        left &= _of_version(version)
    return left or every


def _of_day(day: date) -> frozenset[ContractName]:
    if day < NEW_KV_PARALLEL_SIZE.day:
        return frozenset({"v0-early"})
    if day < _FIRST_OF_V1:
        return frozenset({"v0"})
    return frozenset({"v0", "v1"} if day < _FIRST_OF_ROLES else {"v0", "v1", "roles"})


def _of_version(version: tuple[int, int, int]) -> frozenset[ContractName]:
    if version >= (1, 0, 0):
        return frozenset({"v1", "roles"})
    return frozenset({"v0-early"} if version < NEW_KV_PARALLEL_SIZE.version else {"v0"})


def expected(deployment: Deployment) -> Contract | None:
    """Return the contract that the file names, or that of the image's age as far as its tag tells
    one; None if neither does."""
    if deployment.contract != "by-image":
        return CONTRACTS[deployment.contract]
    names = possible(split_image(deployment.image).tag or "")
    return CONTRACTS[next(iter(names))] if len(names) == 1 else None


def contract_of(deployment: Deployment) -> Contract:
    """Return the contract by which a deployment is rendered: v0 where none is known."""
    return expected(deployment) or CONTRACTS["v0"]


def findings(deployment: Deployment) -> Iterator[Finding]:
    """Yield a contract that no image with this tag can have."""
    tag = split_image(deployment.image).tag or ""
    names = possible(tag)
    if deployment.contract != "by-image" and deployment.contract not in names:
        listed = " or ".join(name for name in CONTRACTS if name in names)
        message = (
            f"expected {listed}, which an image with the tag {tag} has by its age, found "
            f"{deployment.contract}: remove the key, its default is by-image, or correct `image`"
        )
        yield "contract-of-image", Problem("contract", message)
