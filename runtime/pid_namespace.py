"""The PID namespace that a pod's containers may share: held by catatonit as its init, made when first asked for."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import time

from host import libc, mounts, processes, procfs
from host.errors import PodkeelError
from runtime.layout import SandboxFolder
from runtime.sandbox import ProcessName

_SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41, "riscv64": 41, "ppc64le": 203, "s390x": 217}[os.uname().machine]

_START_SECONDS = 5.0
_TITLE_BYTES = 4096
# The first process that sh starts is the init of the namespace that unshare made for its children. sh tells its pid and
# ends; the init closes what it inherited once it is set up: so the end of the pipe says that it runs.
_TELLING = 3
_LAUNCH = f'"$0" -P >/dev/null 2>&1 & echo $! >&{_TELLING}'


def start_holder(folder: SandboxFolder, catatonit: str, sandbox_id: str) -> int:
    """Start catatonit as init of a new PID namespace and return its pid; ``pin_holder`` is then due.

    Runs in a fresh thread, which it leaves in another mount namespace. Containers of the pod can reach the init's root
    through /proc/1/root, so it gets an empty one with nothing of the host in it.
    """
    program = _installed(catatonit)
    root = folder.path / "init"
    root.mkdir(mode=0o711, exist_ok=True)
    libc.unshare(libc.CLONE_NEWPID | libc.CLONE_NEWNS)
    libc.mount("", "/", "", mounts.MS_REC | mounts.MS_PRIVATE, "")
    libc.mount("init", str(root), "tmpfs", mounts.MS_NOSUID | mounts.MS_NODEV, "mode=0711,size=64k,nr_inodes=8")
    (root / "catatonit").touch()
    (root / "dev").mkdir()
    (root / "dev" / "null").touch()
    mounts.bind(program, root / "catatonit")
    mounts.bind("/dev/null", root / "dev" / "null")
    os.chdir(root)
    # pivot_root(".", ".") puts the old root on top of the new one, from where it is let go (pivot_root(2)).
    libc.syscall(_SYS_PIVOT_ROOT, b".", b".")
    libc.umount(".", mounts.MNT_DETACH)
    return processes.spawn(["/catatonit", "-P"], environment={}, title=_title(sandbox_id))


def start_holder_in_user_namespace(folder: SandboxFolder, catatonit: str, sandbox_id: str) -> int:
    """The same for a pod with a user namespace, which then owns the PID namespace.

    A process with threads cannot enter a user namespace, so util-linux does it. The init's program is a copy that may
    be executed but not read: the kernel then lets nobody inside look through its /proc/1/root. Blocks.
    """
    program = folder.path / "init" / _title(sandbox_id)
    program.parent.mkdir(mode=0o711, exist_ok=True)
    shutil.copyfile(_installed(catatonit), program)
    program.chmod(0o711)
    told, telling = os.pipe2(os.O_CLOEXEC)
    with open(told, "rb", buffering=0) as answer:
        try:
            command = ["nsenter", f"--user={folder.pin('user')}", "unshare", "--pid", "sh", "-c", _LAUNCH, str(program)]
            parent = processes.spawn(command, descriptors={_TELLING: telling})
        finally:
            os.close(telling)
        try:
            return _holder_in(_read_to_end(answer.fileno(), _START_SECONDS))
        finally:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(parent, signal.SIGKILL)
                os.waitpid(parent, 0)


def _read_to_end(descriptor: int, seconds: float) -> bytes:
    """All that is written to a pipe until its last writer has closed it, or so many seconds have passed."""
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
    """Pin the PID namespace held by ``pid``, a child of ours, and name that process for good."""
    started = processes.start_time(pid)
    if started is None:
        raise PodkeelError(f"the init of the pod's PID namespace (pid {pid}) ended at once")
    pin = folder.pin("pid")
    pin.touch(mode=0o444)
    mounts.bind(f"/proc/{pid}/ns/pid", pin)
    return ProcessName(pid, started)


def end_holder(holder: ProcessName | None, folder: SandboxFolder, sandbox_id: str) -> None:
    """Kill the init of a pod's PID namespace, and with it all that is left in there. Gone already is fine.

    One that was started just before the agent died, and so never written down, is found by its title.
    """
    if holder is None and folder.pin("pid").parent.exists() and (folder.path / "init").exists():
        holder = _find(sandbox_id)
    pidfd = processes.open_process(holder.pid, holder.started) if holder is not None else None
    if pidfd is None:
        return
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
    os.close(pidfd)


def _installed(catatonit: str) -> str:
    program = shutil.which(catatonit)
    if program is None:
        raise PodkeelError(f"a shared PID namespace needs {catatonit!r}, which is not installed")
    return program


def _find(sandbox_id: str) -> ProcessName | None:
    wanted = _title(sandbox_id).encode()
    for pid in procfs.all_pids():
        if procfs.command_line(pid, _TITLE_BYTES)[0].rpartition(b"/")[2] == wanted:
            started = processes.start_time(pid)
            if started is not None:
                return ProcessName(pid, started)
    return None


def _title(sandbox_id: str) -> str:
    return f"podkeel-pod-init-{sandbox_id}"
