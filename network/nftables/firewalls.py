"""Finds and reports other programs' firewall rules that drop the packets of pods. They are never changed.

A forwarded packet passes the chains of all tables. If one chain drops it, the agent's chains cannot change that.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import msgspec

from host import processes
from host.concurrency.tasks import cancel_and_wait
from host.concurrency.threads import in_network_thread
from host.errors import PodkeelError
from network import sysctl
from network.ipam import IPAddress, IPNetwork
from network.nftables.elements import BRIDGE, INET
from network.nftables.verdicts import Chains, Packet, Verdict

_log = logging.getLogger("podkeel.network")

_COMMAND_SECONDS = 20
LOOK_AGAIN_SECONDS = 60.0
_LOOK_AGAIN_SOON_SECONDS = 5.0
_ELSEWHERE = {4: ip_address("192.0.2.1"), 6: ip_address("2001:db8::1")}
_FAMILIES: dict[str, tuple[int, ...]] = {"ip": (4,), "ip6": (6,), "inet": (4, 6)}
_OLD_TABLES = {4: ("ip_tables_names", "iptables-legacy"), 6: ("ip6_tables_names", "ip6tables-legacy")}


class Obstacle(msgspec.Struct, frozen=True):
    """A chain that drops pods' packets, whether it is ``certain``, and the commands that allow the packets."""

    chain: str
    certain: bool
    remedy: str

    @property
    def problem(self) -> str:
        """The problem."""
        how = "drops" if self.certain else "may drop"
        return f"{self.chain}, which Podkeel did not make, {how} what pods send or receive"

    @property
    def message(self) -> str:
        """The problem and its remedy."""
        return f"{self.problem}: allow it, for example by: {self.remedy}"


class FirewallWatch:
    """The effect of other firewalls on the pods of a bridge at the last check.

    Programs that load the node's rules often flush all tables first. If the bridge's tables are missing, ``restore`` is
    called to create them again. Without them pods can reach the node's loopback, but nothing outside the node.
    """

    def __init__(self, bridge: str, restore: Callable[[], Awaitable[None]]) -> None:
        self._bridge = bridge
        self._restore = restore
        self._checked_at = 0.0
        self._looking: asyncio.Task[None] | None = None
        self._obstacles: tuple[Obstacle, ...] = ()

    def obstacle(self) -> Obstacle | None:
        """The chain that certainly blocks pods; None if none is known."""
        return next((obstacle for obstacle in self._obstacles if obstacle.certain), None)

    def check_soon(self, ranges: Sequence[IPNetwork]) -> None:
        """Check again in the background if the last check was some time ago.

        The time is shorter if pods are blocked.
        """
        pause = _LOOK_AGAIN_SOON_SECONDS if self._obstacles else LOOK_AGAIN_SECONDS
        idle = self._looking is None or self._looking.done()
        if idle and (not self._checked_at or time.monotonic() > self._checked_at + pause):
            self._looking = asyncio.create_task(self.look(ranges))

    async def look(self, ranges: Sequence[IPNetwork]) -> None:
        """Check now. Log each blocking chain when it is first seen and when it no longer blocks."""
        self._checked_at = time.monotonic()
        try:
            if not await _has_own_tables(self._bridge):
                await self._restore()
            found = tuple(await find_obstacles(self._bridge, ranges))
        except (PodkeelError, OSError) as error:
            _log.warning("bridge %s: the node's firewalls cannot be checked: %s", self._bridge, error)
            return
        before, self._obstacles = self._obstacles, found
        for obstacle in found:
            if obstacle not in before:
                _log.warning("%s", obstacle.message)
        if before and not found:
            _log.info("firewalls: no other program drops packets of pods any more")

    async def settled(self) -> None:
        """Wait for a check that runs in the background."""
        if self._looking is not None:
            await asyncio.wait([self._looking])

    async def close(self) -> None:
        """End the check in the background."""
        await cancel_and_wait(self._looking)


async def find_obstacles(bridge: str, ranges: Sequence[IPNetwork]) -> list[Obstacle]:
    """The chains of other programs that drop packets from pods on the bridge to other hosts, or the answers.

    Raises CommandError, NotFoundError or DeadlineError when nft fails.
    """
    uplink = await in_network_thread(sysctl.uplink)
    packets = [packet for network in _one_of_each(ranges) for packet in _packets(bridge, uplink, network)]
    found: list[Obstacle] = []
    for family, table in sorted(await _hooked_tables(bridge)):
        concerned = [packet for packet in packets if packet.source.version in _FAMILIES[family]]
        listing = await _list("table", family, table)
        if concerned and listing is not None:
            found += await in_network_thread(_judge, family, table, listing, concerned, bridge)
    for version in sorted({packet.source.version for packet in packets}):
        found += await _old_obstacles(version, bridge)
    return found


