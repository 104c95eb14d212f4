"""Waiting in asynchronous tests for what has no event: processes, the kernel, the agent under test."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from tests.support.agent import SOON


async def until(condition: Callable[[], object], what: str = "condition") -> None:
    """Wait until ``condition`` returns a true value. Fails the test if that takes too long."""
    try:
        async with asyncio.timeout(SOON):
            while not condition():  # noqa: ASYNC110  # there is no event
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(f"{what} did not come true within {SOON:g} s") from None
