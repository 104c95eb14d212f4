"""SELinux with a policy: labels of processes, of everything a container sees, and what the kernel decides by them.

The machine does not enforce, so each decision is asked of the kernel (``/sys/fs/selinux/access``).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from proto.runtime.v1 import cri_pb2
from tests.integration.conformance.support import SLEEP, Pod, refused
from tests.support.agent import BUSYBOX, AgentProcess, running_agent
from tests.support.pods import container_config, remove_all_pods, sandbox_config
from tests.vm.cgroup_files import information

SELINUX = Path("/sys/fs/selinux")

if not (SELINUX / "enforce").exists():
    pytest.skip("needs SELinux with a policy: make test-vm runs this", allow_module_level=True)


@pytest.fixture(scope="module", params=["crun", "runc"])
def shared(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, busybox: Path
) -> Iterator[AgentProcess]:
    with running_agent(tmp_path_factory.mktemp("agent"), busybox, runtime=request.param) as agent:
        yield agent


@pytest.fixture
def agent(shared: AgentProcess) -> Iterator[AgentProcess]:
    yield shared
    remove_all_pods(shared.client)
    assert shared.client.findings() == []


@pytest.fixture
def pod(agent: AgentProcess) -> Pod:
    return Pod.run(agent, sandbox_config(agent))


def process_label(pod: Pod, container_id: str) -> str:
    """The label of a container's first process, as the host sees it."""
    pid = information(pod.agent.client, container_id)["pid"]
    return Path(f"/proc/{pid}/attr/current").read_text().strip("\0\n")


def file_label(path: Path | str) -> str:
    return os.getxattr(path, "security.selinux").rstrip(b"\0").decode()


def level(label: str) -> str:
    return label.split(":", 3)[3]


def inside(pod: Pod, container_id: str, path: str) -> str:
    """The label of a file as it is in the container, by its root as the host reaches it."""
    pid = information(pod.agent.client, container_id)["pid"]
    return file_label(f"/proc/{pid}/root{path}")


def may_write(process: str, file: str) -> bool:
    """Whether the kernel allows a process to write such a file, by its answer to a query (for class file)."""
    number = int((SELINUX / "class/file/index").read_text())
    bit = int((SELINUX / "class/file/perms/write").read_text())
    descriptor = os.open(SELINUX / "access", os.O_RDWR | os.O_CLOEXEC)
    try:
        os.write(descriptor, f"{process} {file} {number}".encode())
        allowed = int(os.read(descriptor, 4096).split()[0], 16)
    finally:
        os.close(descriptor)
    return bool(allowed >> (bit - 1) & 1)


def test_a_pod_has_its_own_categories(pod: Pod) -> None:
    container_id = pod.sleeping()
    label = process_label(pod, container_id)
    assert re.fullmatch(r"system_u:system_r:container_t:s0:c\d+,c\d+", label)
    assert pod.agent.client.output(container_id, "cat", "/proc/self/attr/current").strip("\0\n") == label
    assert process_label(pod, pod.sleeping("other")) == label
    second = Pod.run(pod.agent, sandbox_config(pod.agent))
    assert level(process_label(second, second.sleeping())) != level(label)


def test_all_that_a_container_sees_has_its_label(pod: Pod, tmp_path: Path) -> None:
    volume = tmp_path / "volume"
    (volume / "deep").mkdir(parents=True)
    (volume / "deep/file").write_text("")
    plain = tmp_path / "plain"
    plain.mkdir()
    before = file_label(plain)
    config = container_config("main", *SLEEP)
    config.mounts.add(container_path="/volume", host_path=str(volume), selinux_relabel=True)
    config.mounts.add(container_path="/plain", host_path=str(plain))
    config.mounts.add(container_path="/image", image=cri_pb2.ImageSpec(image=BUSYBOX), readonly=True)
    container_id = pod.start(config)
    expected = f"system_u:object_r:container_file_t:{level(process_label(pod, container_id))}"
    pod.agent.client.output(container_id, "touch", "/new", "/dev/shm/new", "/volume/deep/new")
    seen = ["/", "/bin", "/bin/busybox", "/new", "/dev/shm", "/dev/shm/new", "/etc/hosts", "/etc/resolv.conf"]
    seen += [
        "/image",
        "/image/bin/busybox",
        "/etc/hostname",
        "/volume",
        "/volume/deep",
        "/volume/deep/file",
        "/volume/deep/new",
    ]
    assert {path: inside(pod, container_id, path) for path in seen} == dict.fromkeys(seen, expected)
    assert inside(pod, container_id, "/plain") == before
    assert file_label(volume / "deep/file") == expected


def test_the_kernel_keeps_pods_apart(pod: Pod) -> None:
    second = Pod.run(pod.agent, sandbox_config(pod.agent))
    containers = [(each, each.sleeping()) for each in (pod, second)]
    processes = [process_label(*container) for container in containers]
    files = [inside(*container, "/bin/busybox") for container in containers]
    decisions = [[may_write(process, file) for file in files] for process in processes]
    assert decisions == [[True, False], [False, True]]


def test_given_labels_are_taken(pod: Pod) -> None:
    config = sandbox_config(pod.agent)
    config.linux.security_context.selinux_options.level = "s0:c1,c2"
    given = Pod.run(pod.agent, config)
    first = given.sleeping()
    assert process_label(given, first) == "system_u:system_r:container_t:s0:c1,c2"
    own = container_config("own", *SLEEP)
    own.linux.security_context.selinux_options.level = "s0:c3,c4"
    second = given.start(own)
    assert process_label(given, second) == "system_u:system_r:container_t:s0:c3,c4"
    assert inside(given, second, "/bin") == "system_u:object_r:container_file_t:s0:c3,c4"
    assert inside(given, first, "/bin") == "system_u:object_r:container_file_t:s0:c1,c2"


def test_a_privileged_container_has_no_label_from_the_agent(agent: AgentProcess) -> None:
    config = sandbox_config(agent)
    config.linux.security_context.privileged = True
    pod = Pod.run(agent, config)
    wanted = container_config("main", *SLEEP)
    wanted.linux.security_context.privileged = True
    assert "container_t" not in process_label(pod, pod.start(wanted))


@pytest.mark.parametrize(("field", "value"), [("type", "no_such_t"), ("user", "no_such_u"), ("level", "s7:c1")])
def test_what_the_policy_does_not_know_is_refused(pod: Pod, field: str, value: str) -> None:
    config = container_config("main", *SLEEP)
    setattr(config.linux.security_context.selinux_options, field, value)
    with refused(grpc.StatusCode.INVALID_ARGUMENT, value):
        pod.create(config)


def test_system_folders_keep_their_labels(pod: Pod) -> None:
    before = file_label("/etc")
    config = container_config("main", *SLEEP)
    config.mounts.add(container_path="/host-etc", host_path="/etc", selinux_relabel=True)
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "/etc"):
        pod.create(config)
    assert file_label("/etc") == before


def test_levels_are_kept_until_their_pod_is_removed(pod: Pod) -> None:
    label = process_label(pod, pod.sleeping())
    pod.agent.restart()
    assert process_label(pod, pod.sleeping("later")) == label
    client = pod.agent.client
    client.stop_sandbox(pod.id)
    client.remove_sandbox(pod.id)
    config = sandbox_config(pod.agent)
    config.linux.security_context.selinux_options.level = level(label)
    again = Pod.run(pod.agent, config)
    assert process_label(again, again.sleeping()) == label
