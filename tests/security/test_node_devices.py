"""No container gets a device file of the node, and owner and mode of the node's devices never change."""

from __future__ import annotations

import json
import os
import secrets
import stat
import tarfile
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from proto.runtime.v1 import cri_pb2
from tests.integration.agent.hardening import Attacker, import_image, init_pid, like_kubelets, with_python
from tests.integration.conformance.support import refused
from tests.security.conftest import FIRST_ID, pod_config
from tests.support.agent import AgentProcess, wait_for
from tests.support.image_builder import folder
from tests.support.pods import log_lines, shared_pids

NAMES = ("null", "zero", "full", "random", "urandom", "tty")


def of_node() -> dict[str, os.stat_result]:
    return {name: Path("/dev", name).stat() for name in NAMES}


def identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


@pytest.fixture(autouse=True)
def untouched() -> Iterator[None]:
    """Assert that owner and mode of the node's devices do not change."""
    before = {name: (s.st_uid, s.st_gid, s.st_mode, s.st_ino) for name, s in of_node().items()}
    yield
    assert {name: (s.st_uid, s.st_gid, s.st_mode, s.st_ino) for name, s in of_node().items()} == before


def start(
    agent: AgentProcess,
    handler: str,
    config: cri_pb2.ContainerConfig,
    *,
    user_namespace: bool,
    host_pid: bool = False,
    privileged: bool = False,
) -> Attacker:
    sandbox = pod_config(agent, user_namespace=user_namespace)
    if host_pid:
        sandbox.linux.security_context.namespace_options.pid = cri_pb2.NODE
    sandbox.linux.security_context.privileged = privileged
    config.linux.security_context.privileged = privileged
    config.linux.security_context.namespace_options.CopyFrom(sandbox.linux.security_context.namespace_options)
    sandbox_id = agent.client.run_sandbox(sandbox, handler)
    container_id = agent.client.create(sandbox_id, config, sandbox)
    agent.client.start(container_id)
    return Attacker(agent, sandbox, sandbox_id, container_id)


CHMOD = """
for path in /dev/null /dev/zero /dev/full /dev/random /dev/urandom /dev/tty /proc/1/fd/0 /proc/self/fd/0; do
  chown 1000:1000 $path; chmod 640 $path
done
"""


@pytest.mark.parametrize("streams", ["plain", "stdin", "terminal"])
def test_devices_and_streams_are_the_container_s_own(
    quiet_log: AgentProcess, handler: str, user_namespace: bool, streams: str
) -> None:
    config = like_kubelets("main", stdin=streams != "plain", tty=streams == "terminal")
    ours = start(quiet_log, handler, config, user_namespace=user_namespace)
    process = Path(f"/proc/{init_pid(quiet_log, ours.container_id)}")
    wait_for(lambda: (process / "comm").read_text() == "sleep\n", what="the runtime's last step")
    node = {identity(status) for status in of_node().values()}
    held = [path.stat() for path in (process / "fd").iterdir()]
    held += [(process / "root/dev" / name).stat() for name in NAMES]
    assert not node & {identity(status) for status in held}
    ours.shell(CHMOD)
    assert ours.shell("echo written > /dev/null && head -c 4 /dev/zero | wc -c").strip() == "4"


@pytest.mark.parametrize("uid", [0, 1000])
def test_root_of_a_user_namespace_does_not_own_its_devices(quiet_log: AgentProcess, handler: str, uid: int) -> None:
    config = like_kubelets("main")
    config.linux.security_context.run_as_user.value = uid
    ours = start(quiet_log, handler, config, user_namespace=True)
    output = ours.shell(f"{CHMOD}\nstat -c '%n %u %a' /dev/null /dev/urandom /dev/tty")
    assert output.splitlines()[-3:] == ["/dev/null 65534 666", "/dev/urandom 65534 666", "/dev/tty 65534 666"], output
    links = "for link in fd stdin stdout stderr ptmx; do readlink /dev/$link; done; ls -d /dev/mqueue /dev/pts /dev/shm"
    assert ours.shell(links).split() == [
        "/proc/self/fd",
        "/proc/self/fd/0",
        "/proc/self/fd/1",
        "/proc/self/fd/2",
        "pts/ptmx",
        "/dev/mqueue",
        "/dev/pts",
        "/dev/shm",
    ]


