"""Merges the answers of plugins to CreateContainer into one adjustment."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping, Set
from typing import Any

from google.protobuf.message import Message

from host.errors import InvalidArgumentError
from proto.nri.v1alpha1 import nri_pb2
from runtime.nri.answers.owners import REMOVAL, Owners
from runtime.nri.answers.resource_merging import merge_resources
from runtime.nri.answers.size import check_size

Field = nri_pb2.Field
Messages = Any  # a repeated field of protobuf, whose stubs have no type for it

_HOOK_STAGES = ("prestart", "create_runtime", "create_container", "start_container", "poststart", "poststop")


def removed_name(name: str) -> str | None:
    """The name that a name with a leading ``-`` removes; None for a name without it."""
    return name[1:] if name.startswith(REMOVAL) else None


class Merging:
    """Merges the adjustments of plugins for one container.

    ``container`` is what the next plugin gets: the container with all changes up to now. ``adjustment`` has only the
    changes. In it, a name with a leading ``-`` removes an entry that the container had without plugins.
    """

    def __init__(self, container: nri_pb2.Container, owners: Owners) -> None:
        self.container = container
        self.owners = owners
        self.adjustment = nri_pb2.ContainerAdjustment()

    def add(self, plugin: str, adjust: nri_pb2.ContainerAdjustment) -> None:
        """Add the answer of ``plugin``. Raises ConflictError, or InvalidArgumentError for an invalid value."""
        if not adjust.ByteSize():
            return
        check_size(plugin, adjust)
        self._merge_map(
            Field.Annotations, plugin, adjust.annotations, self.container.annotations, self.adjustment.annotations
        )
        self._merge_list(
            Field.Mounts, plugin, adjust.mounts, self.container.mounts, self.adjustment.mounts, key="destination"
        )
        self._env(plugin, adjust)
        self._args(plugin, adjust)
        self._hooks(plugin, adjust)
        self._merge_list(
            Field.Rlimits, plugin, adjust.rlimits, self.container.rlimits, self.adjustment.rlimits, key="type"
        )
        cdi = self.container.CDI_devices, self.adjustment.CDI_devices
        self._merge_list(Field.CdiDevices, plugin, adjust.CDI_devices, *cdi, key="name")
        if adjust.HasField("linux"):
            self._linux(plugin, adjust.linux)

    def _env(self, plugin: str, adjust: nri_pb2.ContainerAdjustment) -> None:
        current = dict(entry.split("=", 1) for entry in self.container.env if "=" in entry)
        changed = {entry.key: entry.value for entry in self.adjustment.env}
        for entry in adjust.env:
            if not entry.key.removeprefix(REMOVAL) or "=" in entry.key or "\0" in entry.key + entry.value:
                raise InvalidArgumentError(f"NRI plugin {plugin}: {entry.key!r} is not a name of a variable")
        self._merge_map(Field.Env, plugin, {entry.key: entry.value for entry in adjust.env}, current, changed)
        self.container.env[:] = [f"{name}={value}" for name, value in current.items()]
        del self.adjustment.env[:]
        self.adjustment.env.extend(nri_pb2.KeyValue(key=name, value=value) for name, value in changed.items())

    def _args(self, plugin: str, adjust: nri_pb2.ContainerAdjustment) -> None:
        args = list(adjust.args)
        if not args:
            return
        if args[0] == "":  # replace all earlier values
            args = args[1:]
            self.owners.clear(Field.Args, plugin)
        if not args or not args[0]:
            raise InvalidArgumentError(f"NRI plugin {plugin}: Args: no command is left: args must not be empty")
        self.owners.claim(Field.Args, plugin)
        self.container.args[:] = args
        self.adjustment.args[:] = args

    def _hooks(self, plugin: str, adjust: nri_pb2.ContainerAdjustment) -> None:
        if not adjust.HasField("hooks"):
            return
        self.owners.add(Field.OciHooks, plugin)
        for target in (self.container.hooks, self.adjustment.hooks):
            for stage in _HOOK_STAGES:
                getattr(target, stage).extend(getattr(adjust.hooks, stage))

    def _linux(self, plugin: str, linux: nri_pb2.LinuxContainerAdjustment) -> None:
        now, changed = self.container.linux, self.adjustment.linux
        self._merge_list(Field.Devices, plugin, linux.devices, now.devices, changed.devices, key="path")
        self._merge_list(Field.Namespace, plugin, linux.namespaces, now.namespaces, changed.namespaces, key="type")
        self._merge_map(Field.Sysctl, plugin, linux.sysctl, now.sysctl, changed.sysctl)
        self._net_devices(plugin, linux)
        if linux.HasField("resources"):
            merge_resources(linux.resources, (now.resources, changed.resources), self.owners, plugin)
        if linux.cgroups_path:
            self.owners.claim(Field.CgroupsPath, plugin)
            now.cgroups_path = changed.cgroups_path = linux.cgroups_path
        for name, number in (
            ("oom_score_adj", Field.OomScoreAdj),
            ("io_priority", Field.IoPriority),
            ("seccomp_policy", Field.SeccompPolicy),
            ("scheduler", Field.LinuxSched),
            ("memory_policy", Field.MemoryPolicy),
        ):
            if linux.HasField(name):
                self.owners.claim(number, plugin)
                getattr(changed, name).CopyFrom(getattr(linux, name))
                if name in now.DESCRIPTOR.fields_by_name:
                    getattr(now, name).CopyFrom(getattr(linux, name))
        if linux.HasField("rdt"):
            self._rdt(plugin, linux.rdt)

    def _net_devices(self, plugin: str, linux: nri_pb2.LinuxContainerAdjustment) -> None:
        now, changed = self.container.linux.net_devices, self.adjustment.linux.net_devices
        for name in linux.net_devices:
            if (removed := removed_name(name)) is not None:
                self.owners.clear_key(Field.LinuxNetDevices, removed, plugin)
                now.pop(removed, None)
                changed.pop(removed, None)
                changed[name].CopyFrom(nri_pb2.LinuxNetDevice())
        for name, device in linux.net_devices.items():
            if removed_name(name) is None:
                self.owners.claim_key(Field.LinuxNetDevices, name, plugin)
                now[name].CopyFrom(device)
                changed[name].CopyFrom(device)

    def _rdt(self, plugin: str, rdt: nri_pb2.LinuxRdt) -> None:
        fields = (
            ("clos_id", Field.RdtClosID),
            ("schemata", Field.RdtSchemata),
            ("enable_monitoring", Field.RdtEnableMonitoring),
        )
        if rdt.remove:
            for _, number in fields:
                self.owners.clear(number, plugin)
            self.container.linux.ClearField("rdt")
            self.adjustment.linux.ClearField("rdt")
            self.adjustment.linux.rdt.remove = True
        for name, number in fields:
            if rdt.HasField(name):
                self.owners.claim(number, plugin)
                for target in (self.container.linux.rdt, self.adjustment.linux.rdt):
                    getattr(target, name).CopyFrom(getattr(rdt, name))

    def _merge_map(
        self,
        number: Field,
        plugin: str,
        given: Mapping[str, str],
        current: MutableMapping[str, str],
        changed: MutableMapping[str, str],
    ) -> None:
        for name in given:
            if (removed := removed_name(name)) is not None:
                self.owners.clear_key(number, removed, plugin)
                current.pop(removed, None)
                changed.pop(removed, None)
                changed[name] = ""
        for name, value in given.items():
            if removed_name(name) is None:
                self.owners.claim_key(number, name, plugin)
                current[name] = value
                changed[name] = value

    def _merge_list(
        self,
        number: Field,
        plugin: str,
        given: Iterable[Message],
        current: Messages,
        changed: Messages,
        *,
        key: str,
    ) -> None:
        """As ``_merge_map``, for messages of a list. Their field ``key`` identifies them."""
        messages = {str(getattr(message, key)): message for message in given}
        for name in messages:
            if not name.removeprefix(REMOVAL):
                raise InvalidArgumentError(f"NRI plugin {plugin}: {Field.Name(number)}: {key} is empty")
            if (removed := removed_name(name)) is not None:
                self.owners.clear_key(number, removed, plugin)
        for name in messages:
            if removed_name(name) is None:
                self.owners.claim_key(number, name, plugin)
        removals = [message for name, message in messages.items() if removed_name(name) is not None]
        settings = [message for name, message in messages.items() if removed_name(name) is None]
        gone = {removed_name(name) or name for name in messages}
        _replace(current, key, gone, settings)
        _replace(changed, key, gone, [*removals, *settings])


def _replace(messages: Messages, key: str, gone: Set[str], added: Iterable[Message]) -> None:
    """Remove the messages that ``gone`` names and add others."""
    kept = [message for message in messages if getattr(message, key) not in gone]
    del messages[:]
    messages.extend([*kept, *added])
