"""Reaping processes whose parents left them."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import asyncio, os
from pathlib import Path
from host import processes
from host.subreaper import Subreaper
from host.children.reaping import reap

async def main():
    orphans = Subreaper(patience=0.05)
    orphans.adopt()
    done = await processes.run(["sh", "-c", "sleep 0.1 >&- 2>&- & echo $!"])
    orphan = int(done.stdout)
    assert Path(f"/proc/{orphan}/stat").read_text().split()[3] == str(os.getpid())
    awaited = processes.spawn(["sh", "-c", "sleep 0.1; exit 7"])
    pidfd = os.pidfd_open(awaited)
    ended = asyncio.Event()
    processes.watch_exit(pidfd, ended.set)
    await ended.wait()
    assert reap(pidfd) == 7
    async with asyncio.timeout(60):
        while Path(f"/proc/{orphan}").exists():
            await asyncio.sleep(0.02)
    await orphans.close()

asyncio.run(main())
"""


def test_orphans_are_reaped_and_children_are_left_to_those_who_wait() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 0, done.stderr
