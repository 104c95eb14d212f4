"""Pods and containers as plugins see them."""

from __future__ import annotations

from pathlib import Path

import pytest

from host.processes import ProcessName
from proto.nri.v1alpha1 import nri_pb2
from proto.runtime.v1 import cri_pb2
from runtime.cgroups.tree import CgroupTree
from runtime.layout import ContainerFolder, SandboxFolder
from runtime.nri import messages
from runtime.nri.views import Views
from runtime.specgen import config as oci
from runtime.specgen.limits.extra_limits import ExtraLimits
from runtime.state.container import Container, ContainerRecord, ContainerState
from runtime.state.sandbox import Sandbox, SandboxRecord, SandboxState

LIMITS = cri_pb2.LinuxContainerResources(memory_limit_in_bytes=64 << 20, cpu_shares=512, cpuset_cpus="0-1")


@pytest.fixture
def sandbox() -> Sandbox:
    config = cri_pb2.PodSandboxConfig(labels={"app": "web"}, annotations={"a": "b"})
    config.metadata.CopyFrom(cri_pb2.PodSandboxMetadata(name="web", namespace="shop", uid="u1"))
    record = SandboxRecord(
        state=SandboxState.READY,
        created_at=1,
        handler="crun",
        requested_handler="",
        boot_id="b",
        cgroup_parent="/kubepods/pod1",
        addresses=("10.0.0.2", "fd00::2"),
        overhead=LIMITS.SerializeToString(),
    )
    return Sandbox("s1", config, record, SandboxFolder(Path("/run/s1")))


@pytest.fixture
def container(sandbox: Sandbox) -> Container:
    config = cri_pb2.ContainerConfig(labels={"l": "1"}, image=cri_pb2.ImageSpec(image="nginx:1"))
    config.metadata.name = "main"
    config.linux.resources.CopyFrom(LIMITS)
    config.linux.security_context.seccomp.profile_type = cri_pb2.SecurityProfile.Localhost
    config.linux.security_context.seccomp.localhost_ref = "/profile.json"
    record = ContainerRecord(
        state=ContainerState.RUNNING,
        created_at=1,
        started_at=2,
        handler="crun",
        boot_id="b",
        image_id="sha256:1",
        image_ref="nginx@sha256:2",
        cgroup="/kubepods/pod1/c1",
        init=ProcessName(4711, 1),
    )
    return Container("c1", sandbox, config, record, ContainerFolder(Path("/run/c1")))


def test_a_pods_message_has_its_namespaces_addresses_and_overhead(sandbox: Sandbox) -> None:
    told = messages.pod(sandbox, "/kubepods/pod1")
    assert (told.id, told.name, told.namespace, told.uid, told.pid) == ("s1", "web", "shop", "u1", 0)
    assert (dict(told.labels), dict(told.annotations)) == ({"app": "web"}, {"a": "b"})
    assert list(told.ips) == ["10.0.0.2", "fd00::2"]
    assert {space.type: space.path for space in told.linux.namespaces} == {
        "network": "/run/s1/ns/net",
        "uts": "/run/s1/ns/uts",
        "ipc": "/run/s1/ns/ipc",
    }
    assert told.linux.pod_overhead.memory.limit.value == 64 << 20
    assert not told.linux.pod_resources.memory.HasField("limit")


