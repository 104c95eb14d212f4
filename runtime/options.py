"""The options of pods and containers."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

Weight = Annotated[int, msgspec.Meta(ge=0, le=1000)]


class HandlerOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One runtime handler, as a RuntimeClass names it.

    ``path`` is the OCI runtime's program (looked up on the PATH if it has no slash); ``type`` how it is driven: ``oci``
    is by the commands that runc and crun share. ``root`` is the folder of its state (default: one per handler in the
    run folder); ``arguments`` are put before its subcommand. ``allowed_annotations`` are shell patterns of the
    annotations of pods that it may see; those that control crun itself (``run.oci.*``) are never passed.
    ``seccomp_profile`` is the file used for RuntimeDefault in its containers, ``io_weight`` that of its pods.
    """

    path: str
    type: Literal["oci"] = "oci"
    root: str = ""
    arguments: tuple[str, ...] = ()
    allowed_annotations: tuple[str, ...] = ()
    privileged_without_host_devices: bool = False
    seccomp_profile: str = ""
    io_weight: Weight = 0


DEFAULT_HANDLERS = {"crun": HandlerOptions(path="crun"), "runc": HandlerOptions(path="runc")}

DEFAULT_HOOKS_DIRS = ("/usr/share/containers/oci/hooks.d", "/etc/containers/oci/hooks.d")

DEFAULT_SYSCTLS = {
    "net.ipv4.ping_group_range": "0 2147483647",
    "net.ipv4.ip_unprivileged_port_start": "0",
}


class RuntimeOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Folders, runtime handlers, cgroups and defaults of pods and containers.

    ``data_dir`` holds what survives a reboot, ``run_dir`` (best on a tmpfs) what does not. ``default_runtime`` names
    the handler used where none is asked for; empty means the first that works on this host, in the order of
    ``handlers``. ``cgroup_driver`` is ``auto`` (systemd where it runs as init), ``cgroupfs`` or ``systemd``;
    ``cgroup_parent`` is the parent of pods that name none. ``monitor_cgroup`` is the parent of the cgroup of conmon: a
    slice where systemd is init (empty: system.slice), otherwise the path of a cgroup. ``pids_limit`` is the number of
    processes and threads of a container, 0 for no limit. ``container_start_parallelism`` bounds OCI runtimes at work
    at one time, 0 for one per core. ``seccomp_profile`` is a file that replaces the RuntimeDefault profile.
    ``shm_size`` is that of a pod's /dev/shm, in bytes. ``selinux`` says whether containers get labels where the node
    has SELinux. ``umask`` is that of containers, in octal digits. ``io_weight`` is the weight of a pod, from 1 to
    1000, when pods compete for a disk: twice the weight, twice the share; 0 leaves the kernel's default, which is 100.
    ``hooks_dirs`` are folders of OCI hooks (oci-hooks(5)), of which a later one has precedence over an earlier one.
    What an image has at its VOLUMEs is copied for each container: ``max_volume_copy_bytes`` of data (holes of sparse
    files do not count) and ``max_volume_copy_entries`` files at most, all VOLUMEs of a container together.
    """

    data_dir: str = "/var/lib/podkeel"
    run_dir: str = "/run/podkeel"
    default_runtime: str = ""
    handlers: dict[str, HandlerOptions] = msgspec.field(default_factory=lambda: dict(DEFAULT_HANDLERS))
    conmon_path: str = "conmon"
    catatonit_path: str = "catatonit"
    cgroup_driver: str = "auto"
    cgroup_parent: str = "/podkeel"
    monitor_cgroup: str = ""
    pids_limit: int = 0
    default_sysctls: dict[str, str] = msgspec.field(default_factory=lambda: dict(DEFAULT_SYSCTLS))
    seccomp_profile: str = ""
    container_start_parallelism: int = 0
    selinux: bool = True
    umask: str = "0022"
    io_weight: Weight = 0
    shm_size: int = 64 * 1024 * 1024
    hooks_dirs: tuple[str, ...] = DEFAULT_HOOKS_DIRS
    max_volume_copy_bytes: int = 16 << 30
    max_volume_copy_entries: int = 1_000_000
