"""ContainerStats, PodSandboxStats and their lists, compared with what containers really do."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from proto.runtime.v1 import cri_pb2
from tests.support.agent import PATIENCE, AgentProcess, wait_for
from tests.support.pods import container_config, run_container, sandbox_config, wait_for_log

MIB = 1 << 20
SLEEP = ("sleep", "1000")
BUSY = ("sh", "-c", "while :; do :; done")
# A shell keeps a string in anonymous memory, if it does not become its last command.
HOG = ("sh", "-c", f"x=$(head -c {24 * MIB} /dev/zero | tr '\\0' x); echo ready; sleep 1000; true")


def container_stats(agent: AgentProcess, container_id: str) -> cri_pb2.ContainerStats:
    request = cri_pb2.ContainerStatsRequest(container_id=container_id)
    stats: cri_pb2.ContainerStats = agent.client.call("ContainerStats", request).stats
    return stats


def pod_stats(agent: AgentProcess, sandbox_id: str) -> cri_pb2.PodSandboxStats:
    request = cri_pb2.PodSandboxStatsRequest(pod_sandbox_id=sandbox_id)
    stats: cri_pb2.PodSandboxStats = agent.client.call("PodSandboxStats", request).stats
    return stats


def list_containers(agent: AgentProcess, **wanted: Any) -> list[str]:
    request = cri_pb2.ListContainerStatsRequest(filter=cri_pb2.ContainerStatsFilter(**wanted))
    return [item.attributes.id for item in agent.client.call("ListContainerStats", request).stats]


def list_pods(agent: AgentProcess, **wanted: Any) -> list[str]:
    request = cri_pb2.ListPodSandboxStatsRequest(filter=cri_pb2.PodSandboxStatsFilter(**wanted))
    return [item.attributes.id for item in agent.client.call("ListPodSandboxStats", request).stats]


def test_busy_loop_uses_processor_time(agent: AgentProcess) -> None:
    sandbox_id, container_id = run_container(agent, *BUSY)
    seen = [container_stats(agent, container_id).cpu]

    def used() -> int:
        seen.append(container_stats(agent, container_id).cpu)
        return int(seen[-1].usage_core_nano_seconds.value - seen[0].usage_core_nano_seconds.value)

    wait_for(lambda: used() >= 1e9, 20, "a second of processor time")  # the machine may have other work
    assert used() < 1.1 * (seen[-1].timestamp - seen[0].timestamp)
    assert 0 < seen[-1].usage_nano_cores.value < 1.1e9
    of_pod = pod_stats(agent, sandbox_id).linux.cpu
    assert of_pod.usage_core_nano_seconds.value >= seen[-1].usage_core_nano_seconds.value
    # Its rate is known once it was looked at twice, some time apart.
    wait_for(lambda: pod_stats(agent, sandbox_id).linux.cpu.usage_nano_cores.value > 0, what="the pod's rate")


def test_memory_hog_and_its_limit(agent: AgentProcess) -> None:
    limit = 200 * MIB
    resources = cri_pb2.LinuxContainerResources(memory_limit_in_bytes=limit)
    linux = cri_pb2.LinuxContainerConfig(resources=resources)
    _, container_id = run_container(agent, *HOG, linux=linux)
    wait_for_log(agent.client, container_id)
    memory = container_stats(agent, container_id).memory
    assert 24 * MIB < memory.rss_bytes.value <= memory.working_set_bytes.value <= memory.usage_bytes.value < limit
    assert memory.available_bytes.value == limit - memory.working_set_bytes.value
    assert memory.page_faults.value > 1000  # one for each page, but where huge ones are taken
    _, idle = run_container(agent, *SLEEP)
    memory = container_stats(agent, idle).memory
    assert memory.working_set_bytes.value < 8 * MIB
    assert not memory.HasField("available_bytes")


def test_statistics_have_their_times_and_the_attributes_of_the_container(agent: AgentProcess) -> None:
    labels, annotations = {"app": "web", "ü": "ä"}, {"note": "x" * 5000}
    before = time.time_ns()
    sandbox_id, container_id = run_container(agent, *SLEEP, labels=labels, annotations=annotations)
    stats = container_stats(agent, container_id)
    after = time.time_ns()
    assert stats.attributes.metadata == cri_pb2.ContainerMetadata(name="main")
    assert dict(stats.attributes.labels) == labels
    assert dict(stats.attributes.annotations) == annotations
    layer = stats.writable_layer
    for moment in (stats.cpu, stats.memory, stats.swap, layer):
        assert before < moment.timestamp < after
    assert layer.fs_id.mountpoint == str(agent.data)
    assert stats.swap.HasField("swap_usage_bytes")
    pod = pod_stats(agent, sandbox_id)
    assert pod.attributes.metadata == agent.client.sandbox_status(sandbox_id).metadata
    assert [member.attributes for member in pod.linux.containers] == [stats.attributes]
    for part in (pod.linux.cpu, pod.linux.memory, pod.linux.network, pod.linux.process):
        assert part.timestamp > after


def test_pressure_if_the_kernel_reports_it(agent: AgentProcess) -> None:
    _, container_id = run_container(agent, *SLEEP)
    pressure = agent.client.output(container_id, "sh", "-c", "ls /proc/pressure 2>/dev/null; true")
    if "cpu" not in pressure:
        pytest.skip("this kernel has no pressure stall information")
    stats = container_stats(agent, container_id)
    assert stats.io.timestamp > 0
    for part in (stats.cpu, stats.memory, stats.io):
        assert part.psi.HasField("Some")
        assert part.psi.HasField("Full")


def test_writable_layer_is_counted_in_the_background(agent: AgentProcess) -> None:
    script = f"head -c {4 * MIB} /dev/zero > /file; ln /file /link; mkdir /folder; ln -s /x /folder/y; echo ready"
    _, container_id = run_container(agent, "sh", "-c", f"{script}; exec sleep 1000")
    wait_for_log(agent.client, container_id)
    wait_for(lambda: container_stats(agent, container_id).writable_layer.used_bytes.value > 4 * MIB, 25, "the count")
    layer = container_stats(agent, container_id).writable_layer
    assert layer.used_bytes.value < 4.2 * MIB  # the hard link counts once
    assert 4 <= layer.inodes_used.value < 20
    usage = agent.client.call("ImageFsInfo", cri_pb2.ImageFsInfoRequest()).container_filesystems[0]
    assert usage.used_bytes.value > 4 * MIB


def test_only_layers_of_containers_that_ran_are_counted_again(agent: AgentProcess) -> None:
    (_, idle), (_, busy), (_, ended) = (run_container(agent, *SLEEP) for _ in range(3))
    agent.client.stop(ended)

    def layers() -> list[cri_pb2.FilesystemUsage]:
        return [container_stats(agent, container_id).writable_layer for container_id in (idle, busy, ended)]

    wait_for(lambda: all(layer.inodes_used.value > 1 for layer in layers()), what="the first counts")
    before = layers()
    for container_id in (idle, busy, ended):  # by a hand from outside
        (agent.data / "containers" / container_id / "upper" / "new").touch()
    agent.client.output(busy, "true")
    wait_for(lambda: all(b.timestamp > a.timestamp for a, b in zip(before, layers(), strict=True)), 25, "another look")
    assert [b.inodes_used.value - a.inodes_used.value for a, b in zip(before, layers(), strict=True)] == [0, 1, 0]


def test_traffic_of_a_pod(agent: AgentProcess) -> None:
    sandbox_id, container_id = run_container(agent, *SLEEP)
    gateway = agent.client.output(container_id, "sh", "-c", "ip route | sed -n 's/^default via \\([0-9.]*\\).*/\\1/p'")
    before = pod_stats(agent, sandbox_id).linux.network
    assert before.default_interface.name == "eth0"
    assert [interface.name for interface in before.interfaces] == []
    agent.client.exec(container_id, "ping", "-c", "3", "-i", "0.1", "-s", "1000", gateway.strip())
    after = pod_stats(agent, sandbox_id).linux.network
    for field in ("rx_bytes", "tx_bytes"):
        moved = getattr(after.default_interface, field).value - getattr(before.default_interface, field).value
        assert 3 * 1000 < moved < 3 * 1500


def test_a_bulk_transfer_is_counted_completely_on_both_sides(agent: AgentProcess) -> None:
    size = 64 * MIB
    # At the end of its input nc would close the connection: a pipe that it may write to itself has none.
    receiver, sink = run_container(agent, "sh", "-c", "mkfifo /p; echo ready; nc -l -p 5001 <>/p >/dev/null")
    wait_for_log(agent.client, sink)
    address = agent.client.sandbox_status(receiver).network.ip
    sender, source = run_container(agent, *SLEEP)
    before = [pod_stats(agent, pod).linux.network.default_interface for pod in (sender, receiver)]
    send = f"head -c {size} /dev/zero | nc {address} 5001"
    assert agent.client.exec(source, "sh", "-c", send, timeout=int(20 * PATIENCE)).exit_code == 0
    wait_for(lambda: agent.client.status(sink).state == cri_pb2.CONTAINER_EXITED, what="the end of the transfer")
    after = [pod_stats(agent, pod).linux.network.default_interface for pod in (sender, receiver)]
    assert size < after[0].tx_bytes.value - before[0].tx_bytes.value < 1.1 * size
    assert size < after[1].rx_bytes.value - before[1].rx_bytes.value < 1.1 * size
    assert after[0].rx_bytes.value - before[0].rx_bytes.value < 0.1 * size
    assert after[0].tx_errors.value == after[1].rx_errors.value == 0


def test_lists_cover_what_runs_and_obey_filters(agent: AgentProcess) -> None:
    client = agent.client
    sandbox, other = (sandbox_config(agent, labels={"tier": tier}) for tier in ("front", "back"))
    sandbox_id, other_id = client.run_sandbox(sandbox), client.run_sandbox(other)
    ids = {}
    for name in ("runs", "created", "ended"):
        config = container_config(name, *SLEEP, labels={"name": name})
        ids[name] = client.create(sandbox_id, config, sandbox)
    second = client.create(other_id, container_config("second", *SLEEP, labels={"name": "second"}), other)
    for container_id in (ids["runs"], ids["ended"], second):
        client.start(container_id)
    client.stop(ids["ended"])
    assert list_containers(agent) == [ids["runs"], second]
    no_filter = client.call("ListContainerStats", cri_pb2.ListContainerStatsRequest()).stats
    assert [item.attributes.id for item in no_filter] == [ids["runs"], second]
    assert list_containers(agent, id=second[:13]) == [second]
    assert list_containers(agent, pod_sandbox_id=sandbox_id) == [ids["runs"]]
    assert list_containers(agent, label_selector={"name": "second"}) == [second]
    assert list_containers(agent, pod_sandbox_id=sandbox_id, label_selector={"name": "second"}) == []
    assert list_containers(agent, id="f" * 64) == []
    assert list_pods(agent) == [sandbox_id, other_id]
    assert list_pods(agent, id=other_id[:13]) == [other_id]
    assert list_pods(agent, label_selector={"tier": "front"}) == [sandbox_id]
    assert list_pods(agent, label_selector={"tier": "none"}) == []
    streamed = client.stream("StreamContainerStats", cri_pb2.StreamContainerStatsRequest())
    assert [item.attributes.id for message in streamed for item in message.container_stats] == [ids["runs"], second]
    streamed = client.stream("StreamPodSandboxStats", cri_pb2.StreamPodSandboxStatsRequest())
    assert [item.attributes.id for message in streamed for item in message.pod_sandbox_stats] == [sandbox_id, other_id]
    client.stop_sandbox(other_id)
    assert list_pods(agent) == [sandbox_id]
    stopped = pod_stats(agent, other_id)
    assert stopped.attributes.id == other_id
    assert not stopped.linux.HasField("cpu")
    ended = container_stats(agent, ids["ended"])
    assert ended.writable_layer.inodes_used.value > 0
    assert not ended.HasField("cpu")


@pytest.mark.parametrize("call", [container_stats, pod_stats])
def test_unknown_id_is_not_found(agent: AgentProcess, call: Callable[[AgentProcess, str], object]) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        call(agent, "f" * 64)
    assert raised.value.code() is grpc.StatusCode.NOT_FOUND


def test_pods_of_every_kind_side_by_side(agent: AgentProcess) -> None:
    """Alone in a parent, sharing a parent, without one, without containers, on the node's network."""
    client = agent.client
    host = cri_pb2.NamespaceOption(network=cri_pb2.NODE, pid=cri_pb2.CONTAINER)
    security = cri_pb2.LinuxSandboxSecurityContext(namespace_options=host)
    parents = [*map(agent.parent_for_pods, ("given", "shared", "shared")), ""]
    configs = [sandbox_config(agent, linux=cri_pb2.LinuxPodSandboxConfig(cgroup_parent=name)) for name in parents]
    configs.append(sandbox_config(agent, linux=cri_pb2.LinuxPodSandboxConfig(security_context=security)))
    ids = [client.run_sandbox(config) for config in configs]
    empty = client.run_sandbox(sandbox_config(agent))
    members = []
    for sandbox_id, config in zip(ids, configs, strict=True):
        members.append(client.create(sandbox_id, container_config("hog", *HOG), config))
        client.start(members[-1])
    for member in members:
        wait_for_log(client, member)
    stats = {
        item.attributes.id: item.linux
        for item in client.call("ListPodSandboxStats", cri_pb2.ListPodSandboxStatsRequest()).stats
    }
    assert list(stats) == [*ids, empty]
    for sandbox_id, member in zip(ids, members, strict=True):
        linux = stats[sandbox_id]
        assert [container.attributes.id for container in linux.containers] == [member]
        assert 24 * MIB < linux.memory.working_set_bytes.value < 45 * MIB, "one hog, not its neighbours"
        assert linux.cpu.usage_core_nano_seconds.value > 0
        assert 1 <= linux.process.process_count.value <= 3
        assert linux.HasField("network") == (sandbox_id != ids[-1])
    assert stats[empty].memory.working_set_bytes.value < MIB
    assert stats[empty].process.process_count.value == 0


