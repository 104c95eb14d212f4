"""Threads for blocking work: a pool for each purpose, and new threads for work that changes namespaces or may hang."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

from host import libc
from host.concurrency.tasks import wait_out
from host.concurrency.thread_starting import no_thread, start_aside

P = ParamSpec("P")
T = TypeVar("T")


class ResilientThreadPool(ThreadPoolExecutor):
    """Continues with the threads it has while no further one can be started, as on a node without free process ids.

    The base class reports to the caller that its work failed, and does it later nevertheless.
    """

    def _adjust_thread_count(self) -> None:
        try:
            super()._adjust_thread_count()
        except RuntimeError as error:
            if not self._threads:
                self._work_queue.get_nowait()  # only this work is in it
                raise no_thread(error) from error


class _Pool:
    """Threads for one purpose, made when first needed, so that work of another purpose never waits for them.

    ``asked`` is the number of callers that wait for work now, of which ``most`` is done at once.
    """

    def __init__(self, purpose: str, most: int) -> None:
        self.purpose = purpose
        self.most = most
        self.asked = 0
        self._threads = ResilientThreadPool(max_workers=most, thread_name_prefix=purpose)

    async def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run blocking ``work`` on a thread of the pool and wait for it.

        Work that has begun cannot be interrupted: a cancelled caller still waits for its end, so that undoing it
        afterwards never races with it. The cancellation is raised after that.
        """
        future = asyncio.get_running_loop().run_in_executor(self._threads, lambda: work(*args, **kwargs))
        self.asked += 1
        try:
            return await wait_out(future)
        finally:
            self.asked -= 1


# One pool for each purpose. What may take seconds (walks, archives, syncs) has no part in a pool that calls wait for.
_POOLS = (
    _Pool("containers", 12),
    _Pool("network", 6),
    _Pool("stats", 4),
    _Pool("images", 8),
    _Pool("images-long", 32),
)
in_thread = _POOLS[0].run  # making, starting, stopping pods and containers; commands in them
in_network_thread = _POOLS[1].run  # netlink, nftables, files of CNI
in_stats_thread = _POOLS[2].run  # lists, statistics, metrics, traces
in_image_thread = _POOLS[3].run  # short steps of pulls, archives and exports: files, rows, pieces of blobs
in_long_thread = _POOLS[4].run  # long ones: walks over trees and archives, syncs, what is removed


def pool_use() -> dict[str, tuple[int, int]]:
    """For each pool of threads how many pieces of work it has now, waiting ones too, and how many it does at once."""
    return {pool.purpose: (pool.asked, pool.most) for pool in _POOLS}


async def in_fresh_thread(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run ``work`` in a new thread that ends with it. The work may unshare or enter namespaces, or hang."""
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

    start_aside(body, name="namespace", failed=lambda error: loop.call_soon_threadsafe(fail, error))
    return await wait_out(future)


async def acquired(
    run: Callable[[Callable[[], T]], Awaitable[T]], work: Callable[[], T], release: Callable[[T], object]
) -> T:
    """Have ``run``, one of the functions above, do ``work`` that makes something, such as a descriptor or a socket.

    A caller that is cancelled meanwhile never gets it: then it is given to ``release``.
    """
    made: list[T] = []

    def make() -> T:
        made.append(work())
        return made[0]

    try:
        return await run(make)
    except BaseException:
        for thing in made:
            release(thing)
        raise


@contextmanager
def inside_namespace(path: str, kind: int) -> Iterator[None]:
    """Enter the namespace pinned at ``path`` permanently; only for use in a fresh thread."""
    with open(path, "rb") as pin:
        libc.setns(pin.fileno(), kind)
    yield
