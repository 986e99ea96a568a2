#!/usr/bin/env python3
"""Start the API servers of one instance, as the contract's launcher does (4.2 to 4.4)."""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

TERMINATE_SECONDS = 5.0


def main() -> None:
    """Start the servers and stay until the first one ends."""
    args = parse_arguments()
    log(f"starting {args.num_servers} API server(s) of {args.model_path}")
    check_base_port(args.base_api_port)
    Path(args.log_dir).mkdir(parents=True, exist_ok=True)
    servers: list[subprocess.Popen] = []
    # Raised in place, so that nothing is stopped while a lock of subprocess is held.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        start_all(args, servers)
        wait_for_first(servers)
    except KeyboardInterrupt:
        log("interrupted, stopping all")
    stop(servers)  # and end with 0, whatever a server died of, as the original does


def start_all(args: argparse.Namespace, servers: list[subprocess.Popen]) -> None:
    """Start the servers one by one, each on the next free port."""
    taken: set[int] = set()
    for rank in range(args.num_servers):
        port = find_available_port(args.base_api_port + rank, args.max_port_attempts, taken)
        taken.add(port)
        servers.append(start_server(args, rank, port))
        log(f"server {rank}: pid {servers[-1].pid}, port {port}")


def parse_arguments() -> argparse.Namespace:
    """Parse the flags of contract 4.2; exit with code 2 at an unknown one."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add = parser.add_argument
    add("--num-servers", type=int, default=2)
    add("--num-dp", type=int)
    add("--server-offset", type=int, default=0)
    add("--model-path", required=True)
    add("--base-api-port", type=int, default=9000)
    add("--master-ip", required=True)
    add("--master-port", type=int, default=8000)
    add("--gpu-util", "--gpu-memory-utilization", type=float, default=0.9)
    add("--block-size", type=int, default=128)
    add("--tp", type=int, default=1)
    add("--served-model-name", required=True)
    add("--max-model-len", type=int, default=16384)
    add("--max-port-attempts", type=int, default=20)
    add("--kv-transfer-config", default="")
    add("--extra-args", default="")
    add("--additional-config", type=json_text, default="")
    add("--log-dir", default="logs")
    add("--no-enable-prefix-caching", action="store_true")
    add("--no-enable-chunked-prefill", action="store_true")
    add("--enable-mtp", action="store_true")
    add("--num-speculative-tokens", type=int, default=1)
    args = parser.parse_args()
    args.num_dp = args.num_servers if args.num_dp is None else args.num_dp
    if args.num_dp < args.num_servers:
        parser.error(f"--num-dp {args.num_dp} must be >= --num-servers {args.num_servers}")
    return args


def json_text(text: str) -> str:
    """Accept a text that is JSON, or empty."""
    if text:
        try:
            json.loads(text)
        except json.JSONDecodeError as error:
            raise argparse.ArgumentTypeError(f"not JSON: {error}") from None
    return text


def check_base_port(port: int) -> None:
    """Raise RuntimeError when the first API port is taken."""
    if not is_free(port):
        raise RuntimeError(f"base API port {port} is already in use")


def find_available_port(first: int, attempts: int, taken: set[int]) -> int:
    """Find the first free port from `first` upward; raise RuntimeError after so many attempts."""
    for port in range(first, first + attempts):
        if port not in taken and is_free(port):
            return port
    raise RuntimeError(f"no free port in {attempts} attempt(s) from {first} upward")


def is_free(port: int) -> bool:
    """Tell whether the port can be bound; close it again at once.

    Bound without SO_REUSEADDR: connections of an earlier server that linger in TIME_WAIT (60 s)
    make the port count as taken.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def start_server(args: argparse.Namespace, rank: int, port: int) -> subprocess.Popen:
    """Start one `vllm serve`; its output goes to server_<rank>.log, truncated."""
    dp_rank = str(rank + args.server_offset)
    env = os.environ | {
        "VLLM_DP_SIZE": str(args.num_dp),
        "VLLM_DP_RANK": dp_rank,
        "VLLM_DP_RANK_LOCAL": dp_rank,
        "VLLM_DP_MASTER_IP": args.master_ip,
        "VLLM_DP_MASTER_PORT": str(args.master_port),
    }
    with (Path(args.log_dir) / f"server_{rank}.log").open("wb") as output:
        return subprocess.Popen(
            command(args, port), env=env, stdout=output, stderr=subprocess.STDOUT
        )


def command(args: argparse.Namespace, port: int) -> list[str]:
    """Build the argv of contract 4.3, in its order."""
    argv = ["vllm", "serve", args.model_path, "--trust-remote-code"]
    argv += ["--gpu-memory-utilization", str(args.gpu_util), "--block_size", str(args.block_size)]
    argv += ["--tensor-parallel-size", str(args.tp)]
    argv += ["--data-parallel-size", "1", "--data-parallel-size-local", "1"]
    argv += ["--data-parallel-address", args.master_ip]
    argv += ["--data-parallel-rpc-port", str(args.master_port), "--port", str(port)]
    argv += ["--served-model-name", args.served_model_name]
    argv += ["--max-model-len", str(args.max_model_len)]
    if args.enable_mtp:
        count = args.num_speculative_tokens
        speculative = {"method": "deepseek_mtp", "num_speculative_tokens": count}
        argv += ["--speculative_config", json.dumps(speculative)]
    if args.kv_transfer_config:
        argv += ["--kv-transfer-config", args.kv_transfer_config]
    argv += args.extra_args.split()
    if args.additional_config:
        argv += ["--additional-config", args.additional_config]
    if args.no_enable_prefix_caching:
        argv.append("--no-enable-prefix-caching")
    if args.no_enable_chunked_prefill:
        argv.append("--no-enable-chunked-prefill")
    return argv


def wait_for_first(servers: list[subprocess.Popen]) -> None:
    """Wait until one server has ended."""
    # Waits for the event instead of polling each second: a death is noticed at once.
    ranks = {server.pid: rank for rank, server in enumerate(servers)}
    while (pid := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT).si_pid) not in ranks:
        os.waitpid(pid, 0)  # as PID 1 of a container it inherits the orphans
    rank = ranks[pid]
    code = servers[rank].wait()
    log(f"server {rank} (pid {pid}) exited with code {code}, stopping the others")


def stop(servers: list[subprocess.Popen]) -> None:
    """Terminate what still runs, kill what does not end in time."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # one is enough
    for server in servers:
        if server.poll() is None:
            server.terminate()
    deadline = time.monotonic() + TERMINATE_SECONDS
    for server in servers:
        try:
            server.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def log(text: str) -> None:
    """One line of the launcher's log, at once."""
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} start_api_servers: {text}", flush=True)


if __name__ == "__main__":
    main()
