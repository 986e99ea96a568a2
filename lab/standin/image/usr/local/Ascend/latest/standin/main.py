"""`vllm serve`: check everything, load, link, serve."""

import argparse
import os
import signal
import socket
import sys
import threading
import time

from standin import age, bench, death, npu, ondemand, options, plugin, wire
from standin.api import Api
from standin.engine import Engine
from standin.environment import Environment
from standin.faults import Faults
from standin.instance import Instance, resolve
from standin.metrics import Metrics
from standin.prefill import PrefillSide
from standin.rules import RULES, Refusal

SHARDS = 4  # of the model; as many times a load says how far it is


def main(argv: list[str] | None = None) -> None:
    """Run the server; exit code 2 for a wrong command line, 1 for a refusal."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(0))
    argv = sys.argv[1:] if argv is None else argv
    if argv[:2] == ["bench", "serve"]:
        bench.main(argv[2:])
        return
    arguments = options.parse(argv)
    try:
        # vLLM itself is the image's; all that follows goes by the code that is imported.
        config = arguments.kv_transfer_config
        revision = plugin.load(config.get("kv_connector") if isinstance(config, dict) else "")
        _run(arguments, Environment(), revision)
    except Refusal as refusal:
        print(refusal, file=sys.stderr, flush=True)
        sys.exit(1)


def _run(arguments: argparse.Namespace, env: Environment, revision: str) -> None:
    faults = Faults(env.instance)
    settings = faults.now()
    if settings["crash_after"] is not None:
        death.crash_after(settings["crash_after"], settings["exit_code"])
    by_ranktable = age.contract() == "v0"
    instance = (resolve if by_ranktable else ondemand.resolve)(arguments, env)
    if by_ranktable:
        npu.check_addresses(instance.devices)
    holders = npu.hold(instance.device_ids)
    metrics = _metrics(instance, arguments)
    api = _bound_api(arguments, env, faults, metrics)
    api.revision = revision
    if by_ranktable:
        listeners = _prefill_listeners(instance)
    else:
        ports = ondemand.bind(instance, env)
    _announce(arguments, env, instance)
    _load(settings["load_seconds"])
    if settings["hang"]:
        threading.Event().wait()
    api.engine = Engine(arguments, env, instance, faults, metrics)
    if by_ranktable:
        _link(instance, api.engine, faults, metrics, listeners)
    elif instance.is_prefill:
        ondemand.PrefillSide(instance, api.engine.store, faults, metrics).serve(ports[0])
    api.server_activate()
    _log(f"Starting vLLM API server on http://0.0.0.0:{arguments.port}")
    print("INFO:     Application startup complete.", flush=True)
    api.serve_forever()
    del holders  # held until here


def _metrics(instance: Instance, arguments: argparse.Namespace) -> Metrics:
    labels = {}
    if age.contract() != "v0":
        labels = {"engine": "0", "model_name": arguments.served_model_name or arguments.model}
    names = ["vllm:num_requests_running", "vllm:num_requests_waiting", "standin:links"]
    if instance.is_prefill:
        names += ["standin:kv_blocks_held", "standin:kv_requests_held"]
        names += ["standin:kv_blocks_released_total", "standin:kv_sent_bytes_total"]
        return Metrics(*names, **labels)
    names += ["standin:kv_release_errors_total", "standin:kv_transfer_errors_total"]
    metrics = Metrics(*names, **labels)
    for source in ("external_kv_transfer", "local_compute"):
        metrics.add("vllm:prompt_tokens_by_source_total", 0, source=source)
        metrics.add("standin:requests_by_source_total", 0, source=source)
    return metrics


def _bound_api(
    arguments: argparse.Namespace, env: Environment, faults: Faults, metrics: Metrics
) -> Api:
    # With SO_REUSEADDR, as vLLM binds: unlike the launcher's check it may follow a TIME_WAIT.
    try:
        wire.bind("0.0.0.0", arguments.port).close()
        return Api(arguments, faults, metrics, env.number("VLLM_HTTP_TIMEOUT_KEEP_ALIVE"))
    except OSError as error:
        raise Refusal("port", f"API port {arguments.port}: {error}") from None


def _prefill_listeners(instance: Instance) -> tuple[socket.socket, socket.socket] | None:
    if instance.link is None:
        return None
    address = instance.server.server_ip
    ports = {"link": instance.link.port, "ZMQ": instance.zmq_port}
    bound = []
    for what, port in ports.items():
        try:
            bound.append(wire.bind(address, port))
        except OSError as error:
            raise Refusal("port", f"{what} port {address}:{port}: {error}") from None
    return bound[0], bound[1]


def _link(
    instance: Instance,
    engine: Engine,
    faults: Faults,
    metrics: Metrics,
    listeners: tuple[socket.socket, socket.socket] | None,
) -> None:
    _log("Registering KV caches, waiting for the links of all peers")
    if listeners is None:
        engine.decode.link()
    else:
        PrefillSide(instance, engine.store, faults, metrics).link(*listeners)
    _log("All peers linked")


def _announce(arguments: argparse.Namespace, env: Environment, instance: Instance) -> None:
    _log(f"vLLM API server version {age.value('vllm_version')} (stand-in)")
    _log(f"{instance.role} {instance.name}: cluster id {instance.cluster_id}, "
         f"devices {instance.device_ids}, dp rank {instance.dp_rank} of {instance.dp_size}, "
         f"HCCL_CONNECT_TIMEOUT {instance.link_timeout:g} s")
    for name, meant in env.unread.items():
        _log(f"{name} is read by nothing (contract 4.1), did you mean {meant}?", "WARNING")
    if "decode_gear_list" in (arguments.additional_config or {}):
        _log("decode_gear_list is read only inside graph_model_compile_config (contract 4.6)",
             "WARNING")
    if age.contract() == "v0" and 0 < arguments.max_num_batched_tokens < arguments.max_model_len:
        _log(f"max_num_batched_tokens {arguments.max_num_batched_tokens} < max_model_len "
             f"{arguments.max_model_len}: longer prompts are never scheduled (contract 4.6)",
             "WARNING")


def _load(seconds: float) -> None:
    _log("Starting to load model")
    for shard in range(SHARDS + 1):
        # As vLLM has tqdm write it: a line each, after a carriage return.
        print(f"\rLoading safetensors checkpoint shards: {100 * shard / SHARDS:3.0f}% Completed | "
              f"{shard}/{SHARDS} [00:00<00:00,  1.00it/s]", file=sys.stderr, flush=True)
        if shard < SHARDS:
            time.sleep(seconds / SHARDS)
    _log(f"Model loading took {seconds:.2f} seconds")


def _log(text: str, level: str = "INFO") -> None:
    print(f"{level} {time.strftime('%m-%d %H:%M:%S')} [standin] {text}", flush=True)
