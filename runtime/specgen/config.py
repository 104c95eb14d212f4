"""The OCI runtime configuration (``config.json``) as structs: runtime-spec 1.0.2, ``config.md``, ``config-linux.md``.

Only fields that Podkeel sets are here, with those of later versions that plugins may set. Fields with default values
are left out of the JSON, as the specification allows.
"""

from __future__ import annotations

import msgspec

VERSION = "1.0.2"


class _Struct(msgspec.Struct, omit_defaults=True, rename="camel"):
    """The base of all structs here: names are camelCase, and default values are not written."""


class IDMapping(_Struct):
    """A range of ids: ``size`` ids from ``container_id`` inside are mapped to those from ``host_id`` outside."""

    container_id: int = msgspec.field(name="containerID")
    host_id: int = msgspec.field(name="hostID")
    size: int


class User(_Struct):
    """The user of the process, in ids of the container's user namespace."""

    uid: int
    gid: int
    umask: int | None = None
    additional_gids: list[int] = []


class Capabilities(_Struct):
    """The process's five capability sets, names with the ``CAP_`` prefix."""

    bounding: list[str] = []
    effective: list[str] = []
    inheritable: list[str] = []
    permitted: list[str] = []
    ambient: list[str] = []


class Rlimit(_Struct):
    """One resource limit, ``type`` such as ``RLIMIT_NOFILE``."""

    type: str
    hard: int
    soft: int


class ConsoleSize(_Struct):
    """The size of a terminal, in characters."""

    height: int
    width: int


class Scheduler(_Struct):
    """sched_setattr(2) for the process; times in nanoseconds."""

    policy: str
    nice: int = 0
    priority: int = 0
    flags: list[str] = []
    runtime: int = 0
    deadline: int = 0
    period: int = 0


class IOPriority(_Struct):
    """ioprio_set(2) for the process; ``priority`` is from 0 to 7."""

    class_: str = msgspec.field(name="class")
    priority: int = 0


class Process(_Struct):
    """The container's first process."""

    cwd: str
    user: User
    args: list[str]
    terminal: bool = False
    console_size: ConsoleSize | None = None
    env: list[str] = []
    capabilities: Capabilities | None = None
    rlimits: list[Rlimit] = []
    no_new_privileges: bool = False
    apparmor_profile: str = ""
    selinux_label: str = ""
    oom_score_adj: int | None = None
    scheduler: Scheduler | None = None
    io_priority: IOPriority | None = None


class Root(_Struct):
    """The root filesystem."""

    path: str
    readonly: bool = False


class Mount(_Struct):
    """One mount, made in the order of the list."""

    destination: str
    type: str = ""
    source: str = ""
    options: list[str] = []
    uid_mappings: list[IDMapping] = []
    gid_mappings: list[IDMapping] = []


class Namespace(_Struct):
    """A namespace to create or, with ``path``, to join."""

    type: str
    path: str = ""


class Device(_Struct):
    """A device node to create. ``type`` is c, b or p."""

    path: str
    type: str
    major: int | None = None
    minor: int | None = None
    file_mode: int | None = None
    uid: int | None = None
    gid: int | None = None


class DeviceRule(_Struct):
    """One line of the device cgroup's list."""

    allow: bool
    type: str = ""
    major: int | None = None
    minor: int | None = None
    access: str = ""


class Cpu(_Struct):
    """CPU time and placement; quotas, runtimes and periods in microseconds."""

    shares: int | None = None
    quota: int | None = None
    period: int | None = None
    realtime_runtime: int | None = None
    realtime_period: int | None = None
    cpus: str = ""
    mems: str = ""


class Memory(_Struct):
    """Memory limits in bytes; ``swap`` is memory and swap together."""

    limit: int | None = None
    reservation: int | None = None
    swap: int | None = None
    kernel_tcp: int | None = msgspec.field(name="kernelTCP", default=None)
    swappiness: int | None = None
    disable_oom_killer: bool | None = msgspec.field(name="disableOOMKiller", default=None)


class Pids(_Struct):
    """The limit of processes and threads in the container."""

    limit: int


class HugepageLimit(_Struct):
    """A limit in bytes for one page size, such as ``2MB``."""

    page_size: str
    limit: int


class DiskWeight(_Struct):
    """The weight of the container's I/O on one disk, from 10 to 1000."""

    major: int
    minor: int
    weight: int


class Throttle(_Struct):
    """The limit of bytes or operations per second on one disk."""

    major: int
    minor: int
    rate: int


class BlockIO(_Struct):
    """The container's weight and limits on disks."""

    weight: int | None = None
    weight_device: list[DiskWeight] = []
    throttle_read_bps_device: list[Throttle] = []
    throttle_write_bps_device: list[Throttle] = []
    throttle_read_iops_device: list[Throttle] = msgspec.field(name="throttleReadIOPSDevice", default_factory=list)
    throttle_write_iops_device: list[Throttle] = msgspec.field(name="throttleWriteIOPSDevice", default_factory=list)


class Resources(_Struct):
    """The container's cgroup settings."""

    devices: list[DeviceRule] = []
    memory: Memory | None = None
    cpu: Cpu | None = None
    pids: Pids | None = None
    hugepage_limits: list[HugepageLimit] = []
    unified: dict[str, str] = {}
    block_io: BlockIO | None = msgspec.field(name="blockIO", default=None)


class NetDevice(_Struct):
    """A network interface of the node that moves into the container. ``name`` is its name there."""

    name: str = ""


class IntelRdt(_Struct):
    """The group of the container's processes in the kernel's resctrl file system."""

    clos_id: str = msgspec.field(name="closID", default="")
    schemata: list[str] = []
    enable_monitoring: bool = False


class MemoryPolicy(_Struct):
    """set_mempolicy(2) for the container's first process; ``nodes`` is a list such as ``0-1``."""

    mode: str
    nodes: str = ""
    flags: list[str] = []


SCOPE_SUBGROUP = "container"
"""The cgroup below its scope in which crun puts a container, with the systemd cgroup driver on cgroup v2."""


class Linux(_Struct):
    """The fields of ``config-linux.md``. ``seccomp`` is kept encoded, because many containers share a profile."""

    uid_mappings: list[IDMapping] = []
    gid_mappings: list[IDMapping] = []
    namespaces: list[Namespace] = []
    devices: list[Device] = []
    cgroups_path: str = ""
    resources: Resources | None = None
    rootfs_propagation: str = ""
    seccomp: msgspec.Raw | None = None
    masked_paths: list[str] = []
    readonly_paths: list[str] = []
    mount_label: str = ""
    sysctl: dict[str, str] = {}
    net_devices: dict[str, NetDevice] = {}
    intel_rdt: IntelRdt | None = None
    memory_policy: MemoryPolicy | None = None


class Hook(_Struct):
    """A program to run; ``timeout`` in seconds."""

    path: str
    args: list[str] = []
    env: list[str] = []
    timeout: int | None = None


class Hooks(_Struct):
    """Programs that the OCI runtime runs at points of the container's life."""

    prestart: list[Hook] = []
    create_runtime: list[Hook] = []
    create_container: list[Hook] = []
    start_container: list[Hook] = []
    poststart: list[Hook] = []
    poststop: list[Hook] = []


class Spec(_Struct):
    """The whole ``config.json``."""

    oci_version: str
    process: Process
    root: Root
    mounts: list[Mount]
    linux: Linux
    annotations: dict[str, str] = {}
    hooks: Hooks | None = None


_encoder = msgspec.json.Encoder()


def encode(spec: Spec) -> bytes:
    """The JSON for an OCI runtime."""
    return _encoder.encode(spec)
