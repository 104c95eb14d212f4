"""Names with any bytes, which pods and volumes can put into the kernel's tables, stop nothing."""

from __future__ import annotations

import os
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from host import libc
from host.files import mounts
from host.files.mounts import parse_mount_table
from host.files.procfs import table_lines
from network import rtnetlink
from network.attachment import interface_prefix
from network.netlink import NETLINK_ROUTE
from network.netlink_socket import NetlinkSocket
from network.sysctl import ipv4_default_link, ipv6_default_link
from proto.runtime.v1 import cri_pb2
from tests.integration.network.namespaces import Namespace, links_with
from tests.support.agent import AgentProcess
from tests.support.pods import container_config, sandbox_config

# Names with characters at which Python splits text, bytes that are not UTF-8, and characters that the kernel escapes.
NAMES = (
    b"\r",
    b"a\x0bb",
    b"\x0c",
    b"\x1c\x1d\x1e\x1f",
    b"\x85",
    "a\u2028b\u2029\u0085c".encode(),
    b"\xff\xfe",
    b" two  spaces ",
    b"line\nbreak\n\n",
    b"tab\t\\134\\",
    b"- - ext4 x rw",
)


@pytest.fixture
def odd_mounts(tmp_path: Path) -> Iterator[list[Path]]:
    """Mounts whose roots and targets have such names, like those of subPath volumes."""
    made: list[Path] = []
    try:
        for name in NAMES:
            source, target = tmp_path / "volume" / os.fsdecode(name), tmp_path / "pods" / os.fsdecode(name)
            source.mkdir(parents=True)
            target.mkdir(parents=True)
            mounts.bind(source, target)
            made.append(target)
        yield made
    finally:
        for path in reversed(made):
            libc.umount(str(path), mounts.MNT_DETACH)


def test_no_name_of_a_volume_stops_a_start(own_agent: AgentProcess, odd_mounts: list[Path]) -> None:
    volume = cri_pb2.Mount(host_path=str(own_agent.folder / "volume"), container_path="/volume")
    volume.propagation = cri_pb2.PROPAGATION_HOST_TO_CONTAINER
    own_agent.restart()
    sandbox = sandbox_config(own_agent)
    sandbox_id = own_agent.client.run_sandbox(sandbox)
    mount_all = container_config("main", "sleep", "1000", mounts=[volume])
    if not mounts.mount_holding(os.path.realpath(own_agent.folder)).shared:
        del mount_all.mounts[:]
    own_agent.client.start(own_agent.client.create(sandbox_id, mount_all, sandbox))
    assert own_agent.client.findings() == []
    own_agent.restart()
    states = [c.state for c in own_agent.client.call("ListContainers", cri_pb2.ListContainersRequest()).containers]
    assert states == [cri_pb2.CONTAINER_RUNNING]


def test_the_mount_table_shows_every_name_as_it_is(odd_mounts: list[Path]) -> None:
    seen = {entry.target: entry for entry in mounts.mount_table()}
    for path in odd_mounts:
        assert seen[str(path)].root.endswith(f"/{path.name}")


def test_a_leftover_mount_of_any_name_is_reported_and_removed(own_agent: AgentProcess) -> None:
    target = own_agent.run / "sandboxes" / ("f" * 64) / os.fsdecode(b"\xff\r\n x")
    target.mkdir(parents=True)
    mounts.bind("/proc", target)
    told = [finding for finding in own_agent.client.findings() if finding.startswith("mount")]
    assert len(told) == 1
    assert "\\udcff" in told[0]
    own_agent.restart()
    assert own_agent.client.findings() == []
    assert not target.parent.exists()


def test_an_invalid_line_of_the_mount_table_is_skipped() -> None:
    good = b"36 35 98:0 /a /mnt\\040x rw,noatime master:1 shared:2 - ext3  rw,errors=continue"
    odd = (b"", b"x", b"36 35 98:0 / /mnt rw - ext3", b"1 2 3 4 5 6 7 8 9", b"a b 98:0 / /x rw - t s o")
    (entry,) = parse_mount_table(b"\n".join((*odd, good, *odd)))
    assert (entry.target, entry.source, entry.super_options) == ("/mnt x", "", "rw,errors=continue")
    assert (entry.shared, entry.slave, entry.filesystem) == (True, True, "ext3")


