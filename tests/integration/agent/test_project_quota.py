"""Writable layers that the file system counts, on one with project quotas in a file of the test's own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from images.snapshots.project_quota import ProjectQuotas, ProjectUsage
from proto.runtime.v1 import cri_pb2
from tests.support.agent import AgentProcess, running_agent, wait_for
from tests.support.pods import container_config, remove_all_pods, run_container, sandbox_config, wait_for_log

MIB = 1 << 20
SLEEPER = ("sh", "-c", "mkdir /d; echo ready; exec sleep 1000")
FIRST_USER = 300_000
MAKE = {
    "ext4": ("mkfs.ext4", "-q", "-F", "-b", "4096", "-I", "256", "-O", "quota,project", "-E", "quotatype=prjquota"),
    "xfs": ("mkfs.xfs", "-q"),
}

# Give the file of argv[1] no project, from inside the user namespace of the process argv[2], if there is one.
LEAVE_PROJECT = """
import fcntl, os, struct, sys
from host import libc
descriptor = os.open(sys.argv[1], os.O_RDONLY)
if len(sys.argv) > 2:
    libc.setns(os.open(f"/proc/{sys.argv[2]}/ns/user", os.O_RDONLY), libc.CLONE_NEWUSER)
attributes = bytearray(28)
fcntl.ioctl(descriptor, 0x801C581F, attributes)
attributes[12:16] = struct.pack("=I", 0)
fcntl.ioctl(descriptor, 0x401C5820, attributes)
"""


@pytest.fixture(scope="module", params=sorted(MAKE))
def filesystem(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder on a file system with project quotas; reading a folder of it always leaves a trace."""
    make = MAKE[request.param]
    if shutil.which(make[0]) is None:
        pytest.skip(f"{make[0]} is not installed")
    folder = tmp_path_factory.mktemp(request.param)
    image, target = folder / "image", folder / "mounted"
    with image.open("wb") as file:
        file.truncate(512 * MIB)
    subprocess.run([*make, str(image)], check=True)
    target.mkdir()
    if shutil.which("modprobe"):
        for module in ("loop", "quota_v2"):  # if they are no modules, the mount shows it
            subprocess.run(["modprobe", "--quiet", module], check=False)
    mount = ["mount", "-o", "loop,prjquota,strictatime", str(image), str(target)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"this kernel mounts no {request.param} with project quotas: {done.stderr.splitlines()[0]}")
    try:
        yield target
    finally:
        subprocess.run(["umount", str(target)], check=True)


@contextmanager
def agent_in(folder: Path, busybox: Path, options: str) -> Iterator[AgentProcess]:
    folder.mkdir()
    with running_agent(folder, busybox, options=f"[images]\n{options}\n") as agent:
        yield agent
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def agent_for_all(filesystem: Path, busybox: Path) -> Iterator[AgentProcess]:
    """An agent that uses quotas for all containers."""
    with agent_in(filesystem / "all", busybox, 'project_quotas = "all"') as agent:
        yield agent


@pytest.fixture
def agent(agent_for_all: AgentProcess) -> Iterator[AgentProcess]:
    """That agent, empty of pods before and after."""
    yield agent_for_all
    remove_all_pods(agent_for_all.client)


@pytest.fixture
def quotas(filesystem: Path) -> Iterator[ProjectQuotas]:
    """The file system's quotas."""
    quotas = ProjectQuotas(filesystem, (1, 10))
    assert quotas.open() == ""
    yield quotas
    quotas.close()


def layer_of(agent: AgentProcess, container_id: str) -> cri_pb2.FilesystemUsage:
    """The writable layer in an answer, which must be of the time of asking."""
    before = time.time_ns()
    request = cri_pb2.ContainerStatsRequest(container_id=container_id)
    layer: cri_pb2.FilesystemUsage = agent.client.call("ContainerStats", request).stats.writable_layer
    assert before < layer.timestamp < time.time_ns()
    return layer


def folder_of(agent: AgentProcess, container_id: str) -> Path:
    return agent.data / "containers" / container_id


def sleeper(agent: AgentProcess) -> str:
    _, container_id = run_container(agent, *SLEEPER)
    wait_for_log(agent.client, container_id)
    return container_id


def user_namespace_sleeper(agent: AgentProcess) -> str:
    sandbox = sandbox_config(agent)
    options = sandbox.linux.security_context.namespace_options
    options.userns_options.mode = cri_pb2.POD
    for ids in (options.userns_options.uids, options.userns_options.gids):
        ids.add(host_id=FIRST_USER, container_id=0, length=65536)
    config = container_config("main", *SLEEPER)
    config.linux.security_context.namespace_options.CopyFrom(options)
    sandbox_id = agent.client.run_sandbox(sandbox)
    container_id = agent.client.create(sandbox_id, config, sandbox)
    agent.client.start(container_id)
    wait_for_log(agent.client, container_id)
    return container_id


def taken(folder: Path) -> tuple[int, int]:
    """Bytes and inodes of a tree, counted entry by entry."""
    statuses = [folder.lstat(), *(entry.lstat() for entry in folder.rglob("*"))]
    return sum(status.st_blocks * 512 for status in statuses), len(statuses)


