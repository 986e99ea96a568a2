"""Counters are found in what servers show on /metrics."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pd_deploy.engines.base import Counter
from pd_deploy.engines.omniinfer import engine as omniinfer
from pd_deploy.engines.vllm import Vllm
from pd_deploy.steps.verify import metrics

PAGE = """\
# HELP vllm:prompt_tokens_by_source_total Number of prompt tokens by source.
# TYPE vllm:prompt_tokens_by_source_total counter
vllm:prompt_tokens_by_source_total{engine="0",model_name="a \\"b\\", c",source="local_compute"} 3.0
vllm:prompt_tokens_by_source_total{engine="0",model_name="x",source="external_kv_transfer"} 40.0
vllm:prompt_tokens_by_source_total{engine="1",model_name="x",source="external_kv_transfer"} 2.0
vllm:nixl_bytes_transferred_sum{engine="0"} 8192.0
process_start_time_seconds 1.76e+09
up 1 1700000000
broken{ 1
not_a_number x
"""


def test_samples_with_the_labels_of_a_counter_are_added_up() -> None:
    page = metrics.parse(PAGE)
    assert metrics.total([page], Vllm.COUNTERS.kv_tokens) == 42
    assert metrics.total([page, page], Vllm.COUNTERS.kv_tokens) == 84
    assert metrics.total([page], Vllm.COUNTERS.kv_bytes) == 8192
    assert metrics.total([page], Counter("up")) == 1


ODD = """\
# TYPE one counter
one 1
# TYPE
# TYPE two of_another_kind
two{le="+Inf"} 2e0
# HELP 3 no name
three{a="b" 3
four{a="b",a="c"} 4
five{a="b",} 5
six{a="b"} 6 # {trace_id="x"} 0.5
seven NaN
eight{a="b", ="c"} 8
# EOF
"""
ODD += f"nine {'9' * 400}\nten 1 {'9' * 400}\n"


def test_what_is_no_sample_costs_no_other_and_types_change_no_name() -> None:
    page = metrics.parse(ODD)
    assert set(page) >= {"one", "two", "five", "seven"}
    assert page["two"] == [({"le": "+Inf"}, 2)]
    assert not {"three", "four", "eight", "nine", "ten", "one_total"} & set(page)


@given(st.lists(st.text() | st.text('ab_{}="\\\\, #1.e\t'), max_size=5))
def test_no_page_is_an_accident(lines: list[str]) -> None:
    metrics.parse("\n".join([*lines, "last 1"]))


def test_a_label_may_hold_quotes_and_commas() -> None:
    labels, value = metrics.parse(PAGE)["vllm:prompt_tokens_by_source_total"][0]
    assert labels["model_name"] == 'a "b", c'
    assert labels["source"] == "local_compute"
    assert value == 3


@pytest.mark.parametrize("page", ["", "<html>", PAGE.replace("prompt_tokens_by_source", "other")])
def test_a_server_that_does_not_count_is_told_from_one_that_counted_nothing(page: str) -> None:
    assert metrics.total([metrics.parse(page)], omniinfer.COUNTERS.kv_tokens) is None
    silent = PAGE.replace("external_kv_transfer", "local_cache_hit")
    assert metrics.total([metrics.parse(silent)], omniinfer.COUNTERS.kv_tokens) == 0
