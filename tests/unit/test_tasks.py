from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from host.concurrency.tasks import SingleFlight, wait_out
from host.errors import WrongStateError


def flights() -> SingleFlight[str, Any]:
    return SingleFlight("given up: the agent is being stopped")


class Step:
    """Work that says when it has begun, and ends when the test ends it. If it is cancelled, it cleans up until the test
    ends it."""

    def __init__(self, result: object = "done") -> None:
        self.result = result
        self.begun, self.go, self.cleaning, self.clean = (asyncio.Event() for _ in range(4))

    async def __call__(self) -> Any:
        self.begun.set()
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cleaning.set()
            await self.clean.wait()
            raise
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def call(run: Callable[..., Coroutine[Any, Any, Any]], step: Step, *more: object) -> asyncio.Task[Any]:
    return asyncio.create_task(run("key", step, *more))


async def test_callers_of_the_same_key_share_one_run() -> None:
    single, first, second, other = flights(), Step("first"), Step("second"), Step("other")
    calls = [call(single.run, step) for step in (first, second, second)]
    apart = asyncio.create_task(single.run("another key", other))
    await first.begun.wait()
    await other.begun.wait()
    assert len(single) == 2
    first.go.set()
    other.go.set()
    assert await asyncio.gather(*calls, apart) == ["first", "first", "first", "other"]
    assert not second.begun.is_set()
    await settle()
    assert not single.running("key")
    second.go.set()
    assert await single.run("key", second) == "second"


async def test_shared_work_continues_when_its_owner_is_cancelled() -> None:
    single, step = flights(), Step()
    owner, other = call(single.run, step), call(single.run, step)
    await step.begun.wait()
    owner.cancel()
    with pytest.raises(asyncio.CancelledError):
        await owner
    step.go.set()
    assert await other == "done"


async def test_a_shared_error_reaches_all() -> None:
    single, step = flights(), Step(ValueError("no"))
    calls = [call(single.run, step) for _ in range(3)]
    step.go.set()
    assert [str(error) for error in await asyncio.gather(*calls, return_exceptions=True)] == ["no"] * 3


async def test_shared_work_is_cancelled_with_its_last_waiter_and_a_new_caller_begins_after_its_clean_up() -> None:
    single, old, new = flights(), Step("old"), Step("new")
    calls = [call(single.run, old) for _ in range(2)]
    await old.begun.wait()
    for waiter in calls:
        waiter.cancel()
    await old.cleaning.wait()
    assert not single.running("key")
    came = call(single.run, new)
    await settle()
    assert not new.begun.is_set()
    calls[1].cancel()  # a second cancellation interrupts neither the wait nor the clean-up
    await settle()
    assert not calls[1].done()
    old.clean.set()
    assert all(isinstance(end, asyncio.CancelledError) for end in await asyncio.gather(*calls, return_exceptions=True))
    new.go.set()
    assert await came == "new"


async def test_work_cancelled_before_its_first_step_is_forgotten() -> None:
    single, step = flights(), Step()
    waiter = call(single.run, step)
    await asyncio.sleep(0)
    await single.cancel(lambda key: True)
    with pytest.raises(WrongStateError):
        await waiter
    assert not step.begun.is_set()
    step.go.set()
    assert await single.run("key", step) == "done"


async def test_what_work_was_asked_for_is_known_while_it_can_be_joined() -> None:
    single, step = flights(), Step()
    assert await single.request_of("key") is None
    waiter = call(single.run, step, "this")
    await step.begun.wait()
    assert await single.request_of("key") == "this"
    waiter.cancel()
    await step.cleaning.wait()
    asking = asyncio.create_task(single.request_of("key"))
    await settle()
    assert not asking.done()
    step.clean.set()
    assert await asking is None


async def test_callers_of_work_cancelled_by_key_get_an_error_and_it_cleans_up_once() -> None:
    single, step = flights(), Step()
    waiter = call(single.run, step)
    await step.begun.wait()
    ending = [asyncio.create_task(single.cancel(lambda key: key == "key")) for _ in range(2)]
    await step.cleaning.wait()
    await settle()
    assert not ending[0].done()
    step.clean.set()
    await asyncio.gather(*ending)
    with pytest.raises(WrongStateError, match="given up"):
        await waiter


