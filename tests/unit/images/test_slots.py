"""Slots are fair: no pull prevents others from beginning, even with a bad registry."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack

import pytest

from host.errors import KubeletReasonError
from images.content import slots
from images.content.slots import Origin, Slot, Slots


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


class Pull:
    """Layers of one pull that hold their slots until the test ends them."""

    def __init__(self, of: Slots, registry: str, layers: int) -> None:
        self.origin = Origin(registry)
        self.begun: list[Slot] = []
        self.end = asyncio.Event()
        self.tasks = [asyncio.create_task(self._layer(of)) for _ in range(layers)]

    async def _layer(self, of: Slots) -> None:
        async with of.slot(self.origin, "layer") as slot:
            self.begun.append(slot)
            await self.end.wait()

    async def finish(self) -> None:
        self.end.set()
        await asyncio.gather(*self.tasks)


async def test_layers_of_one_pull_get_the_usual_number_of_slots() -> None:
    of = Slots(4)
    pull = Pull(of, "slow", 10)
    await settle()
    assert len(pull.begun) == 4
    await pull.finish()
    assert len(pull.begun) == 10


async def test_each_pull_has_its_own_slot_up_to_the_limit() -> None:
    of = Slots(4, 8)
    first = Pull(of, "slow", 10)
    await settle()
    others = [Pull(of, "slow", 3) for _ in range(6)]
    await settle()
    assert [len(pull.begun) for pull in (first, *others)] == [4, 1, 1, 0, 0, 0, 0]
    await first.finish()
    for pull in others:
        await pull.finish()


async def test_one_registry_never_takes_all_slots() -> None:
    of = Slots(4, 8)
    slow = [Pull(of, "slow", 3) for _ in range(10)]
    await settle()
    assert sum(len(pull.begun) for pull in slow) == 6
    others = [Pull(of, f"other{number}", 3) for number in range(3)]
    await settle()
    assert [len(pull.begun) for pull in others] == [1, 1, 1]
    for pull in (*slow, *others):
        await pull.finish()


async def test_each_registry_gets_its_share_at_once() -> None:
    of = Slots(4)
    first = [Pull(of, "first", 1) for _ in range(30)]
    await settle()
    assert sum(len(pull.begun) for pull in first) == 12
    second = [Pull(of, "second", 1) for _ in range(30)]
    await settle()
    assert sum(len(pull.begun) for pull in second) == 6
    others = [Pull(of, f"other{number}", 1) for number in range(20)]
    await settle()
    assert sum(len(pull.begun) for pull in others) == of.limit - 18 == 14
    # A free slot is given to registries without a slot, not to those that wait longer.
    begun = [pull for pull in first if pull.begun]
    for pull in begun[:6]:
        await pull.finish()
    await settle()
    assert [len(pull.begun) for pull in others] == [1] * 20
    assert sum(len(pull.begun) for pull in (*first, *second)) == 18
    await asyncio.gather(*(pull.finish() for pull in (*first, *second, *others)))


async def test_a_pull_whose_registry_has_its_share_waits_for_half_a_minute_at_most(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(slots, "WAIT_SECONDS", 0.2)
    of = Slots(4)
    pulls = [Pull(of, "one", 1) for _ in range(40)]
    await settle()
    assert sum(len(pull.begun) for pull in pulls) == 12
    async with asyncio.timeout(60):
        while sum(len(pull.begun) for pull in pulls) < 28:  # noqa: ASYNC110  # the passing of time sets no event
            await asyncio.sleep(0.05)
    await asyncio.sleep(0.5)
    assert sum(len(pull.begun) for pull in pulls) == 28, "some are kept for registries that have none"
    other = Pull(of, "other", 1)
    await settle()
    assert len(other.begun) == 1
    await asyncio.gather(*(pull.finish() for pull in (*pulls, other)))


@pytest.mark.parametrize("usual", [1, 4, 16, 40])
async def test_one_pull_gets_as_many_slots_as_are_configured_and_others_one_more(usual: int) -> None:
    of = Slots(usual)
    pull, other = Pull(of, "slow", 50), Pull(of, "other", 5)
    await settle()
    assert (len(pull.begun), len(other.begun)) == (usual, 1)
    await pull.finish()
    await other.finish()


async def test_a_free_slot_goes_to_the_pull_and_then_to_the_registry_that_has_the_fewest() -> None:
    of = Slots(2, 2)
    busy = [Pull(of, "busy", 1), Pull(of, "busy", 1)]
    await settle()
    same, other = Pull(of, "busy", 1), Pull(of, "other", 1)
    await settle()
    assert (len(same.begun), len(other.begun)) == (0, 1)
    await busy[0].finish()
    await settle()
    assert (len(same.begun), len(other.begun)) == (0, 1)
    for pull in (busy[1], same, other):
        await pull.finish()


async def test_what_a_pull_wants_that_another_one_fetches_gets_the_slot_of_either() -> None:
    of = Slots(4, 8)
    slow = Pull(of, "slow", 4)
    await settle()
    begun = asyncio.Event()

    async def shared() -> None:
        async with of.slot(slow.origin, "shared", ["shared"]) as slot:
            assert slot.origin is not slow.origin
            begun.set()

    fetching = asyncio.create_task(shared())
    await settle()
    assert not begun.is_set(), "the slow pull has all the slots it may have"
    with of.want(["shared", "more"], Origin("quick")):
        await asyncio.wait_for(fetching, 60)
    assert of.wanted == 0
    await slow.finish()


async def test_a_pull_that_is_cancelled_while_it_waits_leaves_no_slot_taken() -> None:
    of = Slots(1, 1)
    first, second, third = Pull(of, "a", 1), Pull(of, "b", 1), Pull(of, "c", 1)
    await settle()
    second.tasks[0].cancel()
    await first.finish()
    third.end.set()
    await asyncio.gather(*third.tasks)
    # Also at the very moment when it is granted.
    fourth, fifth = Pull(of, "a", 1), Pull(of, "b", 1)
    await settle()
    fourth.end.set()
    await asyncio.wait(fourth.tasks)
    fifth.tasks[0].cancel()
    await settle()
    await asyncio.wait_for(Pull(of, "c", 1).finish(), 60)


async def test_a_slot_that_is_free_in_the_moment_of_a_cancellation_goes_to_the_next() -> None:
    of = Slots(1, 1)
    first, second, third = Pull(of, "a", 1), Pull(of, "b", 1), Pull(of, "c", 1)
    await settle()
    first.end.set()
    second.tasks[0].cancel()  # the task of the first one runs before that of the second
    await asyncio.wait_for(asyncio.gather(*first.tasks, third.finish()), 60)
    await asyncio.wait_for(Pull(of, "d", 1).finish(), 60)


async def test_with_few_descriptors_left_each_pull_has_one_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("host.files.descriptors.left", lambda: 5)
    of = Slots(4)
    pulls = [Pull(of, "a", 3), Pull(of, "b", 3)]
    await settle()
    assert [len(pull.begun) for pull in pulls] == [1, 1]
    for pull in pulls:
        await pull.finish()
        assert len(pull.begun) == 3


async def chunks(size: int, pause: float) -> AsyncGenerator[bytes, None]:
    while True:
        await asyncio.sleep(pause)
        yield bytes(size)


async def test_a_slow_transfer_makes_room_for_a_pull_of_its_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "WINDOW", 0.2)
    of = Slots(1, 8)
    async with AsyncExitStack() as stack:

        async def transfer(registry: str, size: int) -> None:
            async with of.slot(Origin(registry), f"layer of {registry}") as slot:
                async for _ in slot.watched(chunks(size, 0.01)):
                    pass

        kinds = [("same", 10), *[("same", 100_000)] * 4, ("other", 1)]
        tasks = [asyncio.create_task(transfer(*kind)) for kind in kinds]
        await settle()
        await asyncio.wait_for(stack.enter_async_context(of.slot(Origin("same"), "new")), 60)
        with pytest.raises(KubeletReasonError, match="layer of same: its registry sends less than"):
            await tasks[0]
        assert not any(task.done() for task in tasks[1:])
    for task in tasks[1:]:
        task.cancel()
    await asyncio.wait(tasks)


async def test_the_slowest_transfer_makes_room_when_a_pull_has_no_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "WINDOW", 0.2)
    of = Slots(2, 2, 2)

    async def transfer(size: int) -> None:
        async with of.slot(Origin(f"registry of {size}"), f"layer of {size}") as slot:
            async for _ in slot.watched(chunks(size, 0.01)):
                pass

    quick, slow = (asyncio.create_task(transfer(size)) for size in (100_000, 10))
    await asyncio.sleep(0.5)
    assert not slow.done(), "no pull waits: it may be slow"
    async with AsyncExitStack() as stack:
        await asyncio.wait_for(stack.enter_async_context(of.slot(Origin("new"), "new")), 60)
        with pytest.raises(KubeletReasonError, match="layer of 10: its registry sends less than"):
            await slow
        assert not quick.done()
    quick.cancel()
    await asyncio.wait((quick,))


async def test_a_registry_above_its_share_makes_room_for_one_without_a_slot(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However quickly its bytes come: the slowest of its transfers, and only what had its time."""
    monkeypatch.setattr(slots, "WINDOW", 0.2)
    of = Slots(3, 4, 4)

    async def transfer(registry: str, size: int) -> None:
        async with of.slot(Origin(registry), f"layer of {size}") as slot:
            async for _ in slot.watched(chunks(size, 0.01)):
                pass

    kinds = [("greedy", 300_000), ("greedy", 200_000), ("greedy", 400_000), ("other", 100_000)]
    tasks = [asyncio.create_task(transfer(*kind)) for kind in kinds]
    await settle()
    async with AsyncExitStack() as stack:
        await asyncio.wait_for(stack.enter_async_context(of.slot(Origin("new"), "new")), 60)
        with pytest.raises(KubeletReasonError, match="layer of 200000: its registry"):
            await tasks[1]
        assert [task.done() for task in tasks] == [False, True, False, False]
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


async def test_a_registry_beyond_all_slots_waits_for_a_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the others has one slot, and sends more than what is too slow."""
    monkeypatch.setattr(slots, "WINDOW", 0.2)
    monkeypatch.setattr(slots, "MAX_WAIT_SECONDS", 1.0)
    of = Slots(1, 2, 2)

    async def transfer(size: int) -> None:
        async with of.slot(Origin(f"registry of {size}"), f"layer of {size}") as slot:
            async for _ in slot.watched(chunks(size, 0.01)):
                pass

    tasks = [asyncio.create_task(transfer(size)) for size in (200_000, 300_000)]
    await settle()
    async with AsyncExitStack() as stack:
        await asyncio.wait_for(stack.enter_async_context(of.slot(Origin("new"), "new")), 60)
        with pytest.raises(KubeletReasonError, match="layer of 200000: its registry"):
            await tasks[0]
        assert not tasks[1].done()
    tasks[1].cancel()
    await asyncio.wait(tasks)
