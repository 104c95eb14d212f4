"""The working directory of a running container, opened and checked before an OCI runtime enters it.

An OCI runtime that enters a directory by its name follows links that the container has just made, with rights that the
container does not have: even into /proc/PID/root of processes outside. Some check afterwards where they are (crun from
1.14.1, runc from 1.1.12 and in Debian's 1.1.5+ds1-1+deb12u1). The others get a descriptor, whose directory cannot be
replaced.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass

from host import libc, processes
from host.concurrency.abandonable import AbandonableThreads, GivenUpError, Permission
from host.errors import DeadlineError, PermissionDeniedError, WrongStateError
from host.files.mounts import mount_id
from host.processes import ProcessName
from runtime.specgen import config
from runtime.specgen.mounts import openat2
from runtime.specgen.namespaces import user_mappings
from runtime.state.container import Container

_SYS_SETGROUPS = {"x86_64": 116, "aarch64": 159, "riscv64": 159, "ppc64le": 81, "s390x": 206}[os.uname().machine]
_MAX_LEVELS = 4096
_NOBODY = 65534
_FOLDER = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkingDirectory:
    """``path`` in the container whose first process is ``init``. ``title`` names the container in errors.

    ``user`` has the ids on the host of the process that works there: uid, gid and groups. ``threads`` open the path.
    """

    path: str
    init: ProcessName
    title: str
    user: tuple[int, int, Sequence[int]]
    threads: AbandonableThreads

    async def open(self, seconds: float) -> int:
        """Open the directory within ``seconds``: the server of a volume may be down. The caller closes the descriptor.

        Raises:
            PermissionDeniedError: a link leads into the kernel's file systems, and could lead out of the container.
            WrongStateError: the directory or the container no longer exists.
            DeadlineError: it could not be opened in time.
        """
        opened: list[int] = []

        def work(permission: Permission) -> None:
            descriptor = self._open()
            try:
                with permission.step():
                    opened.append(descriptor)
            except GivenUpError:
                os.close(descriptor)
                raise

        try:
            async with asyncio.timeout(seconds):
                await self.threads.run(self.title, work)
        except BaseException as error:
            for descriptor in opened:
                os.close(descriptor)
            if isinstance(error, TimeoutError):
                raise DeadlineError(
                    f"{self.title}: its working directory {self.path} did not answer in {seconds:g} s: "
                    "check that the server of its volume is reachable"
                ) from error
            raise
        return opened[0]

    def _open(self) -> int:
        """Open the directory in a thread that ends after that, because it may have taken the user's rights."""
        with contextlib.ExitStack() as stack:
            root = self._root()
            stack.callback(os.close, root)
            try:
                return self._below(root)
            except PermissionError:
                # A file system that root cannot read, such as NFS or FUSE: the user's access decides.
                become(self.user)
                return self._below(root)

    def _root(self) -> int:
        """The root of the container's mount namespace, where an OCI runtime begins."""
        pidfd = processes.open_process(self.init.pid, self.init.started)
        if pidfd is None:
            raise WrongStateError(f"{self.title} has just ended")
        try:
            root = os.open(f"/proc/{self.init.pid}/root", _FOLDER)
            signal.pidfd_send_signal(pidfd, 0)
        except ProcessLookupError as error:
            raise WrongStateError(f"{self.title} has just ended") from error
        finally:
            os.close(pidfd)
        return _topmost(root)

    def _below(self, root: int) -> int:
        try:
            return openat2.open_in_root(root, self.path, flags=os.O_DIRECTORY, follow_links=False)
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise self._unusable(error) from error
        try:
            descriptor = openat2.open_in_root(root, self.path, flags=os.O_DIRECTORY)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise self._refusal(root) from error
            raise self._unusable(error) from error
        if libc.is_kernel_filesystem(descriptor):
            os.close(descriptor)
            raise self._refusal(root)
        return descriptor

    def _unusable(self, error: OSError) -> Exception:
        if isinstance(error, PermissionError):
            return error
        return WrongStateError(
            f"{self.title}: its working directory {self.path} cannot be used ({error.strerror}): "
            "make it a folder again, or make a new container"
        )

    def _refusal(self, root: int) -> PermissionDeniedError:
        return PermissionDeniedError(
            f"{self.title}: the link {self._first_link(root)} in its working directory {self.path} leads "
            "into /proc or /sys, and could lead out of the container: make it a folder again, or make a new container"
        )

    def _first_link(self, root: int) -> str:
        names = self.path.strip("/").split("/")
        for number in range(1, len(names)):
            path = "/" + "/".join(names[:number])
            try:
                os.close(openat2.open_in_root(root, path, follow_links=False))
            except OSError:
                return path
        return self.path


def working_directory(
    container: Container, init: ProcessName, process: config.Process, threads: AbandonableThreads
) -> WorkingDirectory:
    """The working directory of ``process``, which is to run in ``container``."""
    mappings = user_mappings(container.sandbox.namespace_options)
    uids, gids = mappings if mappings is not None else ((), ())
    user = process.user
    groups = [on_host(gids, group) for group in user.additional_gids]
    ids = (on_host(uids, user.uid), on_host(gids, user.gid), groups)
    return WorkingDirectory(path=process.cwd, init=init, title=container.title, user=ids, threads=threads)


def on_host(mappings: Sequence[config.IDMapping], number: int) -> int:
    """The host's id of a container's id. Unchanged without ``mappings``; the overflow id if it is not mapped."""
    for mapping in mappings:
        if mapping.container_id <= number < mapping.container_id + mapping.size:
            return mapping.host_id + number - mapping.container_id
    return _NOBODY if mappings else number


def _topmost(folder: int) -> int:
    """The root of the mount namespace of ``folder``, which is closed: a process may have called chroot(2)."""
    for _ in range(_MAX_LEVELS):
        try:
            above = os.open("..", _FOLDER, dir_fd=folder)
        except BaseException:
            os.close(folder)
            raise
        same = os.path.sameopenfile(above, folder) and mount_id(above) == mount_id(folder)
        os.close(folder)
        folder = above
        if same:
            return folder
    os.close(folder)
    raise WrongStateError(f"the root of the container's first process is more than {_MAX_LEVELS} folders deep")


def become(user: tuple[int, int, Sequence[int]]) -> None:
    """Give only the calling thread a user's rights on files (setfsuid(2))."""
    uid, gid, groups = user
    libc.syscall(_SYS_SETGROUPS, ctypes.c_size_t(len(groups)), (ctypes.c_uint32 * len(groups))(*groups))
    libc.set_file_user(uid, gid)
