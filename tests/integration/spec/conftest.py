"""Real OCI runtimes running a busybox root filesystem from built specs."""

from __future__ import annotations

import os
import shutil
import subprocess
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from host.cgroups import discover
from host.files.mounts import mounts_below, unmount
from proto.nri.v1alpha1 import nri_pb2
from runtime.containers.bundle.idmapped_mounts import bind_all
from runtime.nri.abilities import RuntimeAbilities
from runtime.nri.adjustment import adjust
from runtime.nri.answers.merging import Merging
from runtime.nri.answers.owners import Owners
from runtime.oci import private_devices
from runtime.oci.null_device import open_private_null
from runtime.oci.oci_runtime import RuntimeFeatures
from runtime.specgen.builder import ContainerSpec, complete
from runtime.specgen.draft import draft
from runtime.specgen.facts import HandlerFacts, SandboxFiles
from runtime.specgen.mounts.image_volumes import make_volumes
from runtime.specgen.mounts.volume_content import CopyLimits
from runtime.specgen.namespaces import NamespacePaths
from runtime.specgen.node_facts import NodeFacts, probe_node
from tests.unit.spec.requests import Image, container, request, write_accounts

BUSYBOX = Path("/bin/busybox")
CGROUPS = Path("/sys/fs/cgroup")


@pytest.fixture(scope="session")
def node() -> NodeFacts:
    return probe_node(discover())


@pytest.fixture(scope="session")
def pod_namespaces() -> Iterator[NamespacePaths]:
    """Network, IPC and UTS namespaces held by a process that sleeps in them."""
    holder = subprocess.Popen(
        ["unshare", "--net", "--ipc", "--uts", "sh", "-c", "hostname pod-host; echo ready; exec sleep 600"],
        stdout=subprocess.PIPE,
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"ready\n"
        folder = f"/proc/{holder.pid}/ns"
        yield NamespacePaths(network=f"{folder}/net", ipc=f"{folder}/ipc", uts=f"{folder}/uts")
    finally:
        holder.kill()
        holder.communicate()


@pytest.fixture(params=["runc", "crun"])
def runtime(request: pytest.FixtureRequest) -> str:
    """An OCI runtime that works here; crun needs cgroup2 to hold no controller where cgroup v1 is used."""
    name = str(request.param)
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not installed")
    if name == "crun" and _cgroup2_holds_hugetlb():
        folder = CGROUPS / "hugetlb"
        folder.mkdir(exist_ok=True)
        if not os.path.ismount(folder):
            subprocess.run(["mount", "-t", "cgroup", "-o", "hugetlb", "hugetlb", str(folder)], check=True)
    return name


def _cgroup2_holds_hugetlb() -> bool:
    controllers = CGROUPS / "unified/cgroup.controllers"
    return controllers.exists() and "hugetlb" in controllers.read_text().split()


@pytest.fixture
def rootfs(tmp_path: Path) -> Path:
    root = tmp_path / "rootfs"
    for folder in ("bin", "tmp", "proc", "sys", "dev", "root", "home/app"):
        (root / folder).mkdir(parents=True)
    shutil.copy(BUSYBOX, root / "bin/busybox")
    for applet in (
        "sh",
        "cat",
        "ls",
        "id",
        "env",
        "mount",
        "umount",
        "pwd",
        "touch",
        "mknod",
        "stat",
        "hostname",
        "grep",
    ):
        (root / "bin" / applet).symlink_to("busybox")
    for applet in ("unshare", "readlink", "sysctl", "mkdir", "rm", "sleep", "chown", "find", "wc", "head", "dd"):
        (root / "bin" / applet).symlink_to("busybox")
    write_accounts(root)
    return root


@dataclass
class Result:
    status: int
    output: str
    built: ContainerSpec

    def sections(self) -> dict[str, str]:
        """Output between lines ``@name``."""
        found: dict[str, str] = {}
        for part in ("\n" + self.output).split("\n@")[1:]:
            name, _, text = part.partition("\n")
            found[name] = text.strip()
        return found


Run = Callable[..., Result]


@pytest.fixture
def run(runtime: str, rootfs: Path, tmp_path: Path, node: NodeFacts, pod_namespaces: NamespacePaths) -> Iterator[Run]:
    """``run(script, config=…, …)`` runs a shell script in a container built from that request.

    ``adjustment`` is what a plugin of the node changes of it.
    """
    identifier = f"podkeel-test-spec-{uuid.uuid4().hex[:12]}"
    state = tmp_path / "state"
    pod = tmp_path / "pod"
    pod.mkdir()
    for name in ("hosts", "resolv.conf", "hostname"):
        (pod / name).write_text(f"pod's {name}\n")
    (pod / "shm").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "nosuid,nodev,noexec,mode=1777", "shm", pod / "shm"], check=True)
    files = SandboxFiles(pod / "resolv.conf", pod / "hosts", pod / "hostname", pod / "shm")

    def start(script: str, **fields: Any) -> Result:
        config = fields.setdefault("config", container())
        if not config.command:
            config.command.extend(["/bin/sh", "-c", "exec 2>&1\n" + script])
        fields.setdefault("image", Image())
        fields.setdefault("files", files)
        fields.setdefault("namespaces", pod_namespaces)
        fields.setdefault("node", node)
        fields.setdefault("handler", HandlerFacts(runtime, recursive_read_only=True))
        cgroup = f"/podkeel-test-spec/{identifier}"
        adjustment = fields.pop("adjustment", None)
        drafted = draft(request(tmp_path, rootfs=rootfs, cgroups_path=cgroup, **fields))
        if adjustment is not None:
            merging = Merging(nri_pb2.Container(), Owners("container c1"))
            merging.add("10-test", adjustment)
            abilities = RuntimeAbilities(runtime, RuntimeFeatures(), node)
            adjust(drafted, merging.adjustment, merging.owners.message(), abilities)
        built = complete(drafted)
        make_volumes(built.volumes, rootfs, limits=CopyLimits(1 << 30, 10_000))
        namespaces = fields["namespaces"]
        bind_all(built.mapped_volumes, namespaces.user, (built.spec.linux.uid_mappings, built.spec.linux.gid_mappings))
        if built.private_devices is not None:
            private_devices.make(built.private_devices)
        bundle = tmp_path / "bundle"
        bundle.mkdir(exist_ok=True)
        (bundle / "config.json").write_bytes(built.config_json)
        command = [runtime, "--root", str(state), "run", "--bundle", str(bundle), identifier]
        null = open_private_null()  # the OCI runtime gives it to the container's user
        try:
            ended = subprocess.run(command, stdin=null, capture_output=True, timeout=30, check=False)
        finally:
            os.close(null)
        # Both streams of the script go to the first. The second has what the runtime says, warnings too.
        output = ended.stdout + ended.stderr if ended.returncode else ended.stdout
        return Result(ended.returncode, output.decode(errors="replace"), built)

    try:
        yield start
    finally:
        subprocess.run(
            [runtime, "--root", str(state), "delete", "--force", identifier], capture_output=True, check=False
        )
        for target in mounts_below(tmp_path):
            unmount(target)
        _remove_cgroups(identifier)


def _remove_cgroups(identifier: str) -> None:
    for controller in (CGROUPS, *CGROUPS.iterdir()):
        for folder in (controller / "podkeel-test-spec" / identifier, controller / "podkeel-test-spec"):
            if folder.is_dir():
                try:
                    folder.rmdir()
                except OSError as error:
                    if folder.name == identifier:
                        raise AssertionError(f"{folder} is still in use") from error
