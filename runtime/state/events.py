"""Sends events of containers and sandboxes, in order, to any number of subscribers."""

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
    """One subscriber's queue of encoded events, limited in number and in bytes."""

    def __init__(self, missed: Iterable[Callable[[], bytes]] = ()) -> None:
        self._missed = deque(missed)
        self._queue: deque[bytes] = deque()
        self._bytes = 0
        self._ready = asyncio.Event()
        self._closed = False
        self.overflowed = False

    def put(self, event: bytes) -> None:
        """Add an event. If the queue is full, the subscription ends and the waiting events are dropped."""
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
        """End the stream after the waiting events."""
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
    """Sends every event to all present subscribers. ``dropped`` counts subscribers that did not read.

    Before ``serve`` no client can subscribe. Events of the start are kept for clients that subscribe within
    ``MISSED_SECONDS``.
    """

    def __init__(self) -> None:
        self._subscriptions: set[Subscription] = set()
        self._missed: list[Callable[[], bytes]] = []
        self.serving = False
        self.dropped = 0

    def serve(self) -> None:
        """Allow subscribers. Those of the next ``MISSED_SECONDS`` get the kept events."""
        self.serving = True
        asyncio.get_running_loop().call_later(MISSED_SECONDS, self._missed.clear)

    def keep(self, build: Callable[[], bytes]) -> None:
        """Keep an event that happened while no agent ran. ``build`` makes the event for each subscriber."""
        self._missed.append(build)

    @property
    def subscribers(self) -> int:
        """The number of subscribers. Without subscribers an event need not be built."""
        return len(self._subscriptions)

    def publish(self, event: bytes) -> None:
        """Queue an encoded event for every subscriber. One that is too slow gets no more."""
        for subscription in list(self._subscriptions):
            subscription.put(event)
            if subscription.overflowed:
                self.dropped += 1
                self.unsubscribe(subscription)

    def subscribe(self) -> Subscription:
        """Begin to receive. ``unsubscribe`` ends it. Raises LimitError if there are too many subscribers."""
        if len(self._subscriptions) >= SUBSCRIBER_LIMIT:
            raise LimitError(f"container events: {SUBSCRIBER_LIMIT} clients receive them already: end one of them")
        subscription = Subscription(self._missed)
        self._subscriptions.add(subscription)
        return subscription

    def unsubscribe(self, subscription: Subscription) -> None:
        """Stop receiving."""
        self._subscriptions.discard(subscription)

    def close(self) -> None:
        """End every stream, when the agent stops."""
        for subscription in self._subscriptions:
            subscription.close()
