"""Requests like kubelet's, for tests to bend."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from proto.runtime.v1 import cri_pb2
from runtime.specgen import config
from runtime.specgen.capabilities import NAMES
from runtime.specgen.draft import SpecRequest
from runtime.specgen.facts import HandlerFacts, SandboxFiles
from runtime.specgen.namespaces import NamespacePaths
from runtime.specgen.node_facts import NodeFacts

NODE = NodeFacts(
    cgroup_version=1,
    capabilities=frozenset(NAMES) - {"CAP_SYS_RESOURCE"},
    min_oom_score_adj=0,
    max_open_files=20000,
    apparmor_enabled=False,
    selinux_enabled=False,
    swap_accounting=True,
    hugepage_sizes=frozenset({"2MB"}),
    kernel=(6, 1),
    recursive_read_only=True,
    machine="x86_64",
    hostname="node-a",
    default_rlimits=(config.Rlimit(type="RLIMIT_NOFILE", hard=20000, soft=20000),),
)

HANDLER = HandlerFacts("runc", recursive_read_only=True)

PASSWD = """root:x:0:0:root:/root:/bin/sh
app:x:1000:1000:App:/home/app:/bin/sh
nohome:x:1001:1001::relative:/bin/sh
1002:x:0:0:trick:/root:/bin/sh
broken:x:many:1:::
huge:x:99999999999:1:::
"""

GROUP = """root:x:0:
app:x:1000:
staff:x:50:app,root
audio:x:29:app
wheel:x:10:root
"""


@dataclass
class Image:
    user: str = ""
    env: list[str] = field(default_factory=lambda: ["PATH=/bin"])
    entrypoint: list[str] = field(default_factory=list)
    cmd: list[str] = field(default_factory=lambda: ["sh"])
    working_dir: str = ""
    volumes: list[str] = field(default_factory=list)
    stop_signal: str = ""


def write_accounts(rootfs: Path) -> None:
    (rootfs / "etc").mkdir(parents=True, exist_ok=True)
    (rootfs / "etc/passwd").write_text(PASSWD)
    (rootfs / "etc/group").write_text(GROUP)


def container(**fields: Any) -> cri_pb2.ContainerConfig:
    fields.setdefault("metadata", cri_pb2.ContainerMetadata(name="app"))
    return cri_pb2.ContainerConfig(**fields)


def secured(**fields: Any) -> cri_pb2.ContainerConfig:
    """A container configuration with this security context."""
    context = cri_pb2.LinuxContainerSecurityContext(**fields)
    return container(linux=cri_pb2.LinuxContainerConfig(security_context=context))


def sandbox(**fields: Any) -> cri_pb2.PodSandboxConfig:
    fields.setdefault("metadata", cri_pb2.PodSandboxMetadata(name="pod", namespace="default", uid="0123", attempt=0))
    fields.setdefault("hostname", "pod-host")
    return cri_pb2.PodSandboxConfig(**fields)


def privileged_sandbox() -> cri_pb2.PodSandboxConfig:
    context = cri_pb2.LinuxSandboxSecurityContext(privileged=True)
    return sandbox(linux=cri_pb2.LinuxPodSandboxConfig(security_context=context))


def request(folder: Path, **fields: Any) -> SpecRequest:
    """A request whose root filesystem is ``folder``/rootfs, with passwd and group in it unless it is there already."""
    rootfs = fields.pop("rootfs", folder / "rootfs")
    if not rootfs.exists():
        write_accounts(rootfs)
    values: dict[str, Any] = {
        "container_id": "c1",
        "config": container(),
        "sandbox": sandbox(),
        "image": Image(),
        "image_reference": "docker.io/library/busybox:latest",
        "rootfs": rootfs,
        "container_folder": folder / "container",
        "files": SandboxFiles(),
        "namespaces": NamespacePaths(network="/ns/net", ipc="/ns/ipc", uts="/ns/uts"),
        "cgroups_path": "/pod/c1",
        "handler": HANDLER,
        "node": NODE,
    }
    values.update(fields)
    return SpecRequest(**values)


def like_kubelets(folder: Path) -> SpecRequest:
    """A container as kubelet asks for it, with mounts, limits and a security context."""
    mounts = []
    for number, (path, readonly) in enumerate(
        [
            ("/var/run/secrets/kubernetes.io/serviceaccount", True),
            ("/etc/hosts", False),
            ("/dev/termination-log", False),
        ]
    ):
        source = folder / f"kubelet/pods/volumes/{number}"
        source.mkdir(parents=True, exist_ok=True)
        mounts.append(cri_pb2.Mount(container_path=path, host_path=str(source), readonly=readonly))
    limits = cri_pb2.LinuxContainerResources(
        cpu_period=100000,
        cpu_shares=102,
        memory_limit_in_bytes=1 << 25,
        oom_score_adj=999,
        hugepage_limits=[{"page_size": "2MB"}, {"page_size": "1GB"}],
    )
    context = cri_pb2.LinuxContainerSecurityContext(
        namespace_options={"pid": "CONTAINER", "userns_options": {"mode": "NODE"}},
        run_as_user={"value": 1000},
        masked_paths=["/proc/asound", "/proc/acpi", "/proc/kcore"],
        readonly_paths=["/proc/bus", "/proc/sys"],
        seccomp={"profile_type": "RuntimeDefault"},
    )
    config = container(
        command=["sh", "-c", "sleep 1000"],
        envs=[{"key": f"KUBERNETES_{number}", "value": b"10.96.0.1"} for number in range(8)],
        mounts=mounts,
        linux=cri_pb2.LinuxContainerConfig(resources=limits, security_context=context),
        annotations={"io.kubernetes.container.hash": "d6ea5d4e"},
    )
    files = SandboxFiles(Path("/p/resolv.conf"), Path("/p/hosts"), Path("/p/hostname"), Path("/p/shm"))
    return request(folder, config=config, files=files, pids_limit=1000)
