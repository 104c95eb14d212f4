"""A node whose pods are connected by CNI plugins: Debian's, or scripts that a test controls."""

from __future__ import annotations

import contextlib
import itertools
import random
import shlex
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from host.database import Database
from host.errors import PodkeelError
from network.attachment import Attachment, Bandwidth, PortMapping
from network.node_network import NodeNetwork
from network.options import NetworkOptions
from network.schema import MIGRATIONS
from tests.integration.network.namespaces import Namespace, command, links_with, nft_tables, request
from tests.support.cni_plugins import PluginFolders

PLUGINS = "/usr/lib/cni"

_session = f"{random.randrange(16**3):03x}"
_numbers = itertools.count()
_subnets = [f"10.206.{number}" for number in range(128, 256)]
random.shuffle(_subnets)


@dataclass
class CniPod:
    """A namespace connected by plugins."""

    namespace: Namespace
    attachment: Attachment

    @property
    def ip(self) -> str:
        return self.attachment.addresses[0]


@dataclass
class CniNode(PluginFolders):
    """A node under test with its folders; the configuration is written by the test."""

    bridge: str
    subnet: str
    database: Database
    options: dict[str, object]
    network: NodeNetwork = field(init=False)
    namespaces: list[Namespace] = field(default_factory=list)
    told: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.network = self.make()

    def make(self) -> NodeNetwork:
        wanted: dict[str, object] = {
            "mode": "cni",
            "bridge": f"{self.bridge}b",
            "pod_cidrs": (f"{self.subnet}.128/25",),
            "mtu": 1500,
            "cni_config_dir": str(self.configurations),
            "cni_bin_dirs": (str(self.programs), PLUGINS),
            "cni_timeout_seconds": 20.0,
            **self.options,
        }
        made = NodeNetwork(NetworkOptions(**wanted), self.database)  # type: ignore[arg-type]  # options of any type

        async def tell(sandbox_id: str) -> None:
            self.told.append(sandbox_id)

        made.on_released(tell)
        return made

    @property
    def leases(self) -> list[str]:
        """What host-local holds."""
        return sorted(path.name for path in (self.folder / "leases").rglob("*") if path.name[0].isdigit())

    def ipam(self, **more: object) -> dict[str, object]:
        """host-local with its data in the test's folder."""
        data = {"type": "host-local", "dataDir": str(self.folder / "leases"), **more}
        return data if "ranges" in data or more else {**data, "subnet": f"{self.subnet}.0/25"}

    def bridge_plugin(self, **more: object) -> dict[str, object]:
        """Debian's bridge plugin on a bridge of the test's own."""
        plugin = {"type": "bridge", "bridge": self.bridge, "isGateway": True, "ipMasq": False, "hairpinMode": True}
        return {**plugin, "ipam": self.ipam(routes=[{"dst": "0.0.0.0/0"}], subnet=f"{self.subnet}.0/25"), **more}

    async def start(self, *live: str) -> None:
        await self.network.start()
        await self.network.repair(live)

    async def restart(self, *live: str, **options: object) -> None:
        """Another agent over the same store and kernel."""
        await self.network.stop()
        self.options |= options
        self.network = self.make()
        await self.start(*live)

    def namespace(self) -> Namespace:
        made = Namespace(self.folder / f"ns{len(self.namespaces)}")
        self.namespaces.append(made)
        return made

    async def pod(self, sandbox_id: str, *mappings: PortMapping, bandwidth: Bandwidth | None = None) -> CniPod:
        namespace = self.namespace()
        return CniPod(namespace, await self.network.attach(request(sandbox_id, namespace.path, mappings, bandwidth)))

    def rows(self) -> int:
        return int(self.database.read("SELECT count(*) FROM network_cni_attachments")[0][0])


@contextlib.asynccontextmanager
async def cni_node(folder: Path, **options: object) -> AsyncIterator[CniNode]:
    """A node that is not started yet; everything that was made in it is removed afterwards."""
    bridge = f"pkt{_session}{next(_numbers) % 256:02x}"
    database = Database(folder / "store.db", {"network": MIGRATIONS})
    node = CniNode(folder, bridge, _subnets[next(_numbers) % len(_subnets)], database, options)
    try:
        yield node
        for row in node.network.cni.sandboxes():
            with contextlib.suppress(PodkeelError):
                await node.network.detach(row)
    finally:
        for namespace in node.namespaces:
            namespace.close()
        await node.network.stop()
        database.close()
        _clean(bridge)
        assert links_with(bridge) == []


def _clean(bridge: str) -> None:
    for link in (bridge, f"{bridge}b"):
        subprocess.run(["ip", "link", "delete", link], check=False, capture_output=True)
    for table in nft_tables() & {f"{bridge}b", f"{bridge}b_cni"}:
        for family in ("inet", "bridge"):
            subprocess.run(["nft", "delete", "table", family, table], check=False, capture_output=True)


def iptables_rules() -> list[str]:
    """The node's iptables rules that plugins made."""
    return [
        line
        for program in ("iptables", "ip6tables")
        for line in command(program, "-t", "nat", "-S").splitlines()
        if "CNI-" in line
    ]


@pytest.fixture
def clean_iptables() -> Iterator[None]:
    """Plugins keep their chains for the next pod: take them away where there were none."""
    if shutil.which("iptables") is None:
        pytest.skip("the plugins portmap and firewall need iptables")
    tables = set(command("nft", "list", "tables").splitlines())
    assert iptables_rules() == []
    yield
    for program in ("iptables", "ip6tables"):
        lines = [line for line in command(program, "-t", "nat", "-S").splitlines() if "CNI-" in line]
        for line in lines:
            if line.startswith("-A"):
                command(program, "-t", "nat", *shlex.split(line.replace("-A", "-D", 1)))
        for line in lines:
            if line.startswith("-N"):
                command(program, "-t", "nat", "-X", line.split()[1])
    for table in set(command("nft", "list", "tables").splitlines()) - tables:
        if table.split()[1:] in (["ip", "nat"], ["ip6", "nat"], ["ip", "filter"], ["ip6", "filter"]):
            command("nft", "delete", *table.split())
