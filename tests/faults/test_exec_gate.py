"""A process that the kernel asks whether programs in a container may be executed cannot answer."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from pathlib import Path

from runtime.oci.exec_gate import ExecGate
from tests.integration.agent.hardening import init_pid
from tests.support.agent import AgentProcess, wait_for
from tests.support.descriptors import descriptors_left
from tests.support.pods import run_container

_ASKED = (
    "import sys, time; from pathlib import Path; from runtime.oci.exec_gate import ExecGate;"
    " gate = ExecGate(Path(sys.argv[1])); time.sleep(99)"
)


def _waiting(container_pid: int) -> list[str]:
    """The children of the container's first process that have not yet executed their program."""
    children = Path(f"/proc/{container_pid}/task/{container_pid}/children").read_text().split()
    waiting = []
    for pid in children:
        with contextlib.suppress(OSError):  # it has ended
            if Path(f"/proc/{pid}/syscall").read_text().startswith("59 "):
                waiting.append(pid)
    return waiting


def test_programs_that_wait_for_a_killed_process_continue(agent: AgentProcess) -> None:
    script = "while :; do /bin/ls /proc/1/exe >/dev/null || exit 9; echo line; done"
    _, container_id = run_container(agent, "sh", "-c", script)
    log = Path(agent.client.status(container_id).log_path)
    rootfs = agent.run / "containers" / container_id / "rootfs"
    with subprocess.Popen([sys.executable, "-c", _ASKED, str(rootfs)]) as asked:
        held: list[list[str]] = []

        def is_waiting() -> bool:
            held.append(_waiting(init_pid(agent, container_id)))
            return len(held) > 20 and bool(held[-1]) and all(pids == held[-1] for pids in held[-20:])

        try:
            wait_for(is_waiting, what="a program that waits for an answer")
        finally:
            asked.kill()
    size = log.stat().st_size
    wait_for(lambda: log.stat().st_size > size + 500, what="that the container keeps running")
    assert agent.client.exec(container_id, "true").exit_code == 0


def test_programs_continue_if_the_permission_process_has_no_descriptor_left(tmp_path: Path) -> None:
    def groups() -> list[str]:
        links = []
        for entry in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # the folder's own
                links.append(str(entry.readlink()))
        return [link for link in links if "fanotify" in link]

    async def hold(gate: ExecGate) -> None:
        with descriptors_left(0):
            await gate.hold(os.getpid(), "word", 0)

    rootfs = tmp_path / "rootfs"
    rootfs.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=755", "rootfs", rootfs], check=True)
    try:
        gate = ExecGate(rootfs)
        assert groups()
        asyncio.run(hold(gate))
        assert groups() == []
    finally:
        subprocess.run(["umount", rootfs], check=True)
