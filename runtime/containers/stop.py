"""Stops containers, with a grace period or at once."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Sequence
from contextlib import suppress

from host import processes
from host.concurrency.tasks import uninterrupted
from host.concurrency.threads import in_thread
from runtime.cgroups.tree import CgroupTree
from runtime.containers.endings.exit import ContainerExit, kill_group
from runtime.containers.endings.last_wait import wait_for_end
from runtime.oci.conmon import Monitors
from runtime.reserve import Reserve
from runtime.state.container import Container, ContainerState
from runtime.state.sandbox import Sandbox
from runtime.state.state import State

_LOOK_SECONDS = 0.2


class ContainerStop:
    """Stops and kills containers."""

    def __init__(
        self, state: State, cgroups: CgroupTree, monitors: Monitors, reserve: Reserve, exits: ContainerExit
    ) -> None:
        self._state = state
        self._cgroups = cgroups
        self._monitors = monitors
        self._reserve = reserve
        self._exits = exits

    async def stop(self, container_id: str, grace: float) -> None:
        """Send the stop signal, and SIGKILL after ``grace`` seconds. An unknown or ended container is no error.

        If another call has a shorter grace period, it is used for both calls. A frozen container is killed at once and
        then thawed. Raises DeadlineError if even SIGKILL does not end it, and WrongStateError if a frozen ancestor of
        its cgroup prevents its end.
        """
        container = self._state.containers.find(container_id) if container_id else None
        if container is None or not container.visible:
            return
        if container.record.state is ContainerState.EXITED:
            await container.exited.wait()
            return
        if container.checkpoint is not None:
            await _give_up(container.checkpoint)  # while frozen, it cannot handle the signal
        await self._end_restore(container)
        operation = container.begin("StopContainer")
        self._reserve.release_if_short()
        async with operation.stage("signal"):
            if container.record.state is ContainerState.RUNNING:
                frozen = await in_thread(self._cgroups.is_frozen, container.record.cgroup)
                await self._stop_politely(container, 0.0 if frozen else max(grace, 0.0))  # it cannot handle a signal
        async with operation.stage("kill"):
            if not container.exited.is_set():
                await self._kill_and_wait(container)
        if not container.record.private_pid_namespace:  # without their own PID namespace, other processes survive
            async with operation.stage("release"):
                await self._exits.released(container)

    async def _end_restore(self, container: Container) -> None:
        """Kill CRIU if it is restoring the container: its processes do not run yet, and the start fails."""
        while (restoring := container.restoring) is not None:
            container.killed = True
            await in_thread(self._cgroups.kill, container.record.cgroup)
            with suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_SECONDS):
                    await restoring.wait()

    async def _stop_politely(self, container: Container, grace: float) -> None:
        """Send the stop signal, unless another call did. Wait for the end or the earliest deadline of all calls."""
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
        """Send SIGKILL at once, and wait for the end. An ended container is no error."""
        await self.stop(container.id, 0)

    async def _kill_and_wait(self, container: Container) -> None:
        await self.kill_processes(container)
        if container.monitor_descriptor is None:
            async with container.lock:
                if not container.exited.is_set():
                    exit_record = self._monitors.exit_record(container.id)
                    await uninterrupted(self._exits.record_exit(container, exit_record))
            return
        if not await wait_for_end(self._cgroups, container):
            async with container.lock:
                if not container.exited.is_set():
                    await uninterrupted(self._exits.record_exit(container, None))

    async def kill_processes(self, container: Container) -> None:
        """Send SIGKILL to the first process and to those that can outlive it, without waiting."""
        container.killed = self._signal(container, signal.SIGKILL) or container.killed
        await in_thread(kill_group, self._cgroups, container.record)

    async def stop_all(self, sandbox: Sandbox) -> None:
        """Kill every running container of a sandbox."""
        containers = [c for c in self._state.containers_of(sandbox) if c.visible]
        await in_thread(self._thaw_dying, sandbox, containers)
        await asyncio.gather(*(self.kill(container) for container in containers))
        await asyncio.gather(*(self._exits.released(container) for container in containers))

    def _thaw_dying(self, sandbox: Sandbox, containers: Sequence[Container]) -> None:
        """If the pod's own cgroup is frozen, thaw it once all processes in it were killed."""
        cgroups, parent = self._cgroups, sandbox.record.cgroup_parent
        path = cgroups.parent_path(parent)
        if sandbox.record.boot_id != self._state.boot_id or not cgroups.is_frozen(path):
            return
        for container in containers:
            cgroups.kill(container.record.cgroup)
        others = (other.record for other in self._state.sandboxes if other is not sandbox)
        if not any(record.cgroup_parent == parent and not record.torn_down for record in others):
            cgroups.thaw(path)

    def _signal(self, container: Container, number: int) -> bool:
        """Send a signal to the first process. False if it has ended."""
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


async def _give_up(work: asyncio.Future[int]) -> None:
    """Cancel work on a container and wait for the end of its clean-up."""
    work.cancel()
    await asyncio.wait((work,))
