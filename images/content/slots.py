"""Slots for fetching and unpacking layers, shared fairly between pulls and between registries."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter, defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Hashable, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from host.errors import KubeletReasonError
from host.files import descriptors

MAX_SLOTS = 16
_LIMIT_FACTOR = 2  # factor for the limit of all slots; each has two processes, some descriptors and a thread
WAIT_SECONDS = 30.0  # seconds that a pull waits for a slot while its registry has its share
MAX_WAIT_SECONDS = 300.0  # seconds that a registry without a slot waits if there are more registries than slots
WINDOW = 30.0  # seconds of waiting for the network over which the rate of a transfer is measured
_SLOW_RATE = 64 << 10  # bytes a second
_RESERVED_PART = 4  # one quarter of the slots is reserved for registries that have none


@dataclass(frozen=True, slots=True, eq=False)
class Origin:
    """The source of the layers of one pull. Every pull has its own. ``registry`` is empty for an archive."""

    registry: str = ""


class Slot:
    """Permission to fetch and unpack one layer. Measures the rate of its bytes."""

    def __init__(self, origin: Origin) -> None:
        self.origin = origin
        self.timeout = asyncio.Timeout(None)
        self._received = 0
        self._waited = 0.0
        self._waits_since = 0.0
        self._rate = float("inf")

    async def watched(self, chunks: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
        """The same chunks, with their rate measured."""
        async with contextlib.aclosing(chunks):
            while True:
                self._waits_since = time.monotonic()
                chunk = await anext(chunks, b"")
                self._waited += time.monotonic() - self._waits_since
                self._waits_since = 0.0
                if not chunk:
                    return
                self._received += len(chunk)
                self._measure(self._waited)
                yield chunk

    def rate(self) -> float:
        """Bytes a second of waiting for the network in the last window; infinite before the first window ends."""
        self._measure(self._waited + (time.monotonic() - self._waits_since if self._waits_since else 0.0))
        return self._rate

    @property
    def measured(self) -> bool:
        """Whether it has been measured for a whole window."""
        return self.rate() < float("inf")

    def _measure(self, waited: float) -> None:
        if waited < WINDOW:
            return
        self._rate = self._received / waited
        self._received, self._waited = 0, 0.0
        if self._waits_since:
            self._waits_since = time.monotonic()


@dataclass(slots=True, eq=False)
class _Waiting:
    origin: Origin
    wanted: tuple[Hashable, ...]
    since: float = field(default_factory=time.monotonic)
    granted: asyncio.Future[Slot] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Slots:
    """Hands out slots. All pulls share ``usual`` slots. Above that, up to ``most``, each pull without a slot gets one.

    A quarter of these are reserved for registries without a slot. Above ``most``, up to ``limit``, a pull without a
    slot gets one if its registry has less than its share of ``most``; all registries in use have the same share. So a
    registry does not delay another one, regardless of how many images are pulled from it. A pull whose registry has its
    share gets one of these slots after 30 seconds; some are reserved and never given to such pulls. If few file
    descriptors are left, each pull has one slot.

    A free slot goes to the pull that has the fewest, then to the registry that has the fewest. If a pull without a slot
    gets none, one transfer is ended to make room. This is the slowest with less than 64 KiB/s over 30 seconds, of the
    same registry unless all slots are taken. For a registry without a slot it is otherwise the slowest transfer that
    has been measured, if its registry has more than its share. After a wait of five minutes it is one of any registry.

    A pull may wait for a layer that another pull fetches. It then declares with ``want`` that it waits for it: the
    layer gets a slot also if only the waiting pull may have one.
    """

    def __init__(self, usual: int, most: int = MAX_SLOTS, limit: int | None = None) -> None:
        self._usual = usual
        self._shared = max(usual, most - most // _RESERVED_PART)
        self._most = max(most, self._shared + most // _RESERVED_PART)
        self.limit = _LIMIT_FACTOR * self._most if limit is None else max(limit, self._most)
        self._running: list[Slot] = []
        self._waiting: list[_Waiting] = []
        self._wanting: defaultdict[Hashable, Counter[Origin]] = defaultdict(Counter)
        self._watching: asyncio.TimerHandle | None = None

    @property
    def wanted(self) -> int:
        """The number of layers that pulls wait for while other pulls fetch them."""
        return len(self._wanting)

    @contextlib.contextmanager
    def want(self, wanted: Iterable[Hashable], origin: Origin) -> Iterator[None]:
        """During the block the pull of ``origin`` waits for each of ``wanted``, regardless of which pull fetches it."""
        wanted = tuple(wanted)
        for one in wanted:
            self._wanting[one][origin] += 1
        self._grant()
        try:
            yield
        finally:
            for one in wanted:
                self._wanting[one] -= Counter((origin,))
                if not self._wanting[one]:
                    del self._wanting[one]

    @asynccontextmanager
    async def slot(self, origin: Origin, subject: str, wanted: Iterable[Hashable] = ()) -> AsyncIterator[Slot]:
        """Wait for a slot for the block. It may be counted for another pull that waits for one of ``wanted``.

        Raises KubeletReasonError ``RegistryUnavailable``, naming ``subject``, if the transfer is ended to make room.
        """
        slot = await self._granted(_Waiting(origin, tuple(wanted)))
        try:
            async with slot.timeout:
                yield slot
        except TimeoutError as error:
            if not slot.timeout.expired():
                raise
            raise KubeletReasonError(
                "RegistryUnavailable",
                f"{subject}: its registry sends less than {_SLOW_RATE >> 10} KiB a second or less than others, and "
                "other pulls wait for a slot: "
                "pull again when the registry is faster",
            ) from error
        finally:
            self._release(slot)

    async def _granted(self, waiting: _Waiting) -> Slot:
        self._waiting.append(waiting)
        self._grant()
        try:
            return await waiting.granted
        except asyncio.CancelledError:
            if waiting in self._waiting:
                self._waiting.remove(waiting)
            elif not waiting.granted.cancelled():
                self._release(waiting.granted.result())
            raise

    def _release(self, slot: Slot) -> None:
        self._running.remove(slot)
        self._grant()

    def _grant(self) -> None:
        # Waiters that were cancelled in this turn of the loop are still in the list.
        self._waiting = [waiting for waiting in self._waiting if not waiting.granted.cancelled()]
        while (granted := self._next()) is not None:
            waiting, origin = granted
            self._waiting.remove(waiting)
            slot = Slot(origin)
            self._running.append(slot)
            waiting.granted.set_result(slot)
        self._watch()

    def _next(self) -> tuple[_Waiting, Origin] | None:
        """The next layer to get a slot, and the pull that the slot is counted for; None if no layer gets one."""
        pulls, registries = self._slots_in_use()
        having = {origin: (pulls[origin], registries[origin.registry]) for origin in self._origins()}
        claims = [(waiting, min(self._claimants(waiting), key=having.__getitem__)) for waiting in self._waiting]
        share = self._share()
        now = time.monotonic()
        for waiting, origin in sorted(claims, key=lambda claim: having[claim[1]]):
            if len(self._running) < self._limit_for(
                *having[origin], share, waited_long=now - waiting.since >= WAIT_SECONDS
            ):
                return waiting, origin
        return None

    def _slots_in_use(self) -> tuple[Counter[Origin], Counter[str]]:
        """The number of slots of each pull and of each registry."""
        return Counter(slot.origin for slot in self._running), Counter(slot.origin.registry for slot in self._running)

    def _share(self) -> int:
        """The number of slots that each registry in use is entitled to."""
        registries = {origin.registry for origin in self._origins()} | {slot.origin.registry for slot in self._running}
        return max(1, self._shared // max(1, len(registries)))

    def _limit_for(self, of_pull: int, of_registry: int, share: int, *, waited_long: bool) -> int:
        """The number of running slots below which a pull gets one more, if it and its registry have these numbers.

        ``waited_long``: it has waited for ``WAIT_SECONDS``.
        """
        if of_pull:
            return 0 if descriptors.scarce() else self._usual
        if of_registry < share:
            return self.limit
        return self.limit - self._most // _RESERVED_PART if waited_long else self._shared

    def _claimants(self, waiting: _Waiting) -> set[Origin]:
        return {waiting.origin}.union(*(self._wanting[one] for one in waiting.wanted if one in self._wanting))

    def _origins(self) -> set[Origin]:
        return set[Origin]().union(*map(self._claimants, self._waiting))

    def _watch(self) -> None:
        if self._watching is None and self._pulls_without_slot():
            self._watching = asyncio.get_running_loop().call_later(1.0, self._make_room)

    def _make_room(self) -> None:
        self._watching = None
        self._grant()  # to waiters whose waiting time has passed
        without = {origin.registry for origin in self._pulls_without_slot()}
        if without and not any(slot.timeout.expired() for slot in self._running):
            slowest = self._too_slow(without) or self._over_its_share(without)
            if slowest is not None:
                slowest.timeout.reschedule(asyncio.get_running_loop().time())
        self._watch()

    def _full(self) -> bool:
        return len(self._running) >= self.limit

    def _too_slow(self, without: set[str]) -> Slot | None:
        """A transfer to end for pulls of the registries ``without`` a slot, because it is almost stalled."""
        in_the_way = [slot for slot in self._running if self._full() or slot.origin.registry in without]
        slowest = min(in_the_way, key=Slot.rate, default=None)
        return slowest if slowest is not None and slowest.rate() < _SLOW_RATE else None

    def _over_its_share(self, without: set[str]) -> Slot | None:
        """The slowest transfer to end so that one of the registries ``without`` gets its first slot."""
        _, registries = self._slots_in_use()
        if not self._full() or not any(not registries[registry] for registry in without):
            return None
        share = self._share()
        now = time.monotonic()
        too_long = any(
            now - waiting.since >= MAX_WAIT_SECONDS
            and not any(registries[origin.registry] for origin in self._claimants(waiting))
            for waiting in self._waiting
        )
        measured = [
            slot for slot in self._running if slot.measured and (too_long or registries[slot.origin.registry] > share)
        ]
        return min(measured, key=Slot.rate, default=None)

    def _pulls_without_slot(self) -> set[Origin]:
        """The pulls that wait and have no slot. Call it only after ``_grant``."""
        return self._origins() - {slot.origin for slot in self._running}
