"""Noticing that the network's configuration changes: its folder, and the one that holds further plugins of it."""

from __future__ import annotations

import asyncio
from pathlib import Path

from host.files.inotify import FolderWatch


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
        self._followed = folder
        if folder is None:
            return False
        self._plugins = FolderWatch(folder)
        return folder.is_dir()

    async def wait(self) -> None:
        """Wait until something may have changed since this was last waited for."""
        waiting = [asyncio.ensure_future(watch.wait()) for watch in (self._main, self._plugins) if watch is not None]
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waiting:
                task.cancel()

    def close(self) -> None:
        """Stop watching."""
        self._main.close()
        if self._plugins is not None:
            self._plugins.close()
