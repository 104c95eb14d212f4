"""Images, volumes, working directories and logs that try to lead the agent or the OCI runtime out of the container."""

from __future__ import annotations

import contextlib
import os
import stat
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest

from host.files.mounts import mount_table
from proto.runtime.v1 import cri_pb2
from tests.integration.agent.hardening import (
    PRELUDE,
    PYTHON,
    Attacker,
    import_image,
    init_pid,
    like_kubelets,
    with_python,
)
from tests.integration.agent.test_user_namespaces import with_user_namespace
from tests.support.agent import SOON, AgentProcess, wait_for
from tests.support.image_builder import entry, folder
from tests.support.pods import sandbox_config

MakeImage = Callable[..., str]


@pytest.fixture
def image(agent: AgentProcess, tmp_path: Path) -> Iterator[MakeImage]:
    """Imports an image of busybox with more entries; removed after the test."""
    made: list[str] = []

    def make(entries: Sequence[Any] = (), **config: object) -> str:
        made.append(import_image(agent, tmp_path, f"hostile{len(made)}", entries, config))
        return made[-1]

    yield make
    for reference in made:
        agent.client.call("RemoveImage", cri_pb2.RemoveImageRequest(image=cri_pb2.ImageSpec(image=reference)))


def link(name: str, target: str) -> Any:
    return entry(name, kind=tarfile.SYMTYPE, link=target, mode=0o777)


def started(agent: AgentProcess, handler: str, config: cri_pb2.ContainerConfig) -> Attacker | None:
    """The container, or None where the runtime refuses it: both are right as long as the host stays as it is."""
    with contextlib.suppress(grpc.RpcError):
        return Attacker.start(agent, handler, config)
    return None


def listing(path: Path) -> dict[str, tuple[int, int, bytes]]:
    """What is below a folder of the host's: mode, owner and content."""
    found = {}
    for file in sorted(path.rglob("*")):
        status = file.lstat()
        content = file.read_bytes() if file.is_file() and not file.is_symlink() else b""
        found[str(file)] = (status.st_mode, status.st_uid, content)
    return found


@pytest.mark.parametrize(
    "name", ["proc", "sys", "dev", "dev/shm", "etc/hosts", "etc/resolv.conf", "etc/hostname", "etc"]
)
def test_links_at_default_mounts_stay_inside(
    agent: AgentProcess, handler: str, image: MakeImage, tmp_path: Path, name: str
) -> None:
    host = tmp_path / "host"
    (host / "proc" / "sys").mkdir(parents=True)
    for file in ("hosts", "resolv.conf", "hostname", "passwd"):
        (host / file).write_text("the host's\n")
    target = str(host / name.rpartition("/")[2]) if name.startswith("etc/") else str(host)
    parents = [entry("etc/.wh..wh..opq")] if name.startswith("etc/") else []
    hostile = image(
        [*parents, entry(f"{name.rpartition('/')[0]}/.wh.{name.rpartition('/')[2]}".lstrip("/")), link(name, target)]
    )
    before = listing(host)
    attacker = started(agent, handler, like_kubelets("main", image=hostile))
    if attacker is not None:
        attacker.shell(
            "touch /proc/x /dev/x /etc/x /sys/x /dev/shm/x; echo owned > /etc/hosts; echo owned > /etc/resolv.conf"
        )
    assert listing(host) == before
    assert not [entry.target for entry in mount_table() if entry.target.startswith(str(host))]


def test_links_at_volumes_stay_inside(agent: AgentProcess, handler: str, image: MakeImage, tmp_path: Path) -> None:
    host, data = tmp_path / "host", tmp_path / "data"
    host.mkdir()
    data.mkdir()
    (data / "inner").symlink_to(host)  # a volume whose content leads out, with another volume mounted below it
    hostile = image([link("out", str(host)), link("up", "../../../../../../.." + str(host)), folder("in")])
    config = like_kubelets("main", image=hostile)
    for path in ("/out", "/up/deeper", "/out/new/folder", "/volume", "/volume/inner", "/volume/inner/new"):
        config.mounts.add(container_path=path, host_path=str(data))
    before = listing(host)
    started(agent, handler, config)
    assert listing(host) == before
    assert not [entry.target for entry in mount_table() if entry.target.startswith(str(host))]


# Swaps a folder of the volume with a link to the host's root, as often as it can, until it is stopped.
SWAP = """
os.makedirs("/volume/target", exist_ok=True)
os.path.lexists("/volume/link") or os.symlink("/", "/volume/link")
AT, EXCHANGE = -100, 2
while not os.path.exists("/volume/end"):
    libc.renameat2(AT, b"/volume/target", AT, b"/volume/link", EXCHANGE)
"""


