"""Code of a layer that is executed in the unpack worker reaches only the layer.

The attacker's program replaces the one that reads the tar, after the real worker was started and confined.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import select
import signal
import time
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path

import pytest

from host.errors import LimitError, PodkeelError
from host.files.procfs import all_pids, command_line, read_bounded
from images.oci.manifests import Descriptor
from images.unpack import unpacker as unpacking
from images.unpack.unpacker import HELPED_FROM, Unpacker
from tests.security.worker_attack import ANY, Program, layer, program, quiet, unpacker
from tests.support.image_builder import entry, make_tar

__all__ = ["layer", "program", "unpacker"]

# chown, dac_override, fowner, fsetid, setfcap
CAPABILITIES = sum(1 << number for number in (0, 1, 3, 4, 31))
DENIED = "EPERM"


async def unending() -> AsyncGenerator[bytes, None]:
    while True:
        yield bytes(1 << 20)


async def outcome(unpacker: Unpacker, layer: Path) -> dict[str, str]:
    """The findings of the attacker's program, which fails with them as its message."""
    with pytest.raises(PodkeelError) as caught:
        await unpacker.unpack(quiet(), ANY, layer, None, "attack")
    found = json.loads(caught.value.message.removeprefix("attack could not be unpacked: "))
    assert isinstance(found, dict)
    return found


def program_of(*lines: str) -> str:
    """A program of these lines that reports ``found``."""
    body = "\n".join(f"    {line}" for line in lines)
    return f"""
def work(read, max_bytes, max_entries):
{body}
    return {{"error": "internal", "message": json.dumps(found).encode().hex()}}
"""


async def test_the_worker_cannot_mount_or_make_devices(program: Program, unpacker: Unpacker, layer: Path) -> None:
    disk = Path("/").stat().st_dev
    program(
        program_of(
            "call('mount', 165, b'none', b'/', b'tmpfs', 0, None)",
            "call('umount', 166, b'/', 2)",
            "call('open_tree', 428, -100, b'/', 1)",
            "call('fsopen', 430, b'proc', 0)",
            "call('pivot_root', 155, b'/', b'/')",
            "call('chroot', 161, b'/')",
            "call('unshare', 272, 0x20000)",
            "call('setns', 308, 0, 0)",
            "attempt('null', lambda: os.mknod('null', stat.S_IFCHR | 0o666, os.makedev(1, 3)))",
            f"attempt('disk', lambda: os.mknod('disk', stat.S_IFBLK | 0o600, {disk}))",
            f"call('disk by number', 133, b'disk', stat.S_IFBLK | 0o600, ctypes.c_ulong({disk} | 1 << 40))",
            "call('disk at', 259, -100, b'disk', stat.S_IFBLK | 0o600, ctypes.c_ulong(0x100000000 | 0x801))",
            "attempt('block 0', lambda: os.mknod('zero', stat.S_IFBLK, 0))",
            "attempt('opaque', lambda: os.setxattr('/', 'trusted.overlay.opaque', b'y'))",
        )
    )
    assert set((await outcome(unpacker, layer)).values()) == {DENIED}
    assert list(layer.iterdir()) == []


async def test_the_worker_reaches_no_file_outside(program: Program, unpacker: Unpacker, layer: Path) -> None:
    (layer.parent / "secret").write_text("secret")
    secret = str(layer.parent / "secret")
    program(
        program_of(
            f"attempt('secret', lambda: open({secret!r}).read())",
            f"attempt('climbing', lambda: open('../' * 40 + {secret!r}).read())",
            "attempt('shadow', lambda: open('/etc/shadow').read())",
            "attempt('proc', lambda: os.listdir('/proc/1'))",
            "attempt('device', lambda: os.open('/dev/null', os.O_RDWR))",
            "found['root'] = ','.join(os.listdir('/') + os.listdir('/..'))",
            "handle = ctypes.create_string_buffer(b'\\x08\\0\\0\\0\\x01\\0\\0\\0\\x02\\0\\0\\0\\0\\0\\0\\0', 128)",
            "call('handle', 304, os.open('/', os.O_RDONLY), handle, 0)",
            "open_files = []",
            "for number in range(1000):",
            "    try: open_files.append(os.fstat(number).st_mode)",
            "    except OSError: pass",
            # Standard input, output and error, the lifeline, and the descriptor of the previous attempt.
            "found['descriptors'] = ','.join('pipe' if stat.S_ISFIFO(mode) else oct(mode) for mode in open_files)",
        )
    )
    found = await outcome(unpacker, layer)
    assert {found[name] for name in ("secret", "climbing", "shadow", "proc", "device")} == {"ENOENT"}
    assert found["handle"] == DENIED
    assert found["root"] == ""
    assert found["descriptors"] == "pipe,pipe,pipe,pipe,0o40755"


