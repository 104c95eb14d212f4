"""Calls the plugins of a configuration one after another (CNI specification 1.1.0, section 4)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import msgspec

from host import untrusted_json
from host.concurrency.threads import in_network_thread
from host.errors import InvalidArgumentError, PodkeelError, UnsupportedError
from host.untrusted_json import JsonError
from network.attachment import POD_INTERFACE
from network.cni import result as results
from network.cni.configuration import Configuration, Plugin
from network.cni.plugin import Call, PluginRunner, Reply
from network.cni.record import CniRecord


class PluginChain:
    """Runs the operations of CNI on whole configurations."""

    def __init__(self, runner: PluginRunner) -> None:
        self._runner = runner

    async def choose_version(self, configuration: Configuration) -> Configuration:
        """The configuration with the highest version that all its plugins support.

        Raises PluginMissingError, and UnsupportedError if there is no such version.
        """
        allowed = configuration.versions
        for plugin in configuration.plugins:
            call = Call("VERSION")
            output = await self._runner.run(plugin.type, call, {"cniVersion": configuration.version})
            try:
                supported = untrusted_json.decode(output, Reply).supported
            except JsonError as error:
                raise InvalidArgumentError(f"CNI plugin {plugin.type}, VERSION: printed no answer: {error}") from error
            allowed = tuple(version for version in allowed if version in supported)
            if not allowed:
                raise UnsupportedError(
                    f"CNI configuration {configuration.path} asks for CNI {', '.join(configuration.versions)}, which "
                    f"plugin {plugin.type} does not support (it supports {', '.join(supported)}): change cniVersion"
                )
        return msgspec.structs.replace(configuration, version=allowed[0])

    async def add(self, record: CniRecord) -> dict[str, Any]:
        """ADD: connect the pod. Returns the last plugin's result."""
        call = _call("ADD", record, record.netns_path)
        previous: dict[str, Any] | None = None
        for plugin in record.configuration.plugins:
            output = await self._runner.run(plugin.type, call, _settings(record, plugin, previous))
            previous = results.decode(plugin.type, output)
        assert previous is not None, "a configuration has at least one plugin"
        return previous

    async def delete(self, record: CniRecord) -> None:
        """DEL: disconnect the pod, also if ADD did not complete or its namespace is gone."""
        namespace = await in_network_thread(_existing_namespace, record.netns_path)
        call = _call("DEL", record, namespace)
        for plugin in reversed(record.configuration.plugins):
            await self._runner.run(plugin.type, call, _settings(record, plugin, _known_result(record)))

    async def delete_with_each(self, record: CniRecord) -> dict[str, str]:
        """Call DEL of every plugin, even if one fails. Returns the errors of those that failed."""
        namespace = await in_network_thread(_existing_namespace, record.netns_path)
        errors: dict[str, str] = {}
        for plugin in reversed(record.configuration.plugins):
            settings = _settings(record, plugin, _known_result(record))
            try:
                await self._runner.run(plugin.type, _call("DEL", record, namespace), settings)
            except PodkeelError as error:
                errors[plugin.type] = error.message
        return errors

    async def check(self, record: CniRecord) -> None:
        """CHECK: raise PodkeelError if the pod's network has changed. Does nothing below version 0.4.0."""
        if record.configuration.disable_check or not record.configuration.supports("0.4.0"):
            return
        call = _call("CHECK", record, record.netns_path)
        for plugin in record.configuration.plugins:
            await self._runner.run(plugin.type, call, _settings(record, plugin, record.result))

    async def status(self, configuration: Configuration) -> None:
        """STATUS: raise PodkeelError if the plugins cannot serve ADD now. Does nothing below version 1.1.0."""
        if configuration.supports("1.1.0"):
            for plugin in configuration.plugins:
                await self._runner.run(plugin.type, Call("STATUS"), _base(configuration, plugin))

    def collects(self, configuration: Configuration) -> bool:
        """Whether ``collect_garbage`` calls the plugins of this configuration."""
        return not configuration.disable_gc and configuration.supports("1.1.0")

    async def collect_garbage(self, configuration: Configuration, sandbox_ids: Collection[str]) -> list[PodkeelError]:
        """GC: have plugins release what belongs to none of ``sandbox_ids``. Does nothing below version 1.1.0.

        Every plugin is called; the errors are returned.
        """
        if not self.collects(configuration):
            return []
        valid = [{"containerID": sandbox_id, "ifname": POD_INTERFACE} for sandbox_id in sorted(sandbox_ids)]
        errors: list[PodkeelError] = []
        for plugin in configuration.plugins:
            # The specification's first text and its first library had another name for this key.
            named = {"cni.dev/valid-attachments": valid, "cni.dev/attachments": valid}
            try:
                await self._runner.run(plugin.type, Call("GC"), {**_base(configuration, plugin), **named})
            except PodkeelError as error:
                errors.append(error)
        return errors


def _call(command: str, record: CniRecord, netns_path: str) -> Call:
    return Call(command, record.sandbox_id, netns_path, POD_INTERFACE, record.arguments)


def _known_result(record: CniRecord) -> dict[str, Any] | None:
    """The result of ADD that DEL gets; none below version 0.4.0."""
    return record.result if record.configuration.supports("0.4.0") else None


def _base(configuration: Configuration, plugin: Plugin) -> dict[str, Any]:
    settings = {key: value for key, value in plugin.settings.items() if key != "capabilities"}
    return {**settings, "name": configuration.name, "cniVersion": configuration.version}


def _settings(record: CniRecord, plugin: Plugin, previous: Mapping[str, Any] | None) -> dict[str, Any]:
    settings = _base(record.configuration, plugin)
    wanted = {name: value for name, value in record.capabilities.items() if name in plugin.capabilities}
    if wanted:
        settings["runtimeConfig"] = wanted
    if previous is not None:
        settings["prevResult"] = previous
    return settings


def namespace_exists(path: str) -> bool:
    """Whether a network namespace other than the node's is pinned there."""
    try:
        there, own = Path(path).stat(), Path("/proc/self/ns/net").stat()
        return there.st_dev == own.st_dev and there.st_ino != own.st_ino
    except OSError:
        return False


def _existing_namespace(path: str) -> str:
    """The path if a namespace is pinned there, else an empty one: plugins then know that the namespace is gone."""
    return path if namespace_exists(path) else ""