def test_race_of_a_volume_with_the_mounts_of_another_container(
    agent: AgentProcess, handler: str, tmp_path: Path
) -> None:
    """CVE-2021-30465: the folder to mount on becomes a link to / between the runtime's look at it and its mount."""
    volume, other = tmp_path / "volume", tmp_path / "other"
    volume.mkdir()
    other.mkdir()
    config = with_python(like_kubelets("main", PYTHON, "-I", "-c", PRELUDE + SWAP))
    config.mounts.add(container_path="/volume", host_path=str(volume))
    attacker = Attacker.start(agent, handler, config)
    for swapped in (True, False, True):
        wait_for(lambda swapped=swapped: (volume / "target").is_symlink() is swapped, what="a swap")
    root, seen = Path("/").stat(), 0
    for number in range(80):
        if seen == 3:
            break
        victim = like_kubelets(f"victim{number}")
        victim.mounts.add(container_path="/volume", host_path=str(volume))
        victim.mounts.add(container_path="/volume/target", host_path=str(other))
        try:
            container_id = attacker.beside(victim)
        except grpc.RpcError:
            continue
        seen += 1
        table = list(mount_table(f"/proc/{init_pid(agent, container_id)}/mountinfo"))
        inside = Path(f"/proc/{init_pid(agent, container_id)}/root").stat()
        assert (inside.st_dev, inside.st_ino) != (root.st_dev, root.st_ino)
        assert not [entry.target for entry in table if entry.target.startswith(str(tmp_path))]
        agent.client.stop(container_id)
        agent.client.remove(container_id)
    (volume / "end").touch()
    assert seen, "no container could be made at all"
    assert not list(other.iterdir())


def reaches_host(attacker: Attacker, marker: Path) -> str:
    """Whether relative paths from the working directory lead to a file of the host's."""
    up = " ".join("../" * depth for depth in range(9))
    return attacker.shell(f"for up in ./ {up}; do cat $up{marker} && echo REACHED; done 2>/dev/null; echo looked")


@pytest.mark.parametrize("way", ["config", "image", "link", "exec"])
def test_working_directories_through_descriptors(
    agent: AgentProcess, handler: str, image: MakeImage, tmp_path: Path, way: str
) -> None:
    """CVE-2024-21626: a descriptor of the host's that the runtime has open while it changes to the directory."""
    marker = tmp_path / "marker"
    marker.write_text("of the host\n")
    links = [link(f"fd{number}", f"/proc/self/fd/{number}") for number in range(3, 16)]
    for number in range(3, 16):
        directory = f"/proc/self/fd/{number}"
        if way == "config":
            with pytest.raises(grpc.RpcError) as refused:
                Attacker.start(agent, handler, like_kubelets("main", working_dir=directory))
            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            return
        if way == "image":
            hostile = image(WorkingDir=directory)
            with pytest.raises(grpc.RpcError) as refused:
                Attacker.start(agent, handler, like_kubelets("main", image=hostile))
            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            return
    if way == "link":
        hostile = image(links)
        for number in range(3, 16):
            config = like_kubelets("main", image=hostile, working_dir=f"/fd{number}")
            attacker = started(agent, handler, config)
            if attacker is not None:
                assert "REACHED" not in reaches_host(attacker, marker)
        return
    attacker = Attacker.start(agent, handler, like_kubelets("main", working_dir="/work"))
    for number in range(3, 16):
        attacker.shell(f"cd /; rm -r /work; ln -sfn /proc/self/fd/{number} /work")
        with contextlib.suppress(grpc.RpcError):
            assert "REACHED" not in reaches_host(attacker, marker)
        pid = init_pid(agent, attacker.container_id)
        working = Path(f"/proc/{pid}/root/work")
        working.unlink()
        working.mkdir()


PASSWD = "trick:x:0:0::/root:/bin/sh\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (entry("etc/passwd", "x" * (2 << 20)), "larger than"),
        (entry("etc/passwd", kind=tarfile.FIFOTYPE), "not in the image's /etc/passwd"),
        (entry("etc/passwd", kind=tarfile.CHRTYPE, device=(1, 5)), "not in the image's /etc/passwd"),
        (link("etc/passwd", "/proc/self/mounts"), "not in the image's /etc/passwd"),
        (link("etc/passwd", "../../../../../../..{host}/passwd"), "not in the image's /etc/passwd"),
        (link("etc/passwd", "passwd"), "cannot be read"),
    ],
    ids=["huge", "fifo", "device", "proc", "out", "loop"],
)
def test_image_s_passwd_is_read_inside_the_image(
    agent: AgentProcess, image: MakeImage, tmp_path: Path, content: Any, words: str
) -> None:
    (tmp_path / "passwd").write_text(PASSWD)
    info, data = content
    info.linkname = info.linkname.replace("{host}", str(tmp_path))
    hostile = image([(info, data)])
    config = like_kubelets("main", image=hostile)
    config.linux.security_context.run_as_username = "trick"
    begin = time.monotonic()
    with pytest.raises(grpc.RpcError) as refused:
        Attacker.start(agent, "", config)
    assert words in (refused.value.details() or "")
    assert time.monotonic() - begin < SOON  # reading the file or waiting for the fifo would take longer or never end


