"""Mounts of every kind, and images that try to lead them out of their root."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from host.errors import InvalidArgumentError
from proto.runtime.v1 import cri_pb2
from runtime.specgen.namespaces import NamespacePaths
from tests.integration.spec.conftest import Run
from tests.unit.spec.requests import Image, container, secured


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A folder on a shared mount, with a tmpfs mounted below it."""
    folder = tmp_path / "shared"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "shared", folder], check=True)
    subprocess.run(["mount", "--make-rshared", folder], check=True)
    (folder / "below").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "below", folder / "below"], check=True)
    return folder


def test_folders_files_links_and_missing_sources(run: Run, tmp_path: Path) -> None:
    (tmp_path / "data/inner").mkdir(parents=True)
    (tmp_path / "data/inner/file").write_text("content\n")
    (tmp_path / "link").symlink_to("data/inner")
    mounts = [
        cri_pb2.Mount(container_path="/v/nested/file", host_path=str(tmp_path / "data/inner/file"), readonly=True),
        cri_pb2.Mount(container_path="/v", host_path=str(tmp_path / "data")),
        cri_pb2.Mount(container_path="/v/nested", host_path=str(tmp_path / "link")),
        cri_pb2.Mount(container_path="/missing", host_path=str(tmp_path / "no/such/folder")),
        cri_pb2.Mount(container_path="/etc/hosts", host_path=str(tmp_path / "data/inner/file")),
    ]
    look = """
cat /v/inner/file /v/nested/file /etc/hosts
echo more > /v/nested/file; echo new > /v/nested/new; touch /missing/made"""
    result = run(look, config=container(mounts=mounts))
    assert result.output.splitlines()[:3] == ["content"] * 3
    assert "Read-only" in result.output
    assert (tmp_path / "data/inner/new").read_text() == "new\n"
    assert (tmp_path / "no/such/folder/made").exists()
    assert [mount.host_path for mount in result.built.mounts] == [mount.host_path for mount in mounts]


def test_mount_options(run: Run, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/script").write_text("#!/bin/sh\necho ran\n")
    (tmp_path / "data/script").chmod(0o755)
    mount = cri_pb2.Mount(
        container_path="/v", host_path=str(tmp_path / "data"), mount_options=["noexec", "nosuid", "nodev"]
    )
    result = run("/v/script; grep ' /v ' /proc/self/mountinfo", config=container(mounts=[mount]))
    assert "ermission denied" in result.output
    assert {"nosuid", "nodev", "noexec"} <= set(result.output.splitlines()[-1].split()[5].split(","))


@pytest.mark.parametrize(("recursive", "refused"), [(False, 1), (True, 2)])
def test_read_only_and_recursively_so(run: Run, shared: Path, recursive: bool, refused: int) -> None:
    mount = cri_pb2.Mount(container_path="/v", host_path=str(shared), readonly=True, recursive_read_only=recursive)
    result = run("touch /v/x; touch /v/below/x; true", config=container(mounts=[mount]))
    assert result.output.count("Read-only") == refused, result.output


def test_propagation(run: Run, shared: Path) -> None:
    modes = {"/private": "PRIVATE", "/slave": "HOST_TO_CONTAINER", "/shared": "BIDIRECTIONAL"}
    mounts = [
        cri_pb2.Mount(container_path=path, host_path=str(shared), propagation=f"PROPAGATION_{mode}")
        for path, mode in modes.items()
    ]
    config = secured(capabilities={"add_capabilities": ["SYS_ADMIN"]})
    config.mounts.extend(mounts)
    look = """
mkdir /shared/from-inside && mount -t tmpfs inside /shared/from-inside && touch /shared/from-inside/mark
ls /slave/from-inside /private/from-inside
cat /proc/self/mountinfo"""
    result = run(look, config=config)
    assert (shared / "from-inside/mark").exists(), result.output
    fields = {line.split()[4]: line.split()[6] for line in result.output.splitlines() if line.count(" ") > 6}
    assert fields["/private"] == "-"
    assert fields["/slave"].startswith("master:")
    assert fields["/shared"].startswith("shared:")
    assert result.output.count("mark") == 1  # seen in /slave, not in /private


def test_host_to_container_alone_receives_mounts_made_later(run: Run, shared: Path) -> None:
    mount = cri_pb2.Mount(
        container_path="/v", host_path=str(shared), propagation="PROPAGATION_HOST_TO_CONTAINER", readonly=True
    )
    (shared / "later").mkdir()
    (shared / "go").touch()
    look = "while [ -e /v/go ]; do sleep 0.02; done; ls /v/later"
    with run_beside(shared):
        assert run(look, config=container(mounts=[mount])).output.strip() == "mark"


@contextmanager
def run_beside(shared: Path) -> Iterator[None]:
    """Once the container has the mount (a second one appears), mount something below it and let the
    container continue.
    """

    def mount_later() -> None:
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and not _seen_by_another(shared):
            time.sleep(0.02)
        subprocess.run(["mount", "-t", "tmpfs", "later", shared / "later"], check=True)
        (shared / "later/mark").touch()
        (shared / "go").unlink()

    thread = threading.Thread(target=mount_later)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def _seen_by_another(folder: Path) -> bool:
    """Whether a process of another mount namespace has ``folder`` mounted at /v."""
    for table in Path("/proc").glob("[0-9]*/mountinfo"):
        try:
            if any(line.split()[4] == "/v" and " - tmpfs shared " in line for line in table.read_text().splitlines()):
                return folder.exists()
        except OSError:
            continue
    return False


@pytest.mark.parametrize("mode", ["HOST_TO_CONTAINER", "BIDIRECTIONAL"])
def test_propagation_needs_a_source_that_propagates(run: Run, tmp_path: Path, mode: str) -> None:
    source = tmp_path / "private"
    source.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "private", source], check=True)
    subprocess.run(["mount", "--make-private", source], check=True)
    mount = cri_pb2.Mount(container_path="/v", host_path=str(source), propagation=f"PROPAGATION_{mode}")
    with pytest.raises(InvalidArgumentError, match=f"path {source} is mounted on {source} but it is not a shared"):
        run("true", config=container(mounts=[mount]))


