"""The runtime of one agent: it puts the parts together, opens and recovers them, and closes them. Pods keep running."""

from __future__ import annotations

import os
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Self

from host.cgroups import discover
from host.concurrency.threads import in_thread
from host.database import Database
from host.database_copy import DatabaseCopy
from host.libc import leave_session_keyring
from host.processes import ProcessName
from host.subreaper import Subreaper
from images.images import Images
from images.options import ImageOptions
from images.schema import MIGRATIONS as IMAGE_MIGRATIONS
from metrics.meters import Meters
from network.bridge.owner import BridgeOwner
from network.node_network import NodeNetwork
from network.options import NetworkOptions
from network.schema import MIGRATIONS as NETWORK_MIGRATIONS
from runtime.agent_id import agent_id
from runtime.cgroups.monitor_cgroup import MonitorCgroup
from runtime.cgroups.moves import CgroupMoves
from runtime.cgroups.tree import CgroupTree
from runtime.checkpoint.options import CheckpointOptions
from runtime.checkpoints import CheckpointService
from runtime.containers.bundle.bundles import Bundles
from runtime.containers.bundle.rootfs import Rootfs
from runtime.containers.bundle.spec_request import SpecRequests
from runtime.containers.create import ContainerCreate
from runtime.containers.endings.exit import ContainerExit
from runtime.containers.exec import ContainerExec
from runtime.containers.logs import ContainerLogs
from runtime.containers.remove import ContainerRemove
from runtime.containers.resources import ContainerResources
from runtime.containers.start import ContainerStart
from runtime.containers.stop import ContainerStop
from runtime.folder_lock import hold_folder
from runtime.hooks import Hooks
from runtime.layout import Layout
from runtime.nri.options import NriOptions
from runtime.oci.conmon import Monitors
from runtime.oci.handlers import Handlers
from runtime.oci.mask_device import MaskDevice
from runtime.options import RuntimeOptions
from runtime.plugins import NodePlugins
from runtime.pods.remove import PodRemove
from runtime.pods.resources import PodResources
from runtime.pods.restore import PodRestore
from runtime.pods.run import PodRun
from runtime.pods.stop import PodStop
from runtime.recovery.audit import Audit
from runtime.recovery.kept_rows import KeptRows, restore_all_rows
from runtime.recovery.lost_store import LostStore, settle_store
from runtime.recovery.recovery import Recovery
from runtime.reserve import Reserve, require_room
from runtime.specgen.hooks_dir import HooksDir
from runtime.specgen.limits.extra_limits import LimitChange
from runtime.specgen.node_facts import NodeFacts, probe_node
from runtime.specgen.security.apparmor import load_default_profile
from runtime.state.container import Container
from runtime.state.registrar import container_registrar, pod_registrar
from runtime.state.rows import Store
from runtime.state.schema import MIGRATIONS as RUNTIME_MIGRATIONS
from runtime.state.state import State
from runtime.statistics import Statistics

SCHEMAS = {"runtime": RUNTIME_MIGRATIONS, "network": NETWORK_MIGRATIONS, "images": IMAGE_MIGRATIONS}


