"""Stand-in instances as plain processes; simulated hosts are loopback addresses."""

import contextlib
import http.client
import json
import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STANDIN = Path(__file__).parent
LAUNCHER = STANDIN / "image/workspace/omniinfer/tools/scripts/start_api_servers.py"
VLLM = STANDIN / "image/usr/local/Ascend/latest/bin/vllm"
PYTHON = str(Path(sys.executable).resolve())  # without a virtual environment: starts faster
LAUNCH = (PYTHON, "-S", str(LAUNCHER))  # no site-packages: starts faster
DEVICES_PER_INSTANCE = 8
# Ports of an instance, from its first: room for several API servers; master; KV's; two for each
# worker and one of heartbeats.
API_PORT, MASTER_PORT, KV_PORT, WORKER_PORT, PORTS = 0, 20, 22, 24, 50
# Below the ephemeral range, where any outgoing connection could take them; a block has room for the
# four instances of a 3P1D.
PORT_BLOCKS = [range(first, first + 4 * PORTS) for first in range(10000, 19200, 4 * PORTS)]
TIMEOUT_SECONDS = 15.0
LINGER_SECONDS = 60.0  # the kernel's TIME_WAIT, in which a port that was used counts as taken


@dataclass
class Answer:
    """An HTTP answer."""

    status: int
    text: str

    @property
    def body(self) -> Any:
        return json.loads(self.text)


@dataclass
class Instance:
    """One instance: where it runs, its environment and its launcher's arguments."""

    name: str
    host: str
    root: Path
    api_port: int
    env: dict[str, str]
    args: dict[str, str]
    kv: dict[str, Any]
    extra: list[str]
    launcher: list[str] = field(default_factory=lambda: list(LAUNCH))
    process: subprocess.Popen[bytes] | None = field(default=None)

    def start(self) -> None:
        """Start the launcher."""
        argv = [*self.launcher, *self.extra]
        for flag, value in {**self.args, "--kv-transfer-config": json.dumps(self.kv)}.items():
            argv += [flag, value]
        environment = {
            "PATH": f"{self.root.parent / 'bin'}:{os.environ['PATH']}",
            "PYTHONPYCACHEPREFIX": str(self.root.parent.parent / "pycache"),
            **self.env,
        }
        with (self.root / f"{self.name}.launcher.log").open("wb") as log:
            self.process = subprocess.Popen(
                argv,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.root,
                start_new_session=True,
            )

    def exit_code(self) -> int:
        """Wait until the launcher has ended."""
        assert self.process is not None
        return self.process.wait(TIMEOUT_SECONDS)

    def stop(self) -> None:
        """Stop the launcher and its server.

        A launcher that is killed, or interrupted while it starts its server, leaves the server
        behind, so the rest of its process group is killed too. Its port is closed afterwards.
        """
        if self.process is None:
            return
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            self.process.wait(TIMEOUT_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
            deadline = time.monotonic() + TIMEOUT_SECONDS
            while not self.refuses_connections() and time.monotonic() < deadline:
                time.sleep(0.01)  # a killed process still has its sockets for a moment

    def kill_server(self) -> None:
        """Kill the server process itself."""
        pid = int(self.launcher_log().split("pid ")[1].split(",")[0])
        os.kill(pid, signal.SIGKILL)

    def log(self) -> str:
        """Read the server's log; empty before its start."""
        file = Path(self.args["--log-dir"]) / "server_0.log"
        return file.read_text() if file.exists() else ""

    def launcher_log(self) -> str:
        """Read the launcher's log."""
        return (self.root / f"{self.name}.launcher.log").read_text()

    def set_faults(self, **faults: Any) -> None:
        """Write the instance's fault file."""
        file = self.root / "data/standin" / f"{self.name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(faults))

    def request(self, path: str, body: Any = None, **headers: str) -> Answer:
        """Send a GET, or a POST if there is a body."""
        data = None if body is None else json.dumps(body).encode()
        names = {key.replace("_", "-"): value for key, value in headers.items()}
        connection = http.client.HTTPConnection(self.host, self.api_port, timeout=TIMEOUT_SECONDS)
        with contextlib.closing(connection):
            method = "GET" if data is None else "POST"
            connection.request(method, path, data, {"Content-Type": "application/json"} | names)
            answer = connection.getresponse()
            return Answer(answer.status, answer.read().decode())

    def refuses_connections(self) -> bool:
        """Tell whether nothing listens on the API port."""
        with socket.socket() as probe:
            return probe.connect_ex((self.host, self.api_port)) != 0

    def wait_ready(self) -> None:
        """Wait until /health answers, and with 200; fail with the log if the launcher ends."""
        self.wait_for(self._is_healthy, "health")

    def _is_healthy(self) -> bool:
        """Ask /health; a server that starts tries its port, so a connection may be reset."""
        try:
            status = self.request("/health").status
        except ConnectionError:
            return False
        assert status == 200
        return True

    def wait_for(self, condition: Any, event: str) -> None:
        """Wait for a condition; fail after a time, or if the launcher ends."""
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not condition():
            assert self.process is not None
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"{self.name}: no {event}: {self.launcher_log()} {self.log()}")
            time.sleep(0.03)

    def metric(self, name: str, *, missing: float | None = None) -> float:
        """Return the value of a metric; its name includes its labels.

        Args:
            missing: what to return when there is none, as before a label's first count. By
                default that fails.
        """
        for line in self.request("/metrics").text.splitlines():
            if line.rsplit(" ", 1)[0] == name:
                return float(line.rsplit(" ", 1)[1])
        if missing is not None:
            return missing
        raise AssertionError(f"{self.name} has no metric {name}")

    def wait_for_metric(self, name: str, value: float) -> None:
        """Wait until a metric has a value; fail as `wait_for`."""
        self.wait_for(lambda: self.metric(name) == value, f"{name} {value:g}")


