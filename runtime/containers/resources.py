"""Changes the limits of an existing container, all or none of them."""

from __future__ import annotations

import errno
import logging
import os

import msgspec

from host.concurrency.threads import in_thread
from host.errors import CommandError, InvalidArgumentError, LimitError, PodkeelError, WrongStateError
from host.stages import Operation
from proto.runtime.v1 import cri_pb2
from runtime.cgroups import limits
from runtime.cgroups.block_io import BlockIoSettings, read_block_io, settings_of, write_block_io
from runtime.cgroups.extra_files import read_extra_limits, write_extra_limits
from runtime.cgroups.tree import CgroupTree
from runtime.hooks import Hooks
from runtime.oci.handlers import Handlers
from runtime.oci.oci_runtime import OciRuntime, plain_message, refused_limit
from runtime.options import RuntimeOptions
from runtime.specgen import config
from runtime.specgen.limits.extra_limits import ExtraLimits, LimitChange, merged
from runtime.specgen.limits.resources import oom_score_adj, resources
from runtime.specgen.node_facts import NodeFacts
from runtime.state.container import Container, ContainerState
from runtime.state.state import State

_log = logging.getLogger("podkeel.containers")

_KERNEL_DEFAULTS = {
    "cpu_shares": 1024,
    "cpu_period": 100_000,
    "cpu_quota": -1,
    "memory_limit_in_bytes": -1,
    "memory_swap_limit_in_bytes": -1,
}
# Fields that plugins own under other names. A client that sets such a field becomes its owner.
_OWNED = {
    "memory_limit_in_bytes": "MemLimit",
    "memory_swap_limit_in_bytes": "MemSwapLimit",
    "cpu_shares": "CPUShares",
    "cpu_quota": "CPUQuota",
    "cpu_period": "CPUPeriod",
    "cpuset_cpus": "CPUSetCPUs",
    "cpuset_mems": "CPUSetMems",
    "oom_score_adj": "OomScoreAdj",
}

_BLOCK_IO = "BlockioClass"  # the name under which plugins own it

_Both = tuple[cri_pb2.LinuxContainerResources, ExtraLimits]