async def test_the_worker_reaches_no_process_and_no_network(program: Program, unpacker: Unpacker, layer: Path) -> None:
    agent = os.getpid()
    program(
        program_of(
            *(f"attempt('socket {family}', lambda: socket.socket({family}, 1))" for family in (1, 2, 10, 16, 17, 40)),
            "attempt('socketpair', socket.socketpair)",
            f"attempt('kill', lambda: os.kill({agent}, 0))",
            "attempt('kill all', lambda: os.kill(-1, 9))",
            "attempt('signal itself', lambda: os.kill(1, 0))",
            f"call('tgkill', 234, {agent}, {agent}, 9)",
            f"call('ptrace', 101, 16, {agent}, 0, 0)",
            f"call('process_vm_readv', 310, {agent}, 0, 0, 0, 0, 0)",
            f"call('pidfd_open', 434, {agent}, 0)",
            f"call('prlimit', 302, {agent}, 7, 0, 0)",
            "attempt('setsid', os.setsid)",
            "attempt('priority', lambda: os.setpriority(0, 0, 0))",
        )
    )
    assert set((await outcome(unpacker, layer)).values()) == {DENIED}


async def test_the_worker_cannot_start_programs_or_drop_its_confinement(
    program: Program, unpacker: Unpacker, layer: Path
) -> None:
    program(
        program_of(
            "attempt('fork', os.fork)",
            "attempt('exec', lambda: os.execv('/a', ['a']))",
            "call('clone', 56, 17, 0, 0, 0, 0)",
            "call('clone3', 435, 0, 0)",
            "call('bpf', 321, 0, 0, 0)",
            "call('io_uring_setup', 425, 1, 0)",
            "call('keyctl', 250, 0, -3, 0)",
            "call('add_key', 248, b'user', b'a', b'b', 1, -2)",
            "call('perf_event_open', 298, 0, 0, -1, -1, 0)",
            "call('userfaultfd', 323, 0)",
            "call('memfd_create', 319, b'a', 0)",
            "call('prctl', 157, 1, 0, 0, 0, 0)",
            "call('capset', 126, 0, 0)",
            "call('setuid', 105, 0)",
            "call('personality', 135, 0x0400000)",
            "call('seccomp', 317, 0, 0, 0)",
            "call('executable memory', 9, 0, 4096, 7, 0x22, -1, 0)",
            "call('setrlimit', 160, resource.RLIMIT_CPU, (ctypes.c_ulong * 2)(9999, 9999))",
            "attempt('pipe size', lambda: __import__('fcntl').fcntl(0, 1031, 1 << 20))",
        )
    )
    assert set((await outcome(unpacker, layer)).values()) == {DENIED}


