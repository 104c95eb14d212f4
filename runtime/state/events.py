"""Events of containers and sandboxes, in order, to any number of subscribers."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable

from host.errors import LimitError

SUBSCRIBER_LIMIT = 100
QUEUE_LIMIT = 1024
MISSED_SECONDS = 90.0
QUEUE_BYTES = 8 * 1024 * 1024


class Subscription:
    """One subscriber's queue of encoded events, bounded in number and in bytes."""

    def __init__(self, missed: Iterable[Callable[[], bytes]] = ()) -> None:
        self._missed = deque(missed)
        self._queue: deque[bytes] = deque()
        self._bytes = 0
        self._ready = asyncio.Event()
        self._closed = False
        self.overflowed = False

    def put(self, event: bytes) -> None:
        """Add an event; on a full queue the subscription ends, and what waited is dropped."""
        if self.overflowed:
            return
        if len(self._queue) >= QUEUE_LIMIT or self._bytes + len(event) > QUEUE_BYTES:
            self.overflowed = True
            self._queue.clear()  # a subscriber that lost an event must list everything again
        else:
            self._queue.append(event)
            self._bytes += len(event)
        self._ready.set()

    def close(self) -> None:
        """End the stream after what it holds."""
        self._closed = True
        self._ready.set()

    async def events(self) -> AsyncIterator[bytes]:
        """The events from before the agent's start, then new ones as they happen.

        Raises LimitError if this subscriber reads too slowly.
        """
        while self._missed:
            yield self._missed.popleft()()
        while True:
            while self._queue:
                event = self._queue.popleft()
                self._bytes -= len(event)
                yield event
            if self.overflowed:
                raise LimitError(
                    f"stream fell more than {QUEUE_LIMIT} events or {QUEUE_BYTES >> 20} MiB behind and was closed: "
                    "list, and subscribe again"
                )
            if self._closed:
                return
            self._ready.clear()
            await self._ready.wait()


class EventBus:
    """Sends every event to all subscribers of that moment; ``dropped`` counts subscribers that did not read.

    Before ``serve`` no client can subscribe: events of the start are kept for clients that subscribe within the first
    minute.
    """

    def __init__(self) -> None:
        self._subscriptions: set[Subscription] = set()
        self._missed: list[Callable[[], bytes]] = []
        self.serving = False
        self.dropped = 0

    def serve(self) -> None:
        """From now on there may be subscribers; those of the next ``MISSED_SECONDS`` get what is kept."""
        self.serving = True
        asyncio.get_running_loop().call_later(MISSED_SECONDS, self._missed.clear)

    def keep(self, build: Callable[[], bytes]) -> None:
        """Keep what happened while no agent ran; ``build`` makes the event for each subscriber."""
        self._missed.append(build)

    @property
    def subscribers(self) -> int:
        """How many subscribe; without subscribers an event need not be built."""
        return len(self._subscriptions)

    def publish(self, event: bytes) -> None:
        """Queue an encoded event for every subscriber; slow ones get no more."""
        for subscription in list(self._subscriptions):
            subscription.put(event)
            if subscription.overflowed:
                self.dropped += 1
                self.unsubscribe(subscription)

    def subscribe(self) -> Subscription:
        """Begin to receive; end it with ``unsubscribe``. Raises LimitError where too many do."""
        if len(self._subscriptions) >= SUBSCRIBER_LIMIT:
            raise LimitError(f"container events: {SUBSCRIBER_LIMIT} clients receive them already: end one of them")
        subscription = Subscription(self._missed)
        self._subscriptions.add(subscription)
        return subscription

    def unsubscribe(self, subscription: Subscription) -> None:
        """Stop receiving."""
        self._subscriptions.discard(subscription)

    def close(self) -> None:
        """End every stream; for the agent's end."""
        for subscription in self._subscriptions:
            subscription.close()
