"""Starting and stopping containers, and what happens when one ends."""

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
from host.concurrency.tasks import wait_out
from host.concurrency.threads import in_fresh_thread, in_thread
from host.errors import CommandError, InvalidArgumentError, PodkeelError, WrongStateError
from host.files.removal import remove_tree
from host.stages import Operation
from proto.runtime.v1 import cri_pb2
from runtime.containers.kill_watch import KillWatch
from runtime.containers.killing import clear_cgroup, kill_group
from runtime.containers.last_wait import wait_for_end
from runtime.containers.out_of_memory import ended_by_the_kernel, killed_for_memory
from runtime.containers.rootfs import unmount_all
from runtime.node import Node
from runtime.oci.conmon import ExitRecord
from runtime.oci.oci_runtime import cannot_run_program, plain_message
from runtime.state.container import Container, ContainerState
from runtime.state.sandbox import SandboxState
from runtime.state.transitions import of_container

UNKNOWN_EXIT_CODE = 255
START_ERROR_EXIT_CODE = 128

_LOG_SECONDS = 1.0
_OPERATIONS_KEPT = 8
_log = logging.getLogger("podkeel.containers")


def begin(container: Container, name: str) -> Operation:
    """Start recording an operation with a container."""
    operation = Operation(name, container.title)
    container.operations.append(operation)
    del container.operations[:-_OPERATIONS_KEPT]
    return operation


