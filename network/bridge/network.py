"""The built-in network, for pods without CNI: a bridge, addresses from the pod ranges, and host ports."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Collection, Sequence
from ipaddress import ip_interface

from host.concurrency import threads
from host.concurrency.tasks import uninterrupted
from host.concurrency.undo import Undo
from host.database import Database
from host.errors import AlreadyExistsError, InvalidArgumentError, PodkeelError, UnavailableError
from network import ports, sysctl
from network.attachment import Attachment, AttachRequest, PortMapping, interface_name, limiter_name, pod_mac
from network.bridge import loading
from network.bridge.audit import compare_bridge, compare_elements, compare_links, compare_store
from network.bridge.links import BridgeLinks, IPInterface, TableMissingError
from network.bridge.lost_attachments import lost_rows
from network.bridge.owner import BridgeOwner
from network.bridge.reservation import Reservation
from network.ipam import IPAddress, Ipam, IPNetwork, gateway_of, parse_ranges
from network.nftables import ruleset
from network.nftables.elements import elements_of
from network.nftables.firewalls import FirewallWatch
from network.options import NetworkOptions
from network.ports import PortRegistry
from network.rwlock import RWLock
from network.status import Condition, Finding
from network.store import NetworkStore

_log = logging.getLogger("podkeel.network")

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,14}")
_REMEDY = "`podkeel check --repair` or a restart of the agent creates it again"
_CONNECTING_AT_ONCE = 4
_MIN_MTU = {4: 576, 6: 1280}


class BuiltInNetwork:
    """Connects sandboxes to the node's bridge. Any number of calls may run at the same time.

    Raises InvalidArgumentError for invalid options. ``start`` makes the kernel match the store. ``registry`` also has
    the host ports of the node's other network. If ``owner`` is set before the start, the agent refuses a bridge or
    ranges of another agent.
    """

    def __init__(self, options: NetworkOptions, database: Database, registry: PortRegistry | None = None) -> None:
        if not _NAME.fullmatch(options.bridge):
            raise InvalidArgumentError(
                f"network.bridge {options.bridge!r} is not an interface name of at most 15 characters"
            )
        self.options = options
        self.owner: BridgeOwner | None = None
        self.store = NetworkStore(database)
        self._cluster_ranges = parse_ranges(options.cluster_cidrs) if options.cluster_cidrs else ()
        self._book = Ipam(parse_ranges(options.pod_cidrs), options.quarantine_seconds)
        self._ports = registry or PortRegistry()
        self._reservations: dict[str, Reservation] = {}
        self._unfinished: set[str] = set()
        self._ranges_in_kernel: set[IPNetwork] = set()
        self._lock = RWLock()
        # Few threads: starting one blocks the loop, and the kernel creates links one after the other anyway.
        self._connecting = asyncio.Semaphore(_CONNECTING_AT_ONCE)
        self._changing_ranges = asyncio.Lock()
        self._mtu = options.mtu
        self._failure = "the network has not been started"
        self._kernel: BridgeLinks | None = None
        self._firewalls = FirewallWatch(options.bridge, self._restore_tables)

    async def start(self) -> None:
        """Read the store, create the bridge and load the tables, after a stop, a crash or a reboot.

        It may be called again while no other call is running.
        """
        try:
            lost = await threads.in_network_thread(self._restore)
            await self._write_lost(lost)
            self._mtu = self.options.mtu or await threads.in_network_thread(sysctl.uplink_mtu)
            self._check_mtu()
            if self._kernel is None:
                self._kernel = await threads.in_network_thread(BridgeLinks, self.options.bridge, self.owner)
            await self._ensure()
        except (PodkeelError, OSError) as error:
            self._failure = error.message if isinstance(error, PodkeelError) else str(error)
            raise
        self._failure = ""
        self._firewalls.check_soon(self._book.current)

    async def settled(self) -> None:
        """Wait for a check of the node's firewalls that runs in the background."""
        await self._firewalls.settled()

    async def stop(self) -> None:
        """Close the netlink sockets. Pods keep their network."""
        self._failure = "the network has been stopped"
        await self._firewalls.close()
        kernel, self._kernel = self._kernel, None
        if kernel is not None:
            kernel.close()

    def condition(self) -> Condition:
        """Whether pods can be connected now."""
        if self._failure:
            return Condition(False, "NetworkNotStarted", self._failure)
        if self._kernel is None or self._kernel.index() is None:
            return Condition(False, "BridgeMissing", f"bridge {self.options.bridge} is missing: {_REMEDY}")
        self._firewalls.check_soon(self._book.current)
        obstacle = self._firewalls.obstacle()
        return Condition(True) if obstacle is None else Condition(False, "ForwardingBlocked", obstacle.message)

    def attachment(self, sandbox_id: str) -> Attachment | None:
        """The sandbox's connection; None if it has none."""
        reservation = self._reservations.get(sandbox_id)
        return reservation.attachment if reservation else None

    @property
    def pod_cidrs(self) -> tuple[str, ...]:
        """The ranges from which new pods get addresses."""
        return tuple(str(network) for network in self._book.current)

    async def attach(self, request: AttachRequest) -> Attachment:
        """Connect a sandbox's network namespace. If a step fails, all steps are undone.

        Raises:
            InvalidArgumentError: a port mapping is invalid.
            AlreadyExistsError: a host port is taken, or the sandbox is connected already.
            LimitError: no address is free.
            NotFoundError: the namespace is missing.
        """
        kernel = self._started()
        versions = tuple(dict.fromkeys(network.version for network in self._book.current))
        wanted = ports.normalise(request.port_mappings, versions)
        sandbox_id = request.sandbox_id
        async with Undo(f"network of sandbox {sandbox_id}") as undo:
            reservation = self._reserve(request, wanted)
            self._unfinished.add(sandbox_id)
            undo.push("reservation", lambda: self._cancel(reservation))
            if reservation.ports:
                await threads.in_network_thread(ports.check_free_on_node, reservation.ports)
            attachment = reservation.attachment
            undo.push("rows", lambda: self.store.remove(sandbox_id, quarantine=False))
            await self.store.add(attachment, reservation.addresses, reservation.ports, self.options.quarantine_seconds)
            undo.push("interface", lambda: threads.in_network_thread(kernel.disconnect, attachment, delete_link=True))
            await self._connect(kernel, attachment)
            self._unfinished.discard(sandbox_id)
        return attachment

    async def detach(self, sandbox_id: str) -> None:
        """Release the sandbox's host ports and addresses. May be repeated, also for an unknown sandbox.

        The interface stays until its namespace ends: the caller ends it next. Until then it cannot send.
        """
        await self._detach(sandbox_id, delete_link=False)

    async def set_pod_cidrs(self, cidrs: Sequence[str]) -> None:
        """Use these ranges for new pods, and store them. Raises InvalidArgumentError for an invalid range."""
        ranges = parse_ranges(cidrs)
        async with self._changing_ranges:
            if ranges == self._book.current:
                return
            self._started()
            await uninterrupted(self._use_ranges(ranges))

    async def _use_ranges(self, ranges: tuple[IPNetwork, ...]) -> None:
        before = self._book.current
        self._book.use(ranges)
        try:
            self._check_mtu()
            await self._ensure()
            await self.store.set_pod_cidrs([str(network) for network in ranges])
        except BaseException:
            self._book.use(before)
            raise

    async def audit(self, live: Collection[str]) -> list[Finding]:
        """Differences between the store, the kernel and the ``live`` sandboxes.

        ``live`` must name every sandbox that may have a network, also those that are being created.
        """
        kernel = self._started()
        if set(self._book.in_use()) != self._ranges_in_kernel:
            await self._ensure()  # the last pod of an earlier range has ended
        async with self._lock.writing():
            unfinished = set(self._unfinished)
            listing = await ruleset.listing(self.options.bridge)
            attachments = [reservation.attachment for reservation in self._reservations.values()]
            return [
                *await threads.in_network_thread(compare_store, self.store, attachments),
                *await threads.in_network_thread(compare_links, kernel, attachments, live, unfinished),
                *await threads.in_network_thread(compare_bridge, kernel, self._bridge_addresses()),
                *await threads.in_network_thread(
                    compare_elements, self.options.bridge, attachments, unfinished, listing
                ),
            ]

    async def repair(self, live: Collection[str]) -> list[Finding]:
        """Remove objects of this network that belong to no ``live`` sandbox, and create what is missing.

        Returns what was wrong. Sandboxes that are connected later are not in ``live`` and are not changed.
        """
        kernel = self._started()
        gone = set(self._reservations) - set(live) - self._unfinished
        findings = await self.audit(live)
        for sandbox_id in gone:
            await self._detach(sandbox_id, delete_link=True)
        await uninterrupted(self._release_lost())
        await self._ensure()
        async with self._lock.writing():
            await self._connect_again(kernel, live)
            known = {name for reservation in self._reservations.values() for name in reservation.attachment.links}
            await threads.in_network_thread(lambda: kernel.delete_links(sorted(kernel.ports() - known)))
        return findings

    async def destroy(self) -> None:
        """Remove the bridge, every pod's interface, the tables and all rows."""
        kernel = self._started()
        await self._firewalls.close()
        async with self._lock.writing():
            await ruleset.load(ruleset.remove_script(self.options.bridge))
            await threads.in_network_thread(lambda: kernel.delete_links([*sorted(kernel.ports()), kernel.name]))
            await self.store.clear()
            self._forget()
        await self.stop()

    def _started(self) -> BridgeLinks:
        if self._kernel is None or self._failure:
            raise UnavailableError(f"network {self.options.bridge} is not ready: {self._failure}")
        return self._kernel

    def _check_mtu(self) -> None:
        smallest = max(_MIN_MTU[network.version] for network in self._book.current)
        if not smallest <= self._mtu <= 65535:
            raise InvalidArgumentError(f"network.mtu {self._mtu} is not between {smallest} and 65535")

    def _forget(self) -> None:
        for reservation in self._reservations.values():
            self._ports.release(reservation.ports)
        self._reservations.clear()
        self._book = Ipam(parse_ranges(self.options.pod_cidrs), self.options.quarantine_seconds)

    def _restore(self) -> loading.LostHolds:
        self._forget()
        announced = self.store.pod_cidrs()
        if announced:
            self._book.use(parse_ranges(announced))
        self._reservations, lost = loading.load(self.store, self._book, self._ports)
        return lost

    async def _write_lost(self, lost: loading.LostHolds) -> None:
        try:
            await self.store.add_held([(key, held.addresses, held.ports) for key, held in lost.items()])
        except PodkeelError as error:  # memory has them, and the next start tries again
            _log.error("network: rows of addresses or host ports cannot be written: %s", error)

    def _bridge_addresses(self) -> list[IPInterface]:
        """The gateways' addresses. If overlapping ranges share a gateway, it has the prefix of the largest."""
        largest_last = sorted(self._book.in_use(), key=lambda network: network.prefixlen, reverse=True)
        prefixes = {gateway_of(network): network.prefixlen for network in largest_last}
        return [ip_interface(f"{gateway}/{prefix}") for gateway, prefix in prefixes.items()]

    async def _ensure(self) -> None:
        """Make bridge and tables match the memory. The tables are replaced in one transaction."""
        kernel = self._kernel
        if kernel is None:
            raise UnavailableError(f"network {self.options.bridge} has been stopped")
        async with self._lock.writing():
            await threads.in_network_thread(kernel.ensure, self._bridge_addresses(), self._mtu)
            # Pods that are not connected yet add their own elements once the lock is free.
            attachments = [r.attachment for id_, r in self._reservations.items() if id_ not in self._unfinished]
            lost = await threads.in_network_thread(kernel.attach_again, [item.host_interface for item in attachments])
            if lost:
                _log.warning("bridge %s: %d links were detached or down: repaired", kernel.name, len(lost))
            ranges = self._book.in_use()
            script = await threads.in_network_thread(self._script, ranges, attachments)
            await ruleset.load(script)
            self._ranges_in_kernel = set(ranges)

    async def _restore_tables(self) -> None:
        _log.warning("nftables tables %s: deleted by another program: creating them again", self.options.bridge)
        await self._ensure()

    def _script(self, ranges: Sequence[IPNetwork], attachments: Sequence[Attachment]) -> str:
        elements = [element for attachment in attachments for element in elements_of(attachment)]
        return ruleset.table_script(
            self.options.bridge, ranges, self._cluster_ranges, masquerade=self.options.masquerade, elements=elements
        )

    def _reserve(self, request: AttachRequest, wanted: tuple[PortMapping, ...]) -> Reservation:
        """Take addresses and host ports in memory: all or none."""
        sandbox_id = request.sandbox_id
        if sandbox_id in self._reservations:
            raise AlreadyExistsError(f"sandbox {sandbox_id} is connected to {self.options.bridge} already")
        chosen = self._book.allocate()
        versions = [address.version for _, address in chosen]
        taken = [port for mapping in wanted for port in ports.host_ports(mapping, versions)]
        try:
            self._ports.take(sandbox_id, taken)
        except AlreadyExistsError:
            self._book.free_unused(chosen)
            raise
        reservation = Reservation(self._attachment(request, wanted, chosen), chosen, taken)
        self._reservations[sandbox_id] = reservation
        return reservation

    def _attachment(
        self, request: AttachRequest, wanted: tuple[PortMapping, ...], chosen: list[tuple[IPNetwork, IPAddress]]
    ) -> Attachment:
        return Attachment(
            sandbox_id=request.sandbox_id,
            host_interface=interface_name(self.options.bridge, request.sandbox_id),
            addresses=tuple(str(address) for _, address in chosen),
            gateways=tuple(str(gateway_of(network)) for network, _ in chosen),
            mac=pod_mac(chosen[0][1]),
            mtu=self._mtu,
            host_ports=wanted,
            bandwidth=request.bandwidth,
            limiter=limiter_name(self.options.bridge, request.sandbox_id) if request.bandwidth.egress else "",
            netns_path=request.netns_path,
        )

    async def restore_lost(self, requests: Sequence[AttachRequest]) -> None:
        """Restore the attachments of sandboxes that hold addresses but whose attachment is lost from the store."""
        lost = await threads.in_network_thread(lost_rows, self.store, set(self._reservations))
        for request in requests:
            if chosen := lost.addresses.get(request.sandbox_id):
                versions = tuple(dict.fromkeys(network.version for network, _ in chosen))
                wanted = ports.normalise(request.port_mappings, versions)
                attachment = self._attachment(request, wanted, chosen)
                held = lost.ports.get(request.sandbox_id, [])
                self._reservations[request.sandbox_id] = Reservation(attachment, chosen, held)
                await self.store.add_attachment(attachment)
                _log.warning("sandbox %s: attachment lost from the store: restored", request.sandbox_id[:13])

    async def _release_lost(self) -> None:
        """Quarantine addresses that no known sandbox holds any more, and free the host ports of such sandboxes."""
        lost = await threads.in_network_thread(lost_rows, self.store, set(self._reservations))
        for sandbox_id in lost.sandboxes:
            await self.store.remove(sandbox_id, quarantine=True)
            self._ports.release(lost.ports.get(sandbox_id, ()))
            for network, address in lost.addresses.get(sandbox_id, ()):
                self._book.release(network, address)
            _log.warning("sandbox %s: addresses or host ports without an attachment: released", sandbox_id[:13])

    def _cancel(self, reservation: Reservation) -> None:
        self._reservations.pop(reservation.attachment.sandbox_id, None)
        self._unfinished.discard(reservation.attachment.sandbox_id)
        self._ports.release(reservation.ports)
        self._book.free_unused(reservation.addresses)

    async def _connect(self, kernel: BridgeLinks, attachment: Attachment) -> None:
        try:
            async with self._connecting, self._lock.reading():
                await threads.in_fresh_thread(kernel.connect, attachment, attachment.netns_path)
        except TableMissingError:
            await self._restore_tables()
            async with self._lock.reading():
                await threads.in_fresh_thread(kernel.connect, attachment, attachment.netns_path)

    async def _connect_again(self, kernel: BridgeLinks, live: Collection[str]) -> None:
        """Create the interfaces of live sandboxes again whose links were deleted. The caller holds the lock alone.

        Their addresses stay the same, and so do their connections.
        """
        present = await threads.in_network_thread(kernel.ports)
        for sandbox_id, reservation in list(self._reservations.items()):  # pods that are being connected add to it
            attachment = reservation.attachment
            if sandbox_id not in live or sandbox_id in self._unfinished or present.issuperset(attachment.links):
                continue
            try:
                await threads.in_network_thread(kernel.delete_links, attachment.links)
                await threads.in_fresh_thread(kernel.connect, attachment, attachment.netns_path)
                _log.warning("sandbox %s: interface lost: created again", sandbox_id)
            except (PodkeelError, TableMissingError) as error:
                _log.error("sandbox %s: interface lost: cannot be created again: %s", sandbox_id, error)

    async def _detach(self, sandbox_id: str, *, delete_link: bool) -> None:
        reservation = self._reservations.get(sandbox_id)
        if reservation is None:
            return
        kernel = self._started()
        async with self._lock.reading():
            await threads.in_network_thread(kernel.disconnect, reservation.attachment, delete_link=delete_link)
            await self.store.remove(sandbox_id, quarantine=True)
            if self._reservations.get(sandbox_id) is not reservation:
                return  # another call has done it
            del self._reservations[sandbox_id]
            self._ports.release(reservation.ports)
            for network, address in reservation.addresses:
                self._book.release(network, address)
