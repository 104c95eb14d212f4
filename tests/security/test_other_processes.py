"""Names of other processes on the node and in containers neither stop anything nor use much memory."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from host.concurrency.threads import in_fresh_thread
from host.files.procfs import command_line, runs_program
from host.processes import ProcessName, start_time
from runtime.layout import SandboxFolder
from runtime.namespaces.pid import end_holder, start_holder
from tests.support.agent import AgentProcess, wait_for
from tests.support.pods import run_container

# The first program sleeps with a name and arguments of its choice. The second one makes the kernel show 64 MiB as its
# arguments (PR_SET_MM_MAP, which needs no privilege).
_LONG = """
import ctypes, mmap, os, struct, sys, time
size = 64 << 20
words = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
words[:12] = b"conmon\\0-b\\0/x"
for page in range(4096, size, 4096): words[page:page + 6] = b"\\0-b\\0aa"
start = ctypes.addressof(ctypes.c_char.from_buffer(words))
stat = open("/proc/self/stat").read().rpartition(")")[2].split()
field = lambda number: int(stat[number - 3])
libc = ctypes.CDLL(None, use_errno=True); libc.sbrk.restype = ctypes.c_void_p
brk = libc.sbrk(0)
# start_code, end_code, start_data, end_data, start_brk; brk, start_stack, arg_start, arg_end; env_start, env_end;
# auxv, auxv_size, exe_fd
map_ = struct.pack("=5Q", *map(field, (26, 27, 45, 46, 47))) + struct.pack("=4Q", brk, field(28), start, start + size)
map_ += struct.pack("=2Q", field(50), field(51)) + struct.pack("=QIi", 0, 0, -1)
if libc.prctl(35, 14, map_, len(map_), 0): sys.exit(f"PR_SET_MM_MAP: {os.strerror(ctypes.get_errno())}")
print("ready", flush=True)
time.sleep(1000)
"""


@contextmanager
def _process(code: str, *, ready: bool = False, user: int | None = None) -> Iterator[int]:
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, user=user)
    assert process.stdout is not None
    try:
        if ready:
            assert process.stdout.readline() == "ready\n"
        else:
            wait_for(lambda: Path(f"/proc/{process.pid}/comm").read_text() == "sleep\n")
        yield process.pid
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def _named(*words: str) -> str:
    return f"import os; os.execv('/bin/sleep', {[*words]!r})"


def _peak(agent: AgentProcess) -> int:
    status = Path(f"/proc/{agent.pid()}/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+)", status)[0])


def test_no_command_line_stops_a_start(own_agent: AgentProcess) -> None:
    _, container_id = run_container(own_agent, "sleep", "1000")
    bundle = own_agent.run / "containers" / ("a" * 64)
    with (
        _process(_named("conmon", "1000", "-b")),
        _process(_named("conmon", "1000", "-b", str(bundle))),
        _process(_named("conmon", "1000", "-b", str(own_agent.run / "containers" / container_id))) as impostor,
    ):
        own_agent.restart()
        assert own_agent.client.findings() == []
        assert Path(f"/proc/{impostor}").exists()
        assert own_agent.client.exec(container_id, "true").exit_code == 0


@pytest.mark.skipif(shutil.which("catatonit") is None, reason="needs catatonit")
def test_no_process_is_killed_instead_of_the_init_of_a_pod(tmp_path: Path) -> None:
    """The agent was killed before it recorded the init. It finds it by a file that only root can read, not by name."""
    folder, sandbox_id = SandboxFolder(tmp_path), "a" * 64
    with contextlib.ExitStack() as stack:
        title = f"/x/podkeel-pod-init-{sandbox_id}"
        impostors = [stack.enter_context(_process(_named(title, "1000"))) for _ in range(3)]
        pid = asyncio.run(in_fresh_thread(start_holder, folder, "catatonit", sandbox_id))
        impostors.append(stack.enter_context(_process(_named(title, "1000"))))
        assert command_line(pid)[0].decode().endswith(sandbox_id)
        end_holder(None, SandboxFolder(tmp_path / "another"), sandbox_id)
        assert start_time(pid) is not None
        end_holder(ProcessName(impostors[0], start_time(impostors[0]) or 0), folder, sandbox_id)
        assert start_time(pid) is None
        assert None not in map(start_time, impostors)


def test_a_command_line_of_many_megabytes_is_not_read(own_agent: AgentProcess) -> None:
    own_agent.restart()
    before = _peak(own_agent)
    with _process(_LONG, ready=True) as pid:
        with open(f"/proc/{pid}/cmdline", "rb") as words:
            assert len(words.read(40 << 20)) == 40 << 20
        own_agent.restart()
        assert own_agent.client.findings() == []
        assert _peak(own_agent) - before < 32 * 1024
        assert len(b"\0".join(command_line(pid))) <= 64 * 1024


def test_a_program_is_identified_by_its_file_and_user() -> None:
    sleep = "/bin/sleep"
    with _process(_named("conmon", "1000")) as pid:
        assert runs_program(pid, os.path.realpath(sleep))
        assert not runs_program(pid, "/usr/bin/conmon")
    with _process(_named("sleep", "1000"), user=65534) as pid:
        assert not runs_program(pid, sleep)
    assert not runs_program(2**22, sleep)
