"""All plugins of a node: who they are, and what they are told and asked, in the order of their indices."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from google.protobuf.message import Message

from host.errors import InvalidArgumentError, PodkeelError
from network.rwlock import RWLock
from proto.nri.v1alpha1 import nri_pb2
from runtime.nri.merging import Merging
from runtime.nri.options import NriOptions
from runtime.nri.owners import Owners
from runtime.nri.plugin import Plugin, PluginLostError, titles
from runtime.nri.resource_merging import merge_resources
from runtime.nri.trunk import Trunk

NRI_VERSION = "v0.12.0"
MOST_PLUGINS = 128
MOST_UNREGISTERED = 32
_MESSAGE_LIMIT = 3 << 20  # of one Synchronize; a ttrpc message may have 4 MiB

Answer = TypeVar("Answer", bound=Message)
Inventory = Callable[[], Awaitable[tuple[Sequence[nri_pb2.PodSandbox], Sequence[nri_pb2.Container]]]]
Update = Callable[[nri_pb2.ContainerUpdate], Awaitable[None]]
Evict = Callable[[nri_pb2.ContainerEviction, str], Awaitable[None]]

_log = logging.getLogger("podkeel.nri")


@dataclass(frozen=True, slots=True)
class Node:
    """What plugins can see and do of the node.

    ``inventory`` lists all pods and containers that clients may see. ``update`` changes the resources of one container,
    ``evict`` ends one; both raise PodkeelError.
    """

    name: str
    version: str
    inventory: Inventory
    update: Update
    evict: Evict


@dataclass(slots=True)
class Creation:
    """What plugins made of a container that is being created."""

    adjustment: nri_pb2.ContainerAdjustment
    owners: nri_pb2.FieldOwners
    updates: list[nri_pb2.ContainerUpdate] = field(default_factory=list)


class Adaptation:
    """Admits plugins and passes events to them.

    One event at a time goes through all plugins, as they expect. ``passing`` goes around what makes, changes or removes
    a pod or container and the event of it: a plugin that is being synchronised sees it either in its list or as event.
    """

    def __init__(self, options: NriOptions, node: Node) -> None:
        self._options = options
        self._node = node
        self._plugins: list[Plugin] = []
        self._unregistered: set[Plugin] = set()
        self._lock = RWLock()
        self._events = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def plugins(self) -> Sequence[Plugin]:
        """Those that are synchronised, by index."""
        return self._plugins

    @asynccontextmanager
    async def passing(self) -> AsyncIterator[None]:
        """Hold back the synchronisation of plugins meanwhile."""
        async with self._lock.reading():
            yield

    def new_trunk(self, config: str = "", *, name: str = "", index: str = "") -> Trunk:
        """The protocol of a socket that a plugin has connected, or of one that it was started with."""
        admitted: list[Plugin] = []

        def connected(trunk: Trunk) -> None:
            if len(self._unregistered) >= MOST_UNREGISTERED or len(self._plugins) >= MOST_PLUGINS:
                trunk.close("there are too many plugins")
                return
            plugin = Plugin(trunk, self._update_containers, name=name, index=index)
            admitted.append(plugin)
            self._unregistered.add(plugin)
            self._spawn(self._admit(plugin, config))

        def ended(why: str) -> None:
            for plugin in admitted:
                self._lose(plugin, why)

        return Trunk(connected, ended)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

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
            await plugin.configure(request, options.registration_seconds)
            async with self._lock.writing():
                updates = await self._synchronize(plugin)
                if not plugin.closed:
                    self._plugins.append(plugin)
                    self._plugins.sort(key=lambda other: (other.index, other.name))
            await self._apply(updates)
            _log.info("nri: plugin %s: connected: events %#x", plugin.title, plugin.events)
        except PodkeelError as error:
            plugin.close(str(error))
            _log.warning("nri: plugin %s: not admitted: %s", plugin.title, error)
        finally:
            self._unregistered.discard(plugin)

    def _lose(self, plugin: Plugin, why: str) -> None:
        plugin.close(why)
        if plugin in self._plugins:
            self._plugins.remove(plugin)
            _log.warning("nri: plugin %s: gone: %s", plugin.title, plugin.closed)

    async def _synchronize(self, plugin: Plugin) -> list[nri_pb2.ContainerUpdate]:
        """Tell a plugin all that is there; returns the updates that it asks for."""
        pods, containers = await self._node.inventory()
        requests = list(split(pods, containers))
        for request in requests:
            answer = await plugin.call(
                "Synchronize", request, nri_pb2.SynchronizeResponse, self._options.request_seconds
            )
            if request.more and (not answer.more or answer.update):
                raise PodkeelError(
                    "it cannot be synchronised in several messages, and everything does not fit into one"
                )
        return self._collect(plugin, answer.update, {})

    async def tell(
        self, event: int, method: str, request: Message, answer: type[Answer]
    ) -> list[tuple[Plugin, Answer]]:
        """Tell an event to the plugins that want it, one after the other; their answers.

        Raises PodkeelError for an error that one answers. One that is lost over it is left out.
        """
        answers = []
        async with self._events:
            for plugin in list(self._plugins):
                if plugin.wants(event):
                    given = await self._ask(plugin, event, method, request, answer)
                    if given is not None:
                        answers.append((plugin, given))
        return answers

    async def _ask(
        self, plugin: Plugin, event: int, method: str, request: Message, answer: type[Answer]
    ) -> Answer | None:
        try:
            return await plugin.notify(event, method, request, answer, self._options.request_seconds)
        except PluginLostError as error:
            self._lose(plugin, str(error))
            return None

    async def create(self, request: nri_pb2.CreateContainerRequest, subject: str) -> Creation:
        """Let plugins adjust a container that is being made, and validators look at the result.

        ``subject`` names the container in errors. Raises ConflictError when two plugins set the same thing, and
        PodkeelError when one refuses.
        """
        merging = Merging(request.container, Owners(subject))
        updates: dict[str, _Collected] = {}
        evictions: list[tuple[nri_pb2.ContainerEviction, str]] = []
        async with self._events:
            for plugin in [plugin for plugin in self._plugins if plugin.wants(nri_pb2.CREATE_CONTAINER)]:
                response = nri_pb2.CreateContainerResponse
                answer = await self._ask(plugin, nri_pb2.CREATE_CONTAINER, "CreateContainer", request, response)
                if answer is not None:
                    merging.add(plugin.title, answer.adjust)
                    self._collect(plugin, answer.update, updates, making=request.container.id)
                    evictions += [(eviction, plugin.title) for eviction in answer.evict]
                    request.container.CopyFrom(merging.container)
        changes = [collected.update for collected in updates.values()]
        await self._apply(changes)
        await self._evict(evictions)
        return Creation(merging.adjustment, merging.owners.message(), changes)

    def _collect(
        self,
        plugin: Plugin,
        wanted: Iterable[nri_pb2.ContainerUpdate],
        updates: dict[str, _Collected],
        making: str = "",
    ) -> list[nri_pb2.ContainerUpdate]:
        for update in wanted:
            if update.container_id == making:
                raise InvalidArgumentError(
                    f"NRI plugin {plugin.title} asks for an update of the container that is being made: adjust it"
                )
            collected = updates.setdefault(update.container_id, _Collected(update.container_id))
            merge_resources(update.linux.resources, (collected.update.linux.resources,), collected.owners, plugin.title)
            collected.update.ignore_failure = update.ignore_failure
        return [collected.update for collected in updates.values()]

    async def _apply(self, updates: Iterable[nri_pb2.ContainerUpdate]) -> list[nri_pb2.ContainerUpdate]:
        """Carry out updates, each for itself; returns those that failed and must not."""
        failed = []
        for update in updates:
            try:
                await self._node.update(update)
            except PodkeelError as error:
                _log.warning("nri: update of container %s failed: %s", update.container_id, error)
                if not update.ignore_failure:
                    failed.append(update)
        return failed

    async def _evict(self, evictions: Iterable[tuple[nri_pb2.ContainerEviction, str]]) -> None:
        for eviction, plugin in evictions:
            try:
                await self._node.evict(eviction, plugin)
            except PodkeelError as error:
                _log.warning("nri: eviction of container %s failed: %s", eviction.container_id, error)

    async def _update_containers(
        self, plugin: Plugin, request: nri_pb2.UpdateContainersRequest
    ) -> nri_pb2.UpdateContainersResponse:
        """A plugin's own call, at any time."""
        failed = await self._apply(self._collect(plugin, request.update, {}))
        await self._evict((eviction, plugin.title) for eviction in request.evict)
        return nri_pb2.UpdateContainersResponse(failed=failed)

    async def close(self) -> None:
        """Tell plugins that the agent ends, and let them go."""
        for plugin in [*self._plugins, *self._unregistered]:
            if plugin.events:
                try:
                    await plugin.call("Shutdown", nri_pb2.Empty(), nri_pb2.Empty, self._options.request_seconds)
                except PodkeelError as error:
                    _log.info("nri: plugin %s: Shutdown: %s", plugin.title, error)
            plugin.close("the agent ends")
        self._plugins.clear()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)


@dataclass(slots=True)
class _Collected:
    """The updates of several plugins for one container."""

    container_id: str
    update: nri_pb2.ContainerUpdate = field(init=False)
    owners: Owners = field(init=False)

    def __post_init__(self) -> None:
        self.update = nri_pb2.ContainerUpdate(container_id=self.container_id)
        self.owners = Owners(f"update of container {self.container_id[:13]}")


def split(
    pods: Sequence[nri_pb2.PodSandbox], containers: Sequence[nri_pb2.Container], limit: int = _MESSAGE_LIMIT
) -> Iterable[nri_pb2.SynchronizeRequest]:
    """Everything in as few messages as it fits into, all but the last with ``more``."""
    request, size = nri_pb2.SynchronizeRequest(), 0
    for kind, items in (("pods", pods), ("containers", containers)):
        for item in items:
            if size and size + item.ByteSize() > limit:
                request.more = True
                yield request
                request, size = nri_pb2.SynchronizeRequest(), 0
            getattr(request, kind).append(item)
            size += item.ByteSize() + 8
    yield request


__all__ = ["Adaptation", "Creation", "Node", "split", "titles"]
