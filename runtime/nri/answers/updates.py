"""Merges the updates and evictions of containers that plugins ask for. Each value has one owner."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field

from host.errors import InvalidArgumentError, PodkeelError
from proto.nri.v1alpha1 import nri_pb2
from runtime.nri.answers.owners import Owners
from runtime.nri.answers.resource_merging import merge_resources
from runtime.nri.answers.size import MAX_UPDATES, check_updates

Inventory = Callable[[], Awaitable[Sequence[nri_pb2.SynchronizeRequest]]]
Update = Callable[[nri_pb2.ContainerUpdate, str], Awaitable[None]]
Evict = Callable[[nri_pb2.ContainerEviction, str], Awaitable[None]]

_log = logging.getLogger("podkeel.nri")


@dataclass(frozen=True, slots=True)
class PluginsView:
    """What plugins can list and change on the node.

    ``inventory`` lists all pods and containers that clients may see, in one message or more. ``update`` changes the
    resources of one container, ``evict`` kills one. Both get the titles of the plugins that ask for it, and raise
    PodkeelError.
    """

    name: str
    version: str
    inventory: Inventory
    update: Update
    evict: Evict


@dataclass(slots=True)
class _Collected:
    """The updates of several plugins for one container."""

    container_id: str
    update: nri_pb2.ContainerUpdate = field(init=False)
    owners: Owners = field(init=False)

    def __post_init__(self) -> None:
        self.update = nri_pb2.ContainerUpdate(container_id=self.container_id, ignore_failure=True)
        self.owners = Owners(f"update of container {self.container_id[:13]}")


class Updates:
    """Merges what plugins ask for. ``making`` is a container that is being created: no plugin may update it."""

    def __init__(self, making: str = "") -> None:
        self.evictions: list[tuple[nri_pb2.ContainerEviction, str]] = []
        self._making = making
        self._collected: dict[str, _Collected] = {}

    def add(
        self,
        plugin: str,
        updates: Sequence[nri_pb2.ContainerUpdate],
        evictions: Iterable[nri_pb2.ContainerEviction] = (),
    ) -> None:
        """Add the requests of ``plugin``. Raises ConflictError, or InvalidArgumentError for an invalid request."""
        check_updates(plugin, updates)
        for update in updates:
            if update.container_id == self._making:
                raise InvalidArgumentError(
                    f"NRI plugin {plugin} asks to update the container that is being created: adjust it instead"
                )
            if len(self._collected) >= MAX_UPDATES:
                raise InvalidArgumentError(f"NRI plugins ask for too many updates at once: the limit is {MAX_UPDATES}")
            collected = self._collected.setdefault(update.container_id, _Collected(update.container_id))
            merge_resources(update.linux.resources, (collected.update.linux.resources,), collected.owners, plugin)
            collected.update.ignore_failure = collected.update.ignore_failure and update.ignore_failure
        self.evictions += [(eviction, plugin) for eviction in list(evictions)[:MAX_UPDATES]]

    def add_each(
        self,
        plugin: str,
        updates: Sequence[nri_pb2.ContainerUpdate],
        evictions: Iterable[nri_pb2.ContainerEviction],
    ) -> list[nri_pb2.ContainerUpdate]:
        """As ``add``, but an invalid update fails alone. Returns those that failed and were not allowed to.

        Raises InvalidArgumentError for too many or too large requests.
        """
        check_updates(plugin, updates)
        failed = []
        for update in updates:
            try:
                merge_resources(update.linux.resources, (nri_pb2.LinuxResources(),), Owners(""), plugin)
            except InvalidArgumentError as error:
                _log_failure(update, plugin, error)
                if not update.ignore_failure:
                    failed.append(update)
            else:
                self.add(plugin, (update,))
        self.add(plugin, (), evictions)
        return failed

    def take(self, container_id: str) -> nri_pb2.LinuxResources | None:
        """Remove and return the update for one container."""
        collected = self._collected.pop(container_id, None)
        return collected.update.linux.resources if collected is not None else None

    def updates(self) -> list[tuple[nri_pb2.ContainerUpdate, str]]:
        """One update for each container, and the plugins that asked for it."""
        return [(collected.update, collected.owners.names()) for collected in self._collected.values()]

    async def carry_out(self, node: PluginsView) -> list[nri_pb2.ContainerUpdate]:
        """Update and evict containers one by one. Return the failed updates that the plugin did not allow to fail."""
        failed = []
        for update, plugins in self.updates():
            await asyncio.sleep(0)  # thousands of unknown containers must not block the loop
            try:
                await node.update(update, plugins)
            except PodkeelError as error:
                _log_failure(update, plugins, error)
                if not update.ignore_failure:
                    failed.append(update)
        for eviction, plugin in self.evictions:
            await asyncio.sleep(0)
            try:
                await node.evict(eviction, plugin)
            except PodkeelError as error:
                _log.warning(
                    "nri: eviction of container %s: failed for plugin %s: %s", eviction.container_id[:64], plugin, error
                )
        return failed


def _log_failure(update: nri_pb2.ContainerUpdate, plugins: str, error: PodkeelError) -> None:
    _log.warning("nri: update of container %s: failed for plugin %s: %s", update.container_id[:64], plugins, error)