def test_image_volumes_and_image_mounts(run: Run, rootfs: Path, tmp_path: Path) -> None:
    (rootfs / "data").mkdir(mode=0o750)
    (rootfs / "data/seed").write_text("from the image\n")
    prepared = tmp_path / "image"
    (prepared / "models").mkdir(parents=True)
    (prepared / "models/weights").write_text("weights\n")
    mount = cri_pb2.Mount(
        container_path="/m", image=cri_pb2.ImageSpec(image="models:1"), image_sub_path="models", readonly=True
    )
    result = run(
        "cat /data/seed /m/weights; touch /m/x; echo new > /data/new; stat -c %a /data",
        config=container(mounts=[mount]),
        image=Image(volumes=["/data", "/empty"]),
        image_mounts={0: prepared},
    )
    assert result.output.splitlines()[:2] == ["from the image", "weights"]
    assert "Read-only" in result.output
    assert result.output.splitlines()[-1] == "750"
    folders = {volume.container_path: volume.folder for volume in result.built.volumes}
    assert (folders["/data"] / "new").read_text() == "new\n"
    assert not (rootfs / "data/new").exists()
    assert list(folders["/empty"].iterdir()) == []


def test_a_hostile_image_cannot_lead_mounts_or_lookups_out_of_its_root(run: Run, rootfs: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "passwd").write_text("evil:x:0:0::/:/bin/sh\n")
    (outside / "secret").write_text("secret\n")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/mine").write_text("mine\n")
    (rootfs / "etc/passwd").unlink()
    (rootfs / "etc/passwd").symlink_to(outside / "passwd")
    (rootfs / "etc/hosts").symlink_to(outside / "hosts")
    (rootfs / "vol").symlink_to(outside)
    (rootfs / "up").symlink_to("../../../../.." + str(outside))
    mounts = [
        cri_pb2.Mount(container_path="/vol/a", host_path=str(tmp_path / "data")),
        cri_pb2.Mount(container_path="/up/b", host_path=str(tmp_path / "data")),
    ]
    with pytest.raises(InvalidArgumentError, match="'evil' is not in the image"):
        run("true", config=secured(run_as_username="evil"))
    result = run(
        "cat /vol/a/mine /up/b/mine; cat /vol/secret", config=container(mounts=mounts), image=Image(volumes=["/vol"])
    )
    assert sorted(path.name for path in outside.iterdir()) == ["passwd", "secret"], result.output
    assert "secret\n" not in result.output.replace("'/vol/secret'", "")
    assert not any((volume.folder / "secret").exists() for volume in result.built.volumes)


def test_host_namespaces(run: Run) -> None:
    look = "for kind in net ipc uts pid mnt; do readlink /proc/self/ns/$kind; done"
    output = run(look, namespaces=NamespacePaths(host_pid=True)).output.split()
    for kind, inside in zip(("net", "ipc", "uts", "pid"), output, strict=False):
        assert inside == str(Path(f"/proc/self/ns/{kind}").readlink())
    assert output[4] != str(Path("/proc/self/ns/mnt").readlink())


def test_pod_namespaces(run: Run, pod_namespaces: NamespacePaths) -> None:
    output = run("for kind in net ipc uts pid; do readlink /proc/self/ns/$kind; done").output.split()
    pinned = (pod_namespaces.network, pod_namespaces.ipc, pod_namespaces.uts)
    assert output[:3] == [str(Path(path).readlink()) for path in pinned if path]
    assert output[3] != str(Path("/proc/self/ns/pid").readlink())