class StandinSet:
    """A set of instances with its ranktables on loopback hosts of 16 devices.

    Two instances share a host, but each instance of a decode over several hosts has its own.
    """

    def __init__(
        self,
        directory: Path,
        first_port: int,
        prefills: int,
        decodes: int = 1,
        built: str | None = None,
        contract: str = "v0",
    ) -> None:
        """Write everything that the instances need.

        Args:
            first_port: of `PORTS` for each instance.
            decodes: instances of the one decode pod.
            built: date of the image; by default the one that it has.
            contract: v0, v1 or roles.
        """
        self.contract = contract
        self.directory = directory
        self.prefills = prefills
        self.decodes = decodes
        self.built = built
        # Each set has its own loopback network, so that sets can run at the same time.
        self._network = f"127.{1 + secrets.randbelow(250)}.{secrets.randbelow(250)}"
        self._npu_prefix = f"standin-{secrets.token_hex(4)}"
        self._first_port = first_port
        model = directory / "model"
        model.mkdir(parents=True)
        (model / "config.json").write_text("{}")
        _write_script(directory / "bin/vllm", f'exec {PYTHON} -S {VLLM} "$@"')
        names = [*(f"p{i}" for i in range(prefills)), *(f"d{i}" for i in range(decodes))]
        self.places = {name: divmod(slot, 2) for slot, name in enumerate(names)}
        if decodes > 1:
            first = -(-prefills // 2)
            self.places |= {f"d{i}": (first + i, 0) for i in range(decodes)}
        for host in {host for host, _ in self.places.values()}:
            self._make_host(host)
        if contract == "v0":
            self.write_ranktables()
        self.instances = {name: self._instance(name, slot) for slot, name in enumerate(names)}

    def __getitem__(self, name: str) -> Instance:
        return self.instances[name]

    def start(self, names: Sequence[str] = ()) -> None:
        """Start the named instances, or all."""
        for name in names or self.instances:
            self.instances[name].start()

    def wait_ready(self) -> None:
        """Wait for all instances."""
        for instance in self.instances.values():
            instance.wait_ready()

    def stop(self) -> None:
        """Stop all instances."""
        for instance in self.instances.values():
            if instance.process is not None and instance.process.poll() is None:
                instance.process.send_signal(signal.SIGINT)
        for instance in self.instances.values():
            instance.stop()

    def address(self, host: int) -> str:
        """Return the address of a simulated host."""
        return f"{self._network}.{1 + host}"

    def root(self, host: int) -> Path:
        """Return the root directory of a simulated host."""
        return self.directory / f"host{host}"

    def device_ids(self, name: str) -> list[int]:
        """List the physical device ids of an instance."""
        first = self.places[name][1] * DEVICES_PER_INSTANCE
        return list(range(first, first + DEVICES_PER_INSTANCE))

    def local_path(self, name: str) -> Path:
        """Return the path of the instance's local ranktable."""
        return self.directory / "ranktables" / f"local_{name}.json"

    @property
    def global_path(self) -> Path:
        """The path of the global ranktable."""
        return self.directory / "ranktables" / "global.json"

    def write_ranktables(self) -> None:
        """Write correct ranktables for all instances."""
        self.global_path.parent.mkdir(exist_ok=True)
        pods = [[f"p{i}"] for i in range(self.prefills)]
        pods.append([f"d{i}" for i in range(self.decodes)])
        groups = []
        for index, members in enumerate(pods):
            servers = [self._server(name, rank) for rank, name in enumerate(members)]
            count = "1" if len(members) == 1 else len(members)
            local = {"group_id": "0", "server_count": count, "server_list": servers}
            for name in members:
                self.local_path(name).write_text(json.dumps(_HEAD | local))
            groups.append(
                {"group_id": str(index), "server_count": len(members), "server_list": servers}
            )
        self.global_path.write_text(json.dumps(_HEAD | {"server_group_list": groups}))

    def _server(self, name: str, node_rank: int) -> dict[str, Any]:
        host, _ = self.places[name]
        first = node_rank * DEVICES_PER_INSTANCE
        devices = [
            {"device_id": str(i), "device_ip": f"192.168.{host}.{100 + i}", "rank_id": str(rank)}
            for rank, i in enumerate(self.device_ids(name), first)
        ]
        address = self.address(host)
        return {"server_id": address, "server_ip": address, "device": devices}

    def _make_host(self, host: int) -> None:
        root = self.root(host)
        for directory in ("etc", "usr/bin", "usr/local/Ascend/driver"):
            (root / directory).mkdir(parents=True)
        lines = [f"address_{i}=192.168.{host}.{100 + i}\n" for i in range(16)]
        (root / "etc/hccn.conf").write_text("".join(lines))
        for tool in ("usr/bin/hccn_tool", "usr/local/Ascend/driver/version.info"):
            (root / tool).symlink_to(STANDIN / "host" / tool)
        (root / "etc/standin.json").write_text('{"load_seconds": 0.05}')
        image = root / "usr/local/Ascend/latest/standin"
        image.mkdir(parents=True)
        (image / "contract").write_text(self.contract)
        if self.built is not None:
            (image / "built").write_text(self.built)

    def _instance(self, name: str, slot: int) -> Instance:
        role = "prefill" if name.startswith("p") else "decode"
        host, _ = self.places[name]
        first = self._first_port + slot * PORTS
        api_port = first + API_PORT
        if self.contract != "v0":
            env = self._later_env(name, role, first + WORKER_PORT)
        else:
            env = self._env(name, role) | {"VLLM_LLMDATADIST_ZMQ_PORT": str(first + KV_PORT)}
        args = {
            "--num-servers": "1",
            "--model-path": str(self.directory / "model"),
            "--master-ip": self.address(host),
            "--master-port": str(first + MASTER_PORT),
            "--base-api-port": str(api_port),
            "--tp": str(DEVICES_PER_INSTANCE),
            "--served-model-name": "qwen",
            "--max-model-len": "61244",
            "--gpu-util": "0.88",
            "--extra-args": "--max-num-batched-tokens 40960 --disable-log-requests",
            "--max-port-attempts": "1",
            "--log-dir": str(self.directory / "logs" / name),
        }
        kv = {
            "kv_connector": "AscendHcclConnectorV1",
            "kv_buffer_device": "npu",
            "kv_role": "kv_producer" if role == "prefill" else "kv_consumer",
            "kv_rank": min(slot, self.prefills),
            "engine_id": slot if role == "prefill" else 0,
            "kv_parallel_size": self.prefills + 1,
        }
        extra = ["--no-enable-prefix-caching", "--no-enable-chunked-prefill"]
        if self.contract != "v0":
            kv["kv_connector"] = "LLMDataDistConnector"
            args["--extra-args"] = "--max-num-batched-tokens 61440"
            extra.append("--use-inventory-devices")
        if self.contract == "roles":  # which gives neither
            del kv["engine_id"], kv["kv_buffer_device"]
        return Instance(name, self.address(host), self.root(host), api_port, env, args, kv, extra)

    def _later_env(self, name: str, role: str, worker_port: int) -> dict[str, str]:
        host, _ = self.places[name]
        prefix = "OMNI_PD_" if self.contract == "roles" else ""
        base_port = {"VLLM_LLMDATADIST_BASE_PORT": str(worker_port + DEVICES_PER_INSTANCE + 1)}
        return {
            "STANDIN_ROOT": str(self.root(host)),
            "STANDIN_ADDRESS": self.address(host),
            "STANDIN_NPU_PREFIX": f"{self._npu_prefix}-host{host}-",
            "HOST": name,
            f"{prefix}ROLE": role,
            f"{prefix}PREFILL_POD_NUM": str(self.prefills),
            f"{prefix}DECODE_POD_NUM": "1",
            "ASCEND_RT_VISIBLE_DEVICES": ",".join(map(str, self.device_ids(name))),
            "OMNI_LLMDATADIST_ZMQ_PORT": str(worker_port),
            "VLLM_PLUGINS": "omni-npu,omni_npu_patches,omni_custom_models",
            "OMNI_VLLM_PATCHES": "ALL",
            "GLOO_SOCKET_IFNAME": "lo",
            "TP_SOCKET_IFNAME": "lo",
        } | (base_port if self.contract == "v1" else {})

    def _env(self, name: str, role: str) -> dict[str, str]:
        host, _ = self.places[name]
        decode_ips = ",".join(self.address(self.places[f"d{i}"][0]) for i in range(self.decodes))
        return {
            "STANDIN_ROOT": str(self.root(host)),
            "STANDIN_ADDRESS": self.address(host),
            "STANDIN_NPU_PREFIX": f"{self._npu_prefix}-host{host}-",
            "HOST": name,
            "ROLE": role,
            "RANK_TABLE_FILE_PATH": str(self.local_path(name)),
            "GLOBAL_RANK_TABLE_FILE_PATH": str(self.global_path),
            "ASCEND_RT_VISIBLE_DEVICES": ",".join(map(str, self.device_ids(name))),
            "PREFILL_POD_NUM": str(self.prefills),
            "DECODE_POD_NUM": "1",
            "LOCAL_DECODE_SERVER_IP_LIST": decode_ips,
            "GLOBAL_DECODE_SERVER_IP_LIST": decode_ips,
            "HCCL_CONNECT_TIMEOUT": "30",
            "HCCL_EXEC_TIMEOUT": "1800",
            "HCCL_INTRA_ROCE_ENABLE": "1",
            "HCCL_INTRA_PCIE_ENABLE": "0",
            "VLLM_USE_V1": "1",
            "VLLM_WORKER_MULTIPROC_METHOD": "fork",
            "VLLM_LOGGING_LEVEL": "INFO",
            "GLOO_SOCKET_IFNAME": "lo",
            "TP_SOCKET_IFNAME": "lo",
            "OMNI_REUSE_PREFILLED_TOKENS": "1",
            "OMNI_SKIP_DECODE_TOKENIZE": "1",
        }


def _write_script(path: Path, command: str) -> None:
    path.parent.mkdir(parents=True)
    path.write_text(f"#!/bin/sh\n{command}\n")
    path.chmod(0o755)


@contextlib.contextmanager
def free_ports(count: int) -> Iterator[int]:
    """Give the first of so many free ports beside one another. Who asks meanwhile, in another
    process too, gets others."""
    assert count <= len(PORT_BLOCKS[0])
    deadline = time.monotonic() + LINGER_SECONDS
    while True:
        for block in random.sample(PORT_BLOCKS, len(PORT_BLOCKS)):
            with socket.socket(socket.AF_UNIX) as claim:
                try:
                    claim.bind(f"\0standin-ports-{block.start}")
                except OSError:  # another's
                    continue
                if all(_is_free(port) for port in block[:count]):
                    yield block.start
                    return
        if time.monotonic() > deadline:
            raise AssertionError(f"no {count} free ports in any block")
        time.sleep(0.25)


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def hand_over(prefill: Instance, decode: Instance, body: dict[str, Any]) -> Answer:
    """Do what the proxy does: prefill one token, then decode with the KV parameters."""
    headers = {"X_Request_Id": f"test-{time.monotonic_ns()}"}
    first = prefill.request("/v1/completions", body | {"max_tokens": 1, "stream": False}, **headers)
    assert first.status == 200, first.text
    params = first.body["kv_transfer_params"]
    return decode.request("/v1/completions", body | {"kv_transfer_params": params}, **headers)


_HEAD = {"version": "1.0", "status": "completed"}


@contextlib.contextmanager
def standin_set(
    directory: Path,
    prefills: int,
    decodes: int = 1,
    built: str | None = None,
    contract: str = "v0",
) -> Iterator[StandinSet]:
    """Give a set of instances; stop it at the end."""
    with free_ports(PORTS * (prefills + decodes)) as first_port:
        instances = StandinSet(directory, first_port, prefills, decodes, built, contract)
        try:
            yield instances
        finally:
            instances.stop()
