"""The node's network: the interface of networks, and the choice between CNI plugins and the built-in bridge."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, Collection, Sequence
from pathlib import Path
from typing import Protocol

from host.concurrency.tasks import cancel_and_wait
from host.database import Database
from host.errors import WrongStateError
from network.attachment import Attachment, AttachRequest
from network.bridge.network import BuiltInNetwork
from network.bridge.owner import BridgeOwner
from network.cni.network import CniNetwork
from network.cni.watch import follow_configuration
from network.options import NetworkOptions
from network.ports import PortRegistry
from network.status import Condition, Finding

_log = logging.getLogger("podkeel.network")


class Network(Protocol):
    """The interface of networks. All methods may run concurrently."""

    async def start(self) -> None:
        """Load the state from the store, after a stop, a crash or a reboot."""

    async def stop(self) -> None:
        """Release the agent's own resources. Pods keep their network."""

    def condition(self) -> Condition:
        """Whether pods can be connected now, from memory."""

    def attachment(self, sandbox_id: str) -> Attachment | None:
        """The sandbox's connection; None if it has none."""

    async def attach(self, request: AttachRequest) -> Attachment:
        """Connect a sandbox. If a step fails, all steps are undone."""

    async def detach(self, sandbox_id: str) -> None:
        """Disconnect a sandbox. May be repeated, also for an unknown sandbox."""

    async def set_pod_cidrs(self, cidrs: Sequence[str]) -> None:
        """Use these ranges of pod addresses, and store them."""

    async def audit(self, live: Collection[str]) -> list[Finding]:
        """Differences between the store, the node and the ``live`` sandboxes."""

    async def repair(self, live: Collection[str]) -> list[Finding]:
        """Release what belongs to no ``live`` sandbox and create what is missing. Return what was wrong."""

    async def destroy(self) -> object:
        """Remove everything of this network."""


class NodeNetwork:
    """Connects new pods to the network that options and CNI folder select, and serves the pods of both networks.

    In the mode ``auto`` the folder decides at the start. A configuration that appears later is used for new pods. If it
    is removed, new pods do not use the bridge again: the removal may be part of an upgrade of the plugin. Only a later
    start without a configuration, and without pods of it, uses the bridge again.
    """

    def __init__(self, options: NetworkOptions, database: Database, owner: BridgeOwner | None = None) -> None:
        registry = PortRegistry()
        self.options = options
        self.built_in = BuiltInNetwork(options, database, registry)
        self.built_in.owner = owner
        self.cni = CniNetwork(options, database, registry)
        self._folder = Path(options.cni_config_dir)
        self._built_in_runs = False
        self._cni_chosen = options.mode == "cni"
        self._watching: asyncio.Task[None] | None = None

    @property
    def current(self) -> Network:
        """The network that new pods are connected to."""
        return self.cni if self._cni_chosen else self.built_in

    def on_released(self, callback: Callable[[str], Awaitable[None]]) -> None:
        """Set the function that is called with each sandbox whose network was released after ``detach`` had failed."""
        self.cni.on_released = callback

    async def start(self) -> None:
        """Load the state from the store, choose the network, and watch the CNI folder."""
        await self.cni.start()
        self._choose(self.cni.configured or self.cni.in_use)
        if not self._cni_chosen or self.built_in.store.attachments():
            await self.built_in.start()
            self._built_in_runs = True
        if self.options.mode != "built-in" and self._watching is None:
            self._watching = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        """Stop both networks. Pods keep their network."""
        watching, self._watching = self._watching, None
        await cancel_and_wait(watching)
        await self.cni.stop()
        await self.built_in.stop()
        self._built_in_runs = False

    def condition(self) -> Condition:
        """Whether new pods can be connected now."""
        return self.current.condition()

    def attachment(self, sandbox_id: str) -> Attachment | None:
        """The sandbox's connection; None if it has none."""
        return self.built_in.attachment(sandbox_id) or self.cni.attachment(sandbox_id)

    async def attach(self, request: AttachRequest) -> Attachment:
        """Connect a sandbox to the current network, which documents the errors."""
        return await self.current.attach(request)

    async def detach(self, sandbox_id: str) -> None:
        """Disconnect a sandbox from its network."""
        await self.built_in.detach(sandbox_id)
        await self.cni.detach(sandbox_id)

    async def give_up(self, sandbox_id: str) -> str | None:
        """Forget what CNI plugins hold for a sandbox whose ``detach`` fails. Return it; None if they hold nothing."""
        return await self.cni.give_up(sandbox_id)

    async def set_pod_cidrs(self, cidrs: Sequence[str]) -> None:
        """Use these ranges of pod addresses. Raises InvalidArgumentError."""
        if self._built_in_runs:
            await self.built_in.set_pod_cidrs(cidrs)
        await self.cni.set_pod_cidrs(cidrs)

    async def audit(self, live: Collection[str]) -> list[Finding]:
        """Differences between the store, the node and the ``live`` sandboxes."""
        found = await self.built_in.audit(live) if self._built_in_runs else []
        return found + await self.cni.audit(live)

    async def repair(self, live: Collection[str]) -> list[Finding]:
        """Release what belongs to no ``live`` sandbox and create what is missing. Return what was wrong."""
        before = self.cni.sandboxes()
        found = await self.built_in.repair(live) if self._built_in_runs else []
        newer = self.cni.sandboxes() - before
        return found + await self.cni.repair(newer.union(live))

    async def restore_lost(self, requests: Sequence[AttachRequest]) -> None:
        """Restore attachments that the store has lost, if the addresses identify the sandbox."""
        if self._built_in_runs:
            await self.built_in.restore_lost(requests)

    async def destroy(self, *, force: bool = False) -> list[str]:
        """Remove both networks. With ``force``, what CNI plugins do not release is given up and reported."""
        given_up = await self.cni.destroy(force=force)
        if not self._built_in_runs and self.options.bridge in {name for _, name in socket.if_nameindex()}:
            try:
                await self.built_in.start()
                self._built_in_runs = True
            except WrongStateError as error:  # it belongs to another agent, or no agent created it
                _log.info("bridge %s: kept: %s", self.options.bridge, error)
        if self._built_in_runs:
            await self.built_in.destroy()
        await self.stop()
        return given_up

    def _choose(self, configured: bool) -> None:
        if self.options.mode == "auto" and configured and not self._cni_chosen:
            self._cni_chosen = True
            _log.info("network: new pods use CNI: %s has a configuration", self._folder)

    async def _watch(self) -> None:
        await follow_configuration(self._folder, self._reload)

    async def _reload(self) -> Path | None:
        await self.cni.reload()
        self._choose(self.cni.configured)
        return self.cni.plugin_folder