def _one_of_each(ranges: Sequence[IPNetwork]) -> list[IPNetwork]:
    return list({network.version: network for network in reversed(ranges)}.values())


def _packets(bridge: str, uplink: str, network: IPNetwork) -> list[Packet]:
    pod: IPAddress = network.network_address + 2
    elsewhere = _ELSEWHERE[network.version]
    return [Packet(bridge, uplink, pod, elsewhere, False), Packet(uplink, bridge, elsewhere, pod, True)]


async def _hooked_tables(bridge: str) -> set[tuple[str, str]]:
    """Tables of other programs with a chain that forwarded packets pass."""
    listed = await _list("chains") or []
    chains = [entry["chain"] for entry in listed if "chain" in entry]
    return {
        (chain["family"], chain["table"])
        for chain in chains
        if chain.get("hook") == "forward" and chain["family"] in _FAMILIES and chain["table"] != bridge
    }


async def _has_own_tables(bridge: str) -> bool:
    """Whether the tables exist. Listed as text: with JSON, nft aborts if any table's name is not UTF-8."""
    listed = await processes.run(["nft", "list", "tables"], timeout=_COMMAND_SECONDS)
    tables = set(listed.stdout.split(b"\n"))
    return {f"table {family} {bridge}".encode() for family in (BRIDGE, INET)} <= tables


async def _list(*what: str) -> list[dict[str, Any]] | None:
    """The output of nft, or None if the requested object no longer exists."""
    completed = await processes.run(["nft", "-j", "list", *what], timeout=_COMMAND_SECONDS, check=len(what) == 1)
    if completed.status != 0:
        return None
    listed: list[dict[str, Any]] = (await in_network_thread(msgspec.json.decode, completed.stdout))["nftables"]
    return listed


def _judge(
    family: str, table: str, listing: Sequence[dict[str, Any]], packets: Sequence[Packet], bridge: str
) -> list[Obstacle]:
    chains = Chains(listing)
    found: list[Obstacle] = []
    for chain in chains.policies:
        verdicts = {chains.verdict(chain, packet) for packet in packets}
        if verdicts != {Verdict.PASSED}:
            remedy = _remedy(family, table, chain, set(chains.rules), bridge)
            name = f"nftables chain {chain} of table {family} {table}"
            found.append(Obstacle(name, Verdict.DROPPED in verdicts, remedy))
    return found


def _remedy(family: str, table: str, chain: str, names: set[str], bridge: str) -> str:
    if any(name.startswith(("ufw-", "ufw6-")) for name in names):
        return f"ufw route allow in on {bridge} && ufw route allow out on {bridge}"
    if table == "firewalld":
        return f"firewall-cmd --permanent --zone=trusted --add-interface={bridge} && firewall-cmd --reload"
    if family in ("ip", "ip6") and table == "filter":
        program = "iptables" if family == "ip" else "ip6tables"
        return _iptables(program, "DOCKER-USER" if "DOCKER-USER" in names else chain, bridge)
    insert = f"nft insert rule {family} {table} {chain}"
    return f"{insert} iifname {bridge} accept && {insert} oifname {bridge} accept"


def _iptables(program: str, chain: str, bridge: str) -> str:
    return f"{program} -I {chain} -i {bridge} -j ACCEPT && {program} -I {chain} -o {bridge} -j ACCEPT"


async def _old_obstacles(version: int, bridge: str) -> list[Obstacle]:
    """The obstacles in the tables of legacy iptables: only the policy and the rules for the bridge are read."""
    tables, program = _OLD_TABLES[version]
    if not await in_network_thread(_has_filter, Path("/proc/self/net") / tables):
        return []
    try:
        completed = await processes.run([program, "-S"], timeout=_COMMAND_SECONDS)
    except PodkeelError:
        return []  # the legacy iptables program is missing, so its tables cannot be read
    lines = os.fsdecode(completed.stdout).split("\n")
    passes = all(any(f"{flag} {bridge} -j ACCEPT" in line for line in lines) for flag in ("-i", "-o"))
    if "-P FORWARD DROP" not in lines or passes:
        return []
    chain = "DOCKER-USER" if "-N DOCKER-USER" in lines else "FORWARD"
    certain = not any(line.startswith("-A") and line.endswith("-j ACCEPT") for line in lines)
    return [Obstacle(f"the policy of {program}'s chain FORWARD", certain, _iptables(program, chain, bridge))]


def _has_filter(names: Path) -> bool:
    try:
        return b"filter" in names.read_bytes().split()
    except OSError:  # the kernel has no legacy tables
        return False
