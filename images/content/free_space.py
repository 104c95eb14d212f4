"""Keeps a part of the disk free: pulls that would use it up are refused before they start, or ended while they run."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path

from host.concurrency.threads import in_image_thread
from host.errors import NoSpaceError
from images.content.trash import Trash
from images.options import ImageOptions, free_bytes

CHECK_SECONDS = 0.5


class FreeSpace:
    """The free space on the disk of ``folder``, of which ``options.min_free`` must stay free.

    Before a pull is refused, files that wait for their deletion in ``trash`` are deleted.
    """

    def __init__(self, folder: Path, options: ImageOptions, trash: Trash) -> None:
        self._folder = folder
        self._options = options
        self._trash = trash

    async def require(self, needed: int, subject: str) -> None:
        """Raise NoSpaceError if ``needed`` more bytes for ``subject`` would leave too little free space."""
        if await in_image_thread(self._refusal, needed):
            await self._trash.emptied()
            refusal = await in_image_thread(self._refusal, needed)
            if refusal:
                raise NoSpaceError(f"{subject} does not fit on the disk: {refusal}")

    async def watched(self, chunks: AsyncGenerator[bytes, None], subject: str) -> AsyncGenerator[bytes, None]:
        """The ``chunks``. Raises NoSpaceError as soon as the disk has too little free space."""
        checked = time.monotonic()
        async with aclosing(chunks):
            async for chunk in chunks:
                if time.monotonic() >= checked + CHECK_SECONDS:
                    await self.require(0, subject)
                    checked = time.monotonic()
                yield chunk

    def _refusal(self, needed: int) -> str:
        """Why there is not enough space for ``needed`` bytes; empty if there is. Blocks."""
        disk = os.statvfs(self._folder)
        free, total = disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize
        reserved = free_bytes(self._options.min_free, total)
        if free >= needed + reserved:
            return ""
        wanted = f"it needs at least {needed} bytes, " if needed else ""
        return (
            f"{wanted}{self._folder} has {free} bytes free, {reserved} must stay free (images.min_free): "
            "remove images, for example with `podkeel image prune --all`"
        )
