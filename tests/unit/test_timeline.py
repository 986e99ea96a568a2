"""The bench knows every step of the runbook."""

import re

import pytest

from bench.__main__ import MEANING
from bench.timeline import BETWEEN, PARTS, part_of
from pd_deploy import tasks
from pd_deploy.tasks.step import Step
from tests.unit.example import ROOT

STEPS = [
    step.name
    for step in vars(tasks).values()
    if isinstance(step, Step) and step not in (tasks.gate, tasks.stop)  # `stop`: only of teardown
]
GATES = [
    name
    for path in sorted((ROOT / "flows").glob("*.py"))
    for name in re.findall(r'\.joined\("([^"]+)"\)', path.read_text())
]
STARTED = ["serve: decode started", "way back: prefill started"]


@pytest.mark.parametrize("name", [*STEPS, *GATES, *STARTED])
def test_each_step_belongs_to_a_part(name: str) -> None:
    assert part_of(name) in MEANING


def test_each_part_has_a_meaning() -> None:
    assert len(STEPS) > 20
    assert len(GATES) > 4
    assert MEANING.keys() == {*PARTS.values(), BETWEEN}
