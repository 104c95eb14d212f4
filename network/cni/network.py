"""Pods on a CNI network: plugins connect them, each call is recorded in the store, and a failed DEL is repeated."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine, Sequence
from pathlib import Path

import msgspec

from host.concurrency import threads
from host.concurrency.tasks import cancel_and_wait
from host.concurrency.undo import Undo
from host.database import Database
from host.errors import AlreadyExistsError, PodkeelError, UnavailableError
from network import ports
from network.attachment import Attachment, AttachRequest, Bandwidth
from network.cni.audit import broken_files, compare, without_namespace
from network.cni.chain import PluginChain, namespace_exists
from network.cni.configuration import Configuration
from network.cni.deletions import Deletions
from network.cni.folder import ConfigurationFolder, View
from network.cni.host_ports import HostPortTable, forget_flows
from network.cni.namespace import bring_up_loopback, remove_veth
from network.cni.orphans import end_orphans
from network.cni.plugin import PluginRunner
from network.cni.record import FAMILIES, CniRecord, CniState, CniStore
from network.cni.request import arguments, capabilities
from network.ipam import parse_ranges
from network.options import NetworkOptions
from network.ports import PortRegistry
from network.rwlock import RWLock
from network.status import Condition, Finding
from network.store import NetworkStore

_PORT_MAPPINGS = "portMappings"
LOOK_AGAIN_SECONDS = 5.0
START_SECONDS = 5.0
_NAMESPACES_AT_ONCE = 2

_log = logging.getLogger("podkeel.network")


async def _no_callback(_sandbox_id: str) -> None:
    """Used until a callback for released networks is set."""


class CniNetwork:
    """Connects sandboxes with the plugins of the first configuration in the folder.

    ``registry`` also has the host ports of the node's other network. ``on_released`` is called for each sandbox whose
    network was released in the background after ``detach`` had failed.
    """

    def __init__(self, options: NetworkOptions, database: Database, registry: PortRegistry | None = None) -> None:
        self.options = options
        self.on_released: Callable[[str], Awaitable[None]] = _no_callback
        self.runner = PluginRunner(options.cni_bin_dirs, options.cni_timeout_seconds)
        self._chain = PluginChain(self.runner)
        self._files = ConfigurationFolder(Path(options.cni_config_dir), self._chain)
        self._rows = CniStore(database)
        self._network_rows = NetworkStore(database)
        self._ports = registry or PortRegistry()
        self._table = HostPortTable(f"{options.bridge}_cni")
        # Starting a thread blocks the loop: a burst of pods must not start a thread for each at once.
        self._entering = asyncio.Semaphore(_NAMESPACES_AT_ONCE)
        self._records: dict[str, CniRecord] = {}
        self._unfinished: set[str] = set()
        self._deletions = Deletions(self._delete, self._call_released)
        self._lock = RWLock()
        self._reading = asyncio.Lock()
        self.view = View(None, Condition(False, "NetworkNotStarted", "the network has not been started"), False)
        self._status = Condition(True)
        self._tasks: set[asyncio.Task[None]] = set()
        self._pod_cidrs: tuple[str, ...] = ()
        self._starting = True

    @property
    def configured(self) -> bool:
        """Whether the folder had a configuration, valid or not, when it was read last."""
        return self.view.present or self._files.asking

    @property
    def plugin_folder(self) -> Path | None:
        """The folder of further plugins of the configuration that was read last; None if there was none."""
        return self._files.parsed.plugin_folder if self._files.parsed is not None else None

    def sandboxes(self) -> set[str]:
        """The sandboxes that have, or may have, an attachment to this network."""
        return set(self._records)

    @property
    def in_use(self) -> bool:
        """Whether any sandbox has, or may have, an attachment to this network."""
        return bool(self._records)

    async def start(self) -> None:
        """Read the store, end plugins that an earlier agent left running, and read the folder."""
        records = await threads.in_network_thread(self._rows.records)
        busy = [record.sandbox_id for record in records if record.state is not CniState.ADDED]
        ended = await threads.in_network_thread(end_orphans, busy)
        if ended:
            _log.warning("CNI plugins: ended %d processes of an earlier agent", ended)
        for known in list(self._records.values()):
            self._forget(known)
        for record in records:
            self._records[record.sandbox_id] = record
            try:
                self._ports.take(record.sandbox_id, record.taken)
            except AlreadyExistsError as error:  # from a wrong row: it must not prevent the start
                _log.error("sandbox %s: host ports: %s", record.sandbox_id[:13], error)
        self._pod_cidrs = tuple(await threads.in_network_thread(self._network_rows.pod_cidrs))
        if self.options.mode != "built-in":
            # A plugin that answers slowly must not delay the start of the agent.
            await asyncio.wait([self._in_background(self.reload())], timeout=START_SECONDS)

    async def settled(self) -> None:
        """Wait for the background work that is running now, except failed deletions."""
        await self._table.settled()
        if self._tasks:
            await asyncio.wait(set(self._tasks))

    async def stop(self) -> None:
        """End the background work. Pods keep their network."""
        await self._deletions.close()
        await self._table.close()
        await cancel_and_wait(*self._tasks)

    async def reload(self) -> None:
        """Read the folder again, and use its configuration for new pods."""
        async with self._reading:
            before = self.view
            self.view = await self._files.look(self.view)
            await self._ask_status()
        if self.view.condition != before.condition or self.view.configuration != before.configuration:
            configuration, condition = self.view.configuration, self.view.condition
            if configuration is not None:
                _log.info(
                    "CNI network %s: using %s, version %s",
                    configuration.name,
                    configuration.path,
                    configuration.version,
                )
            elif self.options.mode == "cni" or before.present or self.view.present:
                _log.warning("CNI: no usable network: %s", condition.message)

    def condition(self) -> Condition:
        """Whether pods can be connected now. If they cannot, this call makes the agent read the folder again."""
        condition = self.view.condition if not self.view.condition.ready else self._status
        configuration = self.view.configuration
        changeable = not condition.ready or (configuration is not None and configuration.supports("1.1.0"))
        if changeable and not self._starting and time.monotonic() > self._files.read_at + LOOK_AGAIN_SECONDS:
            self._files.read_at = time.monotonic()
            self._in_background(self.reload())
        self._table.check_soon(self._records.values())
        return condition

    def attachment(self, sandbox_id: str) -> Attachment | None:
        """The sandbox's connection; None if it has none."""
        record = self._records.get(sandbox_id)
        return record.attachment if record else None

    async def set_pod_cidrs(self, cidrs: Sequence[str]) -> None:
        """Pass these ranges to plugins with the capability ``ipRanges`` from now on; raises InvalidArgumentError."""
        self._pod_cidrs = tuple(str(network) for network in parse_ranges(cidrs))
        await self._network_rows.set_pod_cidrs(self._pod_cidrs)

    async def attach(self, request: AttachRequest) -> Attachment:
        """Connect a sandbox's network namespace. On failure DEL is called, and repeated until it succeeds.

        Raises:
            UnavailableError: there is no usable configuration, or a plugin says that trying later may help.
            InvalidArgumentError: a port mapping is invalid.
            AlreadyExistsError: a host port is taken, or the sandbox is connected already.
            NotFoundError: the namespace is missing.
            DeadlineError: a plugin took too long.
            PodkeelError: a plugin failed, with its code and text.
        """
        record = self._new_record(request)
        sandbox_id = record.sandbox_id
        if sandbox_id in self._records:
            raise AlreadyExistsError(f"sandbox {sandbox_id} is connected to {record.configuration.name} already")
        self._ports.take(sandbox_id, record.taken)
        self._records[sandbox_id] = record
        self._unfinished.add(sandbox_id)
        async with Undo(f"CNI network of sandbox {sandbox_id}") as undo:
            undo.push("reservation", lambda: self._abandon(sandbox_id))
            if record.host_ports:
                await threads.in_network_thread(ports.check_free_on_node, record.taken)
            async with self._entering:
                await threads.in_fresh_thread(bring_up_loopback, sandbox_id, request.netns_path)
            undo.push("network", lambda: self._deletions.run(sandbox_id))
            await self._rows.save(record)
            async with self._lock.reading():
                result = await self._chain.add(record)
            self._records[sandbox_id] = record = record.connected(result)
            await self._rows.save(record)
            if record.forwards:
                await self._table.load(self._records.values())
            await forget_flows(record.host_ports)
        self._unfinished.discard(sandbox_id)
        assert record.attachment is not None, "ADD is done"
        return record.attachment

    async def detach(self, sandbox_id: str) -> None:
        """Have the plugins release the sandbox's network. May be repeated, also for an unknown sandbox.

        If a plugin fails, its error is raised and DEL is repeated in the background until it succeeds. Then
        ``on_released`` is called. Before the first ``repair`` this does not wait: plugins may need pods to run.
        """
        record = self._records.get(sandbox_id)
        if record is None:
            return
        if self._starting:
            await self._save(msgspec.structs.replace(record, state=CniState.DELETING))
            self._deletions.schedule(sandbox_id)
            raise UnavailableError("its CNI network is released in the background; the sandbox is released after that")
        try:
            await self._deletions.run(sandbox_id)
        except PodkeelError as error:
            if await threads.in_network_thread(namespace_exists, record.netns_path):
                raise
            # As after a reboot: DEL could not release anything, and the pod must not stay for ever.
            _log.error("sandbox %s: released without DEL, its namespace is missing: %s", sandbox_id[:13], error)
            await self._release_ports(self._records.get(sandbox_id, record))
            self._collect_soon()

    async def give_up(self, sandbox_id: str) -> str | None:
        """Forget a sandbox whose DEL failed: its row, host ports and link are deleted; its namespace stays.

        Each plugin is called once more. Returns a sentence about what the failing plugins keep; None if no DEL is
        waiting.
        """
        await self._deletions.forget(sandbox_id)
        record = self._records.get(sandbox_id)
        if record is None or record.state is not CniState.DELETING:
            return None
        errors = await self._chain.delete_with_each(record)
        self._deletions.errors.pop(sandbox_id, None)
        if record.forwards:
            await self._table.load(self._records.values())
        if record.attachment is not None and record.attachment.host_interface:
            await threads.in_network_thread(remove_veth, record.attachment.host_interface)
        await self._rows.remove(sandbox_id)
        self._forget(record)
        await forget_flows(record.host_ports)
        held = ", ".join(record.attachment.addresses) if record.attachment is not None else "something"
        left = f"{', '.join(errors)} may hold {held} for ever ({'; '.join(errors.values())})" if errors else "no error"
        return f"CNI network {record.configuration.name} of sandbox {sandbox_id}: DEL is given up; {left}"

    async def audit(self, live: Collection[str]) -> list[Finding]:
        """Differences between the store, the plugins (by CHECK) and the ``live`` sandboxes."""
        settled = [record for id_, record in self._records.items() if id_ not in self._unfinished]
        findings = await compare(settled, self._chain, live, self._deletions.errors)
        findings += broken_files(self._files.path, self._files.broken)
        if not (self._records or self.configured):
            return findings
        return findings + await self._table.findings(self._records.values())

    async def repair(self, live: Collection[str]) -> list[Finding]:
        """Begin to release attachments of no ``live`` sandbox, have plugins collect garbage, and load host ports.

        The plugins run in the background: they may be slow or need pods of this node. Returns what was wrong.
        """
        self._starting = False
        stale = set(self._records) - set(live) - self._unfinished
        for sandbox_id in stale:
            self._deletions.schedule(sandbox_id)
        if self._records or self.configured:
            await self._table.load(self._records.values())
        self._collect_soon()
        return [Finding("CNI attachment", sandbox_id, "its sandbox is gone") for sandbox_id in sorted(stale)]

    async def destroy(self, *, force: bool = False) -> list[str]:
        """Release everything now. If a plugin fails, its error is raised.

        With ``force`` the attachment is given up instead, and the returned sentences report it.
        """
        self._starting = False
        answers = await asyncio.gather(
            *(self._deletions.run(id_) for id_ in list(self._records)), return_exceptions=True
        )
        for answer in answers:
            if isinstance(answer, BaseException) and not (force and isinstance(answer, PodkeelError)):
                raise answer
        given_up = [await self.give_up(id_) for id_ in list(self._records)] if force else []
        await self._table.remove()
        await self.stop()
        return [sentence for sentence in given_up if sentence is not None]

    def _new_record(self, request: AttachRequest) -> CniRecord:
        configuration = self.view.configuration
        if configuration is None:
            raise UnavailableError(self.view.condition.message)
        host_ports = ports.normalise(request.port_mappings, FAMILIES)
        if request.bandwidth != Bandwidth() and "bandwidth" not in configuration.capabilities:
            _log.warning(
                "CNI network %s: bandwidth is not limited: no plugin has the capability bandwidth", configuration.name
            )
        return CniRecord(
            sandbox_id=request.sandbox_id,
            netns_path=request.netns_path,
            arguments=arguments(request),
            configuration=configuration,
            capabilities=capabilities(request, host_ports, self._pod_cidrs),
            host_ports=host_ports,
            forwards=bool(host_ports) and _PORT_MAPPINGS not in configuration.capabilities,
        )

    async def _abandon(self, sandbox_id: str) -> None:
        """Forget a sandbox for which no plugin was called. If plugins were called, it is forgotten when DEL succeeds.

        Its host ports are free at once: the pod does not exist, and its next attempt asks for the same ports.
        """
        self._unfinished.discard(sandbox_id)
        record = self._records.get(sandbox_id)
        if record is not None and record.state is CniState.ADDING:
            self._forget(record)
        elif record is not None:
            await self._release_ports(record)

    async def _release_ports(self, record: CniRecord) -> None:
        """Free the host ports of a pod that no longer exists; DEL still gets them."""
        if record.host_ports:
            self._ports.release(record.taken)
            await self._save(msgspec.structs.replace(record, host_ports=(), forwards=False))

    async def _delete(self, sandbox_id: str) -> None:
        """Make one attempt at DEL. If it succeeds, forget the sandbox."""
        record = self._records.get(sandbox_id)
        if record is None:
            return
        if record.state is not CniState.DELETING:
            record = msgspec.structs.replace(record, state=CniState.DELETING)
            await self._save(record)
        if record.forwards:
            await self._table.load(self._records.values())
        async with self._lock.reading():
            await self._chain.delete(record)
        await self._rows.remove(sandbox_id)
        self._forget(record)
        await forget_flows(record.host_ports)

    async def _save(self, record: CniRecord) -> None:
        self._records[record.sandbox_id] = record
        await self._rows.save(record)

    def _forget(self, record: CniRecord) -> None:
        if self._records.pop(record.sandbox_id, None) is not None:
            self._ports.release(record.taken)

    async def _call_released(self, sandbox_id: str) -> None:
        await self.on_released(sandbox_id)

    async def _ask_status(self) -> None:
        status = Condition(True)
        if self.view.configuration is not None:
            try:
                await self._chain.status(self.view.configuration)
            except PodkeelError as error:
                status = Condition(False, "CniPluginNotReady", error.message)
        self._status = status  # set after the answers: the earlier status is valid while plugins are asked

    async def _collect_garbage(self, configuration: Configuration) -> None:
        async with self._lock.writing():
            kept = [id_ for id_, record in self._records.items() if record.state is not CniState.DELETING]
            errors = await self._chain.collect_garbage(configuration, kept)
        for error in errors:
            _log.warning("%s", error)
        if self._chain.collects(configuration) and not errors:
            await self._forget_collected(configuration.name)

    async def _forget_collected(self, network: str) -> None:
        """Forget attachments whose DEL failed but which GC has released."""
        records = list(self._records.values())
        for record in await threads.in_network_thread(without_namespace, records, set(self._deletions.errors)):
            if record.configuration.name == network and self._records.get(record.sandbox_id) is record:
                await self._deletions.forget(record.sandbox_id)
                self._deletions.errors.pop(record.sandbox_id, None)
                await self._rows.remove(record.sandbox_id)
                self._forget(record)
                await self._call_released(record.sandbox_id)

    def _collect_soon(self) -> None:
        if self.view.configuration is not None:
            self._in_background(self._collect_garbage(self.view.configuration))

    def _in_background(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
