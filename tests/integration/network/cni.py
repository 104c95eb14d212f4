"""A node whose pods are connected by CNI plugins: Debian's, or scripts that do what a test tells them."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import shlex
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from host.database import Database
from host.errors import PodkeelError
from network.attachment import Attachment, Bandwidth, PortMapping
from network.options import NetworkOptions
from network.provider import NodeNetwork
from network.schema import MIGRATIONS
from tests.integration.network.namespaces import Namespace, command, links_with, nft_tables, request

PLUGINS = "/usr/lib/cni"
ALL_VERSIONS = ("0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")

_session = f"{random.randrange(16**3):03x}"
_numbers = itertools.count()
_subnets = [f"10.206.{number}" for number in range(256)] + [f"10.207.{number}" for number in range(128, 256)]
random.shuffle(_subnets)

_SCRIPT = """#!/bin/sh
calls={calls}
settings=$(cat)
number=$(ls "$calls" | wc -l)
printf '%s' "$settings" > "$calls/$(printf %04d "$number")-{name}-$CNI_COMMAND-$$"
echo "$CNI_CONTAINERID $CNI_NETNS $CNI_IFNAME $CNI_ARGS $CNI_PATH" > "$calls/.environment-$CNI_COMMAND"
case $CNI_COMMAND in
{cases}
esac
"""


def result(address: str = "10.206.0.2/24", version: str = "1.0.0") -> str:
    """What a script prints to report an address."""
    return f'echo \'{{"cniVersion": "{version}", "ips": [{{"address": "{address}"}}]}}\''


def failure(code: int, text: str, details: str = "") -> str:
    """How a script fails as a plugin does."""
    body = json.dumps({"cniVersion": "1.0.0", "code": code, "msg": text, "details": details})
    return f"echo '{body}'; exit 1"


@dataclass
class Call:
    """One call of a scripted plugin."""

    plugin: str
    command: str
    settings: dict[str, Any]


@dataclass
class CniPod:
    """A namespace connected by plugins."""

    namespace: Namespace
    attachment: Attachment

    @property
    def ip(self) -> str:
        return self.attachment.addresses[0]


@dataclass
class CniNode:
    """A node under test with its folders; the configuration is written by the test."""

    folder: Path
    bridge: str
    subnet: str
    database: Database
    options: dict[str, object]
    network: NodeNetwork = field(init=False)
    namespaces: list[Namespace] = field(default_factory=list)
    told: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for folder in (self.configurations, self.programs, self.calls):
            folder.mkdir()
        self.network = self._make()

    def _make(self) -> NodeNetwork:
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

        made.when_given_back(tell)
        return made

    @property
    def configurations(self) -> Path:
        return self.folder / "net.d"

    @property
    def programs(self) -> Path:
        return self.folder / "bin"

    @property
    def calls(self) -> Path:
        return self.folder / "calls"

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

    def configure(
        self, *plugins: dict[str, object], version: str = "1.0.0", name: str = "10-test.conflist", **more: Any
    ) -> Path:
        """Write a configuration, as one does: beside and then in place."""
        content = {"cniVersion": version, "name": "testnet", "plugins": plugins, **more}
        path = self.configurations / name
        beside = path.with_suffix(".new")
        beside.write_text(json.dumps(content))
        return beside.rename(path)

    def script(self, name: str, *, versions: Sequence[str] = ALL_VERSIONS, **commands: str) -> dict[str, object]:
        """Make a plugin that runs these shell lines, ``true`` where none are given; returns its settings."""
        told = json.dumps({"cniVersion": "1.0.0", "supportedVersions": list(versions)})
        lines = {"VERSION": f"echo '{told}'", "ADD": result(), **commands}
        cases = "\n".join(f"{name})\n{line}\n;;" for name, line in lines.items())
        path = self.programs / name
        beside = path.with_name(f".{name}")
        beside.write_text(_SCRIPT.format(calls=self.calls, name=name, cases=cases))
        beside.chmod(0o755)
        beside.rename(path)
        return {"type": name}

    def called(self, *commands: str) -> list[Call]:
        """The calls of scripted plugins so far, without VERSION; only those of ``commands`` if any are named."""
        found = []
        for path in sorted(self.calls.iterdir()):
            if path.name.startswith("."):
                continue
            _, plugin, command_name, _ = path.name.split("-")
            if command_name in commands or (not commands and command_name != "VERSION"):
                found.append(Call(plugin, command_name, json.loads(path.read_text())))
        return found

    def environment(self, command_name: str) -> list[str]:
        """The variables of the last call of that command."""
        return (self.calls / f".environment-{command_name}").read_text().split()

    async def start(self, *live: str) -> None:
        await self.network.start()
        await self.network.repair(live)

    async def restart(self, *live: str, **options: object) -> None:
        """Another agent over the same store and kernel."""
        await self.network.stop()
        self.options |= options
        self.network = self._make()
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
    """A node that is not started yet; whatever was made in it is gone afterwards."""
    bridge = f"pkt{_session}{next(_numbers) % 256:02x}"
    database = Database(folder / "store.db", {"network": MIGRATIONS})
    node = CniNode(folder, bridge, _subnets[next(_numbers) % len(_subnets)], database, options)
    try:
        yield node
        for row in node.network.cni._records.copy():
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
