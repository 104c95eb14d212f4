"""Cgroup settings, limits, sysctls, namespaces, devices and log paths."""

from __future__ import annotations

import os
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from host.cgroups import discover
from host.errors import InvalidArgumentError
from proto.runtime.v1 import cri_pb2
from runtime.containers.bundle.log_path import resolve_log_path
from runtime.specgen import config as oci
from runtime.specgen.devices import devices
from runtime.specgen.limits.resources import oom_score_adj, resources
from runtime.specgen.namespaces import NamespacePaths, namespaces, user_mappings
from runtime.specgen.node_facts import kernel_version, probe_node
from runtime.specgen.process import rlimits
from runtime.specgen.sysctls import DEFAULTS, pod_sysctls, sysctl_path
from tests.unit.spec.requests import NODE, sandbox

Resources = cri_pb2.LinuxContainerResources


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, oci.Resources()),
        (
            {"cpu_period": 100000, "cpu_quota": 50000, "cpu_shares": 512},
            oci.Resources(cpu=oci.Cpu(period=100000, quota=50000, shares=512)),
        ),
        ({"cpu_shares": 1}, oci.Resources(cpu=oci.Cpu(shares=2))),
        ({"cpu_quota": -1}, oci.Resources()),
        ({"cpuset_cpus": "0-2,7", "cpuset_mems": "0"}, oci.Resources(cpu=oci.Cpu(cpus="0-2,7", mems="0"))),
        ({"memory_limit_in_bytes": 5}, oci.Resources(memory=oci.Memory(limit=5, swap=5))),
        (
            {"memory_limit_in_bytes": 5, "memory_swap_limit_in_bytes": 9},
            oci.Resources(memory=oci.Memory(limit=5, swap=9)),
        ),
        ({"memory_limit_in_bytes": -1}, oci.Resources(memory=oci.Memory(limit=-1, swap=-1))),
        (
            {"hugepage_limits": [{"page_size": "2MB", "limit": 0}, {"page_size": "1GB", "limit": 0}]},
            oci.Resources(hugepage_limits=[oci.HugepageLimit(page_size="2MB", limit=0)]),
        ),
    ],
)
def test_resources(fields: dict[str, Any], expected: oci.Resources) -> None:
    assert resources(Resources(**fields), NODE) == expected


def test_resources_of_the_node() -> None:
    limited = Resources(memory_limit_in_bytes=5)
    assert resources(limited, replace(NODE, swap_accounting=False)).memory == oci.Memory(limit=5)
    assert resources(Resources(), NODE, pids_limit=99).pids == oci.Pids(limit=99)
    assert resources(Resources(), NODE, pids_limit=-1).pids is None
    unified = Resources(unified={"memory.high": "100"})
    assert resources(unified, replace(NODE, cgroup_version=2)).unified == {"memory.high": "100"}
    swap = Resources(memory_limit_in_bytes=5, unified={"memory.swap.max": "9"})  # as kubelet says it (LimitedSwap)
    assert resources(swap, replace(NODE, cgroup_version=2)).memory == oci.Memory(limit=5)
    with pytest.raises(InvalidArgumentError, match=r"memory.high needs cgroup v2"):
        resources(unified, NODE)


@pytest.mark.parametrize(
    "fields",
    [
        {"cpu_shares": -2},
        {"cpu_shares": (1 << 18) + 1},
        {"cpu_period": -1},
        {"cpuset_cpus": "all"},
        {"cpuset_mems": "0-"},
        {"memory_limit_in_bytes": -2},
        {"memory_swap_limit_in_bytes": 5},
        {"memory_limit_in_bytes": 9, "memory_swap_limit_in_bytes": 5},
        {"hugepage_limits": [{"page_size": "1GB", "limit": 1}]},
        {"unified": {"../memory.max": "1"}},
        {"unified": {"cgroup": "1"}},
    ],
)
def test_resources_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError, match=next(iter(fields)) if len(fields) == 1 else "memory_swap"):
        resources(Resources(**fields), replace(NODE, cgroup_version=2))


@pytest.mark.parametrize(("wanted", "lowest", "expected"), [(0, 0, 0), (-998, 0, 0), (-998, -1000, -998), (5, 0, 5)])
def test_oom_score_adj(wanted: int, lowest: int, expected: int) -> None:
    assert oom_score_adj(Resources(oom_score_adj=wanted), replace(NODE, min_oom_score_adj=lowest)) == expected


@pytest.mark.parametrize("wanted", [-1001, 1001])
def test_oom_score_adj_refused(wanted: int) -> None:
    with pytest.raises(InvalidArgumentError, match="out of range"):
        oom_score_adj(Resources(oom_score_adj=wanted), NODE)


