"""All plugins of a node. Each event and request goes to them in the order of their indices."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass
from typing import Any, TypeVar

from google.protobuf.message import Message

from host.errors import InvalidArgumentError, PodkeelError
from host.stages import Operation
from network.rwlock import RWLock
from proto.nri.v1alpha1 import nri_pb2
from runtime.nri import validator
from runtime.nri.answers.merging import Merging
from runtime.nri.answers.owners import Owners
from runtime.nri.answers.resource_merging import merge_resources
from runtime.nri.answers.size import by_size, check_updates
from runtime.nri.answers.updates import PluginsView, Updates
from runtime.nri.options import NriOptions
from runtime.nri.plugins.backoff import Backoff
from runtime.nri.plugins.encoding import EventRequest
from runtime.nri.plugins.events import CREATE_CONTAINER, UPDATE_CONTAINER, VALIDATE_CONTAINER_ADJUSTMENT, EventCall
from runtime.nri.plugins.plugin import Plugin, PluginLostError, Shared
from runtime.nri.plugins.trunk import Trunk
from runtime.nri.plugins.ttrpc import shortened

NRI_VERSION = "v0.12.0"
MAX_PLUGINS = 128
MAX_UNREGISTERED = 32
_GATE_SECONDS = 1.0  # how long new calls at most wait because a new plugin waits for the running ones
_GONE_KEPT = 32

Answer = TypeVar("Answer", bound=Message)
_log = logging.getLogger("podkeel.nri")


@dataclass(slots=True)
class Creation:
    """The result of CreateContainer of all plugins: ``container`` is the container with their changes.

    ``updates`` are the updates that they ask for other containers, for ``carry_out``.
    """

    adjustment: nri_pb2.ContainerAdjustment
    owners: nri_pb2.FieldOwners
    container: nri_pb2.Container
    updates: Updates


@dataclass(frozen=True, slots=True)
class Gone:
    """A plugin that disconnected or was closed: when (nanoseconds since the epoch) and why."""

    title: str
    at: int
    why: str


class Adaptation:
    """Admits plugins and sends events to them.

    One event at a time goes through all plugins, because NRI plugins expect that. ``sync_blocked`` encloses an
    operation on a pod or container and its event. So a plugin that is being synchronised gets the object either in its
    list or as an event. No lock of a container may be taken inside ``sync_blocked``. Therefore the updates that plugins
    ask for other containers are made outside of it.
    """

    def __init__(self, options: NriOptions, node: PluginsView) -> None:
        self.gone: deque[Gone] = deque(maxlen=_GONE_KEPT)
        self.shared = Shared()
        self._options = options
        self._node = node
        self._plugins: list[Plugin] = []
        self._wanted = 0  # the events that any of them wants, or wanted before it turned out to have no method for it
        self._unregistered: set[Plugin] = set()
        self._backoff = Backoff()
        self._lock = RWLock()
        self._events = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def plugins(self) -> Sequence[Plugin]:
        """The synchronised plugins, sorted by index."""
        return self._plugins

    @property
    def unregistered(self) -> int:
        """The number of plugins that are connected but have not registered yet."""
        return len(self._unregistered)

    def sync_blocked(self) -> AbstractAsyncContextManager[None]:
        """A context in which no plugin is synchronised. It must not be nested."""
        return self._lock.reading()

    def wants(self, event: EventCall[Any]) -> bool:
        """Whether any plugin asked for an event."""
        return bool(self._wanted >> (event.number - 1) & 1)

    def _count_events(self) -> None:
        self._wanted = 0
        for plugin in self._plugins:
            self._wanted |= plugin.events

    def new_trunk(
        self, config: str = "", name: str = "", index: str = "", closed: Callable[[], None] | None = None
    ) -> Trunk:
        """Make the protocol for the socket of a plugin that has connected, or that the agent started.

        ``closed`` is called when the connection has ended.
        """
        admitted: list[Plugin] = []

        def connected(trunk: Trunk) -> None:
            if len(self._unregistered) >= MAX_UNREGISTERED or len(self._plugins) >= MAX_PLUGINS:
                trunk.close(f"too many plugins: {MAX_PLUGINS} can be connected, {MAX_UNREGISTERED} unregistered")
                return
            plugin = Plugin(trunk, self._update_containers, self.shared, name=name, index=index)
            admitted.append(plugin)
            self._unregistered.add(plugin)
            self._spawn(self._admit(plugin, config))

        def ended(why: str) -> None:
            for plugin in admitted:
                self._lose(plugin, why)
            if closed is not None:
                closed()

        return Trunk(connected, ended)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def settled(self) -> None:
        """Wait until each plugin that is connected now is admitted or refused."""
        if self._tasks:
            await asyncio.wait(list(self._tasks))

    async def _admit(self, plugin: Plugin, config: str) -> None:
        options = self._options
        try:
            await plugin.registered(options.registration_seconds)
            request = nri_pb2.ConfigureRequest(
                config=config,
                runtime_name=self._node.name,
                runtime_version=self._node.version,
                registration_timeout=int(options.registration_seconds * 1000),
                request_timeout=int(options.request_seconds * 1000),
                NRI_version=NRI_VERSION,
            )
            self._backoff.check(plugin.title)
            await plugin.configure(request, options.registration_seconds)
            async with AsyncExitStack() as stack:
                await self._close_gate(stack)
                updates = await self._synchronize(plugin)
                if not plugin.closed:
                    self._plugins.append(plugin)
                    self._plugins.sort(key=lambda other: (other.index, other.name))
                    self._count_events()
                    plugin.admitted_at = time.time_ns()
                    _log.info("nri: plugin %s: connected: events %#x", plugin.title, plugin.events)
            await updates.carry_out(self._node)
        except PodkeelError as error:
            plugin.close(str(error))
            self.note_gone(plugin.title, f"not admitted: {error}")
            _log.warning("nri: plugin %s: not admitted: %s", plugin.title, error)
        finally:
            self._unregistered.discard(plugin)

    async def _close_gate(self, stack: AsyncExitStack) -> None:
        """Wait until no operation runs. Admit new calls from time to time meanwhile, because a running one may hang."""
        while True:
            try:
                async with asyncio.timeout(_GATE_SECONDS):
                    await stack.enter_async_context(self._lock.writing())
                return
            except TimeoutError:
                await asyncio.sleep(_GATE_SECONDS)

    def note_gone(self, title: str, why: str) -> None:
        """Record for reports that a plugin is disconnected, and why."""
        self.gone.append(Gone(title, time.time_ns(), why))

    def _lose(self, plugin: Plugin, why: str) -> None:
        plugin.close(why)
        if plugin in self._plugins:
            self._plugins.remove(plugin)
            self._count_events()
            self.note_gone(plugin.title, plugin.closed)
            _log.warning("nri: plugin %s: gone: %s", plugin.title, plugin.closed)

    async def _synchronize(self, plugin: Plugin) -> Updates:
        """Send a plugin all pods and containers; return the updates that it asks for."""
        for request in await self._node.inventory():
            seconds, begin = self._options.registration_seconds, time.monotonic()
            try:
                answer = await plugin.call("Synchronize", request, nri_pb2.SynchronizeResponse, seconds)
            except PodkeelError:
                self._backoff.note(plugin.title, time.monotonic() - begin)
                raise
            if request.more and (not answer.more or answer.update):
                raise PodkeelError(
                    "it does not accept Synchronize in several messages, and the list does not fit into one message"
                )
        updates = Updates()
        await by_size(answer, updates.add, plugin.title, answer.update)
        return updates

    async def call_plugins(
        self,
        event: EventCall[Answer],
        request: Message | EventRequest,
        operation: Operation | None = None,
        called: list[Plugin] | None = None,
    ) -> list[tuple[Plugin, Answer]]:
        """Call the plugins that want an event, one after the other, and return their answers.

        Each plugin is added to ``called`` before it is called. Raises PodkeelError if one answers with an error. A
        plugin that disconnects meanwhile is left out.
        """
        answers = []
        async with self._events:
            for plugin in self._asked(event, called):
                given = await self._ask(plugin, event, request, operation)
                if given is not None:
                    answers.append((plugin, given))
        return answers

    def _asked(self, event: EventCall[Any], called: list[Plugin] | None) -> Iterable[Plugin]:
        for plugin in [plugin for plugin in self._plugins if plugin.wants(event.number)]:
            if not plugin.closed:
                if called is not None:
                    called.append(plugin)
                yield plugin

    async def notify(
        self,
        event: EventCall[Answer],
        request: Message | EventRequest,
        operation: Operation | None = None,
        only: Sequence[Plugin] | None = None,
    ) -> list[tuple[Plugin, Answer]]:
        """Notify plugins (``only`` these, if given) of an event that they cannot refuse. Their errors are logged."""
        answers = []
        async with self._events:
            for plugin in self._asked(event, None):
                if only is not None and plugin not in only:
                    continue
                try:
                    given = await self._ask(plugin, event, request, operation)
                except PodkeelError as error:
                    _log.warning("nri: %s; the operation continues", error)
                else:
                    if given is not None:
                        answers.append((plugin, given))
        return answers

    async def _ask(
        self,
        plugin: Plugin,
        event: EventCall[Answer],
        request: Message | EventRequest,
        operation: Operation | None,
    ) -> Answer | None:
        try:
            if operation is None:
                return await plugin.notify(event, request, self._options.request_seconds)
            async with operation.foreign_stage(f"nri:{plugin.title}"):
                return await plugin.notify(event, request, self._options.request_seconds)
        except PluginLostError as error:
            self._lose(plugin, str(error))
            return None

    async def create(
        self,
        request: nri_pb2.CreateContainerRequest,
        subject: str,
        operation: Operation | None = None,
        called: list[Plugin] | None = None,
    ) -> Creation:
        """Have plugins adjust a container that is being created, and validators check the result.

        ``subject`` names the container in errors. Each plugin is added to ``called`` before it is called. Raises
        ConflictError when two plugins set the same field, and PodkeelError when a plugin refuses the container.
        """
        container_id, original = request.container.id, b""
        if validates := self._options.default_validator.enabled or self.wants(VALIDATE_CONTAINER_ADJUSTMENT):
            original = request.container.SerializeToString()
        asked = called if called is not None else []
        merging, updates = Merging(request.container, Owners(subject)), Updates(making=container_id)
        saw: list[nri_pb2.PluginInstance] = []
        async with self._events:
            for plugin in self._asked(CREATE_CONTAINER, asked):
                answer = await self._ask(plugin, CREATE_CONTAINER, request, operation)
                if answer is not None:
                    await by_size(answer, merging.add, plugin.title, answer.adjust)
                    await by_size(answer, updates.add, plugin.title, answer.update, answer.evict)
                if not plugin.closed:  # a plugin that disconnected during the call may not have answered
                    saw.append(nri_pb2.PluginInstance(name=plugin.name, index=plugin.index))
            owners = merging.owners.message()
            if validates:
                changes = nri_pb2.ValidateContainerAdjustmentRequest(
                    adjust=merging.adjustment,
                    update=[update for update, _ in updates.updates()],
                    owners=nri_pb2.OwningPlugins(owners={container_id: owners}),
                    plugins=saw,
                )
                validated = EventRequest(request.pod.SerializeToString(), original, changes.SerializeToString())
                await self._validate(validated, subject, operation)
        return Creation(merging.adjustment, owners, merging.container, updates)

    async def _validate(
        self,
        request: EventRequest,
        subject: str,
        operation: Operation | None,
    ) -> None:
        """Call the agent's own validator, then the validators of all plugins at the same time."""
        if (own := self._options.default_validator).enabled:
            validator.check(nri_pb2.ValidateContainerAdjustmentRequest.FromString(request.encoded), own, subject)
        validators = list(self._asked(VALIDATE_CONTAINER_ADJUSTMENT, None))
        asking = [self._ask(plugin, VALIDATE_CONTAINER_ADJUSTMENT, request, operation) for plugin in validators]
        answers = await asyncio.gather(*asking) if len(asking) > 1 else [await one for one in asking]
        for plugin, answer in zip(validators, answers, strict=True):
            if answer is not None and answer.reject:
                raise InvalidArgumentError(
                    f"{subject}: NRI plugin {plugin.title} rejects it: {shortened(answer.reason)}"
                )

    async def update(
        self, request: nri_pb2.UpdateContainerRequest, subject: str, operation: Operation | None = None
    ) -> tuple[nri_pb2.LinuxResources, str, Updates]:
        """Have plugins change an update of a container.

        Returns the merged values, the plugins that set them, and updates for other containers, for ``carry_out``.
        Raises PodkeelError when a plugin refuses the update, ConflictError when two plugins set the same value.
        """
        container_id, updates, owners = request.container.id, Updates(), Owners(subject)
        own = nri_pb2.LinuxResources()
        async with self._events:
            for plugin in self._asked(UPDATE_CONTAINER, None):
                answer = await self._ask(plugin, UPDATE_CONTAINER, request, operation)
                if answer is None:
                    continue
                targets = own, request.linux_resources
                check_updates(plugin.title, answer.update)
                for update in answer.update:
                    if update.container_id == container_id:
                        await by_size(answer, merge_resources, update.linux.resources, targets, owners, plugin.title)
                others = [update for update in answer.update if update.container_id != container_id]
                await by_size(answer, updates.add, plugin.title, others, answer.evict)
        return own, owners.names(), updates

    async def carry_out(self, updates: Updates) -> None:
        """Update and evict the containers that plugins asked for."""
        await updates.carry_out(self._node)

    async def _update_containers(
        self, plugin: Plugin, request: nri_pb2.UpdateContainersRequest
    ) -> nri_pb2.UpdateContainersResponse:
        """Answer UpdateContainers, which a plugin may call at any time after it is synchronised."""
        if plugin not in self._plugins:
            raise InvalidArgumentError("the plugin is not synchronised yet: answer Synchronize first")
        updates = Updates()
        failed = await by_size(request, updates.add_each, plugin.title, request.update, request.evict)
        return nri_pb2.UpdateContainersResponse(failed=[*failed, *await updates.carry_out(self._node)])

    async def close(self) -> None:
        """Notify all plugins, at the same time, that the agent stops; then disconnect them."""
        await asyncio.gather(*(self._shut_down(plugin) for plugin in self._plugins))
        for plugin in [*self._plugins, *self._unregistered]:
            plugin.close("the agent stops")
        self._plugins.clear()
        self._count_events()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _shut_down(self, plugin: Plugin) -> None:
        try:
            await plugin.call("Shutdown", nri_pb2.Empty(), nri_pb2.Empty, self._options.request_seconds)
        except PodkeelError as error:
            _log.info("nri: plugin %s: Shutdown: %s", plugin.title, error)
