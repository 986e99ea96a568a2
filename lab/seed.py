"""The files that differ from box to box: a read-only layer over the shared root."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from pd_deploy.lab.system import mode_of

NPUS = 16
NPU_DEVICES = (
    *(f"davinci{i}" for i in range(NPUS)),
    "davinci_manager",
    "devmm_svm",
    "hisi_hdc",
)
# user -> (home, uid), as the cached root has them
USERS = {
    "root": ("/root", 0),
    "deployer": ("/home/deployer", 1000),
    "nodocker": ("/home/nodocker", 1001),
}
MODEL = {
    "architectures": ["Qwen2ForCausalLM"],
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 5120,
    "intermediate_size": 27648,
    "max_position_embeddings": 131072,
    "model_type": "qwen2",
    "num_attention_heads": 40,
    "num_hidden_layers": 64,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 152064,
}
TOKENIZER = {"model_max_length": 131072, "tokenizer_class": "Qwen2Tokenizer"}
SSHD_CONFIG = """\
ListenAddress {address}
HostKey /etc/ssh/ssh_host_ed25519_key
PermitRootLogin prohibit-password
PasswordAuthentication yes
KbdInteractiveAuthentication no
UsePAM no
UseDNS no
LogLevel VERBOSE
Subsystem sftp /usr/lib/openssh/sftp-server
"""
REGISTRY_CONFIG = """\
version: 0.1
storage:
  cache: {{blobdescriptor: inmemory}}
  filesystem: {{rootdirectory: /var/lib/docker-registry}}
http:
  addr: {address}
"""


class KeyPair(BaseModel):
    """An SSH key pair in OpenSSH's text formats."""

    model_config = ConfigDict(frozen=True)

    private: str
    public: str


def seed_host(
    directory: Path,
    *,
    standin: Path,
    address: str,
    names: Mapping[str, str],
    registry: str,
    cgroup: str,
    client_key: str,
    host_key: KeyPair,
) -> None:
    """Write a host's own files below ``directory``.

    Args:
        standin: tree of the stand-in NPU tools.
        names: host name → address, for /etc/hosts.
        cgroup: parent of its containers' control groups.
        client_key: public key that all users accept.
    """
    shutil.copytree(standin, directory, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (directory, *directory.rglob("*")):
        path.chmod(0o755 if path.is_dir() else mode_of(path.read_bytes()))
    octet = address.rpartition(".")[2]
    _write(directory, "/etc/hccn.conf", _hccn_conf(octet))
    _write(directory, "/etc/hosts", _hosts_file(names))
    _write(directory, "/etc/ssh/sshd_config", SSHD_CONFIG.format(address=address))
    _write(directory, "/etc/ssh/ssh_host_ed25519_key", host_key.private, 0o600)
    _write(directory, "/etc/ssh/ssh_host_ed25519_key.pub", host_key.public)
    _write(directory, "/etc/docker/daemon.json", json.dumps(_engine(registry, cgroup), indent=1))
    _write(directory, "/data/models/QwQ-32B/config.json", json.dumps(MODEL, indent=1))
    tokenizer = json.dumps(TOKENIZER, indent=1)
    _write(directory, "/data/models/QwQ-32B/tokenizer_config.json", tokenizer)
    for user in USERS:
        _authorize(directory, user, client_key)


def seed_switch(directory: Path, *, registry: str) -> None:
    """Write the switch's own files: the registry's configuration."""
    directory.mkdir(parents=True)
    directory.chmod(0o755)
    _write(directory, "/etc/docker/registry/config.yml", REGISTRY_CONFIG.format(address=registry))


def _hccn_conf(octet: str) -> str:
    values = {"address": "192.168.{octet}.{last}", "netmask": "255.255.255.0",
              "gateway": "192.168.{octet}.1"}  # fmt: skip
    lines = [
        f"{key}_{i}={value.format(octet=octet, last=100 + i)}"
        for key, value in values.items()
        for i in range(NPUS)
    ]
    return "\n".join([*lines, ""])


def _hosts_file(names: Mapping[str, str]) -> str:
    lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in names.items())]
    return "\n".join([*lines, ""])


def _engine(registry: str, cgroup: str) -> dict[str, object]:
    """Build the Docker engine's configuration: no networks, as containers use the host's."""
    return {
        "bridge": "none",
        "iptables": False,
        "ip6tables": False,
        "ip-forward": False,
        "ip-masq": False,
        "userland-proxy": False,
        "insecure-registries": [registry],
        "cgroup-parent": cgroup,
    }


def _authorize(directory: Path, user: str, client_key: str) -> None:
    home, uid = USERS[user]
    _write(directory, f"{home}/.ssh/authorized_keys", client_key, 0o600)
    for path in (home, f"{home}/.ssh", f"{home}/.ssh/authorized_keys"):
        os.chown(directory / path.lstrip("/"), uid, uid)
    for path in (home, f"{home}/.ssh"):
        (directory / path.lstrip("/")).chmod(0o700)


def _write(directory: Path, path: str, text: str, mode: int = 0o644) -> None:
    file = directory / path.lstrip("/")
    # A layer's directories hide the modes of those below, so set 0755 regardless of the umask.
    for parent in reversed(file.parents):
        if parent.is_relative_to(directory) and not parent.exists():
            parent.mkdir()
            parent.chmod(0o755)
    file.touch(mode=0o600)
    file.write_text(text)
    file.chmod(mode)
