"""KV transfer of the contracts v1 and roles: no ranktable, links at the first request."""

import argparse
import ipaddress
import os
import socket
import threading
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from standin import age, npu, wire
from standin.decode import PullFailed
from standin.environment import Environment
from standin.faults import Faults
from standin.instance import Instance, check_paths, device_list
from standin.kvstore import KvStore
from standin.metrics import Metrics
from standin.ranktable import Device, Server
from standin.rules import RULES, Refusal

_SECONDS = 20.0  # for a link and for each pull


def resolve(options: argparse.Namespace, env: Environment) -> Instance:
    """Build the instance, or say which rule its inputs break.

    Raises:
        Refusal: names the rule and the contract's section.
    """
    check_paths(options.model)
    _check_plugins(env["VLLM_PLUGINS"])
    kv = _kv_config(options.kv_transfer_config, env["ROLE"])
    for name in ("PREFILL_POD_NUM", "DECODE_POD_NUM"):
        if env.number(name) < 1:
            raise Refusal("pod-count", f"{name}={env[name]}")
    rank, size = _place(options, env)
    devices = _devices(options, env)
    address = default_route_address()
    port = int(kv.get("kv_port") or env.number("OMNI_LLMDATADIST_ZMQ_PORT"))
    port += _server() * len(devices)  # after those of the instance's other servers
    return Instance(
        name=env.instance or env["ROLE"],
        role=env["ROLE"],
        server=Server(address, tuple(devices)),
        devices=devices,
        cluster_id=int(ipaddress.IPv4Address(address)) << 16 | port,
        link=None,
        prefills=(),
        dp_rank=rank,
        dp_size=size,
        tensor_parallel_size=options.tensor_parallel_size,
        kv_parallel_size=kv.get("kv_parallel_size", 1),
        pairs_by_tp=False,
        digest="",
        zmq_port=port,
        link_timeout=env.number("HCCL_CONNECT_TIMEOUT"),
        recomputes=kv.get("kv_load_failure_policy", "recompute") == "recompute",
        release_seconds=env.number("BLOCK_RELEASE_DELAY"),
    )


def default_route_address() -> str:
    """Return the address that this host has toward the default route: it is the one announced.

    Raises:
        Refusal: there is no default route.
    """
    # On loopback there is none: tests without network namespaces say which address it would be.
    if own := os.environ.get("STANDIN_ADDRESS"):
        return own
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("8.8.8.8", 80))  # sends nothing
        except OSError as error:
            raise Refusal("default-route", str(error)) from None
        return str(probe.getsockname()[0])


def bind(instance: Instance, env: Environment) -> list[socket.socket]:
    """Bind and listen on every port of the workers; the first is that of links and pulls.

    Each worker has kv_port + its local rank, counted over the servers of the instance. In v1,
    prefill has a port of heartbeats too, and one per worker after it, which are the same for every
    instance of a host unless VLLM_LLMDATADIST_BASE_PORT differs.

    Raises:
        Refusal: a port is taken.
    """
    ports = [instance.zmq_port + rank for rank in range(len(instance.devices))]
    if instance.is_prefill and age.contract() == "v1":
        base = env.number("VLLM_LLMDATADIST_BASE_PORT")
        first = base + _server() * len(instance.devices)
        heartbeats = [base - 1] if _server() == 0 else []
        ports += [*heartbeats, *(first + rank for rank in range(len(instance.devices)))]
    listeners = []
    for port in ports:
        try:
            listeners.append(wire.bind(instance.server.server_ip, port))
        except OSError as error:
            where = f"{instance.server.server_ip}:{port}"
            raise Refusal("port", f"KV port {where} of a worker: {error}") from None
        listeners[-1].listen(128)
    return listeners


