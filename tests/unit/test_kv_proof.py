"""What the servers' counters say about the way of the KV."""

import pytest


from pd_deploy.engines import omniinfer
from tests.unit import example

SERVING = example.place().instances
ANSWER = Answer("text", 40, 0.1)
NOTHING = Counts(None, None, None)
BEFORE = {
    "p0": Counts(3, 0, None),
    "p1": NOTHING,
    "p2": Counts(1, 0, None),
    "d0": Counts(4, 100, 8000),
}


def way(requests: int = 1, **after: Counts) -> Handover:
    return handover(SERVING, BEFORE, BEFORE | after, [ANSWER] * requests)


def test_the_way_of_a_request_is_named_by_instances_and_hosts() -> None:
    found = way(p2=Counts(2, 0, None), d0=Counts(5, 140, 9000))
    assert str(found) == "KV of 40 of 40 prompt tokens went from p2 (b) to d0 (b), 1000 bytes"
    assert found.complete


def test_a_counter_that_appears_with_its_first_request_has_counted_it() -> None:
    assert way(p1=Counts(1, 0, None), d0=Counts(5, 140, 9000)).prefill == "p1 (a)"


@pytest.mark.parametrize(
    ("tokens", "moved", "prefill", "complete"),
    [
        (40, 1000, 1, True),
        (39, 1000, 1, True),  # the last token is computed for the first of the answer
        (38, 1000, 1, False),
        (0, 0, 1, False),
        (40, 0, 1, False),  # counted, but nothing moved
        (40, 1000, 0, False),  # no prefill has served
    ],
)
def test_kv_has_to_come_from_a_prefill_for_the_whole_prompt(
    tokens: int, moved: int, prefill: int, complete: bool
) -> None:
    found = way(p0=Counts(3 + prefill, 0, None), d0=Counts(5, 100 + tokens, 8000 + moved))
    assert found.complete is complete


def test_where_no_bytes_are_counted_tokens_are_enough() -> None:
    before = BEFORE | {"d0": Counts(4, 100, None)}
    after = before | {"p0": Counts(4, 0, None), "d0": Counts(5, 140, None)}
    assert handover(SERVING, before, after, [ANSWER]).complete


def test_requests_at_once_are_counted_together() -> None:
    found = way(2, p0=Counts(4, 0, None), p1=Counts(1, 0, None), d0=Counts(6, 178, 9000))
    assert (found.prefill, found.prompt_tokens, found.kv_tokens) == ("p0 (a), p1 (a)", 80, 78)
    assert found.complete


@pytest.mark.parametrize(
    ("after", "answer", "reason"),
    [
        ({}, ANSWER, ""),
        ({"d0": Counts(4, None, None)}, ANSWER,
         "d0 counts no vllm:prompt_tokens_by_source_total"),
        ({"d0": Counts(None, 1, None)}, ANSWER, "d0 counts no vllm:request_success_total"),
        (dict.fromkeys(("p0", "p1", "p2"), NOTHING), ANSWER,
         "p0, p1, p2 count no vllm:request_success_total"),
        ({}, Answer("text", None, 0.1), "the answer does not say how long the prompt is"),
    ],
)  # fmt: skip
def test_what_is_not_counted_makes_it_not_provable(
    after: dict[str, Counts], answer: Answer, reason: str
) -> None:
    assert not_counted(omniinfer.COUNTERS, SERVING, BEFORE | after, [answer]) == reason
