"""What the containers of a pod share with each other and with the node: network, IPC, PIDs, names, sysctls."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import grpc
import pytest

from proto.runtime.v1 import cri_pb2
from tests.integration.conformance.support import SLEEP, Pod, refused
from tests.support.agent import AgentProcess, wait_for
from tests.support.pods import container_config, sandbox_config
from tests.support.ports import free_port


def _pod(agent: AgentProcess, **options: object) -> Pod:
    config = sandbox_config(agent)
    context = config.linux.security_context.namespace_options
    for name, value in options.items():
        setattr(context, name, value)
    return Pod.run(agent, config)


def _container(pod: Pod, name: str, *command: str) -> cri_pb2.ContainerConfig:
    """As kubelet: containers are given the options of their pod."""
    config = container_config(name, *command)
    options = config.linux.security_context.namespace_options
    options.CopyFrom(pod.config.linux.security_context.namespace_options)
    return config


def _namespace(pod: Pod, container_id: str, kind: str) -> str:
    return pod.agent.client.output(container_id, "readlink", f"/proc/self/ns/{kind}").strip()


def _own(kind: str) -> str:
    return str(Path(f"/proc/self/ns/{kind}").readlink())


def test_containers_share_network_ipc_and_names_but_not_processes(agent: AgentProcess) -> None:
    pod = _pod(agent, pid=cri_pb2.CONTAINER)
    first, second = (pod.start(_container(pod, name, *SLEEP)) for name in ("first", "second"))
    for kind, same in (("net", True), ("ipc", True), ("uts", True), ("pid", False), ("mnt", False)):
        ours = _namespace(pod, first, kind)
        assert (ours == _namespace(pod, second, kind)) == same, kind
        assert ours != _own(kind)


def test_containers_talk_over_localhost_and_the_node_to_the_address(agent: AgentProcess) -> None:
    pod = _pod(agent, pid=cri_pb2.CONTAINER)
    server = pod.start(_container(pod, "server", "sh", "-c", "cd /tmp; echo page > p; exec httpd -f -p 8080"))
    client = pod.start(_container(pod, "client", *SLEEP))
    fetch = ("wget", "-qO-", "http://127.0.0.1:8080/p")
    wait_for(lambda: agent.client.exec(client, *fetch).stdout == b"page\n", what="the page")
    address = agent.client.sandbox_status(pod.id).network.ip
    with socket.create_connection((address, 8080), timeout=5):
        pass
    other = _pod(agent, pid=cri_pb2.CONTAINER)
    peer = other.start(_container(other, "peer", *SLEEP))
    assert agent.client.output(peer, "wget", "-qO-", f"http://{address}:8080/p") == "page\n"
    agent.client.remove(server)


def test_shared_memory_is_the_pods(agent: AgentProcess) -> None:
    pod = _pod(agent, pid=cri_pb2.CONTAINER)
    first, second = (pod.start(_container(pod, name, *SLEEP)) for name in ("first", "second"))
    agent.client.output(first, "sh", "-c", "echo shared > /dev/shm/file")
    assert agent.client.output(second, "cat", "/dev/shm/file") == "shared\n"
    (line,) = agent.client.output(first, "grep", " /dev/shm ", "/proc/mounts").splitlines()
    assert "size=65536k" in line
    other = _pod(agent, pid=cri_pb2.CONTAINER)
    assert agent.client.output(other.start(_container(other, "other", *SLEEP)), "ls", "/dev/shm") == ""


def test_host_network(agent: AgentProcess) -> None:
    pod = _pod(agent, network=cri_pb2.NODE)
    container_id = pod.start(_container(pod, "main", *SLEEP))
    assert _namespace(pod, container_id, "net") == _own("net")
    assert agent.client.sandbox_status(pod.id).network.ip == ""
    assert agent.client.output(container_id, "hostname").strip() == os.uname().nodename
    status = agent.client.sandbox_status(pod.id)
    assert status.linux.namespaces.options.network == cri_pb2.NODE


def test_host_network_with_a_user_namespace(agent: AgentProcess) -> None:
    status = agent.client.call("Status", cri_pb2.StatusRequest())
    for handler in (item for item in status.runtime_handlers if item.features.user_namespaces):
        config = sandbox_config(agent)
        options = config.linux.security_context.namespace_options
        options.network = cri_pb2.NODE
        options.userns_options.mode = cri_pb2.POD
        for mappings in (options.userns_options.uids, options.userns_options.gids):
            mappings.add(container_id=0, host_id=100_000, length=65536)
        pod = Pod(agent, config, agent.client.run_sandbox(config, handler=handler.name))
        script = "readlink /proc/self/ns/net; cat /proc/self/uid_map; ls /sys/class/net"
        words = pod.printed(_container(pod, "main", "sh", "-c", script)).split()
        assert words[:4] == [_own("net"), "0", "100000", "65536"]
        assert "lo" in words
    assert status.features.user_namespaces_host_network


def test_host_pid(agent: AgentProcess) -> None:
    pod = _pod(agent, pid=cri_pb2.NODE)
    container_id = pod.start(_container(pod, "main", *SLEEP))
    assert _namespace(pod, container_id, "pid") == _own("pid")
    agent.client.output(container_id, "test", "-d", f"/proc/{os.getpid()}")
    spawner = _container(pod, "spawner", "sh", "-c", "setsid sleep 4242 & exec sleep 1000")
    spawned = pod.start(spawner)
    wait_for(lambda: "sleep 4242" in agent.client.output(container_id, "ps", "-o", "args"), what="the child")
    agent.client.stop(spawned)
    assert "sleep 4242" not in agent.client.output(container_id, "ps", "-o", "args")


def test_host_ipc(agent: AgentProcess) -> None:
    pod = _pod(agent, ipc=cri_pb2.NODE, pid=cri_pb2.CONTAINER)
    container_id = pod.start(_container(pod, "main", *SLEEP))
    assert _namespace(pod, container_id, "ipc") == _own("ipc")
    mark = Path("/dev/shm/podkeel-test-mark")
    mark.touch()
    try:
        assert mark.name in agent.client.output(container_id, "ls", "/dev/shm")
    finally:
        mark.unlink()


def test_shared_pid_namespace(agent: AgentProcess) -> None:
    pod = _pod(agent, pid=cri_pb2.POD)
    first = pod.start(_container(pod, "first", "sleep", "1111"))
    second = pod.start(_container(pod, "second", "sleep", "2222"))
    processes = agent.client.output(first, "ps", "-o", "pid,args").splitlines()
    assert any("sleep 2222" in line for line in processes)
    assert not any(line.split()[0] == "1" and "sleep" in line for line in processes)
    # Orphans become children of the namespace's init, which reaps them.
    agent.client.output(first, "sh", "-c", "(true & exec setsid true) & exit 0")
    zombies = agent.client.output(first, "sh", "-c", "grep -l 'State:.Z' /proc/[0-9]*/status 2>/dev/null || true")
    wait_for(lambda: not zombies or _no_zombies(agent, first), what="the reaping")
    agent.client.stop(first)
    assert agent.client.status(second).state == cri_pb2.CONTAINER_RUNNING
    assert "sleep 1111" not in agent.client.output(second, "ps", "-o", "args")
    third = pod.start(_container(pod, "third", "sleep", "3333"))
    assert "sleep 3333" in agent.client.output(second, "ps", "-o", "args")
    agent.client.stop(third)


def _no_zombies(agent: AgentProcess, container_id: str) -> bool:
    return not agent.client.output(container_id, "sh", "-c", "grep -l 'State:.Z' /proc/[0-9]*/status || true")


def test_stop_takes_every_process_of_a_container_in_a_shared_namespace(agent: AgentProcess) -> None:
    pod = _pod(agent, pid=cri_pb2.POD)
    first = pod.start(_container(pod, "first", "sh", "-c", "setsid sleep 1111 & exec sleep 1000"))
    second = pod.start(_container(pod, "second", *SLEEP))
    wait_for(lambda: "sleep 1111" in agent.client.output(second, "ps", "-o", "args"), what="the child")
    agent.client.stop(first)
    assert "sleep 1111" not in agent.client.output(second, "ps", "-o", "args")


def test_target_joins_the_processes_of_another_container(agent: AgentProcess) -> None:
    pod = _pod(agent, pid=cri_pb2.CONTAINER)
    target = pod.start(_container(pod, "target", "sleep", "1111"))
    config = _container(pod, "debugger", *SLEEP)
    config.linux.security_context.namespace_options.pid = cri_pb2.TARGET
    config.linux.security_context.namespace_options.target_id = target
    debugger = pod.start(config)
    assert "sleep 1111" in agent.client.output(debugger, "ps", "-o", "args")
    assert _namespace(pod, debugger, "pid") == _namespace(pod, target, "pid")
    agent.client.stop(debugger)
    assert agent.client.status(target).state == cri_pb2.CONTAINER_RUNNING


def test_target_must_be_a_running_container_of_the_pod(agent: AgentProcess) -> None:
    pod, other = (_pod(agent, pid=cri_pb2.CONTAINER) for _ in range(2))
    foreign = other.start(_container(other, "foreign", *SLEEP))
    waiting = pod.create(_container(pod, "waiting", *SLEEP))
    for target, code in (
        (foreign, grpc.StatusCode.INVALID_ARGUMENT),
        ("", grpc.StatusCode.INVALID_ARGUMENT),
        (waiting, grpc.StatusCode.FAILED_PRECONDITION),
    ):
        config = _container(pod, "debugger", *SLEEP)
        config.linux.security_context.namespace_options.pid = cri_pb2.TARGET
        config.linux.security_context.namespace_options.target_id = target
        with refused(code, "target"):
            pod.create(config)


def test_hostname(pod: Pod) -> None:
    config = container_config("main", "sh", "-c", "hostname; cat /etc/hostname; echo $HOSTNAME")
    assert pod.printed(config).split() == [pod.config.hostname] * 3


def test_resolver(agent: AgentProcess) -> None:
    config = sandbox_config(agent)
    config.dns_config.servers.extend(["10.96.0.10", "fd00::10"])
    config.dns_config.searches.extend(["default.svc.cluster.local", "svc.cluster.local"])
    config.dns_config.options.extend(["ndots:5", "edns0"])
    pod = Pod.run(agent, config)
    assert pod.printed(container_config("main", "cat", "/etc/resolv.conf")).splitlines() == [
        "search default.svc.cluster.local svc.cluster.local",
        "nameserver 10.96.0.10",
        "nameserver fd00::10",
        "options ndots:5 edns0",
    ]
    plain = Pod.run(agent, sandbox_config(agent))
    shown = plain.printed(container_config("main", "cat", "/etc/resolv.conf"))
    assert shown.strip() == Path("/etc/resolv.conf").read_text().strip()


def test_sysctls(agent: AgentProcess) -> None:
    config = sandbox_config(agent)
    given = {
        "net.ipv4.ip_local_port_range": "20000 30000",
        "net/ipv4/conf/all/forwarding": "1",
        "net.ipv4.conf.eth0.rp_filter": "2",
        "net.ipv4.neigh.eth0.gc_stale_time": "120",
        "kernel.shm_rmid_forced": "1",
        "kernel.msgmax": "4096",
        "fs.mqueue.msg_max": "32",
    }
    config.linux.sysctls.update(given)
    pod = Pod.run(agent, config)
    paths = [f"/proc/sys/{name.replace('.', '/')}" for name in given]
    values = pod.printed(container_config("main", "cat", *paths)).splitlines()
    assert [value.split() for value in values] == [value.split() for value in given.values()]
    defaults = pod.printed(container_config("defaults", "cat", "/proc/sys/net/ipv4/ip_unprivileged_port_start"))
    assert defaults.strip() == "0"


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("kernel.panic", {}),
        ("vm.swappiness", {}),
        ("net.ipv4.ip_forward", {"network": cri_pb2.NODE}),
        ("kernel.shmmax", {"ipc": cri_pb2.NODE}),
        ("../../etc/passwd", {}),
        ("net.ipv4.conf.eth9.rp_filter", {}),
    ],
)
def test_sysctls_that_are_not_the_pod_s_are_refused(agent: AgentProcess, name: str, options: dict[str, int]) -> None:
    config = sandbox_config(agent)
    for key, value in options.items():
        setattr(config.linux.security_context.namespace_options, key, value)
    config.linux.sysctls[name] = "1"
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "sysctl"):
        agent.client.run_sandbox(config)


def test_host_ports_reach_the_pod_through_localhost(agent: AgentProcess) -> None:
    port = free_port()
    config = sandbox_config(agent)
    config.port_mappings.add(container_port=8080, host_port=port, host_ip="127.0.0.1")
    config.port_mappings.add(container_port=8081)
    config.port_mappings.add(protocol=cri_pb2.UDP, container_port=53, host_port=port)
    pod = Pod.run(agent, config)
    pod.start(container_config("server", "sh", "-c", "cd /tmp; echo page > p; exec httpd -f -p 8080"))
    wait_for(lambda: _fetch(port).endswith(b"page\n"), what="an answer through the host port")
    taken = sandbox_config(agent)
    taken.port_mappings.add(container_port=80, host_port=port)
    with refused(grpc.StatusCode.ALREADY_EXISTS, str(port)):
        agent.client.run_sandbox(taken)
    agent.client.stop_sandbox(pod.id)
    assert _fetch(port) == b""
    agent.client.run_sandbox(taken)


def _fetch(port: int) -> bytes:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=2) as connection:
            connection.sendall(b"GET /p HTTP/1.0\r\n\r\n")
            received = b""
            while chunk := connection.recv(65536):
                received += chunk
            return received
    except OSError:
        return b""
