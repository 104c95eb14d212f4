"""Stopping containers: with a grace period, or at once."""

from __future__ import annotations

import asyncio
import os
import signal

from host import processes
from host.concurrency.tasks import wait_out
from host.concurrency.threads import in_thread
from runtime.containers.endings.exit import ContainerExit, kill_group
from runtime.containers.endings.last_wait import wait_for_end
from runtime.node import Node
from runtime.state.container import Container, ContainerState


class ContainerStop:
    """Ends containers."""

    def __init__(self, node: Node, exits: ContainerExit) -> None:
        self._node = node
        self._state = node.state
        self._exits = exits

    async def stop(self, container_id: str, grace: float) -> None:
        """Stop a container: its stop signal, then after ``grace`` seconds SIGKILL. Unknown or ended ones are no error.

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
        operation = container.begin("StopContainer")
        self._node.reserve.release_if_short()
        async with operation.stage("signal"):
            if container.record.state is ContainerState.RUNNING:
                frozen = await in_thread(self._node.cgroups.is_frozen, container.record.cgroup)
                await self._stop_politely(container, 0.0 if frozen else max(grace, 0.0))  # it could not heed a signal
        async with operation.stage("kill"):
            if not container.exited.is_set():
                await self._kill_and_wait(container)
        if not container.record.private_pid_namespace:  # others end with their init; these may have survived it
            async with operation.stage("release"):
                await self._exits.released(container)

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
        """SIGKILL at once, and wait for the end; an ended one is no error."""
        await self.stop(container.id, 0)

    async def _kill_and_wait(self, container: Container) -> None:
        await self.kill_processes(container)
        if container.monitor_descriptor is None:
            async with container.lock:
                if not container.exited.is_set():
                    exit_record = self._node.monitors.exit_record(container.id)
                    await wait_out(asyncio.ensure_future(self._exits.record_exit(container, exit_record)))
            return
        if not await wait_for_end(self._node, container):
            async with container.lock:
                if not container.exited.is_set():
                    await wait_out(asyncio.ensure_future(self._exits.record_exit(container, None)))

    async def kill_processes(self, container: Container) -> None:
        """SIGKILL to the first process and to those that may outlive it; waits for nothing."""
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
