"""A container in a user namespace that its pod has pinned."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from proto.runtime.v1 import cri_pb2
from runtime.specgen.facts import SandboxFiles
from runtime.specgen.namespaces import NamespacePaths
from tests.integration.spec.conftest import Run
from tests.unit.spec.requests import container, sandbox

BASE = 200_000


@pytest.fixture
def mapped(rootfs: Path, tmp_path: Path) -> Iterator[NamespacePaths]:
    """Namespaces owned by a user namespace; the root filesystem belongs to its root."""
    for folder, folders, files in os.walk(rootfs):
        for name in (".", *folders, *files):
            os.chown(Path(folder, name), BASE, BASE, follow_symlinks=False)
    for parent in (tmp_path, *tmp_path.parents):
        if parent.name.startswith("pytest-") or parent == tmp_path:
            parent.chmod(0o755)
    holder = subprocess.Popen(
        ["unshare", "--user", "--net", "--ipc", "--uts", "sh", "-c", "echo ready; read line; exec sleep 600"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"ready\n"
        for kind in ("uid_map", "gid_map"):
            Path(f"/proc/{holder.pid}/{kind}").write_text(f"0 {BASE} 65536")
        folder = f"/proc/{holder.pid}/ns"
        yield NamespacePaths(f"{folder}/net", f"{folder}/ipc", f"{folder}/uts", f"{folder}/user")
    finally:
        holder.kill()
        holder.communicate()


def test_user_namespace(run: Run, mapped: NamespacePaths, tmp_path: Path) -> None:
    mapping = [cri_pb2.IDMapping(container_id=0, host_id=BASE, length=65536)]
    options = cri_pb2.NamespaceOption(userns_options={"mode": "POD", "uids": mapping, "gids": mapping})
    pod = sandbox(linux=cri_pb2.LinuxPodSandboxConfig(security_context={"namespace_options": options}))
    (tmp_path / "data").mkdir()
    os.chown(tmp_path / "data", BASE, BASE)
    config = container(mounts=[cri_pb2.Mount(container_path="/data", host_path=str(tmp_path / "data"))])
    look = """
echo @id; id -u
echo @map; cat /proc/self/uid_map
echo @user; readlink /proc/self/ns/user
echo @null; echo x > /dev/null && echo fine
echo @write; touch /data/file /own && echo written
echo @sys; ls /sys/class/net
echo @end"""
    result = run(look, config=config, namespaces=mapped, sandbox=pod, files=SandboxFiles())
    seen = result.sections()
    assert "end" in seen, result.output
    assert seen["id"] == "0"
    assert seen["map"].split() == ["0", str(BASE), "65536"]
    assert seen["user"] == str(Path(mapped.user or "").readlink())
    assert seen["null"] == "fine"
    assert seen["write"] == "written"
    assert "lo" in seen["sys"].split()
    assert (tmp_path / "data/file").stat().st_uid == BASE
    shutil.rmtree(tmp_path / "data")


def test_volumes_are_idmapped_not_chowned(run: Run, mapped: NamespacePaths, tmp_path: Path) -> None:
    mapping = [cri_pb2.IDMapping(container_id=0, host_id=BASE, length=65536)]
    options = cri_pb2.NamespaceOption(userns_options={"mode": "POD", "uids": mapping, "gids": mapping})
    pod = sandbox(linux=cri_pb2.LinuxPodSandboxConfig(security_context={"namespace_options": options}))
    data = tmp_path / "data"
    data.mkdir()
    mount = cri_pb2.Mount(container_path="/data", host_path=str(data), uidMappings=mapping, gidMappings=mapping)
    result = run(
        "stat -c %u /data; touch /data/file && echo made",
        config=container(mounts=[mount]),
        namespaces=mapped,
        sandbox=pod,
        files=SandboxFiles(),
    )
    assert result.output.split() == ["0", "made"]
    assert [(path.name, path.stat().st_uid) for path in data.iterdir()] == [("file", 0)]
