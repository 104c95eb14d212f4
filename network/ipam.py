"""IPAM: the address ranges and the addresses that pods hold, in memory. The store has a row for each address."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from host.errors import InvalidArgumentError, LimitError, WrongStateError

IPAddress = IPv4Address | IPv6Address
IPNetwork = IPv4Network | IPv6Network

_MAX_PREFIX = {4: 30, 6: 126}
_MAX_RANGES = 16


def parse_ranges(cidrs: Sequence[str]) -> tuple[IPNetwork, ...]:
    """Parse ``cidrs``. Raises InvalidArgumentError for a range that pods cannot use."""
    if not 1 <= len(cidrs) <= _MAX_RANGES:
        raise InvalidArgumentError(f"pod CIDRs: {len(cidrs)} ranges given: give 1 to {_MAX_RANGES}")
    ranges = tuple(_parse_range(cidr) for cidr in cidrs)
    for position, network in enumerate(ranges):
        for other in ranges[:position]:
            if network.version == other.version and network.overlaps(other):
                raise InvalidArgumentError(f"pod CIDRs {other} and {network} overlap: give ranges that do not")
    return ranges


def _parse_range(cidr: str) -> IPNetwork:
    try:
        network = ip_network(cidr.strip())
    except ValueError as error:
        raise InvalidArgumentError(f"pod CIDR {cidr!r} is not an address range: {error}") from error
    if network.prefixlen > _MAX_PREFIX[network.version]:
        raise InvalidArgumentError(f"pod CIDR {network} is too small for a gateway and pods")
    if network.is_multicast or network.is_loopback or network.is_link_local or network.network_address.is_unspecified:
        raise InvalidArgumentError(f"pod CIDR {network} is loopback, link-local, multicast or unspecified space")
    return network


def gateway_of(network: IPNetwork) -> IPAddress:
    """The bridge's address in a range: the first one."""
    return network.network_address + 1


class AddressPool:
    """One range, assigned in rotation. A released address is in quarantine for ``quarantine`` seconds before it is used
    again."""

    def __init__(self, network: IPNetwork, quarantine: float) -> None:
        self.network = network
        self._quarantine = quarantine
        self._first = int(network.network_address) + 2
        self._last = int(network.broadcast_address) - (1 if network.version == 4 else 0)
        self._next = self._first
        self._newest = 0.0
        self._taken: set[int] = set()
        self._quarantined: OrderedDict[int, float] = OrderedDict()

    def restore(self, address: IPAddress, allocated_at: float, released_at: float | None) -> None:
        """Load one row of the store. Rows in quarantine must be loaded in the order of their release."""
        value = int(address)
        if released_at is None:
            self._taken.add(value)
            self._quarantined.pop(value, None)
        else:
            self._quarantined[value] = released_at
        if allocated_at >= self._newest:
            self._newest = allocated_at
            self._next = value + 1

    def allocate(self, beside: Collection[AddressPool] = ()) -> IPAddress | None:
        """The next address that is free and not in quarantine; None if there is none.

        Addresses that the overlapping pools ``beside`` this one hold are skipped.
        """
        self.end_quarantines()
        size = self._last - self._first + 1
        if self.held >= size:
            return None
        value = self._next if self._first <= self._next <= self._last else self._first
        pools = (self, *beside)
        for _ in range(min(size, 1 + sum(pool.held + 1 for pool in pools))):
            if not any(pool.holds(value) for pool in pools):
                self._taken.add(value)
                self._next = value + 1
                return type(self.network.network_address)(value)
            value = value + 1 if value < self._last else self._first
        return None

    def holds(self, value: int) -> bool:
        """Whether an address is in use, in quarantine, or the gateway's."""
        return value in self._taken or value in self._quarantined or value == self._first - 1

    @property
    def held(self) -> int:
        """The number of addresses in use or in quarantine."""
        return len(self._taken) + len(self._quarantined)

    def free_unused(self, address: IPAddress) -> None:
        """Free an address that no pod ever used, without quarantine."""
        self._taken.discard(int(address))

    def release(self, address: IPAddress) -> None:
        """Put an address that a pod held into quarantine."""
        if int(address) in self._taken:
            self._taken.remove(int(address))
            self._quarantined[int(address)] = time.time()

    def end_quarantines(self) -> None:
        """Free the addresses whose quarantine is over. If the clock was set back, they are free at once."""
        now = time.time()
        while self._quarantined:
            value, released_at = next(iter(self._quarantined.items()))
            if 0 <= now - released_at < self._quarantine:
                return
            del self._quarantined[value]

    def is_taken(self, address: IPAddress) -> bool:
        """Whether a pod holds an address."""
        return int(address) in self._taken

    @property
    def taken(self) -> int:
        """The number of addresses that pods hold."""
        return len(self._taken)

    def __str__(self) -> str:
        return f"{self.network} ({len(self._taken)} in use, {len(self._quarantined)} in quarantine)"