def test_a_container_without_input_reads_the_end_of_file(
    quiet_log: AgentProcess, handler: str, user_namespace: bool
) -> None:
    config = like_kubelets("main", "sh", "-c", "cat; echo read; test -c /dev/stdin && echo device; exec sleep 1000")
    ours = start(quiet_log, handler, config, user_namespace=user_namespace)
    path = quiet_log.client.status(ours.container_id).log_path
    wait_for(lambda: len(log_lines(path)) == 2, what="the container's words")
    assert log_lines(path) == ["read", "device"]


def test_requested_devices_in_a_user_namespace_are_the_container_s_own(quiet_log: AgentProcess, handler: str) -> None:
    config = like_kubelets("main")
    for host, inside in (("/dev/zero", "/dev/some/zero"), ("/dev/full", "/devices/full"), ("/dev/zero", "/dev/null")):
        config.devices.add(host_path=host, container_path=inside, permissions="rw")
    ours = start(quiet_log, handler, config, user_namespace=True)
    root = Path(f"/proc/{init_pid(quiet_log, ours.container_id)}/root")
    node = {identity(status) for status in of_node().values()}
    for inside, device in (("dev/some/zero", (1, 5)), ("devices/full", (1, 7)), ("dev/null", (1, 5))):
        status = (root / inside).stat()
        assert stat.S_ISCHR(status.st_mode)
        assert (os.major(status.st_rdev), os.minor(status.st_rdev)) == device
        assert identity(status) not in node
    assert ours.shell("head -c 3 /dev/some/zero | wc -c; echo x > /devices/full").split()[0] == "3"
    assert "not permitted" in ours.shell("chmod 600 /dev/some/zero")
    assert "not permitted" in ours.shell("chmod 600 /devices/full")


def test_a_device_at_the_path_of_a_folder_is_refused(quiet_log: AgentProcess, handler: str) -> None:
    config = like_kubelets("main")
    config.devices.add(host_path="/dev/zero", container_path="/dev/null/zero", permissions="rw")
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "/dev/null/zero cannot be made"):
        start(quiet_log, handler, config, user_namespace=True)


@pytest.fixture
def described() -> Iterator[str]:
    """A CDI device with two device nodes, one of which has an owner."""
    kind = f"pkt{secrets.token_hex(3)}.example/device"
    place = Path("/var/run/cdi")
    new = not place.exists()
    place.mkdir(parents=True, exist_ok=True)
    file = place / f"{kind.partition('.')[0]}.json"
    nodes = [{"path": "/dev/own/zero", "hostPath": "/dev/zero", "uid": 7, "gid": 8, "fileMode": 0o600}]
    nodes.append({"path": "/vendor/full", "hostPath": "/dev/full"})
    device = {"name": "one", "containerEdits": {"deviceNodes": nodes}}
    file.write_text(json.dumps({"cdiVersion": "0.6.0", "kind": kind, "devices": [device]}))
    yield f"{kind}=one"
    file.unlink()
    if new:
        place.rmdir()


def test_cdi_devices_in_a_user_namespace_are_the_container_s_own(
    quiet_log: AgentProcess, handler: str, described: str
) -> None:
    config = like_kubelets("main")
    config.CDI_devices.add(name=described)
    ours = start(quiet_log, handler, config, user_namespace=True)
    assert ours.shell("stat -c '%u %g %a' /dev/own/zero /vendor/full").splitlines() == ["7 8 600", "0 0 666"]
    root = Path(f"/proc/{init_pid(quiet_log, ours.container_id)}/root")
    node = {identity(status) for status in of_node().values()}
    assert not node & {identity((root / path).stat()) for path in ("dev/own/zero", "vendor/full")}
    assert (root / "dev/own/zero").stat().st_uid == FIRST_ID + 7
    assert ours.shell("chmod 640 /vendor/full; head -c 2 /dev/own/zero | wc -c").strip() == "2"


