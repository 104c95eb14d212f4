"""Where blocking work goes: a pool for what is short, fresh threads for what changes namespaces or may hang."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

from host import libc

P = ParamSpec("P")
T = TypeVar("T")

_pool = ThreadPoolExecutor(max_workers=12, thread_name_prefix="blocking")


async def in_thread(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run blocking ``work`` on the pool and wait for it.

    Work that has begun cannot be interrupted: a cancelled caller still waits for its end, so that undoing it afterwards
    never races with it; then the cancellation goes on.
    """
    future = asyncio.get_running_loop().run_in_executor(_pool, lambda: work(*args, **kwargs))
    return await wait_out(future)


async def in_fresh_thread(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run ``work`` in a thread of its own that ends with it, free to unshare or enter namespaces, or to hang."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def succeed(value: T) -> None:
        if not future.done():
            future.set_result(value)

    def fail(error: BaseException) -> None:
        if not future.done():
            future.set_exception(error)

    def body() -> None:
        try:
            value = work(*args, **kwargs)
        except BaseException as error:
            loop.call_soon_threadsafe(fail, error)
        else:
            loop.call_soon_threadsafe(succeed, value)

    threading.Thread(target=body, name="namespace", daemon=True).start()
    return await wait_out(future)


@contextmanager
def inside_namespace(path: str, kind: int) -> Iterator[None]:
    """Enter the namespace pinned at ``path`` for good; only for use in a fresh thread."""
    with open(path, "rb") as pin:
        libc.setns(pin.fileno(), kind)
    yield


async def wait_out(future: asyncio.Future[T]) -> T:
    """Wait for the end of ``future`` also when the caller is cancelled meanwhile; then the cancellation goes on."""
    cancelled: asyncio.CancelledError | None = None
    while not future.done():
        try:
            await asyncio.shield(future)
        except asyncio.CancelledError as error:
            if future.cancelled():
                raise
            cancelled = error
        except BaseException:
            break
    if cancelled is not None:
        future.exception()  # retrieved here, so that it is not reported as lost
        raise cancelled
    return future.result()
