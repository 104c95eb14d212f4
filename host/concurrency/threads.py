"""Threads for blocking work: one pool for each purpose, and new threads for work that enters namespaces or may hang."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

from host import libc
from host.concurrency.tasks import wait_out
from host.concurrency.thread_starting import no_thread, start_thread

P = ParamSpec("P")
T = TypeVar("T")


class ResilientThreadPool(ThreadPoolExecutor):
    """Keeps working with the threads that it has if no further one can be started: the node may lack process ids.

    The base class would report to the caller that the work failed, and still do it later.
    """

    def _adjust_thread_count(self) -> None:
        try:
            super()._adjust_thread_count()
        except RuntimeError as error:
            if not self._threads:
                self._work_queue.get_nowait()  # the queue has only this work
                raise no_thread(error) from error


class _Pool:
    """Threads for one purpose, started when first needed. So work of one purpose never waits for work of another.

    ``asked`` is the number of pieces of work that run or wait; at most ``most`` run at the same time.
    """

    def __init__(self, purpose: str, most: int) -> None:
        self.purpose = purpose
        self.most = most
        self.asked = 0
        self._threads = ResilientThreadPool(max_workers=most, thread_name_prefix=purpose)

    async def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run blocking ``work`` on a thread of the pool and wait for it.

        Work that has begun cannot be interrupted. A cancelled caller waits for its end, so that undoing the work never
        races with it. The cancellation is raised after that.
        """
        future = asyncio.get_running_loop().run_in_executor(self._threads, lambda: work(*args, **kwargs))
        self.asked += 1
        try:
            return await wait_out(future)
        finally:
            self.asked -= 1


# One pool for each purpose. Work that may take seconds (walks, archives, syncs) must not share a pool with calls.
_POOLS = (
    _Pool("containers", 12),
    _Pool("network", 6),
    _Pool("stats", 4),
    _Pool("images", 8),
    _Pool("images-long", 32),
)
in_thread = _POOLS[0].run  # creating, starting, stopping pods and containers; commands in them
in_network_thread = _POOLS[1].run  # netlink, nftables, files of CNI
in_stats_thread = _POOLS[2].run  # lists, statistics, metrics, traces
in_image_thread = _POOLS[3].run  # short steps of pulls, archives and exports: files, rows, pieces of blobs
in_long_thread = _POOLS[4].run  # long steps: walks over trees and archives, syncs, removals


def pool_use() -> dict[str, tuple[int, int]]:
    """For each pool, the number of pieces of work that run or wait, and how many can run at the same time."""
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

    start_thread(body, name="namespace", failed=lambda error: loop.call_soon_threadsafe(fail, error))
    return await wait_out(future)


async def acquired(
    run: Callable[[Callable[[], T]], Awaitable[T]], work: Callable[[], T], release: Callable[[T], object]
) -> T:
    """Run ``work``, which creates a resource such as a descriptor or a socket, with ``run``, a function of this module.

    If the caller is cancelled meanwhile, the resource is passed to ``release``.
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
    """Enter the namespace pinned at ``path``. The thread cannot leave it, so it must be a new one."""
    with open(path, "rb") as pin:
        libc.setns(pin.fileno(), kind)
    yield