@pytest.mark.parametrize(
    "place", ["/dev", "/dev/", "/proc", "/sys", "/dev/null", "/dev/pts", "/dev/ptmx", "//dev/console"]
)
def test_a_volume_at_the_path_of_kernel_files_is_refused(
    quiet_log: AgentProcess, handler: str, tmp_path: Path, place: str
) -> None:
    """Its null could be used as a stream and a mask, and its files in /proc would replace the kernel's."""
    (tmp_path / "null").symlink_to("/proc/1/root/etc/shadow")
    config = like_kubelets("main")
    config.mounts.add(container_path=place, host_path=str(tmp_path))
    cleaned = "/" + place.strip("/")
    with refused(grpc.StatusCode.INVALID_ARGUMENT, f"mounts: {cleaned} can only be .*{tmp_path}"):
        start(quiet_log, handler, config, user_namespace=False)


def test_a_volume_behind_a_link_to_the_null_device_is_refused(
    quiet_log: AgentProcess, handler: str, tmp_path: Path
) -> None:
    """OCI runtimes use this device to hide files (CVE-2025-31133)."""
    link = tarfile.TarInfo("hidden")
    link.type, link.linkname = tarfile.SYMTYPE, "/dev/null"
    image = import_image(quiet_log, tmp_path, "linked-null", [(link, b"")])
    (tmp_path / "file").write_text("shown instead of what is hidden")
    config = like_kubelets("main", image=image)
    config.mounts.add(container_path="/hidden", host_path=str(tmp_path / "file"))
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "/dev/null can only be a null device"):
        start(quiet_log, handler, config, user_namespace=False)


@pytest.mark.parametrize("place", ["/dev", "/sys", "/proc", "/dev/null"])
def test_a_volume_of_an_image_at_the_path_of_kernel_files_is_refused(
    quiet_log: AgentProcess, tmp_path: Path, place: str
) -> None:
    image = import_image(
        quiet_log, tmp_path, f"volume{place.replace('/', '-')}", [folder("data")], {"Volumes": {place: {}}}
    )
    with refused(grpc.StatusCode.INVALID_ARGUMENT, f"VOLUME of the image: {place}"):
        start(quiet_log, "", like_kubelets("main", image=image), user_namespace=False)


@pytest.mark.parametrize("uid", [0, 65534])
# With a terminal, runc opens /dev/console, which only privileged containers may do.
@pytest.mark.parametrize(("streams", "privileged"), [("plain", True), ("plain", False), ("terminal", True)])
def test_the_node_s_dev_mounted_at_dev_is_not_changed(
    quiet_log: AgentProcess, handler: str, uid: int, streams: str, privileged: bool
) -> None:
    """Storage and device drivers use such mounts. The OCI runtime must not give the node's files to the user."""
    if streams == "terminal" and not Path("/dev/console").exists():
        pytest.skip("the node has no /dev/console, over which OCI runtimes mount the terminal")
    config = like_kubelets("main", tty=streams == "terminal")
    config.mounts.add(container_path="/dev" if privileged else "//dev/.", host_path="/dev")
    config.linux.security_context.run_as_user.value = uid
    ours = start(quiet_log, handler, config, user_namespace=False, privileged=privileged)
    process = Path(f"/proc/{init_pid(quiet_log, ours.container_id)}")
    wait_for(lambda: (process / "comm").read_text() == "sleep\n", what="the runtime's last step")
    node = {identity(status) for status in of_node().values()}
    assert not node & {identity(path.stat()) for path in (process / "fd").iterdir()}
    assert identity((process / "root/dev/null").stat()) in node
    assert ours.shell("echo x > /dev/null && echo written").strip() == "written"
    if streams == "plain":
        assert ours.shell("cat /proc/1/fd/0; echo end").strip() == "end"


