"""What answers say of the KV behind them."""

import pytest

from pd_deploy.steps.verify.verdict import difference, fits, strays

SAME = {"p0": ["a", "a"], "p1": ["a", "a"]}


def test_equal_answers_differ_nowhere() -> None:
    assert difference("?", SAME) is None
    assert difference("?", {"p0": ["a"]}) is None
    assert difference("?", {}) is None


def test_a_prefill_that_differs_from_the_others_is_named() -> None:
    found = difference("?", SAME | {"p2": ["b", "b"]})
    assert found
    assert not found.by_itself
    assert str(found) == "'a' with the KV of p0 and 'b' with that of p2 to '?'"


@pytest.mark.parametrize("texts", [["a", "b"], ["b", "a"], ["a", "a", "c"]])
def test_a_prefill_that_differs_from_itself_comes_before_all_else(texts: list[str]) -> None:
    """Then a difference from others means nothing."""
    found = difference("?", {"p0": ["x", "x"], "p1": texts})
    assert found
    assert found.by_itself
    assert found.of_one == "p1"


def test_a_pattern_is_looked_for_in_the_text() -> None:
    assert fits(r"^\s*13\b", " 13, 14")
    assert not fits(r"^\s*13\b", " 130, 14")
    assert not fits(r"^\s*13\b", " river 13")


@pytest.mark.parametrize(
    ("handed_over", "alone", "expected"),
    [
        ({"1": "a", "2": "b", "3": "c"}, {"1": "a", "2": "b", "3": "c"}, False),
        ({"1": "a", "2": "b", "3": "c"}, {"1": "x", "2": "y", "3": "c"}, False),
        ({"1": "a", "2": "b", "3": "c"}, {"1": "x", "2": "y", "3": "z"}, True),
        ({"1": "a", "2": "b"}, {"2": "x"}, True),
        ({"1": "a"}, {}, False),  # decode alone was not deterministic
    ],
)
def test_other_kv_shows_in_every_answer(
    handed_over: dict[str, str], alone: dict[str, str], expected: bool
) -> None:
    """One that differs may be rounding."""
    assert strays(handed_over, alone) is expected
