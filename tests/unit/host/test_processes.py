from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator

import pytest

from host import processes
from host.processes import ProcessName, has_ended, start_time
from tests.support.agent import wait_for


def named(pid: int) -> ProcessName:
    started = start_time(pid)
    assert started is not None
    return ProcessName(pid, started)


@contextlib.contextmanager
def running(*command: str) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_process_has_ended_when_it_is_a_zombie_or_gone_or_another() -> None:
    with running("sleep", "1000") as process:
        name = named(process.pid)
        assert not has_ended(name)
        assert has_ended(ProcessName(name.pid, name.started + 1))
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert has_ended(name)
        process.wait()
        assert has_ended(name)


@pytest.mark.skipif(os.geteuid() != 0, reason="PID namespaces need root")
def test_an_init_has_ended_that_waits_for_others_of_its_namespace() -> None:
    with running("unshare", "--pid", "--fork", "--kill-child", "sleep", "1000") as outer:
        (init,) = wait_for_child(outer.pid)
        with running("nsenter", f"--pid=/proc/{init}/ns/pid", "sleep", "1000") as parent:
            (inner,) = wait_for_child(parent.pid)
            name = named(init)
            parent.send_signal(signal.SIGSTOP)  # it does not collect its child, so the kernel keeps the init
            wait_for(lambda: processes.state(parent.pid) == b"T", what="the stop of the parent")
            os.kill(init, signal.SIGKILL)
            wait_for(lambda: processes.state(inner) == b"Z", what="the end of the process in the namespace")
            assert processes.state(init) not in (b"Z", b"")
            assert has_ended(name)
            parent.send_signal(signal.SIGCONT)


def wait_for_child(pid: int) -> list[int]:
    children: list[int] = []

    def found() -> bool:
        with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file:
            children[:] = map(int, file.read().split())
        return bool(children) and all(b"sleep" in command_of(child) for child in children)

    wait_for(found, what="the child")
    return children


def command_of(pid: int) -> bytes:
    with open(f"/proc/{pid}/cmdline", "rb") as file:
        return file.read()