@pytest.mark.parametrize("processes", [1, 2])
async def test_the_kernel_reports_the_worker_s_confinement(
    layer: Path, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also that of the second process, which a large layer gets on a node with several processors."""
    monkeypatch.setattr(os, "cpu_count", lambda: processes)
    content = make_tar([entry("a", bytes(2 * HELPED_FROM))])

    async def waiting() -> AsyncGenerator[bytes, None]:
        yield content[:HELPED_FROM]
        await asyncio.Event().wait()

    unpacker = Unpacker(max_bytes=8 << 20, max_entries=100, max_seconds=60, parallel=1)
    call = asyncio.create_task(unpacker.unpack(waiting(), Descriptor("", "", len(content)), layer, None, "attack"))
    pidfds = {}
    async for process in confined_processes():
        status = dict(line.split(":\t", 1) for line in (process / "status").read_text().splitlines())
        assert int(status["CapPrm"], 16) == int(status["CapEff"], 16) == CAPABILITIES
        assert int(status["CapInh"], 16) == int(status["CapAmb"], 16) == 0
        assert (status["Seccomp"], status["NoNewPrivs"], status["Threads"]) == ("2", "1", "1")
        for kind in ("mnt", "net", "ipc", "pid"):
            assert (process / "ns" / kind).readlink() != Path("/proc/self/ns", kind).readlink(), kind
        assert (process / "mountinfo").read_text().count("\n") == 1
        assert (process / "net/dev").read_text().count("\n") == 3  # two header lines and a loopback that is down
        assert (process / "oom_score_adj").read_text() == "1000\n"
        if status["NSpid"] not in pidfds:
            pidfds[status["NSpid"]] = os.pidfd_open(int(process.name))
        if len(pidfds) == processes:
            break
    assert sorted(numbers.split()[-1] for numbers in pidfds) == ["1", "2"][:processes]
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    for pidfd in pidfds.values():
        ended = select.poll()
        ended.register(pidfd, select.POLLIN)
        assert ended.poll(5000)
        os.close(pidfd)
    unpacker.close()


@pytest.mark.parametrize("victim", ["1", "2"])
async def test_a_killed_worker_is_reported(layer: Path, victim: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    killed = asyncio.Event()
    content = make_tar([entry(f"file{number}", b"x") for number in range(4000)])

    async def chunks() -> AsyncGenerator[bytes, None]:
        yield content[: len(content) // 2]
        await killed.wait()
        yield content[len(content) // 2 :]

    with contextlib.closing(Unpacker(max_bytes=8 << 20, max_entries=9999, max_seconds=60, parallel=1)) as unpacker:
        call = unpacker.unpack(chunks(), Descriptor("", "", len(content)), layer, None, "layer")
        task = asyncio.create_task(call)
        async for process in confined_processes():
            if re.search(rf"^NSpid:.*\t{victim}$", (process / "status").read_text(), re.MULTILINE):
                os.kill(int(process.name), signal.SIGKILL)
                break
        killed.set()
        with pytest.raises(LimitError, match=r"layer is over the limits: .* killed: the node may be short of memory"):
            await task


async def confined_processes() -> AsyncIterator[Path]:
    """Waits for the inner processes of this process's workers."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for pid in all_pids():
            status = read_bounded(f"/proc/{pid}/status", 65536)
            if b"Seccomp:\t2" in status and b"images.unpack.worker" in b" ".join(command_line(pid)):
                yield Path(f"/proc/{pid}")
        await asyncio.sleep(0.02)
    raise TimeoutError("no worker confined itself")


@pytest.mark.parametrize(
    "case",
    [
        ("while True: pass", "2 s of processor time (images.max_layer_seconds)"),
        ("return bytearray(5 << 30)", "bytes of memory"),
        ("import _thread; lock = _thread.allocate_lock(); lock.acquire(); lock.acquire()", "images.max_layer_seconds"),
    ],
    ids=["processor time", "memory", "seconds"],
)
async def test_the_worker_s_memory_and_time_are_limited(
    program: Program,
    unpacker: Unpacker,
    layer: Path,
    monkeypatch: pytest.MonkeyPatch,
    case: tuple[str, str],
) -> None:
    body, words = case
    if "processor" in words:
        monkeypatch.setattr(unpacking, "WALL_TIME", 100)  # others may use the processors too
    program(f"import _thread\ndef work(read, max_bytes, max_entries):\n    {body}\n")
    began = time.monotonic()
    with pytest.raises(LimitError) as caught:
        await unpacker.unpack(quiet(), ANY, layer, None, "attack")
    assert words in caught.value.message
    assert time.monotonic() - began < 100  # the attack never ends


async def test_a_worker_that_stops_reading_releases_its_sender(
    program: Program, unpacker: Unpacker, layer: Path
) -> None:
    program("import _thread\ndef work(*_):\n    lock = _thread.allocate_lock(); lock.acquire(); lock.acquire()\n")
    with pytest.raises(LimitError, match=r"images\.max_layer_seconds"):
        await unpacker.unpack(unending(), ANY, layer, None, "attack")


async def test_open_files_and_file_sizes_are_limited(program: Program, unpacker: Unpacker, layer: Path) -> None:
    program(
        program_of(
            "file = os.open('big', os.O_WRONLY | os.O_CREAT)",
            "attempt('size', lambda: os.pwrite(file, b'x', 1 << 20))",
            "attempt('truncate', lambda: os.truncate(file, 1 << 40))",
            "attempt('number', lambda: [os.open('/', os.O_RDONLY) for _ in range(70)])",
        )
    )
    assert await outcome(unpacker, layer) == {"size": "EFBIG", "truncate": "EFBIG", "number": "EMFILE"}
