"""The bench knows every step of the runbook."""

import re

import pytest

from bench.__main__ import MEANING
from bench.timeline import BETWEEN, PARTS, part_of
from tests.unit.example import ROOT

STEPS = [
    name
    for path in sorted((ROOT / "tasks").glob("*.py"))
    for name in re.findall(r'^@step\("([^"]+)"\)', path.read_text(), re.MULTILINE)
    if not name.startswith("stop ")  # only of the teardown
]


@pytest.mark.parametrize("name", STEPS)
def test_each_step_belongs_to_a_part(name: str) -> None:
    assert part_of(name) in MEANING


def test_each_part_has_a_meaning() -> None:
    assert STEPS
    assert MEANING.keys() == {*PARTS.values(), BETWEEN}
