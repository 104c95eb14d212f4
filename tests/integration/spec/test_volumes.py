"""What an image has at a VOLUME is copied with owners, modes and links, and never from outside the image."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from runtime.spec.volumes import Volume, make_volumes


def test_content_is_copied_as_it_is(tmp_path: Path) -> None:
    source = tmp_path / "rootfs/data"
    (source / "sub").mkdir(parents=True)
    (source / "sub/file").write_text("content")
    os.chown(source / "sub/file", 7, 8)
    (source / "sub/file").chmod(0o4750)
    os.setxattr(source / "sub/file", "user.kept", b"yes")
    (source / "link").symlink_to("/etc/shadow")
    os.mkfifo(source / "pipe", 0o600)
    os.mknod(source / "device", 0o020600, os.makedev(1, 3))
    source.chmod(0o1777)
    os.chown(source, 5, 6)
    volume = Volume(tmp_path / "container/volumes/a", "/data")
    make_volumes([volume], tmp_path / "rootfs")
    made = volume.folder
    assert (stat.S_IMODE(made.stat().st_mode), made.stat().st_uid, made.stat().st_gid) == (0o1777, 5, 6)
    status = (made / "sub/file").stat()
    assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid) == (0o4750, 7, 8)
    assert os.getxattr(made / "sub/file", "user.kept") == b"yes"
    assert (made / "sub/file").read_text() == "content"
    assert str((made / "link").readlink()) == "/etc/shadow"
    assert stat.S_ISFIFO((made / "pipe").stat().st_mode)
    assert not (made / "device").exists()


def test_links_out_of_the_image_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "rootfs").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/secret").touch()
    (tmp_path / "rootfs/data").symlink_to(tmp_path / "outside")
    (tmp_path / "rootfs/file").touch()
    volumes = [Volume(tmp_path / "a", "/data"), Volume(tmp_path / "b", "/file"), Volume(tmp_path / "c", "/file/below")]
    make_volumes(volumes, tmp_path / "rootfs")
    for volume in volumes:
        assert list(volume.folder.iterdir()) == []
