"""The names of a lab's hosts."""

import pytest

from pd_deploy.lab.lifecycle import host_names


@pytest.mark.parametrize(
    ("count", "first", "last"), [(1, "a", "a"), (26, "a", "z"), (28, "a", "ab"), (703, "a", "aaa")]
)
def test_hosts_are_named_as_columns_of_a_spreadsheet(count: int, first: str, last: str) -> None:
    names = host_names(count)
    assert (names[0], names[-1], len(set(names))) == (first, last, count)
