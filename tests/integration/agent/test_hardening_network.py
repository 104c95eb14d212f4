"""What a pod can reach of its node: not what listens on loopback, not the agent, not sockets without a file."""

from __future__ import annotations

import contextlib
import re
import secrets
import select
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from proto.runtime.v1 import cri_pb2
from tests.integration.agent.hardening import Attacker, like_kubelets, with_python
from tests.support.agent import AgentProcess
from tests.support.pods import sandbox_config

# Sends a UDP packet from the pod in a frame to the node's side of the bridge, regardless of the pod's routes.
FRAME = """
import socket, struct
gateway, target, port = {gateway!r}, {target!r}, {port}
plain = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
plain.sendto(b"wake", (gateway, 9))
own = (plain.connect((gateway, 9)), plain.getsockname()[0])[1]
deadline = time.monotonic() + 5
while True:
    lines = [line.split() for line in open("/proc/net/arp")][1:]
    macs = [line[3] for line in lines if line[0] == gateway and line[2] != "0x0"]
    if macs:
        break
    assert time.monotonic() < deadline, "the node does not answer"
    time.sleep(0.01)
mac = lambda text: bytes.fromhex(text.replace(":", ""))
def checksum(data):
    total = sum(struct.unpack(f">{{len(data) // 2}}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
payload = b"from the pod"
datagram = struct.pack(">HHHH", 40000, port, 8 + len(payload), 0) + payload
addresses = socket.inet_aton(own) + socket.inet_aton(target)
head = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(datagram), 0, 0, 64, 17, 0) + addresses
head = head[:10] + struct.pack(">H", checksum(head)) + head[12:]
raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
raw.bind(("eth0", 0))
source = open("/sys/class/net/eth0/address").read().strip()
raw.send(mac(macs[0]) + mac(source) + b"\\x08\\x00" + head + datagram)
answer(macs[0])
"""

CONNECT = """
import socket
def reach(address, port):
    with socket.socket(socket.AF_INET) as probe:
        probe.settimeout(0.7)
        try:
            probe.connect((address, port))
        except OSError as error:
            return type(error).__name__
        return "CONNECTED"
answer([reach(address, port) for address, port in {targets!r}])
"""

# Root with CAP_NET_ADMIN in its own network may route its loopback addresses to the node.
ROUTE_LOOPBACK = """exec 2>&1
echo 1 > /proc/sys/net/ipv4/conf/eth0/route_localnet
ip route del local 127.0.0.0/8 dev lo table local; ip route del local 127.0.0.1 dev lo table local
ip route add 127.0.0.0/8 via {gateway} && echo routed"""


@pytest.fixture
def attacker(agent: AgentProcess) -> Attacker:
    return Attacker.start(agent, "", with_python(like_kubelets("main")))


def gateway_of(attacker: Attacker) -> str:
    found = re.search(r"^default via (\S+)", attacker.shell("ip route"), re.MULTILINE)
    assert found is not None
    return found[1]


@contextlib.contextmanager
def datagrams(address: str) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind((address, 0))
        yield server


@contextlib.contextmanager
def listening(address: str) -> Iterator[int]:
    with socket.socket(socket.AF_INET) as server:
        server.bind((address, 0))
        server.listen()
        yield int(server.getsockname()[1])


def received(server: socket.socket, seconds: float) -> bytes:
    readable, _, _ = select.select([server], [], [], seconds)
    return server.recv(100) if readable else b""


def streaming_port(attacker: Attacker) -> int:
    request = cri_pb2.ExecRequest(container_id=attacker.container_id, cmd=["true"], stdout=True)
    url: str = attacker.agent.client.call("Exec", request).url
    port = urlsplit(url).port
    assert port is not None
    return port


def test_frames_to_loopback_addresses_do_not_arrive(attacker: Attacker) -> None:
    """CVE-2020-8558: with route_localnet the kernel takes packets to 127.0.0.1 from neighbours."""
    gateway = gateway_of(attacker)
    with datagrams("127.0.0.1") as private, datagrams(gateway) as public:
        for server in (private, public):
            address, port = server.getsockname()
            attacker.python(FRAME.format(gateway=gateway, target=address, port=port))
        assert received(public, 5) == b"from the pod", "the frames do not work, so the test shows nothing"
        assert received(private, 0.2) == b""


