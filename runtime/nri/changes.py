"""Applies changes of plugins to a container's draft, record and limits."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from host.concurrency.threads import in_thread
from host.errors import InvalidArgumentError
from proto.nri.v1alpha1 import nri_pb2
from proto.runtime.v1 import cri_pb2
from runtime.cgroups.tree import CgroupTree
from runtime.nri.abilities import Field, FieldErrors, RuntimeAbilities
from runtime.nri.adjustment import adjust
from runtime.nri.answers.owners import Owners, changes
from runtime.nri.answers.resource_merging import merge_resources
from runtime.nri.messages import cri_resources
from runtime.nri.resource_adjustment import extra_limits
from runtime.oci.handlers import Handlers
from runtime.specgen import config
from runtime.specgen.draft import Draft
from runtime.specgen.limits.block_io import block_io
from runtime.specgen.limits.extra_limits import LimitChange, merged
from runtime.specgen.node_facts import NodeFacts
from runtime.state.container import Container


@dataclass(frozen=True, slots=True)
class Changing:
    """How plugins change containers: ``update`` sets resources, ``end`` kills a container and waits until it ended."""

    update: Callable[[Container, LimitChange], Awaitable[None]]
    end: Callable[[Container], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Adjuster:
    """Applies the changes of plugins to the drafts and records of containers that are being created.

    ``block_io_file`` is the file with the node's classes of block I/O.
    """

    handlers: Handlers
    cgroups: CgroupTree
    facts: NodeFacts
    block_io_file: str

    def adjust(
        self,
        container: Container,
        draft: Draft,
        adjustment: nri_pb2.ContainerAdjustment,
        owners: nri_pb2.FieldOwners,
    ) -> None:
        """Change ``draft`` and the record of ``container``.

        Raises the errors of ``adjustment.adjust``, and InvalidArgumentError for a cgroup of another container.
        """
        if not adjustment.ByteSize():
            return
        runtime, cgroups = self.handlers.get(container.record.handler), self.cgroups
        systemd = cgroups.driver == "systemd"
        abilities = RuntimeAbilities(runtime.name, runtime.features, self.facts, systemd, self.block_io_file)
        adjust(draft, adjustment, owners, abilities)
        record, linux = container.record, adjustment.linux
        if linux.cgroups_path:
            cgroup = cgroups.path_of(linux.cgroups_path, uses_subgroup=runtime.features.is_crun)
            if cgroup != record.cgroup and cgroups.exists(cgroup):
                raise FieldErrors(owners).invalid(
                    Field.CgroupsPath, f"{cgroup} exists already, so it belongs to another container"
                )
            record.cgroup = cgroup
        before = cri_pb2.LinuxContainerResources.FromString(record.resources)
        resources = merged(before, cri_resources(linux.resources))
        if linux.HasField("oom_score_adj"):
            resources.oom_score_adj = linux.oom_score_adj.value
        record.resources = resources.SerializeToString()
        record.extra_limits = extra_limits(linux.resources, self.facts, FieldErrors(owners))
        record.changed_by = changes(owners)

    async def limit_change(self, given: nri_pb2.LinuxResources, plugins: str) -> LimitChange:
        """As the function ``limit_change``, without blocking the loop."""
        if given.HasField("blockio_class"):
            return await in_thread(limit_change, given, plugins, self.facts, self.block_io_file)
        return limit_change(given, plugins, self.facts, self.block_io_file)


def limit_change(given: nri_pb2.LinuxResources, plugins: str, facts: NodeFacts, block_io_file: str) -> LimitChange:
    """The change of limits that ``plugins`` ask for an existing container. It blocks if a class of block I/O is given.

    Raises UnsupportedError or InvalidArgumentError for a value that cannot be changed. Both name the plugins and the
    field.
    """
    owners = Owners("")
    merge_resources(given, (nri_pb2.LinuxResources(),), owners, plugins)
    errors = FieldErrors(owners.message())
    if given.HasField("rdt_class"):
        raise errors.unsupported(Field.RdtClass, "it cannot be changed once the container exists")
    if given.devices:
        raise InvalidArgumentError(f"NRI plugin {plugins}: devices of an existing container cannot be changed")
    limits = class_of_block_io(given, block_io_file, errors) if given.HasField("blockio_class") else None
    return LimitChange(cri_resources(given), extra_limits(given, facts, errors), owners.changes(), limits)


def class_of_block_io(given: nri_pb2.LinuxResources, file: str, errors: FieldErrors) -> config.BlockIO:
    """The limits of a class; no limits if there is no name. Raises the errors of ``limit_change``."""
    name = given.blockio_class.value
    if not name:
        return config.BlockIO()
    if not file:
        what = "the node has no classes of block I/O: set nri.blockio_config_file"
        raise errors.unsupported(Field.BlockioClass, what, name)
    try:
        return block_io(file, name)
    except InvalidArgumentError as error:
        raise errors.invalid(Field.BlockioClass, error.message, name) from error
