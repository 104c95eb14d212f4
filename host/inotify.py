"""Waiting for a file to appear (inotify(7))."""

from __future__ import annotations

import asyncio
import ctypes
import os
from pathlib import Path

_IN_CREATE = 0x100
_IN_MOVED_TO = 0x80

_libc = ctypes.CDLL(None, use_errno=True)


async def wait_until_exists(path: Path, timeout: float) -> bool:
    """Wait until ``path`` exists, at most ``timeout`` seconds; its folder exists. Returns whether it does."""
    descriptor = _libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
    if descriptor < 0:
        raise OSError(ctypes.get_errno(), "inotify_init1")
    loop = asyncio.get_running_loop()
    changed = asyncio.Event()

    def ready() -> None:
        os.read(descriptor, 65536)
        changed.set()

    try:
        if _libc.inotify_add_watch(descriptor, os.fsencode(path.parent), _IN_CREATE | _IN_MOVED_TO) < 0:
            raise OSError(ctypes.get_errno(), "inotify_add_watch", str(path.parent))
        loop.add_reader(descriptor, ready)
        async with asyncio.timeout(timeout):
            while not path.exists():
                changed.clear()
                await changed.wait()
    except TimeoutError:
        return path.exists()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)
    return True
