"""Who is asked for a hand-over, and what the counters say of it."""

import pytest

from pd_deploy.steps.verify.handover import Handover, pairs, way_of
from pd_deploy.steps.verify.servers import Counts

NOTHING = Counts(None, None, None)


@pytest.mark.parametrize(
    ("prefill", "decode", "expected"),
    [
        ("abc", "x", ["ax", "bx", "cx"]),
        ("a", "xyz", ["ax", "ay", "az"]),
        ("ab", "xyz", ["ax", "by", "az"]),
        ("abc", "xy", ["ax", "by", "cx"]),
    ],
)
def test_pairs_have_every_prefill_and_every_decode(
    prefill: str, decode: str, expected: list[str]
) -> None:
    found = pairs(list(prefill), list(decode))  # type: ignore[arg-type]
    assert ["".join(pair) for pair in found] == expected  # type: ignore[arg-type]


def way(tokens: float, moved: float | None, served: float = 1) -> Handover:
    found = way_of("p2 (b)", "d0 (b)", 40, Counts(served, tokens, moved))
    assert found
    return found


def test_the_way_of_a_request_is_told_by_instances_and_hosts() -> None:
    assert (
        str(way(40, 1000)) == "KV of 40 of 40 prompt tokens went from p2 (b) to d0 (b), 1000 bytes"
    )
    assert str(way(40, None)) == "KV of 40 of 40 prompt tokens went from p2 (b) to d0 (b)"


@pytest.mark.parametrize(
    ("tokens", "moved", "complete"),
    [
        (40, 1000, True),
        (39, 1000, True),  # the last token is computed for the first of the answer
        (38, 1000, False),
        (0, 0, False),
        (40, 0, False),  # counted, but nothing moved
        (40, None, True),  # bytes are not counted
    ],
)
def test_kv_has_to_come_for_the_whole_prompt(
    tokens: int, moved: float | None, complete: bool
) -> None:
    assert way(tokens, moved).complete is complete


@pytest.mark.parametrize(
    ("tokens", "served", "alone"), [(40, 1, True), (40, 2, False), (80, 1, False), (39, 1, True)]
)
def test_other_requests_show_in_the_counters(tokens: int, served: int, alone: bool) -> None:
    """Their KV must not make up for ours that got lost."""
    assert way(tokens, None, served).alone is alone


@pytest.mark.parametrize(
    ("prompt_tokens", "since"), [(None, Counts(1, 40, None)), (40, Counts(1, None, None))]
)
def test_what_is_not_counted_or_said_tells_no_way(prompt_tokens: int | None, since: Counts) -> None:
    assert way_of("p0 (a)", "d0 (b)", prompt_tokens, since) is None


@pytest.mark.parametrize(
    ("now", "before", "since"),
    [
        (Counts(3, 10, None), Counts(1, 4, None), Counts(2, 6, None)),
        (Counts(3, 10, 8), NOTHING, Counts(3, 10, 8)),  # shown once it has counted
        (NOTHING, NOTHING, NOTHING),
    ],
)
def test_counters_are_compared(now: Counts, before: Counts, since: Counts) -> None:
    assert now.since(before) == since


@pytest.mark.parametrize(
    ("since", "complete"),
    [
        (Counts(1, 40, 1000), True),
        (Counts(1, 40, None), True),
        (Counts(1, None, None), True),
        (NOTHING, True),
        (Counts(0, 40, 1000), False),
        (Counts(1, 0, None), False),
        (Counts(1, 40, 0), False),
    ],
)
def test_a_request_is_counted_once_all_that_is_counted_has_moved(
    since: Counts, complete: bool
) -> None:
    assert since.is_complete() is complete
