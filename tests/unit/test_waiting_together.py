"""Steps that run together: one failure ends every wait at once, and is what gets reported."""

import asyncio
import math
from collections.abc import Awaitable
from typing import TypeVar

import pytest

from pd_deploy.errors import Abandoned, InstanceDied, PortTaken, SeveralFaults, headline
from pd_deploy.flows.fan_out import fan_out
from pd_deploy.steps.barrier import Barrier

T = TypeVar("T")
SOON_S = 5
"""Far above what any of these waits takes when it works."""


async def soon(work: Awaitable[T]) -> T:
    return await asyncio.wait_for(work, SOON_S)


async def fails(error: Exception) -> None:
    await asyncio.sleep(0)
    raise error


class TestBarrier:
    async def test_gates_show_what_opened_them_in_the_order_asked(self) -> None:
        barrier = Barrier()
        waiting = asyncio.ensure_future(barrier.passed(["d0", "c0"]))
        barrier.open("c0", "proxy")
        barrier.open("d0", "decode")
        assert await soon(waiting) == ["decode", "proxy"]
        assert await soon(barrier.passed(["c0"])) == ["proxy"]
        assert await soon(barrier.passed([])) == []

    async def test_failure_ends_a_wait_under_way_and_names_the_first_cause(self) -> None:
        barrier = Barrier()
        waiting = asyncio.ensure_future(barrier.passed(["d0"]))
        await asyncio.sleep(0)
        barrier.fail("d0 died")
        barrier.fail("p0 died")
        with pytest.raises(Abandoned, match="given up because d0 died"):
            await soon(waiting)

    async def test_failure_ends_later_waits_at_once(self) -> None:
        barrier = Barrier()
        barrier.fail("d0 died")
        with pytest.raises(Abandoned, match="d0 died"):
            await soon(barrier.passed(["d0"]))

    async def test_work_given_up_is_cancelled_before_the_wait_returns(self) -> None:
        barrier, ended = Barrier(), asyncio.Event()

        async def work() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                ended.set()

        waiting = asyncio.ensure_future(barrier.unless_failed(work()))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        barrier.fail("d0 died")
        with pytest.raises(Abandoned):
            await soon(waiting)
        assert ended.is_set()

    async def test_works_own_result_and_error_pass_through(self) -> None:
        barrier = Barrier()
        assert await soon(barrier.unless_failed(asyncio.sleep(0, "done"))) == "done"
        with pytest.raises(PortTaken, match="7000"):
            await soon(barrier.unless_failed(fails(PortTaken("7000"))))

    async def test_cancelling_a_wait_cancels_its_work(self) -> None:
        barrier, ended = Barrier(), asyncio.Event()

        async def work() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                ended.set()

        waiting = asyncio.ensure_future(barrier.unless_failed(work()))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await soon(waiting)
        assert ended.is_set()

    async def test_failure_ends_work_before_it_begins(self) -> None:
        barrier = Barrier()
        barrier.fail("d0 died")
        with pytest.raises(Abandoned, match="d0 died"):
            await soon(barrier.unless_failed(fails(PortTaken("7000"))))

    async def test_work_with_grace_may_still_end(self) -> None:
        barrier, gate = Barrier(), asyncio.Event()

        async def work() -> str:
            await gate.wait()
            return "done"

        looks = asyncio.ensure_future(barrier.unless_failed(work(), grace=600))
        stops = asyncio.ensure_future(barrier.unless_failed(work(), grace=math.inf))
        barrier.fail("d0 died")
        with pytest.raises(Abandoned):
            await soon(barrier.unless_failed(work(), grace=0.01))
        gate.set()
        assert await soon(looks) == await soon(stops) == "done"


class TestFanOut:
    async def test_results_come_in_the_order_of_the_steps(self) -> None:
        gate = asyncio.Event()

        async def first() -> str:
            await gate.wait()
            return "first"

        async def second() -> str:
            gate.set()
            return "second"

        assert await soon(fan_out(Barrier(), [first(), second()])) == ["first", "second"]
        assert await soon(fan_out(Barrier(), [])) == []

    async def test_one_fault_is_raised_as_itself_and_ends_the_others_waits(self) -> None:
        barrier, fault = Barrier(), InstanceDied("exit code 1\nlog line", instance="d0")
        with pytest.raises(InstanceDied) as caught:
            await soon(fan_out(barrier, [barrier.passed(["d0"]), fails(fault)]))
        assert caught.value is fault
        with pytest.raises(Abandoned, match=r"because instance d0: exit code 1$"):
            await barrier.passed(["d0"])

    async def test_several_faults_are_all_reported(self) -> None:
        faults = [PortTaken("7000"), InstanceDied("exit code 1")]
        with pytest.raises(SeveralFaults) as caught:
            await soon(fan_out(Barrier(), map(fails, faults)))
        assert caught.value.faults == faults
        assert str(caught.value) == "2 steps failed:\n- 7000\n- exit code 1"
        assert headline(caught.value) == "7000; exit code 1", "as releases and quarantine have it"

    async def test_the_same_fault_of_several_steps_is_reported_once(self) -> None:
        with pytest.raises(PortTaken):
            await soon(fan_out(Barrier(), [fails(PortTaken("7000")), fails(PortTaken("7000"))]))

    async def test_faults_of_steps_within_steps_are_flattened(self) -> None:
        inner = SeveralFaults([PortTaken("1"), PortTaken("2")])
        with pytest.raises(SeveralFaults) as caught:
            await soon(fan_out(Barrier(), [fails(inner), fails(PortTaken("2"))]))
        assert [str(fault) for fault in caught.value.faults] == ["1", "2"]

    async def test_without_a_cause_one_abandoned_step_is_reported(self) -> None:
        barrier = Barrier()
        barrier.fail("the run before failed")
        with pytest.raises(Abandoned, match="the run before failed"):
            await soon(fan_out(barrier, [barrier.passed(["x"]), barrier.passed(["y"])]))

    async def test_fault_without_a_message_is_raised_as_itself(self) -> None:
        barrier = Barrier()
        with pytest.raises(TimeoutError):
            await soon(fan_out(barrier, [fails(TimeoutError())]))
        with pytest.raises(Abandoned, match="TimeoutError"):
            await barrier.passed(["x"])

    async def test_all_steps_have_ended_when_it_raises_or_is_cancelled(self) -> None:
        ended: list[str] = []

        async def slow(name: str) -> None:
            try:
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(0)
                ended.append(name)

        work = asyncio.ensure_future(fan_out(Barrier(), [slow("a"), slow("b")]))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await soon(work)
        assert sorted(ended) == ["a", "b"]
