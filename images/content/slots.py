"""Who may fetch and unpack a layer now: fair between pulls and registries, and with a slot for every pull."""

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

MOST = 16  # each has a process, some descriptors and a thread
_WINDOW = 30.0  # seconds of waiting for the network over which a transfer is judged
_SLOW = 64 << 10  # bytes a second
_KEPT = 4  # one in so many slots is kept for registries that have none


@dataclass(frozen=True, slots=True, eq=False)
class Origin:
    """Where the layers of one pull come from; every pull has one of its own. ``registry`` is empty for an archive."""

    registry: str = ""


class Slot:
    """A layer that is being fetched or unpacked, with how fast its bytes come."""

    def __init__(self, origin: Origin) -> None:
        self.origin = origin
        self.timeout = asyncio.Timeout(None)
        self._received = 0
        self._waited = 0.0
        self._waits_since = 0.0
        self._rate = float("inf")

    async def watched(self, chunks: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
        """The same chunks, their rate watched."""
        async with contextlib.aclosing(chunks):
            while True:
                self._waits_since = time.monotonic()
                chunk = await anext(chunks, b"")
                self._waited += time.monotonic() - self._waits_since
                self._waits_since = 0.0
                if not chunk:
                    return
                self._received += len(chunk)
                self._judge(self._waited)
                yield chunk

    def rate(self) -> float:
        """Bytes a second of waiting for the network, in the last window; infinite before the end of the first one."""
        self._judge(self._waited + (time.monotonic() - self._waits_since if self._waits_since else 0.0))
        return self._rate

    def _judge(self, waited: float) -> None:
        if waited < _WINDOW:
            return
        self._rate = self._received / waited
        self._received, self._waited = 0, 0.0
        if self._waits_since:
            self._waits_since = time.monotonic()


@dataclass(slots=True, eq=False)
class _Waiting:
    origin: Origin
    wanted: tuple[Hashable, ...]
    granted: asyncio.Future[Slot] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Slots:
    """``usual`` slots for all layers of all pulls; beyond them, up to ``most``, one for each pull that has none.

    A quarter of them are only for registries that have none, so that one registry never takes all. With few file
    descriptors left, each pull has one. A free slot goes to the pull that has the fewest, then to the registry that has
    the fewest. When none is free for a pull without one, the slowest transfer with less than 64 KiB/s over half a
    minute is broken off to make room: one of the same registry, unless all slots are taken.

    Pulls may wait for what another pull fetches. They ``want`` it meanwhile, so that it gets a slot also when only they
    would get one.
    """

    def __init__(self, usual: int, most: int = MOST) -> None:
        self._usual = usual
        self._shared = max(usual, most - most // _KEPT)
        self.most = max(most, self._shared + most // _KEPT)
        self._running: list[Slot] = []
        self._waiting: list[_Waiting] = []
        self._wanting: defaultdict[Hashable, Counter[Origin]] = defaultdict(Counter)
        self._watching: asyncio.TimerHandle | None = None

    @contextlib.contextmanager
    def want(self, wanted: Iterable[Hashable], origin: Origin) -> Iterator[None]:
        """During the block the pull of ``origin`` wants each of ``wanted``, whoever fetches it."""
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
        """A slot for the block, waited for; it may be that of another pull that wants one of ``wanted``.

        Raises KubeletReasonError ``RegistryUnavailable``, naming ``subject``, if the transfer is broken off.
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
                f"{subject}: its registry sends less than {_SLOW >> 10} KiB a second, and other pulls wait for a slot: "
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
        # Those that were cancelled in this turn of the loop have not yet left by themselves.
        self._waiting = [waiting for waiting in self._waiting if not waiting.granted.cancelled()]
        while self._waiting:
            pulls = Counter(slot.origin for slot in self._running)
            registries = Counter(slot.origin.registry for slot in self._running)
            having = {origin: (pulls[origin], registries[origin.registry]) for origin in self._origins()}
            first, origin = min(
                ((waiting, min(self._claimants(waiting), key=having.__getitem__)) for waiting in self._waiting),
                key=lambda one: having[one[1]],
            )
            if len(self._running) >= self._most_for(pulls[origin], registries[origin.registry]):
                break
            self._waiting.remove(first)
            slot = Slot(origin)
            self._running.append(slot)
            first.granted.set_result(slot)
        self._watch()

    def _most_for(self, of_pull: int, of_registry: int) -> int:
        """How many slots may be taken before one more for a pull that has so many, of a registry that has so many."""
        if of_pull:
            return 0 if descriptors.scarce() else self._usual
        return self._shared if of_registry else self.most

    def _claimants(self, waiting: _Waiting) -> set[Origin]:
        return {waiting.origin}.union(*(self._wanting[one] for one in waiting.wanted if one in self._wanting))

    def _origins(self) -> set[Origin]:
        return set[Origin]().union(*map(self._claimants, self._waiting))

    def _watch(self) -> None:
        if self._watching is None and self._without():
            self._watching = asyncio.get_running_loop().call_later(1.0, self._make_room)

    def _make_room(self) -> None:
        self._watching = None
        registries = {origin.registry for origin in self._without()}
        full = len(self._running) >= self.most
        in_the_way = [slot for slot in self._running if full or slot.origin.registry in registries]
        if registries and in_the_way and not any(slot.timeout.expired() for slot in self._running):
            slowest = min(in_the_way, key=Slot.rate)
            if slowest.rate() < _SLOW:
                slowest.timeout.reschedule(asyncio.get_running_loop().time())
        self._watch()

    def _without(self) -> set[Origin]:
        """The pulls that wait and have no slot; only called when what is free was granted."""
        return self._origins() - {slot.origin for slot in self._running}