def test_a_containers_message_has_fields_that_other_agents_omit(container: Container) -> None:
    process = oci.Process(
        cwd="/",
        user=oci.User(uid=7, gid=8, additional_gids=[9]),
        args=["serve"],
        env=["A=1"],
        rlimits=[oci.Rlimit(type="RLIMIT_CORE", hard=2, soft=1)],
    )
    linux = oci.Linux(
        namespaces=[oci.Namespace(type="pid")],
        devices=[oci.Device(path="/dev/fuse", type="c", major=10, minor=229, file_mode=0o666)],
        cgroups_path="/kubepods/pod1/c1",
        resources=oci.Resources(devices=[oci.DeviceRule(allow=False, access="rwm")], pids=oci.Pids(limit=5)),
    )
    mounts = [oci.Mount(destination="/data", type="bind", source="/host", options=["ro"])]
    hooks = oci.Hooks(poststop=[oci.Hook(path="/bin/x", args=["x"], timeout=3)])
    spec = oci.Spec(
        oci_version=oci.VERSION, process=process, root=oci.Root(path="/r"), mounts=mounts, linux=linux, hooks=hooks
    )
    told = messages.container(container, spec)
    assert (told.id, told.pod_sandbox_id, told.name, told.pid) == ("c1", "s1", "main", 4711)
    assert told.state == nri_pb2.CONTAINER_RUNNING
    assert (list(told.args), list(told.env)) == (["serve"], ["A=1"])
    assert (told.user.uid, told.user.gid, list(told.user.additional_gids)) == (7, 8, [9])
    assert [(limit.type, limit.soft, limit.hard) for limit in told.rlimits] == [("RLIMIT_CORE", 1, 2)]
    assert [(mount.destination, list(mount.options)) for mount in told.mounts] == [("/data", ["ro"])]
    assert told.hooks.poststop[0].timeout.value == 3
    assert told.linux.devices[0].file_mode.value == 0o666
    assert (told.linux.resources.memory.limit.value, told.linux.resources.pids.limit) == (64 << 20, 5)
    assert told.linux.resources.devices[0].access == "rwm"
    assert told.linux.seccomp_profile.profile_type == nri_pb2.SecurityProfile.LOCALHOST
    assert told.linux.seccomp_profile.localhost_ref == "/profile.json"
    assert (told.image.name, told.image.digest, told.image.config_digest) == ("nginx:1", "nginx@sha256:2", "sha256:1")


def test_a_container_without_a_bundle_still_has_a_message(container: Container) -> None:
    container.record.state = ContainerState.EXITED
    container.record.exit_code = 137
    told = messages.container(container, None)
    assert (told.state, told.exit_code, told.pid) == (nri_pb2.CONTAINER_STOPPED, 137, 0)
    assert not told.args


def test_resources_come_back_as_they_went() -> None:
    given = cri_pb2.LinuxContainerResources(cpu_quota=-1, cpu_period=100, unified={"memory.high": "1"})
    given.MergeFrom(LIMITS)
    given.hugepage_limits.add(page_size="2MB", limit=4 << 20)
    assert messages.cri_resources(messages.resources(given)) == given


async def test_an_event_has_the_container_as_it_is_now(container: Container) -> None:
    views = Views(CgroupTree(1, "cgroupfs"))
    left = messages.container(container, None)
    left.linux.resources.pids.limit = 9
    left.linux.resources.blockio_class.value = "slow"
    left.linux.resources.hugepage_limits.add(page_size="2MB", limit=1)
    left.linux.cgroups_path = "/own"
    views.keep(left)
    container.record.extra_limits = ExtraLimits(block_io_class="")
    new = cri_pb2.LinuxContainerResources(cpu_shares=7)
    new.hugepage_limits.add(page_size="1GB", limit=2)
    for state, exit_code, stored in ((ContainerState.RUNNING, 0, LIMITS), (ContainerState.EXITED, 3, new)):
        container.record.state, container.record.exit_code = state, exit_code
        container.record.resources = stored.SerializeToString()
        told = nri_pb2.StopContainerRequest.FromString((await views.request(container)).encoded)
        assert told.pod == views.pod_message(container.sandbox)
        limits = told.container.linux.resources
        assert (told.container.id, told.container.linux.cgroups_path, limits.pids.limit) == ("c1", "/own", 9)
        assert (limits.HasField("blockio_class"), limits.blockio_class.value) == (True, "")
        assert limits.cpu.shares.value == stored.cpu_shares
        assert [page.page_size for page in limits.hugepage_limits] == ["1GB" if exit_code else "2MB"]
        assert (told.container.exit_code, told.container.pid) == (exit_code, 0 if exit_code else 4711)
    listed = (await views.inventory([container.sandbox], [container], {"c1": nri_pb2.CONTAINER_RUNNING}))[0]
    assert listed.pods[0] == told.pod
    told.container.state = nri_pb2.CONTAINER_RUNNING
    assert listed.containers[0] == told.container