class PrefillSide:
    """Answers decode's links, pulls and releases; whoever knows the address may link."""

    def __init__(self, instance: Instance, store: KvStore, faults: Faults, metrics: Metrics) -> None:
        self._instance = instance
        self._store = store
        self._faults = faults
        self._metrics = metrics

    def serve(self, listener: socket.socket) -> None:
        """Answer in threads, until the process ends."""
        wire.serve(listener, self._serve_peer)

    def _serve_peer(self, stream: BinaryIO, connection: socket.socket) -> None:
        linked = False
        while message := wire.receive(stream):
            operation = message.get("op")
            if operation == "link":
                answer = self._linked(message)
                linked = linked or answer["status"] == "ok"
                wire.send(connection, answer)
            elif operation == "pull":
                self._send_kv(message, connection)
            elif operation == "release":
                self._release(message["request_id"])
        if linked:
            self._metrics.add("standin:links", -1)
            print("INFO decode has closed the link", flush=True)

    def _linked(self, hello: dict[str, Any]) -> dict[str, Any]:
        prefill_tp, decode_tp = self._instance.tensor_parallel_size, hello["tp"]
        if decode_tp > prefill_tp or prefill_tp % decode_tp:
            reason = f"prefill has tp {prefill_tp}, decode {decode_tp} (rule tp-ratio)"
            print(f"ERROR link refused: {reason}", flush=True)
            return {"status": "failed", "reason": reason}
        self._metrics.add("standin:links")
        print(f"INFO linked with decode {hello['name']} on demand", flush=True)
        return {"status": "ok", "cluster_id": self._instance.cluster_id}

    def _send_kv(self, message: dict[str, Any], connection: socket.socket) -> None:
        kv = self._store.read(message["block_ids"])
        if kv is None or self._faults.now()["refuse_kv"]:
            fault = "was told to refuse (fault refuse_kv)"
            reason = "does not hold these blocks" if kv is None else fault
            wire.send(connection, {"status": "failed", "reason": reason})
            return
        wire.send(connection, {"status": "ok", "bytes": len(kv)})
        connection.sendall(kv)
        self._metrics.add("standin:kv_sent_bytes_total", len(kv))

    def _release(self, request_id: str) -> None:
        if not self._faults.now()["keep_kv"] and not self._store.release(request_id):
            print(f"WARNING release of unknown request {request_id}", flush=True)


class DecodeSide:
    """The links to the prefills that have handed a request over, by announced address."""

    def __init__(self, instance: Instance, metrics: Metrics) -> None:
        self._instance = instance
        self._metrics = metrics
        self._links: dict[str, tuple[socket.socket, BinaryIO]] = {}
        self._lock = threading.Lock()

    def pull(self, cluster_id: object, block_ids: object, announced: str) -> bytes:
        """Fetch the KV of these blocks from the prefill that announced this address.

        Raises:
            PullFailed: unreachable prefill, another one there, or KV not held there.
        """
        if not isinstance(block_ids, list) or not all(type(i) is int for i in block_ids):
            raise PullFailed(f"remote_block_ids must be a list of numbers, found {block_ids!r}")
        with self._lock:
            kv = self._pull(cluster_id, block_ids, announced)
        self._metrics.add("standin:kv_transfers_total", cluster_id=cluster_id)
        self._metrics.add("standin:kv_transfer_bytes_total", len(kv), cluster_id=cluster_id)
        return kv

    def reads_other_heads(self, cluster_id: int) -> bool:
        """Never: nothing reads kv_parallel_size."""
        return False

    def release(self, announced: str, request_id: str) -> None:
        """Tell prefill that its blocks can go; a failure is only logged."""
        with self._lock:
            try:
                connection, _ = self._links[announced]
                wire.send(connection, {"op": "release", "request_id": request_id})
            except (KeyError, OSError) as error:
                self._metrics.add("standin:kv_release_errors_total")
                print(f"WARNING cannot release {request_id} at {announced}: {error}", flush=True)

    def _pull(self, cluster_id: object, block_ids: list[int], announced: str) -> bytes:
        known = announced in self._links
        try:
            return self._pull_once(cluster_id, block_ids, announced)
        except OSError as error:
            self._close(announced)
            if not known:
                raise PullFailed(f"prefill at {announced} is unreachable: {error}") from None
        # It was restarted since: the next link is with the new one.
        try:
            return self._pull_once(cluster_id, block_ids, announced)
        except OSError as error:
            self._close(announced)
            raise PullFailed(f"prefill at {announced} is unreachable: {error}") from None

    def _pull_once(self, cluster_id: object, block_ids: list[int], announced: str) -> bytes:
        if announced not in self._links:
            self._links[announced] = self._linked(cluster_id, announced)
            self._metrics.add("standin:links")
        connection, stream = self._links[announced]
        wire.send(connection, {"op": "pull", "block_ids": block_ids})
        answer = wire.receive(stream)
        if answer is None:
            raise ConnectionError("prefill closed the link")
        if answer["status"] != "ok":
            raise PullFailed(f"prefill at {announced} {answer['reason']}")
        kv = stream.read(answer["bytes"])
        if len(kv) != answer["bytes"]:
            raise ConnectionError("KV ended early")
        return kv

    def _linked(self, cluster_id: object, announced: str) -> tuple[socket.socket, BinaryIO]:
        address = urlsplit(announced)
        try:
            target = (address.hostname or "", int(address.port or 0))
        except ValueError as error:
            raise PullFailed(f"remote_host_ip {announced!r}: {error}") from None
        connection = socket.create_connection(target, timeout=_SECONDS)
        stream = connection.makefile("rb")
        mine = {"name": self._instance.name, "tp": self._instance.tensor_parallel_size}
        wire.send(connection, {"op": "link", **mine})
        answer = wire.receive(stream) or {"status": "failed", "reason": "no answer"}
        if answer["status"] != "ok" or answer["cluster_id"] != cluster_id:
            connection.close()
            found = answer.get("reason", f"cluster {answer.get('cluster_id')} is there")
            raise PullFailed(f"link with cluster {cluster_id} at {announced} FAILED: {found}")
        print(f"INFO linked with prefill at {announced} on demand", flush=True)
        return connection, stream

    def _close(self, announced: str) -> None:
        if link := self._links.pop(announced, None):
            link[0].close()
            self._metrics.add("standin:links", -1)


