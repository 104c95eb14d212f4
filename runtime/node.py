"""Everything one agent works with: its folders, state, runtimes, network and images."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from dataclasses import dataclass, field

from host.database import Database
from images.snapshots.store import SnapshotStore
from images.store import ImageStore
from network.node_network import NodeNetwork
from runtime.cgroups.tree import CgroupTree
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
    """What the pod and container managers share.

    ``failures`` counts what monitors and OCI runtimes failed at, by program and action. ``renamed`` are the
    containers whose image had lost its name to another one at revision ``listed_images`` of the images.
    """

    options: RuntimeOptions
    agent_id: str
    layout: Layout
    reserve: Reserve
    database: Database
    state: State
    cgroups: CgroupTree
    facts: NodeFacts
    apparmor_default: str
    handlers: Handlers
    monitors: Monitors
    network: NodeNetwork
    images: ImageStore
    snapshots: SnapshotStore
    start_parallelism: int = field(init=False)
    starting: asyncio.Semaphore = field(init=False)
    hooks_dir: HooksDir = field(init=False)
    meters: Meters = field(init=False)
    failures: Counter[tuple[str, str]] = field(default_factory=Counter)
    renamed: frozenset[str] = frozenset()
    listed_images: int = -1
    _preparing: asyncio.Future[None] | None = None

    def __post_init__(self) -> None:
        # More at once finish no sooner, and every other call waits behind them for a processor.
        self.start_parallelism = self.options.container_start_parallelism or max(2, os.cpu_count() or 1)
        self.starting = asyncio.Semaphore(self.start_parallelism)
        self.meters = Meters(self.cgroups)
        self.hooks_dir = HooksDir(self.options.hooks_dirs)
        self.snapshots.writable.activity = self._activity

    def expect_container(self) -> None:
        """A container is about to be made: let the kernel prepare for it in the background."""
        if self._preparing is None or self._preparing.done():
            self._preparing = asyncio.get_running_loop().run_in_executor(None, self.cgroups.prepare_for_moves)

    def _activity(self, container_id: str) -> int | None:
        container = self.state.containers.exact(container_id)
        return self.meters.processor_time(container) if container is not None else None
