"""Starts containers."""

from __future__ import annotations

import logging
import time

from host.concurrency.tasks import uninterrupted
from host.errors import CommandError, InvalidArgumentError, PodkeelError, WrongStateError
from host.stages import Operation
from proto.runtime.v1 import cri_pb2
from runtime.checkpoints import CheckpointService
from runtime.containers.bundle.monitor_request import monitor_request
from runtime.containers.endings.exit import ContainerExit
from runtime.containers.stop import ContainerStop
from runtime.hooks import Hooks
from runtime.oci.handlers import Handlers
from runtime.oci.oci_runtime import cannot_run_program, plain_message
from runtime.state.container import Container, ContainerState
from runtime.state.sandbox import SandboxState
from runtime.state.state import State
from runtime.state.transitions import of_container

START_ERROR_EXIT_CODE = 128

_log = logging.getLogger("podkeel.containers")


class ContainerStart:
    """Starts created containers."""

    def __init__(
        self,
        state: State,
        handlers: Handlers,
        hooks: Hooks,
        exits: ContainerExit,
        stops: ContainerStop,
        *,
        checkpoints: CheckpointService,
    ) -> None:
        self._state = state
        self._handlers = handlers
        self._hooks = hooks
        self._exits = exits
        self._stops = stops
        self._checkpoints = checkpoints

    async def start(self, container_id: str) -> None:
        """Start a created container.

        Raises:
            NotFoundError: there is no such container.
            WrongStateError: it is not created, or its sandbox is not ready.
            InvalidArgumentError: its program is missing or cannot be executed; it has exited then.
            PodkeelError: it could not be started; it has exited then.
        """
        container = self._state.get_container(container_id)
        async with container.lock:
            record = container.record
            if record.state is not ContainerState.CREATED:
                raise WrongStateError(f"{container.title} is {record.state}, only a created one can be started")
            if container.sandbox.record.state is not SandboxState.READY or container.sandbox.closing:
                raise WrongStateError(f"{container.title}: its sandbox is not ready: create a new one")
            # An interrupted start may or may not have happened. So a start continues even if its client is gone.
            await uninterrupted(self._start(container))

    async def _start(self, container: Container) -> None:
        hooks = self._hooks
        operation = container.begin("StartContainer")
        async with hooks.sync_blocked():
            await hooks.start_container(container, operation)
        async with operation.stage("runtime"), self._handlers.slots:
            started_at = time.time_ns()
            await self._start_in_runtime(container)
        async with hooks.sync_blocked():
            container.record.started_at = started_at
            written = self._write_start(container, operation)
            await hooks.concurrently(written, hooks.started_container(container, operation))
        self._state.publish(cri_pb2.CONTAINER_STARTED_EVENT, container)
        _log.info("%s: started", container.title, extra=of_container(container, operation))

    async def _write_start(self, container: Container, operation: Operation) -> None:
        async with operation.stage("commit"):
            await self._state.move(container, ContainerState.RUNNING)

    async def _start_in_runtime(self, container: Container) -> None:
        record = container.record
        if record.start_error:
            await self._fail_start(container, record.start_error)
            raise InvalidArgumentError(record.start_error)  # the pod is wrong, not the node
        try:
            runtime = self._handlers.get(record.handler)
            if record.restored_image:
                await self._checkpoints.restores.run(container, runtime, monitor_request(container, runtime))
                self._exits.watch(container)
            else:
                await runtime.start(container.id)
        except (PodkeelError, OSError) as error:  # a start that took too long may have succeeded
            await self._stops.kill_processes(container)
            output = error.output if isinstance(error, CommandError) else ""
            message = plain_message(output) or str(error)
            await self._fail_start(container, message)
            unrunnable = cannot_run_program(message)
            self._handlers.failed_actions[record.handler, "run program" if unrunnable else "start"] += 1
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
        async with self._hooks.sync_blocked():
            await self._exits.save_end(container)
        self._exits.ended(container)