def open_to_others(root: Path) -> list[str]:
    """What users who are neither root nor in a group of it could read or list below a folder of an agent's."""
    found = []
    for parent, folders, files in os.walk(root):
        modes = {name: Path(parent, name).lstat().st_mode for name in (*folders, *files)}
        folders[:] = [name for name in folders if modes[name] & stat.S_IXOTH and not stat.S_ISLNK(modes[name])]
        found += [f"{parent}/{name}" for name, mode in modes.items() if mode & stat.S_IROTH and not stat.S_ISLNK(mode)]
    return found


@pytest.mark.parametrize("users", ["the node's", "its own"])
def test_other_users_of_the_node_reach_nothing_of_containers(agent: AgentProcess, handler: str, users: str) -> None:
    """CVE-2021-41103: secrets in bundles and the store, and set-user-id programs in root file systems and layers."""
    sandbox = sandbox_config(agent)
    if users == "its own":
        with_user_namespace(sandbox.linux.security_context.namespace_options)
    sandbox_id = agent.client.run_sandbox(sandbox, handler)
    config = like_kubelets("main")
    config.envs.add(key="PASSWORD", value=b"secret")
    config.linux.security_context.namespace_options.CopyFrom(sandbox.linux.security_context.namespace_options)
    container_id = agent.client.create(sandbox_id, config, sandbox)
    agent.client.start(container_id)
    agent.client.output(container_id, "chmod", "4755", "/bin/busybox")
    agent.client.output(container_id, "touch", "/dev/shm/shared")
    bundle = agent.run / "containers" / container_id
    for path in (bundle / "config.json", bundle / "rootfs/bin/busybox", agent.run / "sandboxes" / sandbox_id / "shm"):
        assert path.exists()
        tried = subprocess.run(
            ["cat", path], check=False, user=65534, group=65534, extra_groups=[], capture_output=True
        )
        assert b"Permission denied" in tried.stderr
    for folder_of_agent in (agent.run / "containers", agent.run / "sandboxes", agent.run / "oci", agent.data):
        assert open_to_others(folder_of_agent) == []


def test_account_that_looks_like_a_number_is_not_root(agent: AgentProcess, handler: str, image: MakeImage) -> None:
    hostile = image(
        [entry("etc/passwd", "1000:x:0:0::/root:/bin/sh\n"), entry("etc/group", "1000:x:0:\n")], User="1000"
    )
    attacker = Attacker.start(agent, handler, like_kubelets("main", image=hostile))
    assert attacker.shell("id -u; id -g").split() == ["1000", "0"]


def test_selinux_options_where_it_is_off(agent: AgentProcess, tmp_path: Path) -> None:
    """Labels are not set then and nothing is relabelled, but an invalid label is refused anyway."""
    config = like_kubelets("main")
    config.mounts.add(container_path="/volume", host_path=str(tmp_path), selinux_relabel=True)
    config.linux.security_context.selinux_options.level = "s0:c12,c34"
    attacker = Attacker.start(agent, "", config)
    assert attacker.shell("touch /volume/file; ls /volume") == "file\n"
    for field, value in (("level", "high"), ("type", "a:b"), ("user", "x y")):
        wrong = like_kubelets("wrong")
        setattr(wrong.linux.security_context.selinux_options, field, value)
        with pytest.raises(grpc.RpcError) as refused:
            attacker.beside(wrong)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_log_paths_that_lead_out_are_refused(agent: AgentProcess, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("of the host\n")
    sandbox = sandbox_config(agent)
    logs = Path(sandbox.log_directory)
    (logs / "main").mkdir(parents=True)
    (logs / "main" / "0.log").symlink_to(victim)
    (logs / "folder").symlink_to(tmp_path)
    sandbox_id = agent.client.run_sandbox(sandbox)
    for path in ("main/0.log", "folder/victim", "../../victim", "main/../../0.log"):
        config = like_kubelets("main", "echo", "owned")
        config.log_path = path
        with pytest.raises(grpc.RpcError) as refused:
            agent.client.create(sandbox_id, config, sandbox)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT, path
    assert victim.read_text() == "of the host\n"


def test_log_is_not_reopened_through_a_link(agent: AgentProcess, handler: str, tmp_path: Path) -> None:
    """A container with the folder of its logs as a volume puts a link where the rotated log was."""
    victim = tmp_path / "victim"
    victim.write_text("of the host\n")
    attacker = Attacker.start(agent, handler, like_kubelets("main", "sh", "-c", "while echo owned; do sleep 0.1; done"))
    log = Path(agent.client.status(attacker.container_id).log_path)
    old = log.with_name("0.log.old")
    log.rename(old)
    log.symlink_to(victim)
    with pytest.raises(grpc.RpcError):
        request = cri_pb2.ReopenContainerLogRequest(container_id=attacker.container_id)
        agent.client.call("ReopenContainerLog", request)
    size = old.stat().st_size
    wait_for(lambda: old.stat().st_size > size, what="the next line in the log that is still open")
    assert victim.read_text() == "of the host\n"
