"""The PID namespace that a pod's containers may share. catatonit is its init. It is created when first needed."""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import shutil
import signal
import time
from pathlib import Path
from typing import BinaryIO

from host import libc, processes
from host.concurrency.thread_starting import run_in_new_thread
from host.errors import PodkeelError
from host.files import mounts, procfs
from host.processes import ProcessName
from runtime.layout import SandboxFolder
from runtime.namespaces.init_rights import drop_rights, init_filter, join_pod, limit
from runtime.namespaces.init_root import INIT_ROOT, PROGRAM, become_root_of

_START_SECONDS = 5.0
_TITLE_BYTES = 4096
_MARK = "PODKEEL_POD_INIT"
_MARK_BYTES = 32
# The first process that sh starts becomes the init of the namespace that unshare made for its children. sh waits until
# the agent has given it another root, starts the init and ends. The init closes the inherited descriptors once it is
# set up, so the end of the pipe shows that it runs.
_REPORT = 3
_WAITING = 4
_LAUNCH = f"""echo >&{_REPORT}; read go <&{_WAITING} || exit
"$0" -P >/dev/null 2>&1 {_WAITING}<&- &
echo $! >&{_REPORT}"""


def start_holder(folder: SandboxFolder, catatonit: str, sandbox_id: str) -> int:
    """Start catatonit as init of a new PID namespace and return its pid. Call ``pin_holder`` next. Blocks."""
    program = _installed(catatonit)
    mark = _new_mark(folder)
    init_filter()  # compiled now, because that reads files of the node

    def start() -> int:
        join_pod(folder)
        INIT_ROOT.enter(program)
        libc.unshare(libc.CLONE_NEWPID)
        drop_rights()
        pid = processes.spawn([PROGRAM, "-P"], environment={_MARK: mark}, title=_title(sandbox_id))
        limit(pid)
        return pid

    return run_in_new_thread(start, name="pod-init")


def start_holder_in_user_namespace(folder: SandboxFolder, catatonit: str, sandbox_id: str) -> int:
    """As ``start_holder``, for a pod with a user namespace, which then owns the PID namespace.

    A process with threads cannot enter a user namespace, so util-linux does it. No process inside can inspect the init,
    which has rights in that user namespace only. Runs in a new thread, which stays in other namespaces. Blocks.
    """
    program = _installed(catatonit)
    environment = {**os.environ, _MARK: _new_mark(folder)}
    join_pod(folder)
    with contextlib.ExitStack() as stack:
        answer, telling = _pipe(stack)
        waiting, go = _pipe(stack)
        command = ["nsenter", f"--user={folder.pin('user')}", "unshare", "--mount", "--pid", "sh", "-c", _LAUNCH]
        descriptors = {_REPORT: telling.fileno(), _WAITING: waiting.fileno()}
        arguments = [*command, f"/{_title(sandbox_id)}"]
        parent = processes.spawn(arguments, environment=environment, descriptors=descriptors)
        telling.close()
        try:
            if _read_some(answer.fileno(), _START_SECONDS) == b"\n":
                _give_root(parent, program, _title(sandbox_id))
                go.write(b"go\n")
            return _holder_in(_read_to_end(answer.fileno(), _START_SECONDS))
        finally:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(parent, signal.SIGKILL)
                os.waitpid(parent, 0)


def _pipe(stack: contextlib.ExitStack) -> tuple[BinaryIO, BinaryIO]:
    """The reading and the writing end of a pipe, unbuffered. ``stack`` closes both."""
    ends = os.pipe2(os.O_CLOEXEC)
    reading, writing = os.fdopen(ends[0], "rb", buffering=0), os.fdopen(ends[1], "wb", buffering=0)
    return stack.enter_context(reading), stack.enter_context(writing)