def _server() -> int:
    """Return which server of its instance this is, from 0."""
    return int(os.environ["STANDIN_SERVER"])


def _check_plugins(text: str) -> None:
    # Without the list vLLM loads every plug-in that is installed.
    if text and "omni-npu" not in [name.strip() for name in text.split(",")]:
        raise Refusal("plugins", f"VLLM_PLUGINS={text!r} has no omni-npu")


def _kv_config(config: Any, role: str) -> dict[str, Any]:
    if not isinstance(config, dict):
        raise Refusal("kv-config", f"expected an object, found {config!r}")
    known = age.table("kv_config")
    for key, value in config.items():
        if key not in known:
            raise Refusal("kv-config", f"{key} is no field of it; these are: {', '.join(known)}")
        if type(value).__name__ not in known[key]:
            raise Refusal("kv-config", f"{key} must be {' or '.join(known[key])}, found {value!r}")
    registered = age.value("kv_connectors")
    if config.get("kv_connector") not in registered:
        raise Refusal(
            "kv-config",
            f"kv_connector {config.get('kv_connector')!r} is not registered, only "
            f"{', '.join(registered)}",
        )
    if not str(config.get("kv_port", 0)).isdecimal():
        raise Refusal("kv-config", f"kv_port must be a number, found {config['kv_port']!r}")
    policy = config.get("kv_load_failure_policy", "recompute")
    if policy not in ("recompute", "fail"):
        raise Refusal("kv-config", f"kv_load_failure_policy must be recompute or fail: {policy!r}")
    expected = RULES["kv_roles"][role]
    if config.get("kv_role") != expected:
        raise Refusal("kv-role", f"role {role} needs {expected}, found {config.get('kv_role')!r}")
    return config


def _place(options: argparse.Namespace, env: Environment) -> tuple[int, int]:
    """Return rank and size of the data parallel world, as environment and flags agree on them."""
    rank, size = env.number("VLLM_DP_RANK"), env.number("VLLM_DP_SIZE")
    if rank >= size:
        raise Refusal("dp-world", f"VLLM_DP_RANK={rank} in a world of VLLM_DP_SIZE={size}")
    return rank, size


def _devices(options: argparse.Namespace, env: Environment) -> list[Device]:
    # The launcher has given this server its share: a worker's place in it is its local rank.
    visible = device_list(env["ASCEND_RT_VISIBLE_DEVICES"])
    workers = options.tensor_parallel_size * options.pipeline_parallel_size
    if len(visible) != workers:
        raise Refusal("tp-devices", f"{workers} workers, the server's devices are {visible}")
    existing = npu.of_host() or set(visible)
    if missing := sorted(set(visible) - existing):
        raise Refusal("device-choice", f"devices {missing}, the host has {sorted(existing)}")
    return [Device(device, "", rank) for rank, device in enumerate(visible)]
