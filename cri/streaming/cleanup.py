"""Leaving a context to its end, whatever is cancelled meanwhile."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, TypeVar

T = TypeVar("T")


@asynccontextmanager
async def left_fully(context: AbstractAsyncContextManager[T]) -> AsyncIterator[T]:
    """``context``, the leaving of which is not interrupted: a cancellation during it goes on afterwards."""
    value = await context.__aenter__()
    try:
        yield value
    except BaseException:
        if not await _wait_out(context.__aexit__(*sys.exc_info())):
            raise
    else:
        await _wait_out(context.__aexit__(None, None, None))


async def _wait_out(work: Coroutine[Any, Any, bool | None]) -> bool | None:
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None and not task.cancelled() and task.exception() is None:
        raise cancelled
    return task.result()
