"""Counters and gauges in Prometheus' text format."""

import threading

_HELP = {
    "vllm:prompt_tokens_total": ("counter", "Prompt tokens processed."),
    "vllm:generation_tokens_total": ("counter", "Tokens generated."),
    "vllm:request_success_total": ("counter", "Finished requests by reason."),
    "vllm:num_requests_running": ("gauge", "Requests being executed."),
    "vllm:num_requests_waiting": ("gauge", "Requests not yet scheduled."),
    "vllm:prompt_tokens_by_source_total": ("counter", "Prompt tokens by where their KV came from."),
    "standin:requests_total": ("counter", "Completion requests by HTTP status."),
    "standin:requests_by_source_total": ("counter", "Decoded requests by where their KV came from."),
    "standin:kv_transfer_bytes_total": ("counter", "KV bytes pulled, by prefill cluster id."),
    "standin:kv_transfers_total": ("counter", "KV pulls, by prefill cluster id."),
    "standin:kv_transfer_errors_total": ("counter", "KV pulls that failed."),
    "standin:kv_sent_bytes_total": ("counter", "KV bytes handed to decode."),
    "standin:kv_blocks_held": ("gauge", "KV blocks kept for decode."),
    "standin:kv_requests_held": ("gauge", "Requests whose KV is kept for decode."),
    "standin:kv_blocks_released_total": ("counter", "KV blocks freed after decode's release."),
    "standin:kv_release_errors_total": ("counter", "Releases that did not reach prefill."),
    "standin:links": ("gauge", "Peers linked."),
}


class Metrics:
    """Thread-safe values by name and labels."""

    def __init__(self, *always: str, **vllm_labels: str) -> None:
        """Begin with some at 0.

        Args:
            vllm_labels: what vLLM's own metrics have besides.
        """
        self._vllm_labels = vllm_labels
        self._lock = threading.Lock()
        self._values: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {
            (name, ()): 0 for name in always
        }

    def add(self, name: str, amount: float = 1, **labels: object) -> None:
        """Add to a counter or gauge."""
        key = (name, tuple(sorted((k, str(v)) for k, v in labels.items())))
        with self._lock:
            self._values[key] = self._values.get(key, 0) + amount

    def render(self) -> str:
        """Write the text of /metrics."""
        with self._lock:
            values = sorted(self._values.items())
        lines: list[str] = []
        seen = ""
        for (name, labels), value in values:
            if name != seen:
                kind, text = _HELP[name]
                lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
                seen = name
            common = self._vllm_labels if name.startswith("vllm:") else {}
            inner = ",".join(f'{k}="{v}"' for k, v in sorted((common | dict(labels)).items()))
            lines.append(f"{name}{{{inner}}} {value}" if inner else f"{name} {value}")
        return "\n".join(lines) + "\n"