def test_links_of_any_name_may_have_routes() -> None:
    best = b"\x85 \xff".replace(b" ", b"\x1c")
    lines = [
        b"x\x1cy\t0000A8C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0   ",
        best + b"\t00000000\t0100A8C0\t0003\t0\t0\t100\t00000000\t0\t0\t0   ",
        b"eth\t00000000\t0100A8C0\t0003\t0\t0\t200\t00000000\t0\t0\t0   ",
        b"short",
    ]
    assert ipv4_default_link(lines) == os.fsdecode(best)
    zeros, router = b"0" * 32, b"fe8" + b"0" * 28 + b"1"
    tail = b" 00000064 00000001 00000000 00000003    "
    lines = [b" ".join((zeros, b"00", zeros, b"00", router)) + tail + best, b"short"]
    assert ipv6_default_link(lines) == os.fsdecode(best)


def test_only_newlines_separate_the_lines_of_a_table(tmp_path: Path) -> None:
    table = tmp_path / "table"
    table.write_bytes(b"a\rb\x85\n\xe2\x80\xa8c\n")
    assert table_lines(str(table)) == [b"a\rb\x85", b"\xe2\x80\xa8c"]


# A link may have any name of at most 15 bytes without '/', ':' and whitespace (dev_valid_name of the kernel).
LINKS = (b"\xff\xfe", b"\xfe", b"\xff", b"\x01\x1b[2J", b'"\\xff', b"\\xff", b"{s}\x7f")


def test_links_of_any_name_are_found_and_deleted(tmp_path: Path) -> None:
    def work() -> None:
        with NetlinkSocket(NETLINK_ROUTE) as route:
            for name in LINKS:
                subprocess.run([b"ip", b"link", b"add", name, b"type", b"bridge"], check=True)
            found = [link.name for link in rtnetlink.list_links(route) if link.name != "lo"]
            assert sorted(map(os.fsencode, found)) == sorted(LINKS)
            for own in found:
                assert rtnetlink.find_link(route, own).name == own
                route.request([rtnetlink.delete_link(own)])
            assert [link.name for link in rtnetlink.list_links(route)] == ["lo"]

    namespace = Namespace(tmp_path / "namespace")
    try:
        namespace.run(work)
    finally:
        namespace.close()


def test_a_leftover_link_of_any_name_is_reported_and_removed(own_agent: AgentProcess) -> None:
    """A host network pod may create links, and a device returns from a pod with its name there."""
    prefix = interface_prefix(own_agent.bridge)
    name = prefix.encode() + b"\xff\xfe"
    subprocess.run([b"ip", b"link", b"add", name, b"type", b"bridge"], check=True)
    try:
        assert [finding for finding in own_agent.client.findings() if "\\udcff\\udcfe" in finding]
        own_agent.restart()
        assert own_agent.client.findings() == []
        assert links_with(prefix) == []
    finally:
        subprocess.run([b"ip", b"link", b"delete", name], check=False, capture_output=True)


def test_statistics_show_each_link_of_any_name_once(quiet_log: AgentProcess) -> None:
    client = quiet_log.client
    sandbox_id = client.run_sandbox(sandbox_config(quiet_log))
    enter = [b"nsenter", b"--net=" + os.fsencode(quiet_log.run / "sandboxes" / sandbox_id / "ns/net")]
    for name in LINKS:
        subprocess.run([*enter, b"ip", b"link", b"add", name, b"type", b"bridge"], check=True)
    stats = client.call("PodSandboxStats", cri_pb2.PodSandboxStatsRequest(pod_sandbox_id=sandbox_id)).stats
    seen = [interface.name for interface in stats.linux.network.interfaces]
    assert stats.linux.network.default_interface.name == "eth0"
    wanted = {name.decode(errors="backslashreplace") for name in LINKS}  # two have the same text: shown once
    assert len(seen) == len(LINKS) - 1
    assert set(seen) == wanted
    (pod,) = client.call("ListPodSandboxMetrics", cri_pb2.ListPodSandboxMetricsRequest()).pod_metrics
    received = [m.label_values[-1] for m in pod.metrics if m.name == "container_network_receive_bytes_total"]
    assert sorted(received) == sorted([*wanted, "eth0"])


