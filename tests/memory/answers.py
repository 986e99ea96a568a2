"""What images say when they are asked what they are, by the contract that they follow."""

import json
from collections.abc import Iterable
from typing import Any

from pd_deploy.engines.omniinfer.in_image import LAUNCHER, MARK
from pd_deploy.engines.sglang_in_image import SERVER
from pd_deploy.lab import sglang as lab

_FACTS: dict[str, dict[str, Any]] = {
    "v0-early": {
        "scripts": "tools/scripts",
        "proxies": ["global_proxy.sh"],
        "connectors": ["AscendHcclConnectorV1"],
        "kv_parallel_size": "prefill pods + 1",
        "vllm": "0.9.0",
    },
    "v0": {
        "scripts": "tools/scripts",
        "proxies": ["global_proxy.sh"],
        "connectors": ["AscendHcclConnectorV1"],
        "kv_parallel_size": "decode's tensor parallel size",
        "vllm": "0.9.0",
    },
    "v1": {
        "scripts": "tools/scripts",
        "flags": ["--use-inventory-devices"],
        "proxies": ["global_proxy.sh", "omni_proxy.sh"],
        "connectors": ["LLMDataDistConnector"],
        "vllm": "0.12.0",
    },
    "roles": {
        "scripts": "tools/deploy/start_server",
        "flags": ["--use-inventory-devices"],
        "proxies": ["omni_proxy.sh"],
        "connectors": ["LLMDataDistConnector", "NPUOffloadingConnector"],
        "vllm": "0.14.0",
    },
    # Nobody knows what an image with this connector expects.
    "unknown": {
        "scripts": "tools/scripts",
        "proxies": ["omni_proxy.sh"],
        "connectors": ["NextConnector"],
        "vllm": "0.30.0",
    },
    # As old ones are that hold no sources to read: their tag says how old they are.
    "by its tag": {"scripts": "tools/scripts", "proxies": ["global_proxy.sh"]},
}


def sglang(version: str = "0.5.23", without: Iterable[str] = ()) -> str:
    """Of an image of SGLang: all options that the latest version takes, but for some."""
    table = json.loads((lab.STANDIN / "sglang/options.json").read_text())
    options = {name for row in table for name in row["names"]} - set(without)
    facts = {"flags": {SERVER: sorted(options)}, "packages": {"sglang": version}}
    return MARK + json.dumps(facts)


def of(kind: str, commit: str = "") -> str:
    """What an image of this kind prints."""
    facts = dict(_FACTS[kind])
    directory = f"/workspace/omniinfer/{facts.pop('scripts')}"
    versions = {"vllm": facts.pop("vllm", "")}
    answer = {
        "script_directory": directory,
        "programs": {
            LAUNCHER: f"{directory}/{LAUNCHER}",
            **{name: f"/workspace/omniinfer/proxies/{name}" for name in facts.pop("proxies")},
        },
        "flags": {LAUNCHER: ["--model-path", *facts.pop("flags", [])]},
        "packages": {name: version for name, version in versions.items() if version},
        **facts,
        "commit": commit,
    }
    return MARK + json.dumps(answer)
