"""Which masked paths are hidden by mounts of the agent's, and which the OCI runtime hides."""

from __future__ import annotations

from pathlib import Path

import pytest

from host.errors import InvalidArgumentError
from runtime.specgen import config as oci
from runtime.specgen.mounts.container_paths import ContainerPaths
from runtime.specgen.mounts.masks import mask_files

NULL = Path("/run/agent/mask/null")


def test_files_are_hidden_by_mounts_and_folders_by_the_runtime(tmp_path: Path) -> None:
    rootfs, volume = tmp_path / "rootfs", tmp_path / "volume"
    for folder in (rootfs / "etc", volume / "inner"):
        folder.mkdir(parents=True)
    (rootfs / "etc/passwd").touch()
    (rootfs / "link").symlink_to("etc")
    (rootfs / "device").symlink_to("/proc/keys")
    (volume / "inner/secret").touch()
    paths = ContainerPaths(rootfs)
    paths.add("/volume", str(volume))
    files = [
        "/proc/keys",
        "/proc/../etc/passwd",
        "/link/passwd",
        "/volume/inner/secret",
        "/proc/self/environ",
        "/device",
    ]
    others = ["/proc/acpi", "/proc/sys", "/sys/firmware", "/proc/missing", "/dev/shm"]
    folders = ["/etc", "/volume/inner", "/volume"]
    linux = oci.Linux(masked_paths=[*files, *others, "/missing", "/volume/missing", *folders, "/dev/zero"])
    mounts = mask_files(linux, paths, NULL)
    assert [mount.destination for mount in mounts if mount.type == "tmpfs"] == folders
    mounts = [mount for mount in mounts if mount.type != "tmpfs"]
    assert [mount.destination for mount in mounts] == [
        "/proc/keys",
        "/etc/passwd",
        "/volume/inner/secret",
        "/proc/self/environ",
        "/dev/zero",
    ]
    assert {(mount.type, mount.source, *mount.options) for mount in mounts} == {("bind", str(NULL), "bind")}
    assert linux.masked_paths == others


@pytest.mark.parametrize("path", ["/proc/4194305/environ", "/proc/sys/net/ipv4/conf/none0/tag", "/sys/class/net/x/dev"])
def test_what_only_the_container_would_show_is_refused(tmp_path: Path, path: str) -> None:
    with pytest.raises(InvalidArgumentError, match=path):
        mask_files(oci.Linux(masked_paths=[path]), ContainerPaths(tmp_path), NULL)


def test_a_volume_at_proc_says_what_is_hidden_there(tmp_path: Path) -> None:
    (tmp_path / "rootfs").mkdir()
    paths = ContainerPaths(tmp_path / "rootfs")
    paths.add("/proc", "/proc")
    linux = oci.Linux(masked_paths=["/proc/keys", "/proc/sys", "/proc/missing"])
    assert [mount.destination for mount in mask_files(linux, paths, NULL)] == ["/proc/keys"]
    assert linux.masked_paths == ["/proc/sys", "/proc/missing"]
