"""Everything one agent works with: its folders, state, runtimes, network and images."""

from __future__ import annotations

from dataclasses import dataclass, field

from host.database import Database
from images.snapshots.store import SnapshotStore
from images.store import ImageStore
from network.node_network import NodeNetwork
from runtime.cgroups.moves import CgroupMoves
from runtime.cgroups.tree import CgroupTree
from runtime.hooks import Hooks
from runtime.layout import Layout
from runtime.meters import Meters
from runtime.oci.conmon import Monitors
from runtime.oci.handlers import Handlers
from runtime.options import RuntimeOptions
from runtime.reserve import Reserve
from runtime.specgen.hooks_dir import HooksDir
from runtime.specgen.node_facts import NodeFacts
from runtime.state.state import State


@dataclass(slots=True)
class Node:
    """What the pod and container managers share."""

    options: RuntimeOptions
    agent_id: str
    layout: Layout
    reserve: Reserve
    database: Database
    state: State
    cgroups: CgroupTree
    meters: Meters
    facts: NodeFacts
    apparmor_default: str
    handlers: Handlers
    monitors: Monitors
    network: NodeNetwork
    images: ImageStore
    snapshots: SnapshotStore
    hooks: Hooks = field(default_factory=Hooks)
    hooks_dir: HooksDir = field(init=False)
    moves: CgroupMoves = field(init=False)

    def __post_init__(self) -> None:
        self.moves = CgroupMoves(self.cgroups)
        self.hooks_dir = HooksDir(self.options.hooks_dirs)
        self.snapshots.writable.activity = self._activity

    def _activity(self, container_id: str) -> int | None:
        container = self.state.containers.exact(container_id)
        return self.meters.processor_time(container) if container is not None else None
