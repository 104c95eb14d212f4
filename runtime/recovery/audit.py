"""Compares the store with the node, and removes objects that the store does not know."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable
from dataclasses import dataclass, field

from host.concurrency.threads import in_thread
from host.database import Database
from host.errors import PodkeelError, UnavailableError
from images.snapshots.store import SnapshotStore
from network.node_network import NodeNetwork
from runtime.cgroups.tree import CgroupTree
from runtime.containers.bundle.node_mounts import NodeMounts
from runtime.layout import Layout
from runtime.oci.conmon import Monitors
from runtime.oci.handlers import Handlers
from runtime.oci.oci_runtime import OciRuntime
from runtime.recovery import garbage
from runtime.recovery.garbage import AllBut, Finding, Known, find_leftovers
from runtime.state.container import ContainerState
from runtime.state.state import State
from runtime.state.truncindex import is_of

_SETTLE_SECONDS = 1.0

_log = logging.getLogger("podkeel.recovery")


@dataclass(frozen=True, slots=True)
class Audit:
    """Compares and repairs, at the start and while calls run.

    ``cgroup_parent`` is the parent of the cgroups of pods that name none. ``findings`` counts by kind what was repaired
    or could not be repaired.
    """

    agent_id: str
    state: State
    database: Database
    layout: Layout
    monitors: Monitors
    handlers: Handlers
    cgroups: CgroupTree
    cgroup_parent: str
    network: NodeNetwork
    snapshots: SnapshotStore
    findings: Counter[str] = field(default_factory=Counter)

    async def guarded(self, subject: str, work: Awaitable[object]) -> None:
        """Await ``work`` and log its errors: an object that cannot be repaired must not affect the others."""
        try:
            await work
        except UnavailableError as error:
            _log.warning("%s: not finished yet: %s", subject, error)
        except (PodkeelError, OSError) as error:
            self.findings["unrecovered"] += 1
            _log.error("%s: not recovered, left unchanged: %s", subject, error)
        except Exception as error:
            self.findings["unrecovered"] += 1
            _log.error("%s: not recovered, left unchanged: %s", subject, error, exc_info=error)

    def known(self) -> Known:
        """The ids that the store knows now."""
        live = (ContainerState.CREATED, ContainerState.RUNNING)
        return Known(
            sandboxes={sandbox.id for sandbox in self.state.sandboxes},
            containers={container.id for container in self.state.containers},
            live_sandboxes={sandbox.id for sandbox in self.state.sandboxes if not sandbox.record.torn_down},
            live_containers={container.id for container in self.state.containers if container.record.state in live},
        )

    def own_parents(self) -> dict[str, str]:
        """The cgroups of this agent's pods without a named parent, by sandbox id. Other agents may have cgroups in the
        same parent.
        """
        parents = self.cgroups.default_parents(self.cgroup_parent)
        known = {sandbox.id for sandbox in self.state.sandboxes}  # also those that an older version created
        return {id_: path for id_, path in parents.items() if id_ in known or is_of(self.agent_id, id_)}

    async def check(self) -> list[Finding]:
        """Compare the store with kernel and folders. Nothing is changed.

        A finding counts only if it still exists a second later: calls are running, and the kernel removes links and
        namespaces in the background.
        """
        first = await self._differences()
        if not first:
            return []
        await asyncio.sleep(1)
        still = set(await self._differences())
        return [finding for finding in first if finding in still]

    async def repair(self) -> tuple[list[Finding], list[Finding]]:
        """Make the node match the store, without changing others' objects. Returns the findings before and after."""
        found = await self.check()
        await self._remove_leftovers()
        if any(finding.kind.endswith(" row") for finding in found):
            await self.database.forget_set_asides()
        return found, await self.check()

    async def _differences(self) -> list[Finding]:
        known = self.known()
        found = await in_thread(lambda: list(find_leftovers(self.layout, self.monitors, self.own_parents(), known)))
        for row in await in_thread(self.database.set_asides):
            problem = f"cannot be read and was set aside (table set_aside of the store): {row.reason}"
            found.append(Finding(f"{row.kind} row", row.object, problem))
        for finding in await self.network.audit(known.live_sandboxes):
            found.append(Finding(finding.kind, finding.object, finding.problem))
        return found

    async def _remove_leftovers(self) -> None:
        """While calls run: remove objects that the store does not know, and repair the network.

        An object is removed only if it was unknown twice, with a pause in between: a call that creates it would have
        recorded it by then.
        """
        sandboxes, containers = await in_thread(self._unknown)
        await asyncio.sleep(_SETTLE_SECONDS)
        again = await in_thread(self._unknown)
        doomed_sandboxes, doomed_containers = AllBut(sandboxes & again[0]), AllBut(containers & again[1])
        await self.drop_leftovers(Known(doomed_sandboxes, doomed_containers, doomed_sandboxes, doomed_containers))
        await self.network.repair(self.known().live_sandboxes)

    def _unknown(self) -> tuple[set[str], set[str]]:
        return garbage.unknown_ids(self.layout, self.monitors, self.own_parents(), self.known())

    async def drop_leftovers(self, known: Known) -> None:
        """Remove objects that are not ``known``. One that cannot be removed does not prevent the others."""
        monitors = await in_thread(self.monitors.running)
        unknown = {container_id for container_id in monitors if container_id not in known.containers}
        await in_thread(garbage.end_monitors, self.monitors, unknown)
        await asyncio.gather(*(self._drop_unknown_to_store(runtime, known) for runtime in self.handlers.working()))
        self.findings["unrecovered"] += await in_thread(garbage.drop_run_folders, self.layout, known)
        node_mounts = NodeMounts(self.layout.node_mounts)
        for container_id in node_mounts.known():
            if container_id not in known.containers:
                await node_mounts.release(container_id)
        for container_id in self.snapshots.ids():
            if container_id not in known.containers:
                self.findings["snapshot of no container"] += 1
                await self.guarded(f"snapshot {container_id[:13]}", self.snapshots.remove(container_id))
        for sandbox_id, parent in (await in_thread(self.own_parents)).items():
            if sandbox_id not in known.live_sandboxes:
                await self.guarded(f"cgroup {parent}", self.cgroups.remove_parent(parent))

    async def _drop_unknown_to_store(self, runtime: OciRuntime, known: Known) -> None:
        for container_id in await in_thread(garbage.runtime_containers, runtime.root):
            if container_id not in known.live_containers:
                self.findings["container known to the OCI runtime only"] += 1
                await self.guarded(f"{runtime.name} container {container_id[:13]}", runtime.delete(container_id))
