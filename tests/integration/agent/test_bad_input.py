"""Requests that must be refused: the right code, a message that names the object and the remedy, and nothing left."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import grpc
import pytest

from proto.runtime.v1 import cri_pb2
from tests.integration.agent.refusals import refused
from tests.support.agent import AgentProcess, running_agent
from tests.support.pods import container_config, run_container, sandbox_config, shared_pids

Sandbox = cri_pb2.PodSandboxConfig
Container = cri_pb2.ContainerConfig

_BAD_SANDBOXES: dict[str, tuple[Callable[[Sandbox], object], str, tuple[str, ...]]] = {
    "no metadata": (lambda c: c.ClearField("metadata"), "INVALID_ARGUMENT", ("metadata.name",)),
    "long name": (lambda c: setattr(c.metadata, "name", "n" * 254), "INVALID_ARGUMENT", ("name", "253")),
    "long namespace": (lambda c: setattr(c.metadata, "namespace", "n" * 254), "INVALID_ARGUMENT", ("253",)),
    "slash in name": (lambda c: setattr(c.metadata, "name", "a/../../b"), "INVALID_ARGUMENT", ("slash",)),
    "long hostname": (lambda c: setattr(c, "hostname", "h" * 65), "INVALID_ARGUMENT", ("hostname", "64")),
    "relative log folder": (lambda c: setattr(c, "log_directory", "logs"), "INVALID_ARGUMENT", ("absolute",)),
    "relative cgroup": (lambda c: setattr(c.linux, "cgroup_parent", "x"), "INVALID_ARGUMENT", ("cgroup parent", "'x'")),
    "cgroup upwards": (
        lambda c: setattr(c.linux, "cgroup_parent", "/a/../../b"),
        "INVALID_ARGUMENT",
        ("cgroup parent", "/a/../../b"),
    ),
    "slice with cgroupfs": (
        lambda c: setattr(c.linux, "cgroup_parent", "/pod.slice"),
        "INVALID_ARGUMENT",
        ("pod.slice", "driver"),
    ),
    "pid mode": (
        lambda c: setattr(c.linux.security_context.namespace_options, "pid", cri_pb2.TARGET),
        "INVALID_ARGUMENT",
        ("TARGET", "CONTAINER"),
    ),
    "network mode": (
        lambda c: setattr(c.linux.security_context.namespace_options, "network", cri_pb2.TARGET),
        "INVALID_ARGUMENT",
        ("network", "NODE"),
    ),
    "unsafe sysctl": (
        lambda c: c.linux.sysctls.update({"kernel.panic": "1"}),
        "INVALID_ARGUMENT",
        ("kernel.panic",),
    ),
    "sysctl the kernel refuses": (
        lambda c: c.linux.sysctls.update({"net.ipv4.ip_forward": "many"}),
        "INVALID_ARGUMENT",
        ("net.ipv4.ip_forward",),
    ),
    "sysctl that is missing": (
        lambda c: c.linux.sysctls.update({"net.ipv4.no_such": "1"}),
        "INVALID_ARGUMENT",
        ("net.ipv4.no_such",),
    ),
    "name server": (
        lambda c: c.dns_config.servers.append("10.0.0.1\nnameserver 6.6.6.6"),
        "INVALID_ARGUMENT",
        ("10.0.0.1",),
    ),
    "port": (
        lambda c: c.port_mappings.add(host_port=70000, container_port=80),
        "INVALID_ARGUMENT",
        ("70000",),
    ),
    "port protocol": (
        lambda c: c.port_mappings.add(host_port=28090, container_port=80, protocol=7),
        "INVALID_ARGUMENT",
        ("port_mappings[0].protocol", "7", "SCTP"),
    ),
    "port address": (
        lambda c: c.port_mappings.add(host_port=28090, container_port=80, host_ip="nowhere"),
        "INVALID_ARGUMENT",
        ("nowhere",),
    ),
}

_BAD_CONTAINERS: dict[str, tuple[Callable[[Container], object], str, tuple[str, ...]]] = {
    "no metadata": (lambda c: c.ClearField("metadata"), "INVALID_ARGUMENT", ("metadata.name",)),
    "long name": (lambda c: setattr(c.metadata, "name", "n" * 254), "INVALID_ARGUMENT", ("253",)),
    "no image": (lambda c: c.ClearField("image"), "INVALID_ARGUMENT", ("image.image",)),
    "absent image": (
        lambda c: setattr(c.image, "image", "example.org/absent:1"),
        "NOT_FOUND",
        ("example.org/absent:1", "pull it first"),
    ),
    "bad image": (lambda c: setattr(c.image, "image", "UPPER CASE"), "INVALID_ARGUMENT", ("UPPER CASE",)),
    "log upwards": (lambda c: setattr(c, "log_path", "../../x.log"), "INVALID_ARGUMENT", ("../../x.log", "inside")),
    "target": (
        lambda c: c.linux.security_context.namespace_options.MergeFrom(
            cri_pb2.NamespaceOption(pid=cri_pb2.TARGET, target_id="feed")
        ),
        "INVALID_ARGUMENT",
        ("feed", "pod"),
    ),
    "no target": (
        lambda c: setattr(c.linux.security_context.namespace_options, "pid", cri_pb2.TARGET),
        "INVALID_ARGUMENT",
        ("target_id",),
    ),
    "privileged": (
        lambda c: setattr(c.linux.security_context, "privileged", True),
        "INVALID_ARGUMENT",
        ("privileged",),
    ),
    "unknown capability": (
        lambda c: c.linux.security_context.capabilities.add_capabilities.append("FLY"),
        "INVALID_ARGUMENT",
        ("FLY",),
    ),
    "group without user": (
        lambda c: setattr(c.linux.security_context.run_as_group, "value", 7),
        "INVALID_ARGUMENT",
        ("run_as_group",),
    ),
    "unknown user": (
        lambda c: setattr(c.linux.security_context, "run_as_username", "nobody-knows"),
        "INVALID_ARGUMENT",
        ("nobody-knows",),
    ),
    "seccomp file": (
        lambda c: c.linux.security_context.seccomp.MergeFrom(
            cri_pb2.SecurityProfile(
                profile_type=cri_pb2.SecurityProfile.Localhost, localhost_ref="/absent/seccomp.json"
            )
        ),
        "INVALID_ARGUMENT",
        ("/absent/seccomp.json",),
    ),
    "relative mount": (
        lambda c: c.mounts.add(host_path="/tmp", container_path=""),
        "INVALID_ARGUMENT",
        ("container_path",),
    ),
    "absent device": (
        lambda c: c.devices.add(host_path="/dev/absent", container_path="/dev/absent", permissions="rwm"),
        "INVALID_ARGUMENT",
        ("/dev/absent",),
    ),
    "read-only recursively but writable": (
        lambda c: c.mounts.add(host_path="/tmp", container_path="/x", recursive_read_only=True),
        "INVALID_ARGUMENT",
        ("recursive", "/x"),
    ),
    "working folder": (lambda c: setattr(c, "working_dir", "here"), "INVALID_ARGUMENT", ("here",)),
}


@pytest.mark.parametrize("case", _BAD_SANDBOXES)
def test_bad_sandbox(agent: AgentProcess, case: str) -> None:
    if case == "slice with cgroupfs" and agent.cgroup_driver != "cgroupfs":
        pytest.skip("the driver here takes slices")
    spoil, code, words = _BAD_SANDBOXES[case]
    sandbox = sandbox_config(agent)
    spoil(sandbox)
    refused(code, *words, call=lambda: agent.client.run_sandbox(sandbox))
    assert not agent.client.call("ListPodSandbox", cri_pb2.ListPodSandboxRequest()).items


@pytest.mark.parametrize("case", _BAD_CONTAINERS)
def test_bad_container(agent: AgentProcess, case: str) -> None:
    spoil, code, words = _BAD_CONTAINERS[case]
    sandbox = sandbox_config(agent)
    sandbox_id = agent.client.run_sandbox(sandbox)
    container = container_config("main", "sleep", "1000")
    spoil(container)
    refused(code, *words, call=lambda: agent.client.create(sandbox_id, container, sandbox))
    assert not agent.client.call("ListContainers", cri_pb2.ListContainersRequest()).containers
    good = container_config("main", "sleep", "1000")
    agent.client.create(sandbox_id, good, sandbox)


def test_unknown_runtime_handler(agent: AgentProcess) -> None:
    message = refused("NOT_FOUND", "absent", call=lambda: agent.client.run_sandbox(sandbox_config(agent), "absent"))
    assert "runc" in message or "crun" in message


@pytest.mark.parametrize(("mode", "sysctl"), [("network", "net.core.somaxconn"), ("ipc", "kernel.shm_rmid_forced")])
def test_sysctls_of_the_node_are_refused(agent: AgentProcess, mode: str, sysctl: str) -> None:
    sandbox = sandbox_config(agent)
    setattr(sandbox.linux.security_context.namespace_options, mode, cri_pb2.NODE)
    sandbox.linux.sysctls[sysctl] = "1"
    refused("INVALID_ARGUMENT", sysctl, call=lambda: agent.client.run_sandbox(sandbox))


def test_a_taken_host_port(agent: AgentProcess) -> None:
    first, second = sandbox_config(agent), sandbox_config(agent)
    for sandbox in (first, second):
        sandbox.port_mappings.add(host_port=28091, container_port=80)
    agent.client.run_sandbox(first)
    refused("ALREADY_EXISTS", "28091", call=lambda: agent.client.run_sandbox(second))


def test_the_target_must_be_of_the_same_pod_and_run(agent: AgentProcess) -> None:
    client = agent.client
    _, elsewhere = run_container(agent, "sleep", "1000")
    sandbox = sandbox_config(agent)
    sandbox_id = client.run_sandbox(sandbox)
    created = client.create(sandbox_id, container_config("created", "sleep", "1000"), sandbox)
    for target, code, word in ((elsewhere, "INVALID_ARGUMENT", "pod"), (created, "FAILED_PRECONDITION", "run")):
        container = container_config("debugger", "sleep", "1000")
        options = cri_pb2.NamespaceOption(pid=cri_pb2.TARGET, target_id=target)
        container.linux.security_context.namespace_options.CopyFrom(options)
        refused(code, word, call=partial(client.create, sandbox_id, container, sandbox))


def test_a_log_path_that_leaves_by_a_link(agent: AgentProcess, tmp_path: Path) -> None:
    sandbox = sandbox_config(agent)
    sandbox_id = agent.client.run_sandbox(sandbox)
    Path(sandbox.log_directory).mkdir(parents=True, exist_ok=True)
    (Path(sandbox.log_directory) / "out").symlink_to(tmp_path)
    container = container_config("main", "sleep", "1000")
    container.log_path = "out/0.log"
    refused("INVALID_ARGUMENT", "out/0.log", "link", call=lambda: agent.client.create(sandbox_id, container, sandbox))
    assert not (tmp_path / "0.log").exists()


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    folders: list[Path] = []

    def mount(options: str) -> Path:
        folder = tmp_path / f"mounted-{len(folders)}"
        folder.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)
        folders.append(folder)
        return folder

    yield mount
    for folder in folders:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("options", ["ro", "size=4k,nr_inodes=1"], ids=["read-only", "full"])
def test_a_log_folder_that_cannot_be_written(agent: AgentProcess, mounted: Callable[[str], Path], options: str) -> None:
    sandbox = sandbox_config(agent)
    sandbox.log_directory = str(mounted(options))
    sandbox_id = agent.client.run_sandbox(sandbox)
    code = "RESOURCE_EXHAUSTED" if "size" in options else "INTERNAL"
    container = container_config("main", "sleep", "1000")
    refused(code, sandbox.log_directory, call=lambda: agent.client.create(sandbox_id, container, sandbox))
    container.log_path = ""
    agent.client.create(sandbox_id, container, sandbox)


def test_a_full_data_folder(busybox: Path, tmp_path: Path, mounted: Callable[[str], Path]) -> None:
    with running_agent(mounted("size=40m"), busybox) as agent:
        client = agent.client
        first, running = run_container(agent, "sleep", "1000")
        filler = agent.folder / "filler"
        _fill_up(filler)
        refused("RESOURCE_EXHAUSTED", str(agent.data), "space", call=lambda: _fill_the_store(agent))
        client.call("Version", cri_pb2.VersionRequest())
        assert client.sandbox_status(first).state == cri_pb2.SANDBOX_READY
        client.stop(running)
        assert client.status(running).exit_code == 137
        filler.unlink()
        run_container(agent, "sleep", "1000")
        agent.restart()
        assert agent.client.status(running).exit_code == 137
        assert agent.client.findings() == []
        _fill_up(filler)  # what takes the agent down does it without space too


def _fill_up(path: Path) -> None:
    with path.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(b"x" * 4096)


def _fill_the_store(agent: AgentProcess) -> None:
    for _ in range(500):
        sandbox = sandbox_config(agent, annotations={"large": "x" * 20_000})
        agent.client.run_sandbox(sandbox)


def test_containers_of_a_shared_pid_namespace_need_one_in_the_pod(agent: AgentProcess) -> None:
    sandbox = sandbox_config(agent)
    shared_pids(sandbox)
    sandbox_id = agent.client.run_sandbox(sandbox)
    container = container_config("main", "sleep", "1000")
    shared_pids(container)
    container_id = agent.client.create(sandbox_id, container, sandbox)
    agent.client.start(container_id)
    assert "podkeel-pod-init" in agent.client.output(container_id, "ps")


def test_a_command_with_a_nul_is_refused(agent: AgentProcess) -> None:
    """An OCI runtime would execute it with what is before the NUL."""
    _, container_id = run_container(agent, "sleep", "1000")
    for words in (["echo", "a\0b"], ["echo\0", "a"], ["-c", "a\0b", "\n", ""]):
        with pytest.raises(grpc.RpcError, match="the command holds a NUL byte") as refusal:
            agent.client.exec(container_id, *words)
        assert refusal.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    with pytest.raises(grpc.RpcError) as refusal:
        agent.client.exec(container_id, "-c", "\n", "", "=")
    assert refusal.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_exec_in_a_container_that_ends_meanwhile_says_so(agent: AgentProcess, handler: str) -> None:
    sandbox = sandbox_config(agent)
    sandbox_id = agent.client.run_sandbox(sandbox, handler)
    for number in range(5):
        config = container_config(f"short{number}", "sleep", f"0.{number + 1}")
        container_id = agent.client.create(sandbox_id, config, sandbox)
        agent.client.start(container_id)
        with pytest.raises(grpc.RpcError) as refusal:
            while True:
                assert agent.client.exec(container_id, "true").exit_code in (0, 137)
        assert refusal.value.code() is grpc.StatusCode.FAILED_PRECONDITION
