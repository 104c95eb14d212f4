"""Removes pod sandboxes."""

from __future__ import annotations

import logging

from host.concurrency.tasks import uninterrupted
from host.errors import PodkeelError
from host.stages import Operation
from network.node_network import NodeNetwork
from proto.runtime.v1 import cri_pb2
from runtime.containers.remove import ContainerRemove
from runtime.hooks import Hooks
from runtime.pods.stop import PodStop
from runtime.state.sandbox import Sandbox, SandboxState
from runtime.state.state import State
from runtime.state.transitions import of_sandbox

_log = logging.getLogger("podkeel.pods")


class PodRemove:
    """Removes sandboxes with their containers."""

    def __init__(
        self, state: State, containers: ContainerRemove, network: NodeNetwork, hooks: Hooks, stops: PodStop
    ) -> None:
        self._state = state
        self._containers = containers
        self._network = network
        self._hooks = hooks
        self._stops = stops

    async def remove(self, sandbox_id: str) -> None:
        """Stop and remove a sandbox with all its containers. An unknown id is no error."""
        sandbox = self._state.sandboxes.find(sandbox_id) if sandbox_id else None
        if sandbox is None or sandbox.record.state is SandboxState.MAKING:
            return
        await self._stops.stop(sandbox.id)
        async with sandbox.lock:
            if sandbox.id not in self._state.sandboxes:
                return  # another call has removed it
            operation = sandbox.begin("RemovePodSandbox")
            async with operation.stage("containers"):
                await self._containers.remove_all(sandbox)
            # After the removal is recorded, clients no longer see the sandbox. So it continues without this client.
            await uninterrupted(self.finish_removal(sandbox, operation))

    async def force_remove(self, sandbox_id: str) -> list[str]:
        """Remove a sandbox even if its CNI network cannot be released. Returns what was given up.

        A sandbox that was never completed and waits for its network is found too. Raises NotFoundError or
        InvalidArgumentError if the id names no sandbox.
        """
        sandbox = self._state.sandboxes.get(sandbox_id)
        try:
            await self.remove(sandbox.id)
        except (PodkeelError, OSError) as error:
            given_up = await self._give_up_network(sandbox, str(error))
            if not given_up:
                raise
        else:
            given_up = await self._give_up_network(sandbox, "it waits for its network")
        if given_up:
            await self._stops.network_released(sandbox.id)
            await self.remove(sandbox.id)
        return given_up

    async def _give_up_network(self, sandbox: Sandbox, why: str) -> list[str]:
        sentence = await self._network.give_up(sandbox.id)
        if sentence is None:
            return []
        _log.error("%s: %s (%s)", sandbox.title, sentence, why)
        return [sentence]

    async def finish_removal(self, sandbox: Sandbox, operation: Operation | None = None) -> None:
        """Record a removal, unless that is done, and complete it.

        If that fails, the sandbox is listed as stopped, so that its client tries again.
        """
        operation = operation or sandbox.begin("RemovePodSandbox")
        try:
            if sandbox.record.state is not SandboxState.REMOVING:
                async with self._hooks.sync_blocked():
                    recorded = self._record_removal(sandbox, operation)
                    await self._hooks.concurrently(recorded, self._hooks.remove_sandbox(sandbox, operation))
            if not sandbox.record.torn_down:
                await self._stops.tear_down(sandbox, operation)
            async with operation.stage("forget"):
                await self._state.delete(sandbox)
        except (PodkeelError, OSError):
            self._state.take_back(sandbox)
            raise
        self._state.publish(cri_pb2.CONTAINER_DELETED_EVENT, sandbox)
        self._stops.forget(sandbox)
        _log.info("%s: removed", sandbox.title, extra=of_sandbox(sandbox, operation))

    async def _record_removal(self, sandbox: Sandbox, operation: Operation) -> None:
        async with operation.stage("intent"):
            await self._state.move(sandbox, SandboxState.REMOVING)
