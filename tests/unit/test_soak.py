"""The soak: what counts as growth, and what its report says."""

import httpx
import pytest

from bench import prefect_server
from bench.growth import Comparison, Limit, compare
from bench.soak import FAULTS, KEPT, LIMITS, Upgrade, failed, report


def samples(*values: float) -> list[dict[str, float]]:
    """One figure, so many times."""
    return [{"files": value} for value in values]


@pytest.mark.parametrize(
    ("values", "limit", "grew"),
    [
        ([5.0] * 20, Limit(), False),
        ([5.0] * 19 + [900.0], Limit(), True),
        ([float(n) for n in range(100)], Limit(amount=80), True),
        ([float(n) for n in range(100)], Limit(amount=95), False),
        ([100.0, 110.0], Limit(share=0.1), False),
        ([100.0, 111.0], Limit(share=0.1), True),
        ([9.0, 1.0], Limit(), False),
        ([1.0, 9.0], None, False),
        ([1.0] * 10 + [9.0] * 10, Limit(settles=0.5), False),
        ([1.0] * 10 + [9.0] * 9 + [10.0], Limit(settles=0.5), True),
    ],
)
def test_the_last_tenth_may_be_so_much_above_the_first(
    values: list[float], limit: Limit | None, grew: bool
) -> None:
    (compared,) = compare(samples(*values), {"files": limit} if limit else {})
    assert compared.grew is grew


def test_one_of_many_in_a_tenth_is_no_growth() -> None:
    (compared,) = compare(samples(*[5.0] * 29, 900.0), {"files": Limit()})
    assert compared == Comparison("files", 5.0, 5.0, 5.0)


def test_less_than_two_samples_say_nothing() -> None:
    assert compare([], LIMITS) == compare(samples(1.0), LIMITS) == []


def upgrades(count: int, problem: str = "", growing: float = 0) -> list[Upgrade]:
    """So many, each with a bit more of everything, and the last with a problem."""
    made = [
        Upgrade(n, "", 9.0, 1.0, "", dict.fromkeys(LIMITS, 10 + growing * n))
        for n in range(1, count + 1)
    ]
    return [*made, Upgrade(count + 1, FAULTS[0].name, 9.0, 1.0, problem, {})]


def test_a_soak_fails_of_an_upgrade_and_of_growth_and_says_which() -> None:
    assert not failed(upgrades(KEPT + 10))
    assert "GREW" not in report(upgrades(KEPT + 10))
    assert failed(upgrades(KEPT + 10, problem="expected COMPLETED, found Failed: no"))
    assert "found Failed: no" in report(upgrades(KEPT + 10, problem="… found Failed: no"))
    assert failed(upgrades(KEPT + 10, growing=10_000))
    assert report(upgrades(KEPT + 10, growing=10_000)).count("GREW") == len(LIMITS)


def test_what_hosts_fill_up_with_at_first_is_not_compared() -> None:
    assert not failed(upgrades(KEPT + 1, growing=100))


def test_a_soak_that_compared_nothing_has_not_shown_that_nothing_grows() -> None:
    assert "nothing to compare" in report(upgrades(KEPT + 1))


@pytest.mark.parametrize("first", [httpx.ReadTimeout("busy"), httpx.Response(503)])
def test_a_server_that_is_busy_is_asked_again(
    monkeypatch: pytest.MonkeyPatch, first: httpx.Response | Exception
) -> None:
    """As Prefect's own client does: no upgrade has failed of it."""
    answers = [first, httpx.Response(200, json={"id": 1}, request=httpx.Request("GET", "http://x"))]

    def request(*_: object, **__: object) -> httpx.Response:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(prefect_server.httpx, "request", request)
    monkeypatch.setattr(prefect_server, "RETRY_DELAYS_S", (0.0,))
    server = object.__new__(prefect_server.PrefectServer)
    server.api = "http://x"
    assert server.ask("GET", "flow_runs/1") == {"id": 1}
