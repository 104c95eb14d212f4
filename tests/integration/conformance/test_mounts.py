"""Mounts of host paths."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from host import libc
from host.files import mounts
from proto.runtime.v1 import cri_pb2
from tests.integration.conformance.support import SLEEP, Pod, refused
from tests.support.agent import AgentProcess
from tests.support.pods import container_config, sandbox_config


@pytest.fixture
def host(tmp_path: Path) -> Path:
    (tmp_path / "file").write_text("from the host")
    return tmp_path


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[Path]:
    """A folder on a shared mount, with another mount inside."""
    folder = tmp_path / "shared"
    folder.mkdir()
    libc.mount("tmpfs", str(folder), "tmpfs", 0, "size=1m")
    try:
        libc.mount("", str(folder), "", mounts.MS_SHARED, "")
        (folder / "inner").mkdir()
        (folder / "late").mkdir()
        libc.mount("tmpfs", str(folder / "inner"), "tmpfs", 0, "size=1m")
        yield folder
    finally:
        for target in mounts.mounts_below(folder):
            mounts.unmount(target, lazy=True)


def _mounting(name: str, *command: str, **mount: object) -> cri_pb2.ContainerConfig:
    config = container_config(name, *command)
    config.mounts.add(**mount)
    return config


def test_folder_is_shared_both_ways(pod: Pod, host: Path) -> None:
    script = "cat /m/file; echo from inside > /m/new"
    assert pod.printed(_mounting("main", "sh", "-c", script, container_path="/m", host_path=str(host))).strip() == (
        "from the host"
    )
    assert (host / "new").read_text() == "from inside\n"


def test_status_shows_mounts_as_they_were_given(pod: Pod, host: Path) -> None:
    config = _mounting("main", *SLEEP, container_path="/m", host_path=str(host), readonly=True)
    assert list(pod.agent.client.status(pod.create(config)).mounts) == list(config.mounts)


def test_read_only(pod: Pod, host: Path) -> None:
    script = "cat /m/file; echo no > /m/new && exit 9; grep ' /m ' /proc/mounts"
    output = pod.printed(_mounting("main", "sh", "-c", script, container_path="/m", host_path=str(host), readonly=True))
    assert " ro," in output
    assert not (host / "new").exists()


def test_missing_host_path_becomes_a_folder(pod: Pod, host: Path) -> None:
    missing = host / "not" / "there"
    pod.printed(_mounting("main", "touch", "/m/new", container_path="/m", host_path=str(missing)))
    assert (missing / "new").exists()


def test_single_file_and_termination_log(pod: Pod, host: Path) -> None:
    log = host / "termination"
    log.touch(mode=0o666)
    script = "echo bye > /dev/termination-log"
    pod.printed(_mounting("main", "sh", "-c", script, container_path="/dev/termination-log", host_path=str(log)))
    assert log.read_text() == "bye\n"


def test_symbolic_links_of_the_host_are_followed(pod: Pod, host: Path) -> None:
    (host / "real").mkdir()
    (host / "real" / "file").write_text("real")
    (host / "link").symlink_to(host / "real")
    (host / "file-link").symlink_to("real/file")
    for name, path, target in (("folder", "link", "/m/file"), ("file", "file-link", "/m")):
        config = _mounting(name, "cat", target, container_path="/m", host_path=str(host / path))
        assert pod.printed(config).strip() == "real"


def test_dangling_link_is_refused(pod: Pod, host: Path) -> None:
    (host / "dangling").symlink_to("nowhere")
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "dangling"):
        pod.create(_mounting("main", "true", container_path="/m", host_path=str(host / "dangling")))


def test_mounts_inside_mounts(pod: Pod, host: Path) -> None:
    (host / "sub").mkdir()
    (host / "other").mkdir()
    (host / "other" / "deep").write_text("deep")
    config = container_config("main", "cat", "/m/sub/deep")
    config.mounts.add(container_path="/m/sub", host_path=str(host / "other"))
    config.mounts.add(container_path="/m", host_path=str(host))
    assert pod.printed(config).strip() == "deep"


def test_links_of_the_image_do_not_lead_out(pod: Pod, host: Path) -> None:
    """A mount point that is a symbolic link in the root file system leads to a place inside it."""
    outside = host / "outside"
    outside.mkdir()
    first = host / "volume"
    first.mkdir()
    (first / "escape").symlink_to(outside)
    config = container_config("main", *SLEEP)
    config.mounts.add(container_path="/volume", host_path=str(first))
    config.mounts.add(container_path="/volume/escape/m", host_path=str(host / "file"))
    try:
        pod.start(config)
    except grpc.RpcError as error:
        assert error.code() is not grpc.StatusCode.UNKNOWN
    assert not list(outside.iterdir())


def test_bad_container_paths_are_refused(pod: Pod, host: Path) -> None:
    for path in ("relative", "", "/", "/a/../../b"):
        with refused(grpc.StatusCode.INVALID_ARGUMENT, "container_path"):
            pod.create(_mounting("main", "true", container_path=path, host_path=str(host)))
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "host_path"):
        pod.create(_mounting("main", "true", container_path="/m", host_path="relative"))


def test_private_propagation(pod: Pod, shared: Path) -> None:
    container_id = pod.start(_mounting("main", *SLEEP, container_path="/m", host_path=str(shared)))
    libc.mount("tmpfs", str(shared / "late"), "tmpfs", 0, "size=1m")
    table = pod.agent.client.output(container_id, "cat", "/proc/mounts")
    assert " /m/inner " in table
    assert " /m/late " not in table


def test_host_to_container_propagation(pod: Pod, shared: Path) -> None:
    mount = {"container_path": "/m", "host_path": str(shared), "propagation": "PROPAGATION_HOST_TO_CONTAINER"}
    container_id = pod.start(_mounting("main", *SLEEP, **mount))
    libc.mount("tmpfs", str(shared / "late"), "tmpfs", 0, "size=1m")
    assert " /m/late " in pod.agent.client.output(container_id, "cat", "/proc/mounts")


def test_bidirectional_propagation(privileged: Pod, shared: Path) -> None:
    mount = {"container_path": "/m", "host_path": str(shared), "propagation": "PROPAGATION_BIDIRECTIONAL"}
    config = _mounting("main", *SLEEP, **mount)
    config.linux.security_context.privileged = True
    container_id = privileged.start(config)
    privileged.agent.client.output(container_id, "mount", "-t", "tmpfs", "tmpfs", "/m/late")
    assert str((shared / "late").resolve()) in {entry.target for entry in mounts.mount_table()}
    mounts.unmount(shared / "late")
    assert " /m/late " not in privileged.agent.client.output(container_id, "cat", "/proc/mounts")


def test_propagation_needs_a_source_that_shares(privileged: Pod, host: Path) -> None:
    libc.mount("tmpfs", str(host), "tmpfs", 0, "size=1m")
    try:
        libc.mount("", str(host), "", mounts.MS_PRIVATE, "")
        for propagation in ("PROPAGATION_BIDIRECTIONAL", "PROPAGATION_HOST_TO_CONTAINER"):
            mount = {"container_path": "/m", "host_path": str(host), "propagation": propagation}
            with refused(grpc.StatusCode.INVALID_ARGUMENT, "shared"):
                privileged.create(_mounting("main", *SLEEP, **mount))
    finally:
        mounts.unmount(host)


def test_read_only_holds_for_the_mount_itself_alone(pod: Pod, shared: Path) -> None:
    mount = {"container_path": "/m", "host_path": str(shared), "readonly": True, "selinux_relabel": True}
    container_id = pod.start(_mounting("main", *SLEEP, **mount))
    assert pod.agent.client.exec(container_id, "touch", "/m/file").exit_code != 0
    pod.agent.client.output(container_id, "touch", "/m/inner/file")
    assert (shared / "inner" / "file").exists()


def test_recursive_read_only(pod: Pod, shared: Path) -> None:
    mount = {"container_path": "/m", "host_path": str(shared), "recursive_read_only": True}
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "readonly"):
        pod.create(_mounting("main", *SLEEP, **mount))
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "propagation"):
        pod.create(_mounting("main", *SLEEP, readonly=True, propagation="PROPAGATION_HOST_TO_CONTAINER", **mount))


def test_recursive_read_only_with_every_handler(agent: AgentProcess, shared: Path) -> None:
    config = _mounting("main", "touch", "/m/inner/file", container_path="/m", host_path=str(shared), readonly=True)
    config.mounts[0].recursive_read_only = True
    status = agent.client.call("Status", cri_pb2.StatusRequest())
    for handler in status.runtime_handlers:
        sandbox = sandbox_config(agent)
        pod = Pod(agent, sandbox, agent.client.run_sandbox(sandbox, handler=handler.name))
        if handler.features.recursive_read_only_mounts:
            assert pod.finished(config).exit_code == 1
            assert not (shared / "inner" / "file").exists()
        else:
            with refused(grpc.StatusCode.UNKNOWN, "^RROUnsupported"):
                pod.create(config)


def test_mount_options(pod: Pod, host: Path) -> None:
    mount = {"container_path": "/m", "host_path": str(host), "mount_options": ["noexec", "nodev", "nosuid"]}
    (line,) = pod.printed(_mounting("main", "grep", " /m ", "/proc/mounts", **mount)).splitlines()
    assert {"noexec", "nodev", "nosuid"} <= set(line.split()[3].split(","))
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "mount option"):
        pod.create(_mounting("bad", "true", container_path="/m", host_path=str(host), mount_options=["dev"]))


def test_etc_hosts_of_the_client_goes_before_ours(pod: Pod, host: Path) -> None:
    (host / "hosts").write_text("10.0.0.1 mine\n")
    config = _mounting("main", "cat", "/etc/hosts", container_path="/etc/hosts", host_path=str(host / "hosts"))
    assert pod.printed(config) == "10.0.0.1 mine\n"
    own = pod.printed(container_config("own", "cat", "/etc/hosts"))
    address = pod.agent.client.sandbox_status(pod.id).network.ip
    assert "localhost" in own
    assert f"{address}\t{pod.config.hostname}" in own


def test_subpath_of_a_volume_by_its_descriptor(pod: Pod, host: Path) -> None:
    """kubelet makes bind mounts for subPaths: the mount of that time counts, not its path later."""
    target = host / "volume-subpath"
    target.mkdir()
    source = host / "volume"
    (source / "sub").mkdir(parents=True)
    (source / "sub" / "file").write_text("sub")
    mounts.bind(source / "sub", target)
    try:
        config = _mounting("main", "cat", "/m/file", container_path="/m", host_path=str(target))
        assert pod.printed(config).strip() == "sub"
    finally:
        mounts.unmount(target, lazy=True)


def test_sockets_and_devices_of_the_host_as_files(pod: Pod, host: Path) -> None:
    os.mkfifo(host / "fifo")
    config = _mounting("main", "test", "-p", "/m", container_path="/m", host_path=str(host / "fifo"))
    assert pod.finished(config).exit_code == 0
