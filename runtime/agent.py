"""One agent's runtime, put together: opened, recovered, and closed again with every pod left running."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from host.cgroups import discover
from host.children.dying_holder import release_what_is_held
from host.concurrency.threads import in_thread
from host.database import Database
from host.database_copy import DatabaseCopy
from host.errors import WrongStateError
from host.libc import leave_session_keyring
from host.subreaper import Orphans
from images.images import Images
from images.options import ImageOptions
from images.schema import MIGRATIONS as IMAGE_MIGRATIONS
from network.bridge.owner import BridgeOwner
from network.node_network import NodeNetwork
from network.options import NetworkOptions
from network.schema import MIGRATIONS as NETWORK_MIGRATIONS
from runtime.agent_id import agent_id
from runtime.cgroups.tree import CgroupTree
from runtime.containers.create import ContainerManager
from runtime.containers.endings.exit import ContainerExit
from runtime.containers.exec import Execution
from runtime.containers.start import ContainerStart
from runtime.containers.stop import ContainerStop
from runtime.hooks import Hooks
from runtime.layout import Layout
from runtime.meters import Meters
from runtime.node import Node
from runtime.nri.options import NriOptions
from runtime.oci.conmon import Monitors
from runtime.oci.handlers import Handlers
from runtime.oci.mask_device import MaskDevice
from runtime.options import RuntimeOptions
from runtime.pods.remove import PodRemove
from runtime.pods.resources import PodResources
from runtime.pods.run import PodManager
from runtime.pods.stop import PodStop
from runtime.recovery.audit import Audit
from runtime.recovery.kept_rows import KeptRows, put_back_all
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

if TYPE_CHECKING:
    from runtime.nri.hooks import NriHooks

SCHEMAS = {"runtime": RUNTIME_MIGRATIONS, "network": NETWORK_MIGRATIONS, "images": IMAGE_MIGRATIONS}

_log = logging.getLogger("podkeel.agent")


class Agent:
    """Everything behind the gRPC services, for ``async with``.

    ``version`` is reported to plugins of the node, which are served if ``nri`` says so. With ``only_removes`` no
    runtime handler is tried, which takes most of a start: existing pods can be removed, and none can be made.

    Raises WrongStateError when another agent holds the same folders, the data folder is from a newer version, or the
    store is lost and ``lost_store`` does not say what to do then.
    """

    options: RuntimeOptions
    layout: Layout
    database: Database
    state: State
    cgroups: CgroupTree
    facts: NodeFacts
    handlers: Handlers
    hooks: Hooks
    hooks_dir: HooksDir
    network: NodeNetwork
    images: Images
    pods: PodManager
    pod_stops: PodStop
    pod_removals: PodRemove
    pod_resources: PodResources
    containers: ContainerManager
    exits: ContainerExit
    stops: ContainerStop
    starts: ContainerStart
    execution: Execution
    statistics: Statistics
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
        version: str = "",
        only_removes: bool = False,
    ) -> None:
        self._lost_store = lost_store
        self._nri = nri
        self._version = version
        self._only_removes = only_removes
        self._runtime = runtime
        self._network = network
        self._images = images
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        leave_session_keyring()
        async with AsyncExitStack() as stack:
            orphans = Orphans()
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
        reserve = Reserve(layout.run / "reserve")
        await in_thread(reserve.release)
        await in_thread(require_room, layout.run)
        monitors = Monitors(options.conmon_path, layout)
        database = await self._open_database(stack, layout, monitors)
        kept = KeptRows(database)
        stack.push_async_callback(kept.close)
        copy = DatabaseCopy(database, layout.database_copy)
        stack.push_async_callback(copy.close)
        hierarchies = await in_thread(discover)
        cgroups = CgroupTree.of_host(options.cgroup_driver, hierarchies)
        own_id = await in_thread(agent_id, layout)
        handlers = Handlers(options, layout, cgroups, own_id)
        network = NodeNetwork(self._network, database, BridgeOwner(own_id, str(layout.data)))
        images = Images(self._images, layout.data, database)
        facts = await in_thread(partial(probe_node, hierarchies, selinux=options.selinux))
        store = Store(database, layout)
        node = Node(
            options=options,
            agent_id=own_id,
            layout=layout,
            reserve=reserve,
            database=database,
            state=State(store),
            cgroups=cgroups,
            meters=Meters(cgroups, hierarchies),
            facts=facts,
            apparmor_default=await load_default_profile(facts),
            handlers=handlers,
            monitors=monitors,
            network=network,
            images=images.store,
            snapshots=images.snapshots,
        )
        await (handlers.identify() if self._only_removes else handlers.probe())
        mask = MaskDevice(layout.mask)
        stack.callback(mask.remove)
        await in_thread(mask.make)
        await images.start()
        stack.push_async_callback(images.close)
        await network.start()
        stack.push_async_callback(network.stop)
        self.images = images
        self._take(node)
        plugin_hooks = self._plugin_hooks(node)
        self.hooks = node.hooks = plugin_hooks or Hooks()
        self._assemble(node, stack)
        await self.recovery.run()
        copy.start()
        store.when_written(kept.note)
        kept.start((*node.state.sandboxes, *node.state.containers))
        await in_thread(reserve.keep)
        if plugin_hooks is not None:
            await self._serve_plugins(plugin_hooks, stack)
        self.state.events.serve()

    def _take(self, node: Node) -> None:
        self.options, self.layout, self.database = node.options, node.layout, node.database
        self.state, self.facts, self.hooks_dir = node.state, node.facts, node.hooks_dir
        self.cgroups, self.handlers, self.network = node.cgroups, node.handlers, node.network

    def _assemble(self, node: Node, stack: AsyncExitStack) -> None:
        self.exits = ContainerExit(node)
        self.stops = ContainerStop(node, self.exits)
        self.starts = ContainerStart(node, self.exits, self.stops)
        self.containers = ContainerManager(node, container_registrar(), self.exits, self.stops)
        names = pod_registrar()
        self.pod_stops = PodStop(node, names, self.containers)
        self.pod_removals = PodRemove(node, self.containers, self.pod_stops)
        self.pod_resources = PodResources(node)
        self.pods = PodManager(node, names, self.pod_stops)
        node.network.when_given_back(self.pod_stops.network_given_back)
        self.execution = Execution(node)
        self.statistics = Statistics(node.state, node.cgroups, node.meters, node.snapshots, node.layout)
        self._prepare_recovery(node)
        stack.push_async_callback(self.exits.close)
        stack.push_async_callback(self.containers.close)
        stack.push_async_callback(self.pods.close)
        stack.callback(self.state.events.close)
        stack.push_async_callback(self.statistics.close)

    def _prepare_recovery(self, node: Node) -> None:
        self.audit = Audit(
            agent_id=node.agent_id,
            state=node.state,
            database=node.database,
            layout=node.layout,
            monitors=node.monitors,
            handlers=node.handlers,
            cgroups=node.cgroups,
            cgroup_parent=node.options.cgroup_parent,
            network=node.network,
            snapshots=node.snapshots,
        )
        self.recovery = Recovery(
            audit=self.audit,
            state=node.state,
            monitors=node.monitors,
            handlers=node.handlers,
            cgroups=node.cgroups,
            network=node.network,
            pods=self.pods,
            pod_stops=self.pod_stops,
            pod_removals=self.pod_removals,
            containers=self.containers,
            exits=self.exits,
        )

    async def _open_database(self, stack: AsyncExitStack, layout: Layout, monitors: Monitors) -> Database:
        adopted = await in_thread(settle_store, layout, monitors, self._lost_store)
        database = Database(layout.database, SCHEMAS)
        stack.callback(database.close)
        if adopted:
            await put_back_all(database, layout)
        return database

    def _plugin_hooks(self, node: Node) -> NriHooks | None:
        """The hooks that call plugins of the node, if any are served; only then their code is loaded."""
        if self._nri is None or not self._nri.enabled:
            return None
        from runtime.nri.hooks import Changing, NriHooks

        async def update(container: Container, change: LimitChange) -> None:
            await self.execution.apply(container, change)

        async def end(container: Container) -> None:
            await self.stops.kill(container)

        return NriHooks(node, self._nri, self._version, Changing(update, end))

    async def _serve_plugins(self, hooks: NriHooks, stack: AsyncExitStack) -> None:
        """Allow plugins of the node to see and change what is made from now on."""
        from runtime.nri.service import serving

        assert self._nri is not None
        await stack.enter_async_context(serving(hooks, self._nri, self.layout.run / "nri-plugins"))

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._stack.aclose()


def hold_folder(folder: Path) -> int:
    """Lock ``folder`` for this process and return the descriptor that holds the lock.

    Raises WrongStateError when another agent holds it. One that was killed but hangs in the kernel is no obstacle.
    """
    lock = folder / "lock"
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        if not _locked(descriptor):
            holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
            if not (holder.isdecimal() and release_what_is_held(int(holder), lock) and _locked(descriptor)):
                raise WrongStateError(
                    f"folder {folder} is in use by another agent (pid {holder or 'unknown'}): stop it, or use other "
                    "folders"
                )
            _log.warning("folder %s: the agent that held it (pid %s) was killed and hangs: taken over", folder, holder)
    except BaseException:
        os.close(descriptor)
        raise
    with contextlib.suppress(OSError):  # the lock holds without it, also on a full disk
        os.pwrite(descriptor, f"{os.getpid():<10}\n".encode(), 0)
    return descriptor


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
