"""Which devices the workers of a server take: nothing tells them, they compute it (1.6)."""

from standin import npu
from standin.environment import Environment
from standin.ranktable import Server
from standin.rules import Refusal


def chosen_devices(
    env: Environment, visible: list[int], tp: int, workers: int, server: Server
) -> list[int]:
    """List the physical ids in rank order.

    A worker's place is local_rank + VLLM_DP_RANK_LOCAL * tp - SERVER_OFFSET (in devices), counted
    in ASCEND_RT_VISIBLE_DEVICES if that is set, else in the host's physical ids.

    Args:
        visible: ASCEND_RT_VISIBLE_DEVICES; empty = not set.
        workers: of this server on this host.
        server: whose devices stand for those of the host where /etc/hccn.conf names none.

    Raises:
        Refusal: vLLM or a worker would look for a device that does not exist.
    """
    if visible and env.number("VLLM_DP_SIZE") > 1:
        _check_range_of_vllm(env, visible, tp)
    first = env.number("VLLM_DP_RANK_LOCAL") * tp - env.number("SERVER_OFFSET")
    existing = npu.of_host() or set(server.device_ids)
    return [_device(first + rank, visible, existing, env) for rank in range(workers)]


def inputs(env: Environment) -> str:
    """List the variables that decide it, for messages."""
    names = ("VLLM_DP_RANK_LOCAL", "SERVER_OFFSET", "ASCEND_RT_VISIBLE_DEVICES")
    return ", ".join(f"{name}={env[name]}" for name in names)


def _check_range_of_vllm(env: Environment, visible: list[int], tp: int) -> None:
    # With data parallelism vLLM 0.9.0 cuts the list by the local rank, whatever SERVER_OFFSET is.
    first = env.number("VLLM_DP_RANK_LOCAL") * tp
    if first + tp > len(visible):
        raise Refusal(
            "device-choice",
            "IndexError: Error setting ASCEND_RT_VISIBLE_DEVICES: "
            f"local range: [{first}, {first + tp}) base value: {env['ASCEND_RT_VISIBLE_DEVICES']}",
        )


def _device(place: int, visible: list[int], existing: set[int], env: Environment) -> int:
    if visible and not 0 <= place < len(visible):
        raise Refusal("device-choice", f"place {place} of {visible} ({inputs(env)})")
    device = visible[place] if visible else place
    if device not in existing:
        raise Refusal(
            "device-choice", f"device {device}, the host has {sorted(existing)} ({inputs(env)})"
        )
    return device
