"""What steps are given and wait for, as Prefect sees it: little, however many hosts there are."""

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
from prefect import Task
from prefect.context import FlowRunContext
from prefect.utilities.collections import visit_collection
from prefect.utilities.engine import collect_task_run_inputs_sync

from pd_deploy.flows.line import Line
from pd_deploy.steps.barrier import Barrier
from pd_deploy.steps.report import Gate, Report
from pd_deploy.steps.timeline import Timeline
from pd_deploy.tasks.step import step


@step("work {name}")
async def work(state: object, name: str) -> Report:
    """Do something on a host."""
    return Report("work", name, name, False, "done")


ASKED = "prefect.utilities.engine.get_state_for_result"


class Seen:
    """The calls of tasks as Prefect gets them."""

    def __init__(self) -> None:
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any], list[Any]]] = []

    async def run(
        self, task: Task[..., Any], *args: Any, wait_for: list[Any], **kwargs: Any
    ) -> Any:
        """Keep a call, and run it."""
        self.calls.append((args, kwargs, wait_for))
        return await task.fn(*(arg.unwrap() for arg in args))

    @property
    def edges(self) -> list[int]:
        """How many others each waits for."""
        return [len(wait_for) for *_, wait_for in self.calls]


@pytest.fixture
def seen() -> Iterator[Seen]:
    calls = Seen()

    async def run(task: Any, *args: Any, **kwargs: Any) -> Any:
        return await calls.run(task, *args, **kwargs)

    context = FlowRunContext.model_construct(run_results={})
    with context, mock.patch.object(Task, "__call__", run), mock.patch("pd_deploy.tasks.story.log"):
        yield calls


def visits(given: object) -> int:
    """How much Prefect looks at when it searches for results of other tasks."""
    count = 0

    def visit(_: object, context: dict[str, Any]) -> None:
        nonlocal count
        count += 1

    visit_collection(given, visit, context={})
    return count


async def test_prefect_searches_neither_what_a_step_is_given_nor_what_it_waits_for(
    seen: Seen,
) -> None:
    state = {"hosts": [Report("work", str(i), "a", False, "") for i in range(100)]}
    first = await work(state, "a")
    await work.after(first)(state, "b")
    (args, _, _), (_, _, wait_for) = seen.calls
    assert visits(state) > 500
    with mock.patch(ASKED, return_value=None) as asked:
        collect_task_run_inputs_sync(args)
        assert [type(call.args[0]) for call in asked.call_args_list] == [tuple]
        asked.reset_mock()
        collect_task_run_inputs_sync(wait_for)
        looked_at = [call.args[0] for call in asked.call_args_list]
    assert sum(found is first for found in looked_at) == 1
    assert len(looked_at) == 3  # the list, what marks its item as opaque, and the item


@pytest.mark.parametrize("hosts", [2, 48])
async def test_stages_of_many_hosts_are_joined_by_one_gate(seen: Seen, hosts: int) -> None:
    names = [f"h{number}" for number in range(hosts)]
    line = Line(Barrier(), Timeline())
    for stage in range(3):
        await line.together(work.after(*line.ends)(None, name) for name in names)
        await line.joined(f"stage {stage} done")
    assert [type(end) for end in line.ends] == [Gate]
    assert len(line.reports) == 3 * hosts
    assert sum(seen.edges) == 5 * hosts


async def test_a_stage_of_one_host_needs_no_gate_and_an_empty_one_changes_nothing(
    seen: Seen,
) -> None:
    line = Line(Barrier(), Timeline())
    await line.together([work(None, "a")])
    await line.joined("done")
    await line.together([])
    await line.branches([])
    assert line.ends == tuple(line.reports)
    assert len(seen.calls) == 1


async def test_branches_go_on_from_where_the_line_is_and_end_in_it(seen: Seen) -> None:
    async def two(branch: Line, name: str) -> Line:
        await branch.together([work.after(*branch.ends)(None, f"{name} first")])
        await branch.together([work.after(*branch.ends)(None, f"{name} second")])
        return branch

    async def none(branch: Line) -> Line:
        return branch

    line = Line(Barrier(), Timeline())
    await line.together([work(None, "begin")])
    await line.branches([two(line.branch(), "a"), two(line.branch(), "b"), none(line.branch())])
    assert [end.subject for end in line.ends if isinstance(end, Report)] == ["a second", "b second"]
    assert [report.subject for report in line.reports][1:] == [
        "a first", "a second", "b first", "b second",
    ]  # fmt: skip
    assert seen.edges == [0, 1, 1, 1, 1]


async def test_outside_of_a_flow_run_a_step_is_its_function() -> None:
    with mock.patch.object(Task, "__call__", side_effect=AssertionError):
        report = await work.after()(None, name="a")
    assert report.detail == "done"