def test_written_bytes_are_reported_at_once_and_exactly(agent: AgentProcess, filesystem: Path) -> None:
    container_id = sleeper(agent)
    upper = folder_of(agent, container_id) / "upper"
    read = upper.joinpath("d").stat().st_atime_ns
    empty = layer_of(agent, container_id)
    assert 2 <= empty.inodes_used.value < 10  # with the files of /etc that others are mounted over
    agent.client.output(container_id, "sh", "-c", f"head -c {8 * MIB} /dev/zero > /d/file")
    full = layer_of(agent, container_id)
    assert 8 * MIB <= full.used_bytes.value - empty.used_bytes.value < 8.1 * MIB
    assert full.inodes_used.value == empty.inodes_used.value + 1
    usage = agent.client.call("ImageFsInfo", cri_pb2.ImageFsInfoRequest()).container_filesystems[0]
    assert full.used_bytes.value < usage.used_bytes.value < full.used_bytes.value + MIB // 10
    subprocess.run(["sync", "--file-system", str(filesystem)], check=True)
    synced = layer_of(agent, container_id)
    assert upper.joinpath("d").stat().st_atime_ns == read  # no thread has walked there
    assert (synced.used_bytes.value, synced.inodes_used.value) == taken(upper)
    agent.client.output(container_id, "mv", "/d", "/e")
    agent.client.output(container_id, "rm", "/e/file")
    left = layer_of(agent, container_id)
    assert left.used_bytes.value < empty.used_bytes.value + MIB // 10
    assert (left.used_bytes.value, left.inodes_used.value) == taken(upper)


def test_a_restarted_agent_keeps_the_projects(agent: AgentProcess, quotas: ProjectQuotas) -> None:
    container_id = sleeper(agent)
    agent.client.output(container_id, "sh", "-c", f"head -c {MIB} /dev/zero > /d/file; sync")
    before = layer_of(agent, container_id)
    project = quotas.assigned(folder_of(agent, container_id))
    agent.restart()
    after = layer_of(agent, container_id)  # the first answer
    assert (after.used_bytes.value, after.inodes_used.value) == (before.used_bytes.value, before.inodes_used.value)
    second = quotas.assigned(folder_of(agent, sleeper(agent)))
    assert second not in (0, project)


def test_a_project_is_given_again_once_nothing_has_it(agent: AgentProcess, quotas: ProjectQuotas) -> None:
    project = quotas.assigned(folder_of(agent, sleeper(agent)))
    assert quotas.usage(project).inodes > 3
    remove_all_pods(agent.client)
    wait_for(lambda: quotas.usage(project) == ProjectUsage(0, 0), what="the end of the files")
    assert quotas.assigned(folder_of(agent, sleeper(agent))) == project


def test_containers_beyond_the_range_are_counted(filesystem: Path, busybox: Path, quotas: ProjectQuotas) -> None:
    with agent_in(filesystem / "one", busybox, 'project_quotas = "all"\nproject_ids = [70000, 70000]') as agent:
        first, second = sleeper(agent), sleeper(agent)
        assert quotas.assigned(folder_of(agent, first)) == 70000
        assert quotas.assigned(folder_of(agent, second)) == 0
        assert "all project ids are in use" in agent.log.read_text()
        agent.client.output(second, "sh", "-c", f"head -c {MIB} /dev/zero > /file")
        request = cri_pb2.ContainerStatsRequest(container_id=second)
        wait_for(
            lambda: agent.client.call("ContainerStats", request).stats.writable_layer.used_bytes.value >= MIB,
            25,
            "the count",
        )


def leave_project(path: Path, *pid: str) -> bool:
    """Whether root could give the file that a container made no project."""
    command = [sys.executable, "-c", LEAVE_PROJECT, str(path), *pid]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 or "OSError: [Errno 22]" in done.stderr, done.stderr
    return done.returncode == 0


def test_only_a_user_namespace_keeps_files_in_their_project(
    filesystem: Path, busybox: Path, quotas: ProjectQuotas
) -> None:
    with agent_in(filesystem / "usual", busybox, "") as agent:
        plain, mapped = sleeper(agent), user_namespace_sleeper(agent)
        assert quotas.assigned(folder_of(agent, plain)) == 0
        project = quotas.assigned(folder_of(agent, mapped))
        assert project != 0
        agent.client.output(mapped, "sh", "-c", f"head -c {MIB} /dev/zero > /d/file")
        assert layer_of(agent, mapped).used_bytes.value >= MIB
        inside = agent.run / "containers" / mapped / "rootfs" / "d" / "file"
        request = cri_pb2.ContainerStatusRequest(container_id=mapped, verbose=True)
        pid = json.loads(agent.client.call("ContainerStatus", request).info["info"])["pid"]
        assert not leave_project(inside, str(pid))
        assert quotas.usage(project).used_bytes >= MIB
        assert leave_project(inside)  # as root in a container without a user namespace could
        assert quotas.usage(project).used_bytes < MIB