def test_containers_that_vanish_never_fail_a_list(agent: AgentProcess) -> None:
    """Lists of all kinds while containers come and go."""
    client = agent.client
    sandbox = sandbox_config(agent)
    sandbox_id = client.run_sandbox(sandbox)
    stay = client.create(sandbox_id, container_config("stay", *SLEEP), sandbox)
    client.start(stay)
    done = threading.Event()
    failures: list[Exception] = []

    def come_and_go() -> None:
        try:
            for number in range(25):
                gone = client.create(sandbox_id, container_config(f"gone{number}", *SLEEP), sandbox)
                client.start(gone)
                client.remove(gone)
        except Exception as error:
            failures.append(error)
        finally:
            done.set()

    thread = threading.Thread(target=come_and_go)
    thread.start()
    seen = 0
    while not done.is_set():
        assert stay in list_containers(agent)
        assert list_pods(agent) == [sandbox_id]
        metrics = client.call("ListPodSandboxMetrics", cri_pb2.ListPodSandboxMetricsRequest()).pod_metrics
        assert stay in [container.container_id for container in metrics[0].container_metrics]
        seen += 1
    thread.join()
    assert failures == []
    assert seen > 5
    assert list_containers(agent) == [stay]


def test_neither_descriptors_nor_namespaces_are_kept_of_what_is_gone(own_agent: AgentProcess) -> None:
    process = Path(f"/proc/{own_agent.pid()}")
    folder = process / "fd"

    def kept() -> int:
        count = 0
        for link in folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                count += str(link.readlink()).startswith("/sys/fs/cgroup/")
        return count

    sandbox_id, container_id = run_container(own_agent, *SLEEP)
    before = kept()
    list_pods(own_agent)  # reads in the pod's network, and starts the thread that counts writable layers
    assert kept() > before
    networks = set()
    for thread in (process / "task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # the thread has just ended
            networks.add(thread.joinpath("ns/net").readlink())
    assert networks == {process.joinpath("ns/net").readlink()}
    own_agent.client.remove(container_id)
    own_agent.client.stop_sandbox(sandbox_id)
    assert kept() == 0
    own_agent.client.remove_sandbox(sandbox_id)


def test_metrics_match_their_descriptors(agent: AgentProcess) -> None:
    client = agent.client
    sandbox_id, container_id = run_container(agent, *BUSY)
    request = cri_pb2.ListMetricDescriptorsRequest()
    described = {item.name: item for item in client.call("ListMetricDescriptors", request).descriptors}
    assert {"container_cpu_usage_seconds_total", "container_memory_working_set_bytes"} < set(described)
    assert all(item.help for item in described.values())

    def metrics() -> cri_pb2.PodSandboxMetrics:
        (pod,) = client.call("ListPodSandboxMetrics", cri_pb2.ListPodSandboxMetricsRequest()).pod_metrics
        found: cri_pb2.PodSandboxMetrics = pod
        return found

    def labels(metric: cri_pb2.Metric) -> dict[str, str]:
        return dict(zip(described[metric.name].label_keys, metric.label_values, strict=True))

    def seconds() -> int:
        (own,) = metrics().container_metrics
        return int(next(m.value.value for m in own.metrics if m.name == "container_cpu_usage_seconds_total"))

    pod = metrics()
    assert pod.pod_sandbox_id == sandbox_id
    name = client.sandbox_status(sandbox_id).metadata.name
    (container,) = pod.container_metrics
    assert container.container_id == container_id
    for metric in container.metrics:
        values = labels(metric)
        assert (values["namespace"], values["pod"], values["container"]) == ("default", name, "main")
        assert values["name"] == container_id
        assert container_id in values["id"]
        assert values["image"] == "docker.io/library/busybox:latest"
        assert abs(metric.timestamp - time.time_ns()) < 10e9
    networks = [metric for metric in pod.metrics if metric.name == "container_network_receive_bytes_total"]
    assert [labels(metric)["interface"] for metric in networks] == ["eth0"]
    assert networks[0].metric_type == cri_pb2.COUNTER
    types = {metric.name: metric.metric_type for metric in container.metrics}
    assert types["container_memory_working_set_bytes"] == cri_pb2.GAUGE
    wait_for(lambda: seconds() >= 1, 20, "a second of processor time")
    streamed = list(client.stream("StreamPodSandboxMetrics", cri_pb2.StreamPodSandboxMetricsRequest()))
    assert [item.pod_sandbox_id for message in streamed for item in message.pod_sandbox_metrics] == [sandbox_id]