class Ipam:
    """All ranges of the node: those for new pods in order of preference, and earlier ones with addresses of pods."""

    def __init__(self, ranges: Iterable[IPNetwork], quarantine: float) -> None:
        self._quarantine = quarantine
        self._pools: dict[IPNetwork, AddressPool] = {}
        self.current: tuple[IPNetwork, ...] = ()
        self.use(ranges)

    def use(self, ranges: Iterable[IPNetwork]) -> None:
        """Allocate from these ranges from now on. Raises WrongStateError if a pod has the address of a gateway.

        They may overlap the earlier ranges: no address is allocated twice.
        """
        ranges = tuple(ranges)
        for network in ranges:
            for pool in self._overlapping(network):
                if pool.is_taken(gateway_of(network)):
                    raise WrongStateError(
                        f"pod CIDR {network}: a pod has its gateway's address {gateway_of(network)}, from the earlier "
                        f"range {pool.network}: remove this pod first"
                    )
        self.current = ranges
        for network in ranges:
            self._pool(network)

    def restore(
        self, pool: str, address: str, allocated_at: float, released_at: float | None
    ) -> tuple[IPNetwork, IPAddress]:
        """Load one row of the store. Rows in quarantine must be loaded in the order of their release."""
        network, plain = ip_network(pool), ip_address(address)
        self._pool(network).restore(plain, allocated_at, released_at)
        return network, plain

    def range_of(self, address: IPAddress, gateways: Collection[str]) -> IPNetwork | None:
        """The range of an address whose row is lost, preferably with one of these gateways; None if there is none."""
        ranges = [network for network in self._pools if address in network]
        return next((network for network in ranges if str(gateway_of(network)) in gateways), next(iter(ranges), None))

    def allocate(self) -> list[tuple[IPNetwork, IPAddress]]:
        """One address of each family, primary first. Raises LimitError with the ranges that are full."""
        chosen: list[tuple[IPNetwork, IPAddress]] = []
        for version in dict.fromkeys(network.version for network in self.current):
            pools = [self._pools[network] for network in self.current if network.version == version]
            for pool in pools:
                if (address := pool.allocate(self._overlapping(pool.network))) is not None:
                    chosen.append((pool.network, address))
                    break
            else:
                self.free_unused(chosen)
                names = ", ".join(str(pool) for pool in pools)
                raise LimitError(
                    f"no free IPv{version} address in {names}: remove pods or give the node a larger range"
                )
        return chosen

    def free_unused(self, chosen: Iterable[tuple[IPNetwork, IPAddress]]) -> None:
        """Undo ``allocate``."""
        for network, address in chosen:
            self._pools[network].free_unused(address)

    def release(self, network: IPNetwork, address: IPAddress) -> None:
        """Put an address into quarantine."""
        self._pool(network).release(address)

    def in_use(self) -> tuple[IPNetwork, ...]:
        """The ranges for new pods, and those of which pods still hold addresses."""
        return tuple(n for n, pool in self._pools.items() if n in self.current or pool.taken)

    def _overlapping(self, network: IPNetwork) -> list[AddressPool]:
        """The pools of other ranges that share addresses with this one."""
        others = (pool for other, pool in self._pools.items() if other != network and other.version == network.version)
        return [pool for pool in others if pool.network.overlaps(network)]

    def _pool(self, network: IPNetwork) -> AddressPool:
        if network not in self._pools:
            self._pools[network] = AddressPool(network, self._quarantine)
        return self._pools[network]