@pytest.mark.parametrize("powers", [(), ("NET_ADMIN",)])
def test_services_on_the_node_s_loopback_are_out_of_reach(agent: AgentProcess, powers: tuple[str, ...]) -> None:
    config = with_python(like_kubelets("main"))
    config.linux.security_context.capabilities.add_capabilities.extend(powers)
    if powers:
        config.linux.security_context.readonly_paths[:] = []
    attacker = Attacker.start(agent, "", config)
    gateway = gateway_of(attacker)
    streams = streaming_port(attacker)
    if powers:
        assert "routed" in attacker.shell(ROUTE_LOOPBACK.format(gateway=gateway))
    with listening("127.0.0.1") as private, listening(gateway) as public:
        targets = [(gateway, public), (gateway, private), (gateway, streams), ("127.0.0.1", private)]
        targets.append(("127.0.0.1", streams))
        results = attacker.python(CONNECT.format(targets=targets))
    assert results[0] == "CONNECTED"
    assert "CONNECTED" not in results[1:]


def test_host_ports_on_loopback_are_out_of_reach(agent: AgentProcess) -> None:
    """A host port of another pod's that is bound to 127.0.0.1 is for the node only."""
    with listening("127.0.0.1") as port:
        pass
    server = sandbox_config(agent)
    server.port_mappings.add(protocol=cri_pb2.TCP, container_port=8080, host_port=port, host_ip="127.0.0.1")
    server_id = agent.client.run_sandbox(server)
    serve = "while :; do echo hello | nc -l -p 8080; done"
    container_id = agent.client.create(server_id, like_kubelets("main", "sh", "-c", serve), server)
    agent.client.start(container_id)
    config = with_python(like_kubelets("main"))
    config.linux.security_context.capabilities.add_capabilities.append("NET_ADMIN")
    config.linux.security_context.readonly_paths[:] = []
    attacker = Attacker.start(agent, "", config)
    gateway = gateway_of(attacker)
    assert "routed" in attacker.shell(ROUTE_LOOPBACK.format(gateway=gateway))
    targets = [(gateway, port), ("127.0.0.1", port), ("127.0.0.2", port)]
    assert "CONNECTED" not in attacker.python(CONNECT.format(targets=targets))
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        assert connection.recv(10) == b"hello\n"


def test_abstract_sockets_of_the_node_are_out_of_reach(agent: AgentProcess) -> None:
    name = f"podkeel-test-{secrets.token_hex(4)}"
    look = f"import socket\nanswer(attempt(lambda: socket.socket(socket.AF_UNIX).connect({chr(0) + name!r})))"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"\0{name}")
        server.listen()
        inside = Attacker.start(agent, "", with_python(like_kubelets("main")))
        assert inside.python(look) == "ECONNREFUSED"
        assert name not in inside.shell("cat /proc/net/unix")


def test_agent_s_socket_and_files_are_out_of_sight(attacker: Attacker) -> None:
    agent = attacker.agent
    for path in (agent.run, agent.data, agent.logs):
        assert Path(path).exists()
        assert "No such file" in attacker.shell(f"ls {path}")
    mounts = attacker.shell("cat /proc/self/mountinfo")
    shown = {line.split()[3] for line in mounts.splitlines()}
    assert not [root for root in shown if root.endswith((".sock", "podkeel.db"))]


def test_streaming_urls_are_for_one_use(attacker: Attacker) -> None:
    """Who guesses at tokens gets nothing, and the port says nothing of which there are."""
    port = streaming_port(attacker)
    for path in ("/exec/" + "A" * 22, "/attach/", "/portforward/../exec/x", "/metrics", "/"):
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            connection.sendall(
                f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n\r\n".encode()
            )
            assert re.match(rb"HTTP/1\.1 4\d\d ", connection.recv(1000))