@pytest.mark.parametrize("uid", [0, 1000])
@pytest.mark.parametrize("place", ["/dev/null", "/etc/hidden", "/dev/random"])
def test_a_device_in_a_volume_is_replaced_by_the_container_s_own(
    quiet_log: AgentProcess, handler: str, user_namespace: bool, uid: int, place: str
) -> None:
    """The node's /dev/null hides a file there. OCI runtimes give the file at /dev/null to the container's user."""
    config = like_kubelets("main")
    source = "/dev/urandom" if place == "/dev/random" else "/dev/null"
    config.mounts.add(container_path=place, host_path=source)
    if user_namespace:  # kubelet requests this for every volume
        config.mounts[0].uidMappings.add(host_id=FIRST_ID, container_id=0, length=65536)
        config.mounts[0].gidMappings.add(host_id=FIRST_ID, container_id=0, length=65536)
    config.linux.security_context.run_as_user.value = uid
    ours = start(quiet_log, handler, config, user_namespace=user_namespace)
    process = Path(f"/proc/{init_pid(quiet_log, ours.container_id)}")
    wait_for(lambda: (process / "comm").read_text() == "sleep\n", what="the runtime's last step")
    node = {identity(status) for status in of_node().values()}
    inside = process / "root" / place.lstrip("/")
    assert inside.stat().st_rdev == Path(source).stat().st_rdev
    assert not node & {identity(path.stat()) for path in (inside, *(process / "fd").iterdir())}
    ours.shell(f"chmod 640 {place}; chown 7 {place}; echo x > /dev/null")
    size = 0 if source == "/dev/null" else 3
    assert uid or user_namespace or ours.shell(f"head -c 3 {place} | wc -c").strip() == str(size)


def test_privileged_pod_with_a_user_namespace_has_the_node_s_devices_as_its_own(
    quiet_log: AgentProcess, handler: str
) -> None:
    ours = start(quiet_log, handler, like_kubelets("main"), user_namespace=True, privileged=True)
    root = Path(f"/proc/{init_pid(quiet_log, ours.container_id)}/root")
    names = [entry.name for entry in Path("/dev").iterdir() if entry.is_block_device()]
    assert names
    for name in names:
        assert (root / "dev" / name).stat().st_rdev == Path("/dev", name).stat().st_rdev
        assert identity((root / "dev" / name).stat()) != identity(Path("/dev", name).stat())
    assert "denied" in ours.shell(f"head -c 1 /dev/{names[0]}")


def test_the_node_s_sys_mounted_at_sys(quiet_log: AgentProcess, handler: str) -> None:
    config = like_kubelets("main")
    config.mounts.add(container_path="/sys", host_path="/sys", readonly=True)
    ours = start(quiet_log, handler, config, user_namespace=False, privileged=True)
    assert "kernel" in ours.shell("ls /sys")


def test_streams_of_an_attacker_with_its_own_null_and_the_node_s_processes(
    quiet_log: AgentProcess, handler: str, tmp_path: Path
) -> None:
    """A volume at /dev has a null that links to a file of the node, whose owner would be changed."""
    target = tmp_path / "secret"
    target.write_text("secret")
    target.chmod(0o600)
    volume = tmp_path / "volume"
    volume.mkdir()
    (volume / "null").symlink_to(f"/proc/{os.getpid()}/root{target}")
    config = like_kubelets("main")
    config.mounts.add(container_path="/dev", host_path=str(volume))
    config.linux.security_context.run_as_user.value = 65534
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "/dev can only be"):
        start(quiet_log, handler, config, user_namespace=False, host_pid=True)
    assert target.stat().st_uid == os.getuid()


def test_streams_are_the_container_s_own_while_it_is_being_made(
    quiet_log: AgentProcess, handler: str, user_namespace: bool
) -> None:
    """A container of the pod that may look into others watches while the OCI runtime creates another container."""
    watcher = with_python(like_kubelets("watcher"))
    watcher.linux.security_context.capabilities.add_capabilities.append("SYS_PTRACE")
    sandbox = pod_config(quiet_log, user_namespace=user_namespace)
    shared_pids(sandbox)
    options = sandbox.linux.security_context.namespace_options
    watcher.linux.security_context.namespace_options.CopyFrom(options)
    client = quiet_log.client
    sandbox_id = client.run_sandbox(sandbox, handler)
    container_id = client.create(sandbox_id, watcher, sandbox)
    client.start(container_id)
    made = like_kubelets("made")
    made.linux.security_context.namespace_options.CopyFrom(options)
    other = client.create(sandbox_id, made, sandbox)  # the runtime's process in it waits for the start
    process = Path(f"/proc/{init_pid(quiet_log, other)}")
    node = {identity(status) for status in of_node().values()}
    assert not node & {identity(path.stat()) for path in (process / "fd").iterdir()}