async def test_by_turns_the_next_caller_starts_its_own_work_when_the_owner_is_cancelled() -> None:
    single, first, second, third = flights(), Step("first"), Step("second"), Step("third")
    calls = [call(single.by_turns, step) for step in (first, second, third)]
    await first.begun.wait()
    await settle()
    assert not second.begun.is_set()
    calls[0].cancel()
    await second.begun.wait()  # at once: the first one still cleans up
    assert not calls[0].done()
    assert not third.begun.is_set()
    second.go.set()
    assert await calls[1] == await calls[2] == "second"
    first.clean.set()
    with pytest.raises(asyncio.CancelledError):
        await calls[0]


async def test_by_turns_an_error_stays_with_the_caller_whose_work_it_was() -> None:
    single = flights()
    steps = [Step(PermissionError("alice is refused")), Step(PermissionError("bob is refused")), Step("carol's")]
    calls = [call(single.by_turns, step) for step in steps]
    for step in steps:
        step.go.set()
    ends = await asyncio.gather(*calls, return_exceptions=True)
    assert [str(end) for end in ends] == ["alice is refused", "bob is refused", "carol's"]


async def test_by_turns_two_sets_of_credentials_share_only_a_result() -> None:
    single, good, bad = flights(), Step("layer"), Step(PermissionError("no"))
    follower = [call(single.by_turns, step) for step in (good, bad)][1]
    good.go.set()
    assert await follower == "layer"
    assert not bad.begun.is_set()
    # And the other way round: the good one does not fail with the bad one.
    bad.go.set()
    ends = await asyncio.gather(call(single.by_turns, bad), call(single.by_turns, good), return_exceptions=True)
    assert [str(end) for end in ends] == ["no", "layer"]


async def test_by_turns_a_new_caller_comes_in_between() -> None:
    single, first, second, third = flights(), Step("first"), Step("second"), Step("third")
    leaving = call(single.by_turns, first)
    await first.begun.wait()
    waiting = call(single.by_turns, second)
    await settle()
    leaving.cancel()
    coming = call(single.by_turns, third)  # before the one that waits has woken up
    await settle()
    assert [step.begun.is_set() for step in (second, third)].count(True) == 1, "one at a time"
    for step in (first.clean, second.go, third.go):
        step.set()
    assert await waiting == await coming
    assert (await asyncio.gather(leaving, return_exceptions=True))[0].__class__ is asyncio.CancelledError


async def test_by_turns_followers_may_leave_and_the_last_one_ends_the_work() -> None:
    single, step, never = flights(), Step(), Step()
    owner, follower = call(single.by_turns, step), call(single.by_turns, never)
    await step.begun.wait()
    await settle()
    follower.cancel()
    await asyncio.wait((follower,))
    assert not step.cleaning.is_set()
    owner.cancel()
    await step.cleaning.wait()
    assert len(single) == 0
    step.clean.set()
    await asyncio.wait((owner,))
    assert not never.begun.is_set()


@pytest.mark.parametrize("way", ["run", "by_turns"])
async def test_closing_ends_everything_also_what_is_still_cleaning_up_and_starts_nothing(way: str) -> None:
    single, old, new, never = flights(), Step(), Step(), Step()
    run = getattr(single, way)
    left = call(run, old)
    await old.begun.wait()
    left.cancel()
    await old.cleaning.wait()
    calls = [call(run, new), call(run, never)] if way == "by_turns" else []
    await settle()
    closing = asyncio.create_task(single.close())
    await settle()
    assert not closing.done()
    old.clean.set()
    new.clean.set()
    await closing
    for ending in calls:
        with pytest.raises(WrongStateError, match="given up"):
            await ending
    with pytest.raises(WrongStateError, match="given up"):
        await run("key", never)
    assert not never.begun.is_set()
    await asyncio.wait((left,))


async def test_waiting_out_ends_with_the_cancellation_and_never_before_the_work() -> None:
    step = Step()
    work = asyncio.ensure_future(step())
    waiting = asyncio.create_task(wait_out(work))
    await step.begun.wait()
    waiting.cancel()
    await settle()
    waiting.cancel()
    await settle()
    assert not waiting.done()
    step.go.set()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert work.result() == "done"
