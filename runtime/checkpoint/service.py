"""Checkpoints as the agent's services call them; what makes them is loaded when the first one is asked for."""

from __future__ import annotations

from images.snapshots.store import SnapshotStore
from runtime.cgroups.tree import CgroupTree
from runtime.checkpoint.options import CheckpointOptions
from runtime.checkpoint.support import CheckpointSupport
from runtime.layout import Layout
from runtime.oci.handlers import Handlers
from runtime.state.state import State

TYPE_CHECKING = False
if TYPE_CHECKING:
    from runtime.checkpoint.dump import Checkpoints


class CheckpointService:
    """Makes checkpoints of containers; ``support`` says which runtime handlers can."""

    def __init__(
        self,
        options: CheckpointOptions,
        *,
        state: State,
        handlers: Handlers,
        layout: Layout,
        cgroups: CgroupTree,
        snapshots: SnapshotStore,
    ) -> None:
        self._options = options
        self._state = state
        self._handlers = handlers
        self._layout = layout
        self._cgroups = cgroups
        self._snapshots = snapshots
        self._checkpoints: Checkpoints | None = None
        self.support = CheckpointSupport(options, handlers)

    async def checkpoint(self, container_id: str, location: str, seconds: float = 0) -> int:
        """Write a running container to an archive: see ``Checkpoints.checkpoint``."""
        if self._checkpoints is None:
            from runtime.checkpoint.dump import Checkpoints

            self._checkpoints = Checkpoints(
                self._options,
                self.support,
                state=self._state,
                handlers=self._handlers,
                layout=self._layout,
                cgroups=self._cgroups,
                snapshots=self._snapshots,
            )
        return await self._checkpoints.checkpoint(container_id, location, seconds)
