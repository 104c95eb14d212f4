"""Watches the folders of the network's configuration: that of the lists, and that of further plugins."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

from host.files.inotify import FolderWatch

LOOK_AGAIN_SECONDS = 10.0

_log = logging.getLogger("podkeel.network")


async def follow_configuration(
    folder: Path, reload: Callable[[], Awaitable[Path | None]], *, look_again: float = LOOK_AGAIN_SECONDS
) -> None:
    """Call ``reload`` at once and when something in ``folder`` may have changed, or in the folder that it returned.

    If the kernel allows no watch, as all that a user may have are taken, it is called every ``look_again`` seconds.
    """
    told = False
    while True:
        try:
            watch = ConfigurationWatch(folder)
        except OSError as error:
            told = _tell(folder, error, told=told)
        else:
            try:
                while True:
                    plugins = await reload()
                    # Look once more: files may have been added before the watch began.
                    if not watch.follow(plugins):
                        await watch.wait()
            except OSError as error:
                told = _tell(folder, error, told=told)
            finally:
                watch.close()
        with contextlib.suppress(OSError):  # of which the watch says more
            await reload()
        await asyncio.sleep(look_again)


def _tell(folder: Path, error: OSError, *, told: bool) -> bool:
    if not told:
        _log.warning("CNI folder %s: changes are noticed late: %s", folder, error)
    return True


class ConfigurationWatch:
    """Watches ``folder``, and the folder of plugins that ``follow`` names. Raises OSError when the kernel cannot."""

    def __init__(self, folder: Path) -> None:
        self._main = FolderWatch(folder)
        self._followed: Path | None = None
        self._plugins: FolderWatch | None = None

    def follow(self, folder: Path | None) -> bool:
        """Watch that folder of plugins too, instead of the one before. Returns whether files may have been added
        unnoticed."""
        if folder == self._followed:
            return False
        if self._plugins is not None:
            self._plugins.close()
            self._plugins = None
        self._followed = None
        if folder is None:
            return False
        self._plugins = FolderWatch(folder)
        self._followed = folder
        return folder.is_dir()

    async def wait(self) -> None:
        """Wait until something may have changed since this was last waited for."""
        waiting = [asyncio.ensure_future(watch.wait()) for watch in (self._main, self._plugins) if watch is not None]
        try:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

    def close(self) -> None:
        """Stop watching."""
        self._main.close()
        if self._plugins is not None:
            self._plugins.close()
