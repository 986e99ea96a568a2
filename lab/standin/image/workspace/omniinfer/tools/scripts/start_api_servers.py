#!/usr/bin/env python3
"""Start the API servers of one instance, as the launcher of the image's age does (4.2 to 4.4).

The same file stands for all of them; in images of the contract roles it lies elsewhere.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ASCEND = "usr/local/Ascend/latest"
ABOVE = Path(__file__).resolve().parents
sys.path.insert(0, str(next(top / ASCEND for top in ABOVE if (top / ASCEND / "standin").is_dir())))

from standin import age  # noqa: E402

TERMINATE_SECONDS = 5.0
age.follow(__file__)
try:
    CONTRACT = age.contract()
    COUNTS_UP = CONTRACT != "v0" or age.has("launcher-options")  # the newer search for free ports
except age.Refusal as refusal:
    sys.exit(str(refusal))
# Flags that came with the date, which v1 has too; type or argparse's action.
NEWER_FLAGS = {
    "--load-format": str,
    "--dtype": str,
    "--reasoning-parser": str,
    "--tool-call-parser": str,
    "--tool-parser-plugin": str,
    "--chat-template": str,
    "--reasoning-config": str,
    "--enable-auto-tool-choice": bool,
}


def main() -> None:
    """Start the servers and stay until the first one ends."""
    args = parse_arguments()
    log(f"starting {args.num_servers} API server(s) of {args.model_path}")
    if not COUNTS_UP:
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
    port = args.base_api_port - 1
    for rank in range(args.num_servers):
        first = port + 1 if COUNTS_UP else args.base_api_port + rank
        port = find_available_port(first, args.max_port_attempts, taken)
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
    if COUNTS_UP:
        add("--pp", type=int, default=1)
        add("--distributed-executor-backend")
    if COUNTS_UP and CONTRACT != "roles":
        for flag, kind in NEWER_FLAGS.items():
            if kind is bool:
                add(flag, action="store_true")
            else:
                add(flag, type=kind)
        add("--print-screen", action="store_true")
    if CONTRACT != "v0":
        add("--use-inventory-devices", action="store_true")
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
    dp_rank = str(data_parallel_rank(args, rank))
    env = os.environ | share_of(args, rank) | {
        "VLLM_DP_SIZE": str(args.num_dp),
        "VLLM_DP_RANK": dp_rank,
        "VLLM_DP_RANK_LOCAL": dp_rank,
        "VLLM_DP_MASTER_IP": args.master_ip,
        "VLLM_DP_MASTER_PORT": str(args.master_port),
    }
    with (Path(args.log_dir) / f"server_{rank}.log").open("wb") as output:
        return subprocess.Popen(
            command(args, rank, port), env=env, stdout=output, stderr=subprocess.STDOUT
        )


def data_parallel_rank(args: argparse.Namespace, rank: int) -> int:
    """Compute VLLM_DP_RANK of a server; the offset counts servers, in newer launchers devices."""
    if CONTRACT != "v0" or age.has("server-offset-in-devices"):
        return rank + args.server_offset // args.tp
    return rank + args.server_offset


def share_of(args: argparse.Namespace, rank: int) -> dict[str, str]:
    """Return what is set of a server's share of the devices: nothing in v0.

    They are counted from 0, whatever the instance was given, unless told to use its own.
    """
    if CONTRACT == "v0":
        return {}
    count = args.tp * args.pp
    share = slice(rank * count, (rank + 1) * count)
    given = [item.strip() for item in os.environ.get("ASCEND_RT_VISIBLE_DEVICES", "").split(",")]
    from_zero = [str(device) for device in range(share.stop)]
    mine = (given if args.use_inventory_devices else from_zero)[share]
    return {
        "ASCEND_RT_VISIBLE_DEVICES": ",".join(item for item in mine if item),
        "STANDIN_SERVER": str(rank),  # the engine knows it by other means: its ports follow
    }


def extra_arguments(text: str) -> list[str]:
    """Split --extra-args: at blanks, in roles at each flag and then at single blanks."""
    if CONTRACT != "roles":
        return text.split()
    arguments = []
    for part in (part.strip(" ") for part in text.split("--")):
        # The one flag whose value may hold blanks.
        parts = 1 if part.startswith("compilation-config ") else -1
        if part:
            arguments += f"--{part}".split(" ", parts)
    return arguments


def data_parallel_arguments(args: argparse.Namespace, rank: int) -> list[str]:
    """Return what vLLM is told of data parallelism besides the environment."""
    address = ["--data-parallel-address", args.master_ip]
    address += ["--data-parallel-rpc-port", str(args.master_port)]
    if CONTRACT != "roles":
        return ["--data-parallel-size", "1", "--data-parallel-size-local", "1", *address]
    role = os.environ.get("OMNI_PD_ROLE") or os.environ.get("ROLE", "prefill")
    if role != "decode" or args.num_dp == 1:
        return address
    size, number = str(args.num_dp), str(data_parallel_rank(args, rank))
    return [*address, "--data-parallel-size", size, "--data-parallel-rank", number]


def newer_arguments(args: argparse.Namespace) -> list[str]:
    """Pass on what only newer launchers take."""
    argv = []
    if CONTRACT != "v0" or getattr(args, "pp", 1) > 1:
        argv += ["--pipeline-parallel-size", str(args.pp)]
    if getattr(args, "distributed_executor_backend", None):
        argv += ["--distributed-executor-backend", args.distributed_executor_backend]
    for flag, kind in NEWER_FLAGS.items():
        value = getattr(args, flag.strip("-").replace("-", "_"), None)
        if value:
            argv += [flag] if kind is bool else [flag, str(value)]
    return argv


def command(args: argparse.Namespace, rank: int, port: int) -> list[str]:
    """Build the argv of contract 4.3, in its order."""
    argv = ["vllm", "serve", args.model_path, "--trust-remote-code"]
    argv += ["--gpu-memory-utilization", str(args.gpu_util), "--block_size", str(args.block_size)]
    argv += ["--tensor-parallel-size", str(args.tp)]
    argv += [*data_parallel_arguments(args, rank), "--port", str(port)]
    argv += ["--served-model-name", args.served_model_name]
    argv += ["--max-model-len", str(args.max_model_len)]
    if args.enable_mtp:
        count = args.num_speculative_tokens
        method = "deepseek_mtp" if CONTRACT == "v0" else "mtp"
        speculative = {"method": method, "num_speculative_tokens": count}
        argv += ["--speculative_config", json.dumps(speculative)]
    if args.kv_transfer_config:
        argv += ["--kv-transfer-config", args.kv_transfer_config]
    argv += extra_arguments(args.extra_args)
    argv += newer_arguments(args)
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
