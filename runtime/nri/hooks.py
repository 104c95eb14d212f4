"""Sends the events of pods and containers to plugins."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from functools import wraps
from typing import Any, ParamSpec

from host.concurrency.tasks import wait_out
from host.errors import InvalidArgumentError, NotFoundError
from host.stages import Operation
from proto.nri.v1alpha1 import nri_pb2
from runtime.cgroups.tree import CgroupTree
from runtime.hooks import Hooks, Resources
from runtime.nri import messages, report
from runtime.nri.adaptation import Adaptation
from runtime.nri.answers.size import by_size
from runtime.nri.answers.updates import PluginsView, Updates
from runtime.nri.changes import Adjuster, Changing
from runtime.nri.options import NriOptions
from runtime.nri.plugins import events
from runtime.nri.plugins.encoding import EventRequest
from runtime.nri.plugins.plugin import Plugin
from runtime.nri.plugins.ttrpc import shortened
from runtime.nri.started import StartedPlugins
from runtime.nri.views import Views
from runtime.oci.handlers import Handlers
from runtime.specgen.draft import Draft
from runtime.specgen.limits.extra_limits import LimitChange, merged
from runtime.specgen.node_facts import NodeFacts
from runtime.state.container import Container
from runtime.state.sandbox import Sandbox
from runtime.state.state import State

P = ParamSpec("P")
_log = logging.getLogger("podkeel.nri")


def errors_logged(method: Callable[P, Awaitable[None]]) -> Callable[P, Coroutine[Any, Any, None]]:
    """Decorate a hook that runs after its operation: an unexpected error is logged, and the operation continues."""

    @wraps(method)
    async def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            await method(*args, **kwargs)
        except Exception:
            _log.exception("nri: %s: failed", getattr(method, "__name__", "a hook"))

    return guarded


class NriHooks(Hooks):
    """Sends events to plugins through ``adaptation``, and makes the changes that they ask for.

    A new plugin's list has a container that is being created once CreateContainer is done. A container that no plugin
    adjusts is in the list once it is drafted. If a plugin connects before that, it adjusts the container as usual.

    ``_starting`` has the plugins that were connected at StartContainer: only these get PostStartContainer. A plugin
    that connects between the two events gets the container as running.
    """

    def __init__(
        self,
        *,
        state: State,
        handlers: Handlers,
        cgroups: CgroupTree,
        facts: NodeFacts,
        options: NriOptions,
        version: str,
        changing: Changing,
    ) -> None:
        self._state = state
        self._adjuster = Adjuster(handlers, cgroups, facts, options.blockio_config_file)
        self._changing = changing
        view = PluginsView("podkeel", version, self._inventory, self._update, self._evict)
        self.adaptation = Adaptation(options, view)
        self.socket, self.socket_problem = "", ""
        self.started: StartedPlugins | None = None
        self._options = options
        self._validates = options.default_validator.enabled
        self._views = Views(cgroups)
        self._making: dict[str, tuple[Container, list[Plugin]]] = {}  # with the plugins that were connected then
        self._undrafted: dict[str, Container] = {}
        self._described: dict[str, nri_pb2.Container] = {}
        self._starting: dict[str, list[Plugin]] = {}
        self._called: dict[str, list[Plugin]] = {}
        self._sent_once: dict[str, set[str]] = {}
        self._wanted: dict[str, list[Updates]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def sync_blocked(self) -> AbstractAsyncContextManager[None]:
        """A context in which no plugin is synchronised, for one operation and its event."""
        return self.adaptation.sync_blocked()

    async def reload_plugins(self) -> list[str]:
        """Start, restart and end the plugins that the agent starts, as their folders say now."""
        if self.started is None:
            return []
        sentences = await self.started.reload()
        if sentences:
            with contextlib.suppress(TimeoutError):
                # To register, to be configured and to be synchronised.
                async with asyncio.timeout(3 * self._options.registration_seconds):
                    await self.adaptation.settled()
        return sentences

    def service(self) -> dict[str, object]:
        """The socket where plugins connect, or why they cannot connect."""
        return {"enabled": True, "socket": self.socket, "problem": self.socket_problem}

    def report(self) -> list[dict[str, object]]:
        """The connected plugins, then the disconnected ones."""
        return report.plugins(self.adaptation)

    def calls(self) -> Iterable[tuple[tuple[str, str], int, float, int]]:
        """The calls of all plugins since the agent's start."""
        return report.calls(self.adaptation)

    async def concurrently(self, work: Awaitable[None], notification: Coroutine[Any, Any, None]) -> None:
        """Run both at the same time, because a call of a plugin takes about as long as a commit.

        The notification is sent first. So plugins get it even if the agent dies right after the commit.
        """
        if not self.adaptation.plugins:
            await super().concurrently(work, notification)
            return
        working = asyncio.ensure_future(work)
        try:
            await notification
        finally:
            await wait_out(working)

    async def run_sandbox(self, sandbox: Sandbox, operation: Operation) -> None:
        """Send RunPodSandbox."""
        if self.adaptation.wants(events.RUN_POD_SANDBOX):
            called = self._called[sandbox.id] = []
            request = EventRequest(self._views.pod(sandbox))
            await self.adaptation.call_plugins(events.RUN_POD_SANDBOX, request, operation, called)

    @errors_logged
    async def undo_sandbox(self, sandbox: Sandbox) -> None:
        """Send StopPodSandbox and RemovePodSandbox to the plugins that got RunPodSandbox."""
        if called := self._called.pop(sandbox.id, []):
            request, notify = EventRequest(self._views.pod(sandbox)), self.adaptation.notify
            await notify(events.STOP_POD_SANDBOX, request, only=called)
            await notify(events.REMOVE_POD_SANDBOX, request, only=called)

    async def update_sandbox(self, sandbox: Sandbox, overhead: Resources | None, resources: Resources | None) -> None:
        """Send UpdatePodSandbox."""
        if self.adaptation.wants(events.UPDATE_POD_SANDBOX):
            request = nri_pb2.UpdatePodSandboxRequest(pod=self._views.pod_message(sandbox))
            if overhead is not None:
                request.overhead_linux_resources.CopyFrom(messages.resources(overhead))
            if resources is not None:
                request.linux_resources.CopyFrom(messages.resources(resources))
            await self.adaptation.call_plugins(events.UPDATE_POD_SANDBOX, request)

    @errors_logged
    async def updated_sandbox(self, sandbox: Sandbox) -> None:
        """Send PostUpdatePodSandbox."""
        if self.adaptation.wants(events.POST_UPDATE_POD_SANDBOX):
            request = EventRequest(self._views.pod(sandbox))
            await self.adaptation.notify(events.POST_UPDATE_POD_SANDBOX, request)

    @errors_logged
    async def stop_sandbox(self, sandbox: Sandbox, operation: Operation) -> None:
        """Send StopPodSandbox."""
        if self.adaptation.wants(events.STOP_POD_SANDBOX) and self._first(sandbox.id, "stop"):
            request = EventRequest(self._views.pod(sandbox))
            await self.adaptation.notify(events.STOP_POD_SANDBOX, request, operation)

    @errors_logged
    async def remove_sandbox(self, sandbox: Sandbox, operation: Operation) -> None:
        """Send RemovePodSandbox."""
        if self.adaptation.wants(events.REMOVE_POD_SANDBOX) and self._first(sandbox.id, "remove"):
            request = EventRequest(self._views.pod(sandbox))
            await self.adaptation.notify(events.REMOVE_POD_SANDBOX, request, operation)

    async def no_plugin_adjusts(self, container: Container) -> bool:
        """Whether no plugin wants CreateContainer and the agent's own validator is not enabled either."""
        async with self.sync_blocked():
            if self._validates or self.adaptation.wants(events.CREATE_CONTAINER):
                return False
            self._undrafted[container.id] = container
            return True

    def drafted(self, container: Container, draft: Draft) -> bool:
        """Add the container to the lists of new plugins, unless a plugin has connected already.

        This thread or ``_inventory`` decides: the first that removes the container from ``_undrafted``.
        """
        self._views.keep_draft(container, draft)
        self._making[container.id] = container, list(self.adaptation.plugins)
        if self._undrafted.pop(container.id, None) is not None:
            return True
        del self._making[container.id]
        self._views.drop_draft(container)
        return False

    def describe(self, container: Container, draft: Draft) -> None:
        """Make the container's message in the thread that drafted it, where it takes the least time."""
        self._described[container.id] = self._views.new_container(container, draft)

    async def create_container(self, container: Container, draft: Draft, operation: Operation) -> None:
        """Send CreateContainer and ValidateContainerAdjustment; then update other containers as plugins ask."""
        called = self._called[container.id] = []
        async with self.sync_blocked():
            described = self._described.pop(container.id, None) or self._views.new_container(container, draft)
            request = nri_pb2.CreateContainerRequest(
                pod=self._views.pod_message(container.sandbox), container=described
            )
            creation = await self.adaptation.create(request, container.title, operation, called)
            changes = creation.adjustment
            await by_size(changes, self._adjuster.adjust, container, draft, changes, creation.owners)
            if changes.ByteSize():
                self._views.keep(creation.container)
            self._making[container.id] = container, list(self.adaptation.plugins)
        await self.adaptation.carry_out(creation.updates)

    @errors_logged
    async def created_container(self, container: Container, operation: Operation) -> None:
        """Send PostCreateContainer."""
        known, called = self._plugins_knowing(container.id), events.POST_CREATE_CONTAINER.number
        self._called[container.id] = [*known, *(plugin for plugin in self.adaptation.plugins if plugin.wants(called))]
        self._views.drop_draft(container)
        if self.adaptation.wants(events.POST_CREATE_CONTAINER):
            request = await self._views.request(container, nri_pb2.CONTAINER_CREATED)
            await self.adaptation.notify(events.POST_CREATE_CONTAINER, request, operation)

    @errors_logged
    async def undo_container(self, container: Container) -> None:
        """Send StopContainer and RemoveContainer to the plugins that know the container."""
        if only := self._plugins_knowing(container.id):
            request = await self._views.request(container, nri_pb2.CONTAINER_STOPPED)
            await self.adaptation.notify(events.STOP_CONTAINER, request, only=only)
            await self.adaptation.notify(events.REMOVE_CONTAINER, request, only=only)

    async def start_container(self, container: Container, operation: Operation) -> None:
        """Send StartContainer."""
        there = list(self.adaptation.plugins)
        if self.adaptation.wants(events.START_CONTAINER):
            request = await self._views.request(container)
            await self.adaptation.call_plugins(events.START_CONTAINER, request, operation)
        self._starting[container.id] = there

    @errors_logged
    async def started_container(self, container: Container, operation: Operation) -> None:
        """Send PostStartContainer."""
        there = self._starting.pop(container.id, [])
        if self.adaptation.wants(events.POST_START_CONTAINER):
            request = await self._views.request(container, nri_pb2.CONTAINER_RUNNING)
            await self.adaptation.notify(events.POST_START_CONTAINER, request, operation, only=there)

    async def update_container(self, container: Container, given: Resources, operation: Operation) -> LimitChange:
        """Send UpdateContainer, and return the limits with the changes of plugins."""
        if not self.adaptation.wants(events.UPDATE_CONTAINER):
            return LimitChange(given)
        request = nri_pb2.UpdateContainerRequest.FromString((await self._views.request(container)).encoded)
        request.linux_resources.CopyFrom(messages.resources(given))
        own, plugins, updates = await self.adaptation.update(request, container.title, operation)
        self._wanted.setdefault(container.id, []).append(updates)
        if not plugins:
            return LimitChange(given)
        change = await self._adjuster.limit_change(own, plugins)
        return replace(change, given=merged(given, change.given))

    @errors_logged
    async def updated_container(self, container: Container, operation: Operation) -> None:
        """Send PostUpdateContainer."""
        if self.adaptation.wants(events.POST_UPDATE_CONTAINER):
            request = await self._views.request(container)
            await self.adaptation.notify(events.POST_UPDATE_CONTAINER, request, operation)

    @errors_logged
    async def stopped_container(self, container: Container) -> None:
        """Send StopContainer. The updates of other containers that plugins ask for follow in a task."""
        self._starting.pop(container.id, None)
        if not self.adaptation.wants(events.STOP_CONTAINER) or not self._first(container.id, "stop"):
            return
        request = await self._views.request(container, nri_pb2.CONTAINER_STOPPED)
        updates = Updates()
        for plugin, answer in await self.adaptation.notify(events.STOP_CONTAINER, request):
            try:
                await by_size(answer, updates.add, plugin.title, answer.update)
            except InvalidArgumentError as error:
                _log.warning("nri: %s: StopContainer failed: %s", container.title, error)
        self._wanted.setdefault(container.id, []).append(updates)
        task = asyncio.ensure_future(self.carry_out(container))  # the caller holds the container's lock
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    @errors_logged
    async def remove_container(self, container: Container, operation: Operation) -> None:
        """RemoveContainer."""
        if self.adaptation.wants(events.REMOVE_CONTAINER) and self._first(container.id, "remove"):
            request = await self._views.request(container)
            await self.adaptation.notify(events.REMOVE_CONTAINER, request, operation)

    @errors_logged
    async def carry_out(self, container: Container) -> None:
        """Make the updates of other containers that plugins asked for."""
        for updates in self._wanted.pop(container.id, []):
            await self.adaptation.carry_out(updates)

    def forget(self, object_id: str) -> None:
        """Forget an object that is removed."""
        self._views.forget(object_id)
        for kept in (self._making, self._called, self._sent_once, self._undrafted, self._described, self._starting):
            kept.pop(object_id, None)

    async def close(self) -> None:
        """Notify plugins that the agent stops, and wait for the updates that they asked for."""
        await self.adaptation.close()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _plugins_knowing(self, container_id: str) -> list[Plugin]:
        """The plugins that know a container that is being created, by an event or from their list."""
        plugins, called = self.adaptation.plugins, self._called.pop(container_id, [])
        there = self._making.pop(container_id, (None, plugins))[1]
        return [plugin for plugin in plugins if plugin in called or plugin not in there]

    def _first(self, object_id: str, event: str) -> bool:
        called = self._sent_once.setdefault(object_id, set())
        first = event not in called
        called.add(event)
        return first

    async def _inventory(self) -> list[nri_pb2.SynchronizeRequest]:
        """All pods and containers that clients may see, as messages."""
        late = {container_id for container_id in list(self._undrafted) if self._undrafted.pop(container_id, None)}
        making = [container for container, _ in list(self._making.values()) if container.id not in late]
        sandboxes = list(self._state.visible_sandboxes())
        containers = [*self._state.visible_containers(), *making]
        running = dict.fromkeys(self._starting, nri_pb2.CONTAINER_RUNNING)
        return await self._views.inventory(sandboxes, containers, running)

    async def _update(self, update: nri_pb2.ContainerUpdate, plugin: str) -> None:
        container = self._visible(update.container_id)
        _log.info("nri: %s: its resources are changed by plugin %s", container.title, plugin)
        await self._changing.update(container, await self._adjuster.limit_change(update.linux.resources, plugin))

    async def _evict(self, eviction: nri_pb2.ContainerEviction, plugin: str) -> None:
        container = self._visible(eviction.container_id)
        reason = shortened(eviction.reason[:256]) or "no reason given"
        container.evicted = f"evicted by NRI plugin {plugin}: {reason}"
        _log.warning("nri: %s: evicted by plugin %s: %s", container.title, plugin, reason)
        await self._changing.end(container)

    def _visible(self, container_id: str) -> Container:
        container = self._state.containers.exact(container_id)
        if container is None or not container.visible:
            raise NotFoundError(f"container {container_id[:64]!r} not found")
        return container
