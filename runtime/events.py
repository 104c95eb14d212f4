"""Events of containers and sandboxes, in order, to any number of subscribers."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator

from host.errors import LimitError
from proto.runtime.v1 import cri_pb2

QUEUE_LIMIT = 1024


class Subscription:
    """One subscriber's bounded queue."""

    def __init__(self) -> None:
        self._queue: deque[cri_pb2.ContainerEventResponse] = deque()
        self._ready = asyncio.Event()
        self._overflowed = False
        self._closed = False

    def put(self, event: cri_pb2.ContainerEventResponse) -> None:
        """Add an event; a full queue ends the subscription after what it holds."""
        if len(self._queue) >= QUEUE_LIMIT:
            self._overflowed = True
        elif not self._overflowed:
            self._queue.append(event)
        self._ready.set()

    def close(self) -> None:
        """End the stream after what it holds."""
        self._closed = True
        self._ready.set()

    async def events(self) -> AsyncIterator[cri_pb2.ContainerEventResponse]:
        """The events as they come. Raises LimitError when this subscriber fell too far behind."""
        while True:
            while self._queue:
                yield self._queue.popleft()
            if self._overflowed:
                raise LimitError(f"stream fell {QUEUE_LIMIT} events behind and was closed: list and subscribe again")
            if self._closed:
                return
            self._ready.clear()
            await self._ready.wait()


class EventBus:
    """Hands every event to all who are subscribed at that moment."""

    def __init__(self) -> None:
        self._subscriptions: set[Subscription] = set()

    @property
    def wanted(self) -> bool:
        """Whether anybody listens, so that an event need not be built for nobody."""
        return bool(self._subscriptions)

    def publish(self, event: cri_pb2.ContainerEventResponse) -> None:
        """Queue ``event`` for every subscriber."""
        for subscription in self._subscriptions:
            subscription.put(event)

    def subscribe(self) -> Subscription:
        """Begin to receive; end it with ``unsubscribe``."""
        subscription = Subscription()
        self._subscriptions.add(subscription)
        return subscription

    def unsubscribe(self, subscription: Subscription) -> None:
        """Stop receiving."""
        self._subscriptions.discard(subscription)

    def close(self) -> None:
        """End every stream; for the agent's end."""
        for subscription in self._subscriptions:
            subscription.close()