def test_rlimits() -> None:
    core = oci.Rlimit(type="RLIMIT_CORE", hard=0, soft=0)
    files = oci.Rlimit(type="RLIMIT_NOFILE", hard=1 << 30, soft=1024)
    assert rlimits([], NODE) == list(NODE.default_rlimits)
    assert rlimits([core, files], NODE) == [oci.Rlimit(type="RLIMIT_NOFILE", hard=20000, soft=1024), core]
    for limit, reason in (
        (oci.Rlimit(type="RLIMIT_NONE", hard=1, soft=1), "not a resource limit"),
        (oci.Rlimit(type="NOFILE", hard=1, soft=1), "not a resource limit"),
        (oci.Rlimit(type="RLIMIT_CORE", hard=1, soft=2), "above the hard"),
    ):
        with pytest.raises(InvalidArgumentError, match=reason):
            rlimits([limit], NODE)


def _pod(**sysctls: str) -> cri_pb2.PodSandboxConfig:
    return sandbox(linux=cri_pb2.LinuxPodSandboxConfig(sysctls={k.replace("__", "/"): v for k, v in sysctls.items()}))


def test_sysctls_allowed_and_default() -> None:
    wanted = {
        "net.ipv4.ip_local_port_range": "20000 30000",
        "kernel.shmmax": "1",
        "kernel.msgmax": "2",
        "kernel.sem": "3",
        "fs.mqueue.msg_max": "4",
        "net/ipv4/conf/eth0.100/forwarding": "1",
        "net.ipv4.ping_group_range": "1 0",
    }
    config = sandbox(linux=cri_pb2.LinuxPodSandboxConfig(sysctls=wanted))
    settings = pod_sysctls(config, host_network=False, host_ipc=False)
    assert settings == {
        "net.ipv4.ping_group_range": "1 0",
        "net.ipv4.ip_unprivileged_port_start": "0",
        "net.ipv4.ip_local_port_range": "20000 30000",
        "kernel.shmmax": "1",
        "kernel.msgmax": "2",
        "kernel.sem": "3",
        "fs.mqueue.msg_max": "4",
        "net.ipv4.conf.eth0/100.forwarding": "1",
    }
    assert sysctl_path("net.ipv4.conf.eth0/100.forwarding") == "/proc/sys/net/ipv4/conf/eth0.100/forwarding"


def test_sysctl_defaults() -> None:
    assert pod_sysctls(sandbox(), host_network=False, host_ipc=True) == DEFAULTS
    assert pod_sysctls(sandbox(), host_network=True, host_ipc=False) == {}
    assert list(pod_sysctls(sandbox(), host_network=False, host_ipc=False, user_namespace=True)) == [
        "net.ipv4.ip_unprivileged_port_start"
    ]


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("kernel.panic", "1", "not namespaced"),
        ("vm.swappiness", "1", "not namespaced"),
        ("kernel.semaphore", "1", "not namespaced"),
        ("net.ipv4.ip_forward", "1", "host network"),
        ("kernel.shmmax", "1", "host IPC"),
        ("net.ipv4..x", "1", "not a name"),
        ("net/../kernel/panic", "1", "not a name"),
        ("net", "1", "not a name"),
        ("net.ipv4.x", "1\n2", "line break"),
    ],
)
def test_sysctls_refused(name: str, value: str, reason: str) -> None:
    config = sandbox(linux=cri_pb2.LinuxPodSandboxConfig(sysctls={name: value}))
    with pytest.raises(InvalidArgumentError, match=reason):
        pod_sysctls(config, host_network=True, host_ipc=True)


def test_namespaces() -> None:
    def kinds(paths: NamespacePaths, cgroup: bool = False) -> dict[str, str]:
        return {found.type: found.path for found in namespaces(paths, own_cgroup_namespace=cgroup)}

    assert kinds(NamespacePaths()) == {"mount": "", "pid": ""}
    assert kinds(NamespacePaths(host_pid=True), cgroup=True) == {"mount": "", "cgroup": ""}
    assert kinds(NamespacePaths("/n", "/i", "/u", "/s", "/p")) == {
        "mount": "",
        "network": "/n",
        "ipc": "/i",
        "uts": "/u",
        "user": "/s",
        "pid": "/p",
    }


def _options(mode: str, uids: list[tuple[int, int, int]], gids: list[tuple[int, int, int]]) -> cri_pb2.NamespaceOption:
    def mappings(given: list[tuple[int, int, int]]) -> list[cri_pb2.IDMapping]:
        return [cri_pb2.IDMapping(container_id=c, host_id=h, length=n) for c, h, n in given]

    return cri_pb2.NamespaceOption(userns_options={"mode": mode, "uids": mappings(uids), "gids": mappings(gids)})


def test_user_mappings() -> None:
    one = [(0, 65536, 65536)]
    assert user_mappings(cri_pb2.NamespaceOption()) is None
    assert user_mappings(_options("NODE", one, one)) is None
    assert user_mappings(_options("POD", one, one)) == ([oci.IDMapping(container_id=0, host_id=65536, size=65536)],) * 2


