"""Which processes go before others."""

from __future__ import annotations

import os
import subprocess

import pytest

from host.concurrency.priority import run_before_children


@pytest.mark.skipif(os.geteuid() != 0, reason="needs the right to raise priorities")
def test_a_process_goes_before_its_children() -> None:
    script = "read go; sh -c 'cat /proc/self/stat'; cat /proc/$$/stat"
    with subprocess.Popen(["sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        run_before_children(process.pid)
        policy = os.sched_getscheduler(process.pid)
        output, _ = process.communicate("\n")
    child, parent = (line.rpartition(")")[2].split() for line in output.splitlines() if ")" in line)
    assert int(child[16]) == 0  # nice; proc_pid_stat(5)
    assert int(child[38]) == os.SCHED_OTHER
    assert int(parent[16]) == -20
    assert policy == os.SCHED_OTHER | os.SCHED_RESET_ON_FORK  # never ahead of all others, with any value


def test_a_process_that_is_gone_is_passed_over() -> None:
    with subprocess.Popen(["true"]) as process:
        process.wait()
        run_before_children(process.pid)
