"""Records the end of a container and releases its resources."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import Coroutine

from host import processes
from host.children.reaping import reap
from host.concurrency.threads import in_fresh_thread, in_thread
from host.errors import PodkeelError
from host.files.removal import remove_tree
from metrics.meters import Meters
from proto.runtime.v1 import cri_pb2
from runtime.cgroups.tree import CgroupTree
from runtime.containers.bundle.rootfs import Rootfs
from runtime.containers.endings.kill_watch import KillWatch
from runtime.containers.endings.out_of_memory import ended_by_the_kernel, kills_for_memory
from runtime.hooks import Hooks
from runtime.oci.conmon import ExitRecord, Monitors
from runtime.oci.handlers import Handlers
from runtime.state.container import Container, ContainerRecord, ContainerState
from runtime.state.state import State
from runtime.state.transitions import of_container

UNKNOWN_EXIT_CODE = 255

_LOG_SECONDS = 1.0
_CGROUP_SECONDS = 5.0
# Pauses between attempts to handle an end. Attempts fail on a node without free descriptors or process ids.
_FIRST_PAUSE_SECONDS = 0.5
_MAX_PAUSE_SECONDS = 15.0
_log = logging.getLogger("podkeel.containers")


class ContainerExit:
    """Watches the conmon processes of containers, and handles the ends of containers."""

    def __init__(
        self,
        *,
        state: State,
        handlers: Handlers,
        monitors: Monitors,
        cgroups: CgroupTree,
        rootfs: Rootfs,
        meters: Meters,
        hooks: Hooks,
    ) -> None:
        self._state = state
        self._handlers = handlers
        self._monitors = monitors
        self._cgroups = cgroups
        self._rootfs = rootfs
        self._meters = meters
        self._hooks = hooks
        self._kills = KillWatch(cgroups)
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = asyncio.Event()

    def watch(self, container: Container) -> None:
        """Watch for kills in a container, and for the end of its conmon. A program that cannot run has no conmon."""
        descriptor = container.monitor_descriptor
        if descriptor is not None:
            self._kills.watch(container)
            processes.watch_exit(descriptor, lambda: self._on_monitor_end(container))

    def _on_monitor_end(self, container: Container) -> None:
        self._spawn(self._monitor_ended(container))

    async def _monitor_ended(self, container: Container) -> None:
        """Handle the end of conmon, which is noticed only once. It is tried again until it succeeds."""
        self._close_monitor(container)
        pause = _FIRST_PAUSE_SECONDS
        while not self._closing.is_set():
            try:
                await self._handle_end(container)
                return
            except (PodkeelError, OSError, RuntimeError) as error:
                _log.error("%s: its end cannot be handled: trying again: %s", container.title, error)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._closing.wait()
            pause = min(2 * pause, _MAX_PAUSE_SECONDS)

    async def _handle_end(self, container: Container) -> None:
        async with container.lock:
            if container.record.state not in (ContainerState.CREATED, ContainerState.RUNNING):
                self._kills.forget(container.id)
                return
            exit_record = self._monitors.exit_record(container.id)
            if exit_record is None and await self.still_runs(container):
                return
            await self.record_exit(container, exit_record)

    async def still_runs(self, container: Container) -> bool:
        """Whether the container still runs although conmon was killed. Its end will be noticed without an exit code."""
        init = container.record.init
        pidfd = processes.open_process(init.pid, init.started) if init is not None else None
        if pidfd is None:
            return False
        self._handlers.failed_actions["conmon", "monitor"] += 1
        _log.error("%s: conmon was killed: the container runs without log and exit code", container.title)
        container.monitor_descriptor = pidfd
        container.record.monitor = None
        await self._state.save(container)
        self.watch(container)
        return True

    async def record_exit(self, container: Container, exit_record: ExitRecord | None) -> None:
        """Record how a container ended. The caller must hold its lock."""
        await _end_log(container)
        async with self._hooks.sync_blocked():
            counted = self._describe_end(container, exit_record)
            # The OCI runtime's resources are released at the same time: if the agent dies before the commit, conmon's
            # record still exists.
            container.cleanup = self._spawn(self.clean_up(container))
            await self.save_end(container, sandbox_too=counted)
        self.ended(container)
        record, ended = container.record, of_container(container)
        _log.info("%s: exited: code %d, %s", container.title, record.exit_code, record.reason, extra=ended)

    def _describe_end(self, container: Container, exit_record: ExitRecord | None) -> bool:
        """Put the end into the record. Return whether kills in the pod were counted for it, which must be written too.

        Nothing else may run from here to the commit: kills are attributed by which containers are alive.
        """
        record = container.record
        kills = kills_for_memory(self._cgroups, self._state, container)
        history = self._kills.history(container, kills)
        record.exit_code = exit_record.code if exit_record else UNKNOWN_EXIT_CODE
        record.started_at = record.started_at or record.created_at
        # The record's time is the time of a file, for which the kernel uses a coarse clock.
        record.finished_at = max(exit_record.finished_at, record.started_at) if exit_record else time.time_ns()
        failure = "OOMKilled" if ended_by_the_kernel(container, exit_record, history, kills) else "Error"
        record.reason = failure if record.exit_code else "Completed"
        if exit_record is None:
            record.message = self._monitors.why_no_exit_record()
        if container.evicted:
            record.reason, record.message = "Evicted", container.evicted
        return kills > 0

    async def save_end(self, container: Container, *, sandbox_too: bool = False) -> None:
        """Record an end, and notify plugins of it."""
        hooks = self._hooks
        self._state.enter(container, ContainerState.EXITED)
        await hooks.concurrently(
            self._write_end(container, sandbox_too=sandbox_too), hooks.stopped_container(container)
        )

    async def _write_end(self, container: Container, *, sandbox_too: bool) -> None:
        """Write the end. If that fails, the container has still ended, and the next start notices it again."""
        try:
            await self._state.save(container)
            if sandbox_too:
                await self._state.save(container.sandbox)
        except PodkeelError as error:
            _log.error("%s: its exit could not be written to the store: %s", container.title, error)

    def ended(self, container: Container) -> None:
        """Notify waiting callers and clients of the end, and begin to clean up."""
        container.exited.set()
        self._kills.forget(container.id)
        self._meters.forget(container.id)
        self._state.publish(cri_pb2.CONTAINER_STOPPED_EVENT, container)
        if container.cleanup is None:
            container.cleanup = self._spawn(self.clean_up(container))

    async def clean_up(self, container: Container) -> None:
        """Release the resources of an ended container, except its files. May be repeated. A failure is only logged."""
        try:
            await self.release_runtime(container)
            await self.end_monitor(container)
            await self._rootfs.unmount(container)
            container.unmounted = True
        except (PodkeelError, OSError) as error:
            self._handlers.failed_actions[container.record.handler, "delete"] += 1
            _log.error("%s: clean-up failed: RemoveContainer tries again: %s", container.title, error)

    async def release_runtime(self, container: Container) -> None:
        """Kill the remaining processes of a container and delete its state in the OCI runtime. May be repeated."""
        record = container.record
        if record.boot_id != self._state.boot_id:
            return
        cgroups = self._cgroups
        await in_thread(kill_group, cgroups, record)
        runtime = self._handlers.find(record.handler)
        if runtime is None:  # the handler is gone, but its pods must be removable
            await in_thread(cgroups.kill, record.cgroup)
            await in_thread(remove_tree, self._handlers.state_folder(record.handler, container.id))
        elif (runtime.root / container.id).exists():
            await runtime.delete(container.id)
        if cgroups.exists(record.cgroup):
            await in_thread(clear_cgroup, cgroups, record.cgroup)

    async def released(self, container: Container) -> None:
        """Wait until the OCI runtime has released the resources of an ended container. Try again if that failed."""
        if container.cleanup is not None:
            await asyncio.wait((container.cleanup,))
        await self.release_runtime(container)
        if not container.unmounted:
            await self.end_monitor(container)

    async def end_monitor(self, container: Container) -> None:
        """Kill conmon if it still runs after the end of its container, and wait until it writes no more."""
        monitor = container.record.monitor
        if monitor is None or container.record.boot_id != self._state.boot_id:
            return
        pidfd = processes.open_process(monitor.pid, monitor.started)
        if pidfd is None:
            return
        try:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            await processes.wait_ended(pidfd)
        finally:
            os.close(pidfd)

    def _close_monitor(self, container: Container) -> None:
        if container.monitor_descriptor is not None:
            reap(container.monitor_descriptor)
            os.close(container.monitor_descriptor)
            container.monitor_descriptor = None

    def _spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("container: its exit could not be handled: %s", error, exc_info=error)

    async def close(self) -> None:
        """Close the watches of conmon processes, which keep running, and wait for clean-up that is running."""
        self._closing.set()
        self._kills.close()
        loop = asyncio.get_running_loop()
        for container in self._state.containers:
            if container.monitor_descriptor is not None:
                loop.remove_reader(container.monitor_descriptor)
                os.close(container.monitor_descriptor)
                container.monitor_descriptor = None
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=10)


async def _end_log(container: Container) -> None:
    """Mark the last lines of an ended container's log as complete.

    If the log folder does not answer, the caller does not wait.
    """
    if container.log is None:
        return
    work = asyncio.ensure_future(in_fresh_thread(container.log.end_last_lines))
    await asyncio.wait({work}, timeout=_LOG_SECONDS)
    work.add_done_callback(lambda done: done.cancelled() or done.exception())  # the log may have been removed


def kill_group(cgroups: CgroupTree, record: ContainerRecord) -> None:
    """Kill the processes that can outlive a container's first process, and those that cannot end because frozen."""
    if not record.private_pid_namespace or cgroups.is_frozen(record.cgroup):
        cgroups.kill(record.cgroup)


def clear_cgroup(cgroups: CgroupTree, path: str) -> None:
    """Kill the remaining processes of a cgroup in all hierarchies, wait until they ended, and remove it. Blocks.

    Below a frozen cgroup they end only when it is thawed. They are not waited for; the cgroup is removed with the
    pod's.
    """
    cgroups.kill(path)
    pids = cgroups.all_processes(path)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    if cgroups.frozen_holder(path) is None:
        processes.wait_all_ended(pids, _CGROUP_SECONDS)
    cgroups.remove(path)
