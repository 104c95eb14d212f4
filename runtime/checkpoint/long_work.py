"""Long work in a thread that ends soon after its caller is cancelled."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import TypeVar

from host.concurrency.tasks import ended
from host.concurrency.threads import in_long_thread
from host.errors import PodkeelError

T = TypeVar("T")


async def stoppable(work: Callable[[Callable[[], None]], T]) -> T:
    """Run blocking ``work`` in a thread.

    It gets a function that it must call regularly. The function raises if the caller was cancelled.
    """
    given_up = threading.Event()

    def check() -> None:
        if given_up.is_set():
            raise PodkeelError("it was cancelled")

    running = asyncio.create_task(in_long_thread(work, check))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        given_up.set()
        await ended(running)
        raise