@pytest.mark.parametrize(
    ("mode", "uids", "gids", "reason"),
    [
        ("CONTAINER", [(0, 1, 1)], [(0, 1, 1)], "CONTAINER is invalid"),
        ("TARGET", [(0, 1, 1)], [(0, 1, 1)], "TARGET is invalid"),
        ("POD", [], [(0, 1, 1)], "uids: id 0 is not mapped"),
        ("POD", [(0, 1, 1)], [], "gids: id 0 is not mapped"),
        ("POD", [(1, 1, 1)], [(0, 1, 1)], "uids: id 0 is not mapped"),
        ("POD", [(0, 1, 1), (0, 9, 1)], [(0, 1, 1)], "container ids 0 and up are mapped twice"),
        ("POD", [(0, 100, 10), (10, 105, 10)], [(0, 1, 1)], "host ids 105 and up are mapped twice"),
        ("POD", [(0, 1, 0)], [(0, 1, 1)], "no range"),
        ("POD", [(0, 2**32 - 1, 2)], [(0, 1, 1)], "no range"),
    ],
)
def test_user_mappings_refused(mode: str, uids: Any, gids: Any, reason: str) -> None:
    with pytest.raises(InvalidArgumentError, match=reason):
        user_mappings(_options(mode, uids, gids))


def test_devices() -> None:
    nodes, rules = devices([cri_pb2.Device(host_path="/dev/null", container_path="/dev/mine")], all_of_host=False)
    assert [(node.path, node.type, node.major, node.minor) for node in nodes] == [("/dev/mine", "c", 1, 3)]
    assert rules == [
        oci.DeviceRule(allow=False, access="rwm"),
        oci.DeviceRule(allow=True, type="c", major=1, minor=3, access="rwm"),
    ]
    nodes, rules = devices([], all_of_host=True)
    assert rules == [oci.DeviceRule(allow=True, access="rwm")]
    paths = {node.path for node in nodes}
    assert not paths & {"/dev/null", "/dev/ptmx", "/dev/console"}
    assert not [path for path in paths if path.startswith(("/dev/pts/", "/dev/shm/"))]
    assert devices([], all_of_host=False) == ([], [oci.DeviceRule(allow=False, access="rwm")])


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"host_path": "null"}, "not absolute"),
        ({"host_path": "/dev/null", "permissions": "rx"}, "permissions 'rx'"),
        ({"host_path": "/dev/null", "permissions": "rr"}, "permissions 'rr'"),
        ({"host_path": "/dev/null", "container_path": "x"}, "container_path 'x'"),
        ({"host_path": "/dev/null", "container_path": "/dev/../x"}, "has '..'"),
        ({"host_path": "/dev/no-such-device"}, "No such file"),
        ({"host_path": "/etc/passwd"}, "neither a device nor a folder"),
    ],
)
def test_devices_refused(fields: dict[str, str], reason: str) -> None:
    with pytest.raises(InvalidArgumentError, match=reason):
        devices([cri_pb2.Device(**fields)], all_of_host=False)


def test_log_path(tmp_path: Path) -> None:
    (tmp_path / "pod").mkdir()
    (tmp_path / "link").symlink_to("pod")
    assert resolve_log_path("", "a/0.log") is None
    assert resolve_log_path("/var/log/pods/x", "") is None
    assert resolve_log_path("/var/log/pods/x", "a/0.log") == Path("/var/log/pods/x/a/0.log")
    assert resolve_log_path("/var/log/pods/x/", "a/../b/./0.log") == Path("/var/log/pods/x/b/0.log")
    assert resolve_log_path(str(tmp_path / "link"), "0.log") == tmp_path / "link/0.log"


@pytest.mark.parametrize(
    ("folder", "path"),
    [("/logs", "../x"), ("/logs", "a/../../x"), ("/logs", ".."), ("/logs", "."), ("logs", "x"), ("/logs", "a\0b")],
)
def test_log_path_refused(folder: str, path: str) -> None:
    with pytest.raises(InvalidArgumentError):
        resolve_log_path(folder, path)


def test_log_path_does_not_follow_links_out(tmp_path: Path) -> None:
    pod = tmp_path / "pod"
    pod.mkdir()
    (pod / "a").symlink_to(tmp_path)
    (pod / "0.log").symlink_to("../elsewhere")
    for path in ("a/0.log", "0.log"):
        with pytest.raises(InvalidArgumentError, match="symbolic link"):
            resolve_log_path(str(pod), path)


def test_probe() -> None:
    node = probe_node(discover())
    assert node.kernel == kernel_version(os.uname().release)
    assert node.cgroup_version in (1, 2)
    limits = {limit.type: limit for limit in node.default_rlimits}
    assert limits["RLIMIT_NOFILE"].hard <= node.max_open_files
    hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
    assert limits["RLIMIT_CORE"].hard == (0xFFFFFFFFFFFFFFFF if hard == resource.RLIM_INFINITY else hard)
    assert kernel_version("6.18.44-x") == (6, 18)
    assert kernel_version("nonsense") == (0, 0)