_TABLES = """
import asyncio, socket, struct, subprocess, sys
from pathlib import Path
from host.database import Database
from network.bridge.network import BuiltInNetwork
from network.ipam import parse_ranges
from network.options import NetworkOptions
from network.schema import MIGRATIONS

async def main(folder, batch):
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12) as netfilter:
        netfilter.send(bytes.fromhex(batch))
        assert struct.unpack_from("=i", netfilter.recv(4096), 16) == (0,)
    options = NetworkOptions(bridge="pods0", pod_cidrs=("10.88.0.0/16",), mtu=1500)
    database = Database(Path(folder) / "store.db", {"network": MIGRATIONS})
    network = BuiltInNetwork(options, database)
    await network.start()
    await network.settled()
    for family in ("inet", "bridge"):
        subprocess.run(["nft", "delete", "table", family, "pods0"], check=True)
    await network._firewalls.look(parse_ranges(options.pod_cidrs))
    assert network.condition().ready
    await network.stop()
    database.close()
    print(subprocess.run(["nft", "list", "tables"], check=True, capture_output=True).stdout)

asyncio.run(main(*sys.argv[1:]))
"""


def _nfnetlink(kind: int, flags: int, family: int, subsystem: int, body: bytes) -> bytes:
    message = struct.pack("=BBH", family, 0, (subsystem << 8) | (subsystem >> 8)) + body
    return struct.pack("=IHHII", 16 + len(message), kind, flags, 1, 0) + message


def test_deleted_tables_are_restored_beside_a_table_of_any_name(tmp_path: Path) -> None:
    """nft itself aborts when it lists such a table as JSON."""
    attribute = struct.pack("=HH", 10, 1) + b"bad\xff\xfe\0" + bytes(2)  # NFTA_TABLE_NAME
    new_table = _nfnetlink((10 << 8) | 0, 0x405, 2, 0, attribute)
    batch = _nfnetlink(0x10, 1, 0, 10, b"") + new_table + _nfnetlink(0x11, 1, 0, 10, b"")
    root = str(Path(__file__).parents[2])
    command = ["unshare", "-n", sys.executable, "-c", _TABLES, str(tmp_path), batch.hex()]
    environment = {**os.environ, "PYTHONPATH": root}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    for table in ("table ip bad\\xff\\xfe", "table bridge pods0", "table inet pods0"):
        assert table in done.stdout


_names = st.binary(min_size=1, max_size=60).map(lambda name: name.replace(b"\0", b"").replace(b"/", b"")).filter(bool)


def _escaped(name: bytes) -> bytes:
    """The name as the kernel shows it (seq_path)."""
    return re.sub(rb"[ \t\n\\]", lambda found: b"\\%03o" % found[0][0], name)


@given(_names, _names, st.lists(st.binary(max_size=40), max_size=3))
def test_every_mount_name_is_read_unchanged_between_any_lines(root: bytes, target: bytes, odd: list[bytes]) -> None:
    line = b"36 35 98:0 /%s /%s rw - ext4 /dev/x rw" % (_escaped(root), _escaped(target))
    found = list(parse_mount_table(b"\n".join((*odd, line, *odd))))
    wanted = (os.fsdecode(b"/" + root), os.fsdecode(b"/" + target))
    assert wanted in [(entry.root, entry.target) for entry in found]


@given(st.binary(max_size=400))
def test_no_table_of_mounts_or_routes_raises(content: bytes) -> None:
    list(parse_mount_table(content))
    ipv4_default_link(content.split(b"\n"))
    ipv6_default_link(content.split(b"\n"))


@given(st.binary(max_size=40), st.binary(max_size=12), st.binary(max_size=40))
def test_no_default_route_raises(name: bytes, metric: bytes, more: bytes) -> None:
    ipv4_default_link([b"\t".join((name, b"0" * 8, b"1", b"3", b"0", b"0", metric, b"0" * 8, more))])
    ipv6_default_link([b" ".join((b"0" * 32, b"00", b"0" * 32, b"00", b"f" * 32, metric, b"1", b"0", b"3", name))])
