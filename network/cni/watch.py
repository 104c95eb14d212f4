"""Watches the folder of CNI configurations and the folder of further plugins."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Self

from host.concurrency.tasks import cancel_and_wait
from host.concurrency.threads import in_network_thread
from host.files.inotify import FolderWatch

LOOK_AGAIN_SECONDS = 10.0

_log = logging.getLogger("podkeel.network")


async def follow_configuration(
    folder: Path, reload: Callable[[], Awaitable[Path | None]], *, look_again: float = LOOK_AGAIN_SECONDS
) -> None:
    """Call ``reload`` at once, and when ``folder`` or the folder that it returned may have changed.

    If the kernel allows no watch (the user's limit is reached), call it every ``look_again`` seconds.
    """
    logged = False
    while True:
        try:
            async with ConfigurationWatch(folder) as watch:
                while True:
                    plugins = await reload()
                    # Read again: files may have been added before the watch began.
                    if not await watch.follow(plugins):
                        await watch.wait()
        except OSError as error:
            logged = _log_once(folder, error, logged=logged)
        with contextlib.suppress(OSError):  # the next watch reports it
            await reload()
        await asyncio.sleep(look_again)


def _log_once(folder: Path, error: OSError, *, logged: bool) -> bool:
    if not logged:
        _log.warning("CNI folder %s: not watched, so changes are noticed late: %s", folder, error)
    return True


class ConfigurationWatch:
    """Watches ``folder`` in an ``async with`` block, and the folder of plugins set by ``follow``.

    Raises OSError if the kernel allows no watch.
    """

    def __init__(self, folder: Path) -> None:
        self._main = FolderWatch(folder)
        self._followed: Path | None = None
        self._plugins: FolderWatch | None = None

    async def __aenter__(self) -> Self:
        try:
            await self._main.start()
        except BaseException:
            self._main.close()
            raise
        return self

    async def __aexit__(self, *error: object) -> None:
        self._main.close()
        if self._plugins is not None:
            self._plugins.close()

    async def follow(self, folder: Path | None) -> bool:
        """Watch this folder of plugins too, instead of the earlier one. Return whether files may have been added
        before the watch began."""
        if folder == self._followed:
            return False
        if self._plugins is not None:
            self._plugins.close()
            self._plugins = None
        self._followed = None
        if folder is None:
            return False
        self._plugins = FolderWatch(folder)
        await self._plugins.start()
        self._followed = folder
        return await in_network_thread(folder.is_dir)

    async def wait(self) -> None:
        """Wait until a folder may have changed since the last call."""
        waiting = [asyncio.ensure_future(watch.wait()) for watch in (self._main, self._plugins) if watch is not None]
        try:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            await cancel_and_wait(*waiting)