class Lifecycle:
    """Takes containers from created to exited."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._state = node.state
        self._kills = KillWatch(node.layout, node.cgroups)
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, container_id: str) -> None:
        """Let a created container run.

        Raises:
            NotFoundError: there is no such container.
            WrongStateError: it is not created, or its sandbox is not ready.
            InvalidArgumentError: its program is not there or cannot be executed; it has exited then.
            PodkeelError: it could not be started; it has exited then.
        """
        container = self._state.get_container(container_id)
        async with container.lock:
            record = container.record
            if record.state is not ContainerState.CREATED:
                raise WrongStateError(f"{container.title} is {record.state}, only a created one can be started")
            if container.sandbox.record.state is not SandboxState.READY or container.sandbox.closing:
                raise WrongStateError(f"{container.title}: its sandbox is not ready: make a new one")
            # A start that is interrupted may have happened or not, so one whose client goes away is carried to its end.
            await wait_out(asyncio.ensure_future(self._start(container)))

    async def _start(self, container: Container) -> None:
        hooks = self._node.hooks
        operation = begin(container, "StartContainer")
        async with hooks.passing():
            await hooks.start_container(container, operation)
        async with operation.stage("runtime"), self._node.handlers.slots:
            started_at = time.time_ns()
            await self._start_in_runtime(container)
        async with operation.stage("commit"):
            container.record.started_at = started_at
            await self._state.move(container, ContainerState.RUNNING)
        async with hooks.passing():
            await hooks.started_container(container, operation)
        self._state.publish(cri_pb2.CONTAINER_STARTED_EVENT, container)
        _log.info("%s runs", container.title, extra=of_container(container, operation))

    async def _start_in_runtime(self, container: Container) -> None:
        record = container.record
        if record.start_error:
            await self._fail_start(container, record.start_error)
            raise InvalidArgumentError(record.start_error)  # the pod is wrong and not the node
        try:
            await self._node.handlers.get(record.handler).start(container.id)
        except (PodkeelError, OSError) as error:  # also one that took too long may have started it
            await self._kill_processes(container)
            output = error.output if isinstance(error, CommandError) else ""
            message = plain_message(output) or str(error)
            await self._fail_start(container, message)
            unrunnable = cannot_run_program(message)
            self._node.handlers.failed_actions[record.handler, "run program" if unrunnable else "start"] += 1
            if unrunnable:
                raise InvalidArgumentError(message) from error
            raise

    async def _fail_start(self, container: Container, message: str) -> None:
        now = time.time_ns()
        record = container.record
        record.started_at = record.started_at or now
        record.finished_at = now
        record.exit_code = START_ERROR_EXIT_CODE
        record.reason = "StartError"
        record.message = message
        async with self._node.hooks.passing():
            await self._save_end(container)
        self._ended(container)

    def watch(self, container: Container) -> None:
        """Notice kills in a container, and the end of its monitor; for one whose program cannot run there is none."""
        descriptor = container.monitor_descriptor
        if descriptor is not None:
            self._kills.watch(container)
            processes.watch_exit(descriptor, lambda: self._on_monitor_end(container))

    def _on_monitor_end(self, container: Container) -> None:
        self._spawn(self._monitor_ended(container))

    async def _monitor_ended(self, container: Container) -> None:
        self._close_monitor(container)
        async with container.lock:
            if container.record.state not in (ContainerState.CREATED, ContainerState.RUNNING):
                self._kills.forget(container.id)
                return
            exit_record = self._node.monitors.exit_record(container.id)
            if exit_record is None and await self.survives_its_monitor(container):
                return
            await self.record_exit(container, exit_record)

    async def survives_its_monitor(self, container: Container) -> bool:
        """Whether the container runs on though conmon was killed; its end is then noticed without an exit code."""
        init = container.record.init
        pidfd = processes.open_process(init.pid, init.started) if init is not None else None
        if pidfd is None:
            return False
        self._node.handlers.failed_actions["conmon", "monitor"] += 1
        _log.error("%s: its conmon was killed; it runs on, without log and exit code", container.title)
        container.monitor_descriptor = pidfd
        container.record.monitor = None
        await self._state.save(container)
        self.watch(container)
        return True

    async def record_exit(self, container: Container, exit_record: ExitRecord | None) -> None:
        """Write down how a container ended; the caller holds its lock."""
        await _end_log(container)
        async with self._node.hooks.passing():
            counted = self._describe_end(container, exit_record)
            # What the runtime holds is given back meanwhile: should we die before the commit, conmon's record is there.
            container.cleanup = self._spawn(self.clean_up(container))
            await self._save_end(container, sandbox_too=counted)
        self._ended(container)
        record, ended = container.record, of_container(container)
        _log.info("%s ended: exit code %d, %s", container.title, record.exit_code, record.reason, extra=ended)

    def _describe_end(self, container: Container, exit_record: ExitRecord | None) -> bool:
        """Put an end into the record; whether kills of the pod were counted for it, which must be written too.

        From here to the commit nothing else runs: others count the kills of who is alive.
        """
        record = container.record
        counted = killed_for_memory(self._node, container)
        history = self._kills.history(container)
        kills = counted or history.more
        record.exit_code = exit_record.code if exit_record else UNKNOWN_EXIT_CODE
        record.started_at = record.started_at or record.created_at
        # The record's time is that of a file, which the kernel takes from a coarse clock.
        record.finished_at = max(exit_record.finished_at, record.started_at) if exit_record else time.time_ns()
        failure = "OOMKilled" if kills and ended_by_the_kernel(container, exit_record, history) else "Error"
        record.reason = failure if record.exit_code else "Completed"
        if exit_record is None:
            record.message = self._node.monitors.why_no_exit_record()
        if container.evicted:
            record.reason, record.message = "Evicted", container.evicted
        return counted

    async def _save_end(self, container: Container, *, sandbox_too: bool = False) -> None:
        """Write down an end; when that fails the container has ended all the same, and the next start sees it again."""
        try:
            await self._state.move(container, ContainerState.EXITED)
            if sandbox_too:
                await self._state.save(container.sandbox)
        except PodkeelError as error:
            _log.error("%s: its end could not be written down: %s", container.title, error)
        await self._node.hooks.stopped_container(container)

    def _ended(self, container: Container) -> None:
        container.exited.set()
        container.keep_late_log(None)
        self._kills.forget(container.id)
        self._node.meters.forget(container.id)
        self._state.publish(cri_pb2.CONTAINER_STOPPED_EVENT, container)
        if container.cleanup is None:
            container.cleanup = self._spawn(self.clean_up(container))

    async def clean_up(self, container: Container) -> None:
        """Give back what an ended container holds of the node but its files. Repeatable; a failure is logged only."""
        try:
            await self.release_runtime(container)
            await self.end_monitor(container)
            await unmount_all(self._node, container)
            container.unmounted = True
        except PodkeelError as error:
            self._node.handlers.failed_actions[container.record.handler, "delete"] += 1
            _log.error("%s: could not be cleaned up, removing it tries again: %s", container.title, error)

    async def release_runtime(self, container: Container) -> None:
        """Kill what is left of a container and have the OCI runtime forget it. Repeatable."""
        record = container.record
        if record.boot_id != self._state.boot_id:
            return
        cgroups = self._node.cgroups
        await in_thread(kill_group, cgroups, record)
        runtime = self._node.handlers.find(record.handler)
        if runtime is None:  # its pods must still be removable
            await in_thread(cgroups.kill, record.cgroup)
            await in_thread(remove_tree, self._node.layout.runtime_root(record.handler) / container.id)
        elif (runtime.root / container.id).exists():
            await runtime.delete(container.id)
        if cgroups.exists(record.cgroup):
            await in_thread(clear_cgroup, cgroups, record.cgroup)

    async def released(self, container: Container) -> None:
        """Wait until what the OCI runtime held of an ended container is given back, trying again if that failed."""
        if container.cleanup is not None:
            await asyncio.shield(container.cleanup)
        await self.release_runtime(container)

    async def end_monitor(self, container: Container) -> None:
        """Kill conmon if it is still there though its container is not, and wait until it writes no more."""
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

    async def stop(self, container_id: str, grace: float) -> None:
        """Stop a container: its stop signal, then after ``grace`` seconds SIGKILL. Unknown or ended ones are fine.

        While one call waits, another with a shorter grace shortens the wait of both. A frozen one is killed at once and
        then thawed. Raises DeadlineError when even SIGKILL does not end it, WrongStateError when a frozen cgroup above
        it keeps it from that.
        """
        container = self._state.containers.find(container_id) if container_id else None
        if container is None or not container.visible:
            return
        if container.record.state is ContainerState.EXITED:
            await container.exited.wait()
            return
        operation = begin(container, "StopContainer")
        self._node.reserve.release_if_short()
        async with operation.stage("signal"):
            if container.record.state is ContainerState.RUNNING:
                frozen = await in_thread(self._node.cgroups.is_frozen, container.record.cgroup)
                await self._stop_politely(container, 0.0 if frozen else max(grace, 0.0))  # it could not heed a signal
        async with operation.stage("kill"):
            if not container.exited.is_set():
                await self._kill_and_wait(container)
        if not container.record.private_pid_namespace:  # others die with their init; these may have survived it
            async with operation.stage("release"):
                await self.released(container)

    async def _stop_politely(self, container: Container, grace: float) -> None:
        """Send the stop signal, unless another call did, and wait for the end or the earliest deadline of all calls."""
        deadline = asyncio.get_running_loop().time() + grace
        container.stop_deadline = min(deadline, container.stop_deadline or deadline)
        container.stop_changed.set()
        container.stops += 1
        try:
            if container.stops == 1 and grace > 0:
                self._signal(container, container.record.stop_signal)
            await self._wait_for_grace(container)
        finally:
            container.stops -= 1
            if container.stops == 0:
                container.stop_deadline = None

    async def _wait_for_grace(self, container: Container) -> None:
        loop = asyncio.get_running_loop()
        while not container.exited.is_set():
            remaining = (container.stop_deadline or 0.0) - loop.time()
            if remaining <= 0:
                return
            container.stop_changed.clear()
            waits = [
                asyncio.ensure_future(container.exited.wait()),
                asyncio.ensure_future(container.stop_changed.wait()),
            ]
            try:
                await asyncio.wait(waits, timeout=remaining, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for wait in waits:
                    wait.cancel()

    async def kill(self, container: Container) -> None:
        """SIGKILL at once, and wait for the end; what has ended is fine."""
        await self.stop(container.id, 0)

    async def _kill_and_wait(self, container: Container) -> None:
        await self._kill_processes(container)
        if container.monitor_descriptor is None:
            async with container.lock:
                if not container.exited.is_set():
                    exit_record = self._node.monitors.exit_record(container.id)
                    await wait_out(asyncio.ensure_future(self.record_exit(container, exit_record)))
            return
        if not await wait_for_end(self._node, container):
            async with container.lock:
                if not container.exited.is_set():
                    await wait_out(asyncio.ensure_future(self.record_exit(container, None)))

    async def _kill_processes(self, container: Container) -> None:
        container.killed = self._signal(container, signal.SIGKILL) or container.killed
        await in_thread(kill_group, self._node.cgroups, container.record)

    def _signal(self, container: Container, number: int) -> bool:
        """Send a signal to the first process; False if it has ended."""
        init = container.record.init
        pidfd = processes.open_process(init.pid, init.started) if init is not None else None
        if pidfd is None:
            return False
        try:
            signal.pidfd_send_signal(pidfd, number)
        except ProcessLookupError:
            return False
        finally:
            os.close(pidfd)
        return True

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
            _log.error("a container's end could not be handled: %s", error, exc_info=error)

    async def close(self) -> None:
        """Let go of the monitors, which live on, and wait for what is being cleaned up."""
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
    """Mark the last lines of an ended container's log as such; nobody waits for a log folder that does not answer."""
    if container.log is None:
        return
    work = asyncio.ensure_future(in_fresh_thread(container.log.end_last_lines))
    await asyncio.wait({work}, timeout=_LOG_SECONDS)
    work.add_done_callback(lambda done: done.cancelled() or done.exception())  # a log that is gone has no last line