def _give_root(parent: int, program: str, name: str) -> None:
    """Set the init's root for the shell that will start the init and is alone in its mount namespace."""
    with contextlib.ExitStack() as stack:
        namespace = os.open(f"/proc/{parent}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, namespace)
        copy = INIT_ROOT.clone(program)
        stack.callback(os.close, copy)
        become_root_of(namespace, copy, name)


def _read_some(descriptor: int, seconds: float) -> bytes:
    """The first bytes of a pipe. Empty at its end or after so many seconds."""
    poller = select.poll()
    poller.register(descriptor, select.POLLIN)
    return os.read(descriptor, 4096) if poller.poll(seconds * 1000) else b""


def _read_to_end(descriptor: int, seconds: float) -> bytes:
    """Read a pipe until its last writer has closed it, or until so many seconds have passed."""
    poller = select.poll()
    poller.register(descriptor, select.POLLIN)
    deadline = time.monotonic() + seconds
    content = b""
    while poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
        data = os.read(descriptor, 4096)
        if not data:
            break
        content += data
    return content


def _holder_in(answer: bytes) -> int:
    if not answer.strip().isdigit():
        raise PodkeelError(
            "the init of the pod's PID namespace did not start; nsenter, unshare and sh are needed for it"
        )
    return int(answer)


def pin_holder(folder: SandboxFolder, pid: int) -> ProcessName:
    """Pin the PID namespace of ``pid``, a child of this process. Return its pid and start time."""
    started = processes.start_time(pid)
    if started is None:
        raise PodkeelError(f"the init of the pod's PID namespace (pid {pid}) ended at once")
    pin = folder.pin("pid")
    pin.touch(mode=0o444)
    mounts.bind(f"/proc/{pid}/ns/pid", pin)
    return ProcessName(pid, started)


def end_holder(holder: ProcessName | None, folder: SandboxFolder, sandbox_id: str) -> None:
    """Kill the init of a pod's PID namespace, and with it all other processes of the namespace.

    An init that has ended is no error. Its record may be missing, if the agent died before writing it or the record was
    lost. Then it is found in the pinned namespace or, if that is not pinned yet, by the mark in its environment. The
    name of a process is not enough: other processes could be killed instead of the init.
    """
    named = _open_own(holder, folder, sandbox_id) if holder is not None else None
    if named is not None:
        _kill([named])
    elif _mark_file(folder).parent.exists():
        found = (processes.open_process(pid, None) for pid in _found(folder, sandbox_id))
        _kill([pidfd for pidfd in found if pidfd is not None])


def _kill(pidfds: list[int]) -> None:
    for pidfd in pidfds:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    for pidfd in pidfds:
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
        os.close(pidfd)


def _open_own(holder: ProcessName, folder: SandboxFolder, sandbox_id: str) -> int | None:
    """A pidfd of the recorded init. None if it has ended, or the record names a process that is not this pod's init."""
    pidfd = processes.open_process(holder.pid, holder.started)
    if pidfd is None:
        return None
    if _in_pinned(holder.pid, folder) or _marked(holder.pid, folder, sandbox_id):
        return pidfd
    os.close(pidfd)
    return None


def _found(folder: SandboxFolder, sandbox_id: str) -> list[int]:
    return [pid for pid in procfs.all_pids() if _in_pinned(pid, folder) or _marked(pid, folder, sandbox_id)]


def _in_pinned(pid: int, folder: SandboxFolder) -> bool:
    try:
        return folder.pin("pid").samefile(f"/proc/{pid}/ns/pid")
    except OSError:
        return False


def _marked(pid: int, folder: SandboxFolder, sandbox_id: str) -> bool:
    """Whether a process has the pod's mark, which only root can read. Checked last, because most have another name."""
    name = procfs.command_line(pid, _TITLE_BYTES)[0].rpartition(b"/")[2]
    if name != _title(sandbox_id).encode():
        return False
    mark = procfs.read_bounded(str(_mark_file(folder)), _MARK_BYTES)
    return len(mark) == _MARK_BYTES and procfs.has_in_environment(pid, _MARK.encode() + b"=" + mark)


def _mark_file(folder: SandboxFolder) -> Path:
    return folder.path / "init" / "mark"


def _new_mark(folder: SandboxFolder) -> str:
    """Write the mark that the init will have in its environment, before the init is started."""
    file = _mark_file(folder)
    file.parent.mkdir(mode=0o700, exist_ok=True)
    mark = secrets.token_hex(_MARK_BYTES // 2)
    file.write_text(mark, encoding="ascii")
    return mark


def _installed(catatonit: str) -> str:
    program = shutil.which(catatonit)
    if program is None:
        raise PodkeelError(f"a shared PID namespace needs {catatonit!r}, which is not installed: install catatonit")
    return program


def _title(sandbox_id: str) -> str:
    return f"podkeel-pod-init-{sandbox_id}"
