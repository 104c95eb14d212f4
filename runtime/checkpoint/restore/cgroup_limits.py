"""Sets the limits of a restored container's cgroup, which crun would set only after the processes run.

A container that never runs is created in the same cgroup first. crun sets its limits and device rules, also with cgroup
version 2. The cgroup keeps them when the container's only process is killed.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
from pathlib import Path

import msgspec

from host import processes
from host.concurrency.threads import in_thread
from host.errors import PodkeelError
from host.files.removal import remove_tree
from runtime.oci.oci_runtime import OciRuntime
from runtime.specgen import config
from runtime.state.container import Container

# For CRIU and crun themselves while they restore. crun sets the container's own limits after that.
_MEMORY = 64 << 20
_PROCESSES = 64
_SECONDS = 60.0
_PROGRAM = "x"


async def set_limits(container: Container, runtime: OciRuntime) -> None:
    """Set the limits and device rules of the container's spec on its cgroup, which has no process yet.

    Raises CommandError if crun refuses them, and PodkeelError.
    """
    folder = container.folder.path / "limits"
    name = f"limits-{secrets.token_hex(8)}"
    await in_thread(_write_bundle, folder, container.folder.spec)
    words = ("create", "--bundle", str(folder), "--pid-file", str(folder / "pid"), name)
    options = (*runtime.options.arguments, "--root", str(folder / "state"))
    try:
        await processes.run(lambda: (runtime.executable(), *options, *words), timeout=_SECONDS)
    finally:
        await _end(folder)
        for complaint in await in_thread(remove_tree, folder):
            raise PodkeelError(complaint)


async def _end(folder: Path) -> None:
    with contextlib.suppress(OSError, ValueError):
        pid = int(await in_thread((folder / "pid").read_text))
        pidfd = os.pidfd_open(pid)
        try:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            await processes.wait_ended(pidfd)
        finally:
            os.close(pidfd)


def _write_bundle(folder: Path, spec: Path) -> None:
    for complaint in remove_tree(folder):  # a killed agent may have left it
        raise PodkeelError(complaint)
    root = folder / "rootfs"
    (root / "dev").mkdir(parents=True, mode=0o755)
    descriptor = os.open(root / _PROGRAM, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o755)
    os.close(descriptor)
    given = msgspec.json.decode(spec.read_bytes(), type=_Spec)
    (folder / "config.json").write_bytes(config.encode(_placeholder(given.linux)))


class _Linux(msgspec.Struct, rename="camel"):
    cgroups_path: str
    resources: config.Resources | None = None


class _Spec(msgspec.Struct):
    linux: _Linux


def _placeholder(given: _Linux) -> config.Spec:
    """A container in the cgroup of ``given`` whose program is never executed."""
    resources = given.resources or config.Resources()
    limits = config.Resources(devices=resources.devices, hugepage_limits=resources.hugepage_limits)
    memory = resources.memory
    if memory is not None and memory.limit is not None and memory.limit > 0:
        swap = memory.swap + _MEMORY if memory.swap is not None and memory.swap > 0 else memory.swap
        limits.memory = config.Memory(limit=memory.limit + _MEMORY, swap=swap)
    if resources.pids is not None and resources.pids.limit > 0:
        limits.pids = config.Pids(limit=resources.pids.limit + _PROCESSES)
    return config.Spec(
        oci_version=config.VERSION,
        process=config.Process(cwd="/", user=config.User(uid=0, gid=0), args=[f"/{_PROGRAM}"]),
        root=config.Root(path="rootfs", readonly=True),
        mounts=[],
        linux=config.Linux(
            namespaces=[config.Namespace(type="mount"), config.Namespace(type="pid")],
            cgroups_path=given.cgroups_path,
            resources=limits,
        ),
    )
