"""Executed commands whose start breaks off."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import subprocess
from pathlib import Path

import pytest

from host import processes
from host.concurrency.threads import in_thread
from runtime.oci import exec_call
from runtime.oci.exec_call import ExecCall
from runtime.oci.exec_session import kill_session
from runtime.oci.oci_runtime import OciRuntime
from runtime.options import HandlerOptions
from tests.support.agent import wait_for

# Starts a process, as an OCI runtime does that detaches from it, and leaves a copy of its pid.
_RUNTIME = """#!/bin/sh
while [ "$1" != --pid-file ]; do shift; done
sleep 1000 >/dev/null 2>&1 &
echo $! >"$2"
echo $! >{copy}
"""


def _call(tmp_path: Path, program: Path) -> ExecCall:
    options = HandlerOptions(path=str(program))
    runtime = OciRuntime("own", options, tmp_path, program_link=tmp_path / "copy", systemd_cgroup=False)
    return ExecCall(runtime=runtime, container_id="c", folder=tmp_path, program="sleep", process=b"{}", pids=list)


def _runtime(tmp_path: Path) -> Path:
    program = tmp_path / "runtime"
    program.write_text(_RUNTIME.format(copy=tmp_path / "pid"))
    program.chmod(0o755)
    return program


def test_a_process_that_cannot_be_watched_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first: list[int] = []

    def only_one(pid: int) -> int:
        if first:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        first.append(pid)
        return pidfd_open(pid)

    async def body() -> None:
        with _call(tmp_path, _runtime(tmp_path)) as call:
            await call.launch({})
            with pytest.raises(OSError, match="Too many"):
                async with call.process():
                    pass

    pidfd_open = os.pidfd_open
    monkeypatch.setattr(os, "pidfd_open", only_one)
    asyncio.run(body())
    pid = int((tmp_path / "pid").read_text())
    wait_for(lambda: processes.start_time(pid) is None, what="the end of the process")


def test_a_start_that_fails_after_its_client_left_is_over(tmp_path: Path) -> None:
    async def body() -> None:
        with _call(tmp_path, _runtime(tmp_path)) as call:
            (tmp_path / "runtime").chmod(0o644)
            launching = asyncio.ensure_future(call.launch({}))
            await asyncio.sleep(0)
            launching.cancel()
            await asyncio.wait([launching])
            assert launching.cancelled()
        await in_thread(tuple)

    before = exec_call.strays.starting
    asyncio.run(body())
    assert exec_call.strays.starting == before


def test_what_a_command_makes_while_it_is_killed_is_killed_too() -> None:
    """Its parent is another process by then; the session is that of the OCI runtime's call, whose leader has ended."""
    inner = "sleep 998 & echo $! $$; exec sleep 999"
    script = f"sh -c '{inner}' & exec sleep 1000"
    with subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE, start_new_session=True) as runtime:
        assert runtime.stdout is not None
        orphan, leader = map(int, runtime.stdout.readline().split())
        try:
            os.kill(leader, signal.SIGKILL)
            wait_for(lambda: processes.start_time(leader) is None, what="the end of the command")
            kill_session(leader, runtime.pid, lambda: [orphan])
            wait_for(lambda: processes.start_time(orphan) is None, what="the end of what it made")
        finally:
            processes.kill_group(runtime.pid)
