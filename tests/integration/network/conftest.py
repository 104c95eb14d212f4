from __future__ import annotations

import contextlib
import itertools
import os
import random
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from host.database import Database
from host.errors import PodkeelError
from network.attachment import Attachment, PortMapping, interface_prefix
from network.bridge.network import BuiltInNetwork
from network.options import NetworkOptions
from network.schema import MIGRATIONS
from tests.integration.network.namespaces import Namespace, command, links_with, nft_tables, request

if os.geteuid() != 0:
    pytest.skip("networks need root", allow_module_level=True)

_numbers = itertools.count(random.randrange(256))
_session = f"{random.randrange(16**4):04x}"
_octet = 206  # the agents of other tests leave it alone, CNI tests its upper half


@dataclass
class Pod:
    """A connected namespace."""

    namespace: Namespace
    attachment: Attachment

    @property
    def ip(self) -> str:
        return self.attachment.addresses[0]

    def address(self, version: int) -> str:
        found = self.attachment.address(version)
        assert found is not None
        return found


@dataclass
class Node:
    """A network under test with its store, its ranges and the pods made in it."""

    folder: Path
    bridge: str
    subnet: str
    make: Callable[..., BuiltInNetwork]
    network: BuiltInNetwork
    database: Database
    namespaces: list[Namespace] = field(default_factory=list)
    _count: Iterator[int] = field(default_factory=itertools.count)

    def namespace(self) -> Namespace:
        made = Namespace(self.folder / f"ns{next(self._count)}")
        self.namespaces.append(made)
        return made

    async def pod(self, sandbox_id: str, *mappings: PortMapping) -> Pod:
        namespace = self.namespace()
        return Pod(namespace, await self.network.attach(request(sandbox_id, namespace.path, mappings)))

    async def restart(self, **options: object) -> None:
        """Another agent over the same store and kernel."""
        await self.network.stop()
        self.network = self.make(**options)
        await self.network.start()

    def links(self) -> list[str]:
        return links_with(interface_prefix(self.bridge))

    def rows(self) -> dict[str, int]:
        return {
            table: self.database.read(f"SELECT count(*) FROM network_{table} {condition}")[0][0]
            for table, condition in (
                ("attachments", ""),
                ("host_ports", ""),
                ("addresses", "WHERE released_at IS NULL"),
            )
        }

    async def assert_empty(self, live: tuple[str, ...] = ()) -> None:
        """Nothing of any pod is left, in the store or in the kernel."""
        assert set(self.rows().values()) == {0}
        assert self.links() == []
        assert await self.network.audit(live) == []


def spare_subnet() -> str:
    """The first three numbers of an unused range."""
    return f"10.{_octet}.{next(_numbers) % 128}"


@contextlib.asynccontextmanager
async def running_node(folder: Path, **options: object) -> AsyncIterator[Node]:
    number = next(_numbers) % 128
    bridge = f"pkt{_session}{number:02x}"
    subnet = f"10.{_octet}.{number}"
    database = Database(folder / "store.db", {"network": MIGRATIONS})

    def make(**changes: object) -> BuiltInNetwork:
        wanted = {"bridge": bridge, "pod_cidrs": (f"{subnet}.0/24",), "mtu": 1500, **options, **changes}
        return BuiltInNetwork(NetworkOptions(**wanted), database)  # type: ignore[arg-type]  # options of any type

    network = make()
    await network.start()
    node = Node(folder, bridge, subnet, make, network, database)
    try:
        yield node
    finally:
        for namespace in node.namespaces:
            namespace.close()
        with contextlib.suppress(PodkeelError):  # a test may have stopped or destroyed it
            await node.network.start()
            await node.network.destroy()
        database.close()
        assert node.links() == []
        assert links_with(bridge) == []
        assert bridge not in nft_tables()


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    async with running_node(tmp_path) as made:
        yield made


@pytest.fixture
async def dual(tmp_path: Path) -> AsyncIterator[Node]:
    number = next(_numbers) % 128
    cidrs = (f"10.{_octet}.{number}.0/24", f"fd00:{_session}:{number:x}::/64")
    async with running_node(tmp_path, pod_cidrs=cidrs) as made:
        yield made


@dataclass
class Outside:
    """A machine next to the node: a namespace with its own link."""

    namespace: Namespace
    ip: str
    node_ip: str
    link: str


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Outside]:
    number = next(_numbers) % 128
    ip, node_ip, link = f"10.{_octet}.{number}.2", f"10.{_octet}.{number}.1", f"pkto{_session}{number:02x}"
    namespace = Namespace(tmp_path / "outside")

    try:
        command("ip", "link", "add", link, "type", "veth", "peer", "name", f"{link}p")
        namespace_file = os.open(namespace.path, os.O_RDONLY)
        try:
            command("ip", "link", "set", f"{link}p", "netns", f"/proc/{os.getpid()}/fd/{namespace_file}")
        finally:
            os.close(namespace_file)
        command("ip", "address", "add", f"{node_ip}/24", "dev", link)
        command("ip", "link", "set", link, "up")
        namespace.command("ip", "link", "set", f"{link}p", "name", "eth0")
        namespace.command("ip", "address", "add", f"{ip}/24", "dev", "eth0")
        namespace.command("ip", "link", "set", "eth0", "up")
        namespace.command("ip", "link", "show", "eth0")  # asking makes the kernel act on the new carrier
        command("ip", "link", "show", link)
        yield Outside(namespace, ip, node_ip, link)
    finally:
        namespace.close()
        subprocess.run(["ip", "link", "delete", link], check=False, capture_output=True)