class Agent:
    """All parts behind the gRPC services, for ``async with``.

    ``version`` is reported to NRI plugins, which are served if ``nri`` enables them. With ``only_removes`` no runtime
    handler is probed, which takes most of a start: existing pods can be removed, and none can be created.

    Raises WrongStateError if another agent uses the same folders, if a newer version wrote the data folder, or if the
    store is lost and ``lost_store`` does not say what to do about it.
    """

    options: RuntimeOptions
    agent_id: str
    layout: Layout
    database: Database
    state: State
    cgroups: CgroupTree
    monitor_cgroup: MonitorCgroup
    facts: NodeFacts
    handlers: Handlers
    hooks: Hooks
    hooks_dir: HooksDir
    network: NodeNetwork
    images: Images
    pods: PodRun
    pod_stops: PodStop
    pod_removals: PodRemove
    pod_resources: PodResources
    containers: ContainerCreate
    exits: ContainerExit
    stops: ContainerStop
    starts: ContainerStart
    removals: ContainerRemove
    execution: ContainerExec
    logs: ContainerLogs
    resources: ContainerResources
    statistics: Statistics
    checkpoints: CheckpointService
    pod_restores: PodRestore
    audit: Audit
    recovery: Recovery

    def __init__(
        self,
        runtime: RuntimeOptions,
        network: NetworkOptions,
        images: ImageOptions,
        lost_store: LostStore = LostStore.REFUSE,
        *,
        nri: NriOptions | None = None,
        checkpoint: CheckpointOptions | None = None,
        version: str = "",
        only_removes: bool = False,
    ) -> None:
        self._lost_store = lost_store
        self._plugins = NodePlugins(nri, version)
        self._checkpoint = checkpoint or CheckpointOptions()
        self._only_removes = only_removes
        self._runtime = runtime
        self._network = network
        self._images = images
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        leave_session_keyring()
        async with AsyncExitStack() as stack:
            orphans = Subreaper()
            orphans.adopt()
            stack.push_async_callback(orphans.close)
            await self._open(stack)
            self._stack = stack.pop_all()
        return self

    async def _open(self, stack: AsyncExitStack) -> None:
        options = self._runtime
        layout = Layout.of(options)
        layout.make()
        for folder in (layout.data, layout.run):
            stack.callback(os.close, hold_folder(folder))
        reserve = Reserve(layout.run / "reserve", layout.data / "reserve")
        await in_thread(reserve.release)
        await in_thread(require_room, layout.run)
        monitors = Monitors(options.conmon_path, layout)
        database = await self._open_database(stack, layout, monitors)
        kept = KeptRows(database)
        stack.push_async_callback(kept.close)
        copy = DatabaseCopy(database, layout.database_copy)
        stack.push_async_callback(copy.close)
        store = Store(database, layout)
        self.options, self.layout, self.database = options, layout, database
        await self._open_parts(store, stack)
        self._assemble_containers(monitors, reserve, stack)
        self._assemble_pods(stack)
        self._prepare_recovery(monitors)
        await self.recovery.run()
        await in_thread(self.monitor_cgroup.adopt, self._processes_beside_containers())
        copy.start()
        store.when_written(kept.note)
        kept.start((*self.state.sandboxes, *self.state.containers))
        await in_thread(reserve.keep)
        await self._plugins.serve(stack, layout.run / "nri-plugins")
        stack.push_async_callback(self.checkpoints.support.close)
        if not self._only_removes:
            self.checkpoints.support.begin()
        self.state.events.serve()

    def _processes_beside_containers(self) -> list[ProcessName]:
        """The conmon processes and the inits of pods, by their records."""
        monitors = [container.record.monitor for container in self.state.containers]
        holders = [sandbox.record.pid_holder for sandbox in self.state.sandboxes]
        return [process for process in (*monitors, *holders) if process is not None]

    async def _open_parts(self, store: Store, stack: AsyncExitStack) -> None:
        """Open the parts that the verbs of pods and containers use."""
        options, layout = self.options, self.layout
        hierarchies = await in_thread(discover)
        self.cgroups = CgroupTree.of_host(options.cgroup_driver, hierarchies)
        self._moves = CgroupMoves(self.cgroups)
        self._meters = Meters(hierarchies)
        self.agent_id = await in_thread(agent_id, layout)
        self.monitor_cgroup = MonitorCgroup(self.cgroups, options.monitor_cgroup, self.agent_id)
        if not self._only_removes:
            await self.monitor_cgroup.open()
        self.state = State(store, layout, self.agent_id)
        self.handlers = Handlers(options, layout, self.cgroups, self.agent_id)
        self.network = NodeNetwork(self._network, self.database, BridgeOwner(self.agent_id, str(layout.data)))
        self.images = Images(self._images, layout.data, self.database)
        self.images.snapshots.writable.activity = self._activity
        facts = await in_thread(partial(probe_node, hierarchies, selinux=options.selinux))
        self.facts = replace(facts, apparmor_default=await load_default_profile(facts))
        self.hooks_dir = HooksDir(options.hooks_dirs)
        self.hooks = self._plugins.make_hooks(
            state=self.state,
            handlers=self.handlers,
            cgroups=self.cgroups,
            facts=self.facts,
            update=self._update_container,
            end=self._end_container,
        )
        await (self.handlers.identify() if self._only_removes else self.handlers.probe())
        mask = MaskDevice(layout.mask)
        stack.callback(mask.remove)
        await in_thread(mask.make)
        await self.images.start()
        stack.push_async_callback(self.images.close)
        await self.network.start()
        stack.push_async_callback(self.network.stop)

    def _activity(self, container_id: str) -> int | None:
        container = self.state.containers.exact(container_id)
        return self.statistics.processor_time(container) if container is not None else None

    def _assemble_containers(self, monitors: Monitors, reserve: Reserve, stack: AsyncExitStack) -> None:
        state, handlers, cgroups, hooks = self.state, self.handlers, self.cgroups, self.hooks
        monitors.cgroup = self.monitor_cgroup
        names = container_registrar()
        rootfs = Rootfs(self.images.store, self.images.snapshots, self.facts, self.layout)
        self.exits = ContainerExit(
            state=state,
            handlers=handlers,
            monitors=monitors,
            cgroups=cgroups,
            rootfs=rootfs,
            meters=self._meters,
            hooks=hooks,
        )
        self.stops = ContainerStop(state, cgroups, monitors, reserve, self.exits)
        self.checkpoints = CheckpointService(
            self._checkpoint,
            state=state,
            handlers=handlers,
            layout=self.layout,
            cgroups=cgroups,
            images=self.images,
            monitors=monitors,
            max_bytes=self._images.max_layer_bytes,
        )
        self.starts = ContainerStart(state, handlers, hooks, self.exits, self.stops, checkpoints=self.checkpoints)
        self.removals = ContainerRemove(
            state=state,
            names=names,
            rootfs=rootfs,
            monitors=monitors,
            meters=self._meters,
            hooks=hooks,
            exits=self.exits,
            stops=self.stops,
        )
        self.execution = ContainerExec(state, handlers, cgroups, self.facts)
        self.logs = ContainerLogs(state, monitors)
        self.resources = ContainerResources(
            state=state,
            handlers=handlers,
            cgroups=cgroups,
            facts=self.facts,
            options=self.options,
            hooks=hooks,
        )
        self.containers = ContainerCreate(
            catatonit=self.options.catatonit_path,
            state=state,
            names=names,
            images=self.images.store,
            rootfs=rootfs,
            requests=SpecRequests(
                options=self.options,
                facts=self.facts,
                cgroups=cgroups,
                rootfs=rootfs,
                hooks_dir=self.hooks_dir,
                mask=self.layout.mask,
            ),
            bundles=Bundles(hooks, self.options),
            handlers=handlers,
            monitors=monitors,
            cgroups=cgroups,
            moves=self._moves,
            hooks=hooks,
            exits=self.exits,
            removals=self.removals,
            checkpoints=self.checkpoints,
        )
        stack.push_async_callback(self.exits.close)
        stack.push_async_callback(self.containers.close)

    def _assemble_pods(self, stack: AsyncExitStack) -> None:
        state, cgroups, network, hooks = self.state, self.cgroups, self.network, self.hooks
        names = pod_registrar()
        self.pod_stops = PodStop(
            state=state,
            names=names,
            containers=self.containers,
            container_stops=self.stops,
            network=network,
            cgroups=cgroups,
            meters=self._meters,
            hooks=hooks,
        )
        self.pod_removals = PodRemove(state, self.removals, network, hooks, self.pod_stops)
        self.pod_resources = PodResources(state, hooks)
        self.pods = PodRun(
            options=self.options,
            state=state,
            names=names,
            handlers=self.handlers,
            network=network,
            cgroups=cgroups,
            moves=self._moves,
            facts=self.facts,
            hooks=hooks,
            stops=self.pod_stops,
        )
        self.pod_restores = PodRestore(
            state=state,
            handlers=self.handlers,
            images=self.images.store,
            checkpoints=self.checkpoints,
            pods=self.pods,
            removals=self.pod_removals,
            containers=self.containers,
        )
        network.on_released(self.pod_stops.network_released)
        self.statistics = Statistics(state, cgroups, self._meters, self.images.snapshots, self.layout.data)
        stack.push_async_callback(self.pods.close)
        stack.callback(state.events.close)
        stack.push_async_callback(self.statistics.close)

    def _prepare_recovery(self, monitors: Monitors) -> None:
        self.audit = Audit(
            agent_id=self.agent_id,
            state=self.state,
            database=self.database,
            layout=self.layout,
            monitors=monitors,
            handlers=self.handlers,
            cgroups=self.cgroups,
            cgroup_parent=self.options.cgroup_parent,
            network=self.network,
            snapshots=self.images.snapshots,
        )
        self.recovery = Recovery(
            audit=self.audit,
            state=self.state,
            monitors=monitors,
            handlers=self.handlers,
            cgroups=self.cgroups,
            network=self.network,
            pods=self.pods,
            pod_stops=self.pod_stops,
            pod_removals=self.pod_removals,
            containers=self.containers,
            removals=self.removals,
            exits=self.exits,
        )

    async def _open_database(self, stack: AsyncExitStack, layout: Layout, monitors: Monitors) -> Database:
        adopted = await in_thread(settle_store, layout, monitors, self._lost_store)
        database = Database(layout.database, SCHEMAS)
        stack.callback(database.close)
        if adopted:
            await restore_all_rows(database, layout)
        return database

    async def _update_container(self, container: Container, change: LimitChange) -> None:
        await self.resources.apply(container, change)

    async def _end_container(self, container: Container) -> None:
        await self.stops.kill(container)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._stack.aclose()