class ContainerResources:
    """Sets the limits of containers, in their cgroups and in the store."""

    def __init__(
        self,
        *,
        state: State,
        handlers: Handlers,
        cgroups: CgroupTree,
        facts: NodeFacts,
        options: RuntimeOptions,
        hooks: Hooks,
    ) -> None:
        self._state = state
        self._handlers = handlers
        self._cgroups = cgroups
        self._facts = facts
        self._options = options
        self._hooks = hooks

    async def update(self, container_id: str, given: cri_pb2.LinuxContainerResources) -> None:
        """Change a container's limits, all or none of them. Fields that are 0 are not changed.

        Raises:
            WrongStateError: the container has exited.
            LimitError: the memory limit would be below what the container uses now.
            PodkeelError: an NRI plugin refuses.
        """
        container, hooks = self._state.get_container(container_id), self._hooks
        try:
            async with container.lock:
                _require_alive(container)
                operation = container.begin("UpdateContainerResources")
                async with hooks.sync_blocked():
                    change = await hooks.update_container(container, given, operation)
                await self._change(container, change, operation)
                async with hooks.sync_blocked():
                    await hooks.updated_container(container, operation)
        finally:
            await hooks.carry_out(container)

    async def apply(self, container: Container, change: LimitChange) -> None:
        """As ``update``, for a plugin: plugins are not notified."""
        async with container.lock:
            await self._change(container, change, container.begin("UpdateContainerResources"))

    async def _change(self, container: Container, change: LimitChange, operation: Operation) -> None:
        """Change limits of a container whose lock is held. Limits that are not given do not change.

        Raises:
            WrongStateError: the container has exited.
            LimitError: the memory limit would be below what the container uses now.
        """
        record = container.record
        _require_alive(container)
        before = cri_pb2.LinuxContainerResources.FromString(record.resources)
        after = merged(before, change.given)
        extra = record.extra_limits.merged(change.extra)
        self._refuse_below_use(container, change.given.memory_limit_in_bytes)
        async with operation.stage("runtime"):
            await self._apply(container, (before, record.extra_limits), (after, extra), change)
        async with operation.stage("commit"):
            record.resources = after.SerializeToString()
            record.extra_limits = extra
            taken = {name for field, name in _OWNED.items() if getattr(change.given, field)}
            kept = {name: plugin for name, plugin in record.changed_by.items() if name not in taken}
            record.changed_by = {**kept, **change.changed_by}
            await self._state.save(container)

    async def _apply(self, container: Container, before: _Both, after: _Both, change: LimitChange) -> None:
        if container.record.start_error:
            return
        cgroups, path = self._cgroups, container.record.cgroup
        runtime = self._handlers.get(container.record.handler)
        decided, _ = self._decided(*after)  # invalid limits are refused before anything is changed
        sizes = {page.page_size for page in decided.hugepage_limits}
        undoing = await in_thread(_undoing, before[0], after[0], sizes, cgroups, path)
        extra, block_io = before[1], None
        if change.extra != ExtraLimits():
            extra = (await in_thread(read_extra_limits, cgroups, path, change.extra)).merged(extra)
        if change.block_io is not None or _BLOCK_IO in container.record.changed_by:
            block_io = await in_thread(read_block_io, cgroups, path)
        try:
            await self._set(container, runtime, *after)
            if block_io is not None:  # runc (1.1) sets the values with which the container was created
                await self._set_block_io(path, settings_of(change.block_io) if change.block_io else block_io)
        except BaseException as error:
            try:
                await self._set(container, runtime, undoing, extra)
                if block_io is not None:
                    await self._set_block_io(path, block_io)
            except (PodkeelError, OSError) as failure:
                _log.error("%s: changed limits could not be restored: %s", container.title, failure)
            if isinstance(error, CommandError) and os.strerror(errno.EBUSY) in error.output:
                raise LimitError(
                    f"{container.title}: the kernel cannot reclaim enough of its memory for the new limit: "
                    "raise the limit or restart the container"
                ) from error
            if isinstance(error, CommandError) and refused_limit(error.output):
                raise InvalidArgumentError(
                    f"the kernel refuses one of these limits: {plain_message(error.output)}"
                ) from error
            raise

    async def _set(
        self, container: Container, runtime: OciRuntime, wanted: cri_pb2.LinuxContainerResources, extra: ExtraLimits
    ) -> None:
        cgroups, path, init = self._cgroups, container.record.cgroup, container.record.init
        given, score = self._decided(wanted, extra)
        await runtime.update(container.id, msgspec.json.encode(given))
        if wanted.cpu_quota < 0:
            await in_thread(limits.lift_cpu_quota, cgroups, path)
        if given.hugepage_limits:  # runc (1.1) ignores them
            pages = {page.page_size: page.limit for page in given.hugepage_limits}
            await in_thread(limits.limit_huge_pages, cgroups, path, pages)
        if extra != ExtraLimits():  # each OCI runtime ignores others of them
            await in_thread(write_extra_limits, cgroups, path, extra)
        if init is not None:  # no OCI runtime changes it for running processes
            await in_thread(limits.set_oom_score_adj, cgroups, path, init.pid, score)

    async def _set_block_io(self, path: str, wanted: BlockIoSettings) -> None:
        try:
            await in_thread(write_block_io, self._cgroups, path, wanted)
        except OSError as error:
            what = f"the kernel refuses these limits of block I/O: {error.strerror}"
            raise InvalidArgumentError(what) from error

    def _decided(self, wanted: cri_pb2.LinuxContainerResources, extra: ExtraLimits) -> tuple[config.Resources, int]:
        facts = self._facts
        given = resources(wanted, facts, pids_limit=self._options.pids_limit)
        extra.set_in(given)
        return given, oom_score_adj(wanted, facts)

    def _refuse_below_use(self, container: Container, limit: int) -> None:
        if limit <= 0:
            return
        use = limits.memory_in_use(self._cgroups, container.record.cgroup)
        if use > limit:
            raise LimitError(
                f"{container.title} uses {use} bytes of memory that cannot be reclaimed, more than the new limit of "
                f"{limit}: the kernel would kill it; raise the limit or restart the container"
            )


def _require_alive(container: Container) -> None:
    """Raise WrongStateError for an ended container, whose limits can no longer be changed."""
    state = container.record.state
    if state not in (ContainerState.CREATED, ContainerState.RUNNING):
        raise WrongStateError(f"{container.title} is {state}: its limits cannot be changed")


def _undoing(
    before: cri_pb2.LinuxContainerResources,
    after: cri_pb2.LinuxContainerResources,
    page_sizes: set[str],
    cgroups: CgroupTree,
    path: str,
) -> cri_pb2.LinuxContainerResources:
    """``before``, where limits that only ``after`` sets are the kernel's default or the present value.

    ``page_sizes`` are the page sizes of ``after`` that the node has. Others, without a limit, are ignored. systemd may
    have accepted a list of CPUs that the kernel then refused.
    """
    undoing = cri_pb2.LinuxContainerResources()
    undoing.CopyFrom(before)
    in_use = dict(zip(("cpuset_cpus", "cpuset_mems"), limits.cpuset(cgroups, path), strict=True))
    for field, default in {**_KERNEL_DEFAULTS, **in_use}.items():
        if getattr(after, field) and not getattr(before, field):
            setattr(undoing, field, default)
    sizes = page_sizes - {page.page_size for page in before.hugepage_limits}
    for size, limit in limits.huge_page_limits(cgroups, path, sizes).items():
        undoing.hugepage_limits.add(page_size=size, limit=limit)
    undoing.unified.update(limits.settings(cgroups, path, after.unified.keys() - before.unified.keys()))
    return undoing
