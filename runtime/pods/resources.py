"""Records the resource limits of whole pods."""

from __future__ import annotations

from proto.runtime.v1 import cri_pb2
from runtime.hooks import Hooks
from runtime.state.state import State


class PodResources:
    """Records the resources of sandboxes."""

    def __init__(self, state: State, hooks: Hooks) -> None:
        self._state = state
        self._hooks = hooks

    async def update_resources(
        self,
        sandbox_id: str,
        resources: cri_pb2.LinuxContainerResources | None,
        overhead: cri_pb2.LinuxContainerResources | None,
    ) -> None:
        """Record the resource limits of the whole pod (KEP-1287). The client itself sets them on the pod's cgroup.

        Raises NotFoundError.
        """
        sandbox, hooks = self._state.get_sandbox(sandbox_id), self._hooks
        async with sandbox.lock, hooks.sync_blocked():
            await hooks.update_sandbox(sandbox, overhead, resources)
            if resources is not None:
                sandbox.record.resources = resources.SerializeToString()
            if overhead is not None:
                sandbox.record.overhead = overhead.SerializeToString()
            await self._state.save(sandbox)
            await hooks.updated_sandbox(sandbox)
