"""deploy/grafana-dashboard.json: what it asks for is what engines and proxies export."""

import json
import re
from collections.abc import Iterator
from typing import Any

from pd_deploy.planning import scraping
from tests.unit import example

PATH = example.ROOT / "deploy/grafana-dashboard.json"
DASHBOARD: dict[str, Any] = json.loads(PATH.read_text())
STANDIN = example.ROOT / "lab/standin/image/usr/local/Ascend/latest/standin/metrics.py"
# As vLLM 0.32 exports them; those of the second line were in versions up to 0.11.
HISTOGRAMS = {
    "vllm:time_to_first_token_seconds", "vllm:inter_token_latency_seconds",
    "vllm:time_per_output_token_seconds",
    "vllm:nixl_xfer_time_seconds", "vllm:nixl_bytes_transferred",
}  # fmt: skip
OF_VLLM = {
    "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc",
    "vllm:gpu_cache_usage_perc",
    "vllm:num_preemptions_total", "vllm:prompt_tokens_total", "vllm:generation_tokens_total",
    "vllm:prompt_tokens_by_source_total", "vllm:request_success_total",
    "vllm:nixl_num_failed_transfers_total",
    *(f"{name}_{part}" for name in HISTOGRAMS for part in ("bucket", "count", "sum")),
}  # fmt: skip
OF_ROUTER = {"vllm_router_pd_requests_total", "vllm_router_pd_errors_total"}  # 0.1.17
# In upstream's source since October 2025, with the labels endpoint and phase.
OF_OMNI_PROXY = {
    "omni_prefill_running_requests", "omni_decode_running_requests", "omni_phase_waiting",
}  # fmt: skip
SELECTOR = re.compile(r"([a-zA-Z_:][\w:]*)\{([^}]*)\}")


def expressions() -> Iterator[str]:
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", ()):
            yield target["expr"]


def test_every_metric_is_one_that_somebody_exports() -> None:
    of_standin = set(re.findall(r'^    "(.+)": \("', STANDIN.read_text(), re.MULTILINE))
    assert "vllm:num_requests_running" in of_standin
    exported = {"up"} | OF_VLLM | OF_ROUTER | OF_OMNI_PROXY
    named = {name for e in expressions() for name, _ in SELECTOR.findall(e)}
    assert named - exported == set()
    assert {name for name in of_standin if name.startswith("vllm:")} <= OF_VLLM


def test_every_query_is_of_one_service_by_labels_that_targets_have() -> None:
    (server, *_) = scraping.groups(example.service(), example.place(), "1-0123abcd")
    of_target = server["labels"].keys()
    of_metric = {"le", "source", "finished_reason", "phase", "endpoint"}
    for expression in expressions():
        selectors = SELECTOR.findall(expression)
        assert selectors
        for _, labels in selectors:
            assert labels.split(", ")[0] == 'deployment="$deployment"'
            assert set(re.findall(r"(\w+)!?=", labels)) <= of_target
            assert set(re.findall(r'role="(\w+)"', labels)) <= {"prefill", "decode", "proxy"}
        for grouped in re.findall(r" by \(([^)]*)\)", expression):
            assert set(grouped.split(", ")) <= of_target | of_metric


def test_prefill_and_decode_are_told_apart() -> None:
    """A time to the first token, or a queue, of both together says nothing."""
    for expression in expressions():
        for name, labels in SELECTOR.findall(expression):
            if "time_to_first" in name or "num_requests" in name or name.endswith("tokens_total"):
                assert 'role="' in labels, expression


def test_it_is_one_that_grafana_takes() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = {(p["gridPos"]["x"], p["gridPos"]["y"]) for p in panels}
    assert len(places) == len(panels)
    assert all(p["gridPos"]["x"] + p["gridPos"]["w"] <= 24 for p in panels)
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    used = set(re.findall(r"\$\{?([a-z]+)", PATH.read_text()))
    assert used == variables
    assert "id" not in DASHBOARD  # else importing it would replace another
