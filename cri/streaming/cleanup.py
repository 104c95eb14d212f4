"""Leaving a context completely, even if the task is cancelled meanwhile."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TypeVar

from host.concurrency.tasks import uninterrupted

T = TypeVar("T")


@asynccontextmanager
async def left_fully(context: AbstractAsyncContextManager[T]) -> AsyncIterator[T]:
    """``context``, whose exit is not interrupted: a cancellation during it is raised afterwards."""
    value = await context.__aenter__()
    try:
        yield value
    except BaseException:
        if not await uninterrupted(context.__aexit__(*sys.exc_info())):
            raise
    else:
        await uninterrupted(context.__aexit__(None, None, None))
