"""The requirements of an agent on this host, whether they are met, and the remedies: for ``podkeel check``.

The check tries what it can: it runs containers and makes mounts and links, in namespaces and folders that it removes.
"""

from __future__ import annotations

import asyncio
import os
import re
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from cri import kernel_check
from cri.config.configuration import Configuration
from host import processes
from host.cgroups import discover
from host.concurrency.threads import in_fresh_thread, in_thread
from host.errors import InvalidArgumentError, PodkeelError
from host.files import mounts
from host.files.removal import remove_tree
from host.systemd import ServiceManager
from images.unpack.worker_syscalls import worker_filter
from network.cni.configuration import search_folder
from network.cni.plugin import PluginRunner
from network.ipam import parse_ranges
from network.nftables.firewalls import find_obstacles
from network.options import NetworkOptions
from runtime.agent_id import new_agent_id
from runtime.cgroups.tree import CgroupTree
from runtime.checkpoint.support import CheckpointSupport
from runtime.layout import Layout
from runtime.oci.handlers import Handlers
from runtime.oci.oci_runtime import OciRuntime
from runtime.options import RuntimeOptions
from runtime.specgen.hooks_dir import HooksDir

State = Literal["ok", "warn", "fail"]

_COMMAND_SECONDS = 20.0
_SCARCE_BYTES = 5 << 30
_TOO_FEW_BYTES = 512 << 20
_SCARCE_INODES = 100_000
_USUAL_OPEN_FILES = 65_536
# Runtime handlers that check it themselves.
_LOOKING = (
    "install crun 1.14.1 (Debian 13 has it), runc 1.1.12 (Debian 12: 1.1.5+ds1-1+deb12u1, Debian 13), or newer ones, "
    "and name it as runtime.default_runtime"
)


class Check(msgspec.Struct, frozen=True):
    """One finding. With ``fail`` pods cannot run, with ``warn`` they lack a feature; ``remedy`` says what to do."""

    name: str
    state: State
    detail: str
    remedy: str = ""


async def check_host(configuration: Configuration) -> list[Check]:
    """Every check of this host for an agent of ``configuration``; takes about a second and changes nothing."""
    groups: list[Callable[[Configuration], Awaitable[list[Check]]]] = [
        _programs,
        _cgroups,
        *((_handlers, _kernel, _network, _folders) if os.geteuid() == 0 else ()),  # these checks need root
        _limits,
    ]
    checks: list[Check] = []
    for group in groups:
        checks += await group(configuration)
    return checks


async def _programs(configuration: Configuration) -> list[Check]:
    runtime = configuration.runtime
    return [
        await _program("conmon", runtime.conmon_path, "it watches each container", "apt-get install conmon"),
        await _program(
            "catatonit", runtime.catatonit_path, "init of shared PID namespaces", "apt-get install catatonit"
        ),
        await _program("nft", "nft", "it loads the packet rules", "apt-get install nftables"),
        _libseccomp(),
    ]


def _libseccomp() -> Check:
    try:
        worker_filter()
    except PodkeelError as error:
        return Check(
            "libseccomp", "fail", f"no layer can be unpacked; {_sentence(error)}", "apt-get install libseccomp2"
        )
    return Check("libseccomp", "ok", "filter of the process that unpacks layers")


async def _program(name: str, path: str, purpose: str, remedy: str) -> Check:
    try:
        result = await processes.run([path, "--version"], timeout=_COMMAND_SECONDS)
    except (PodkeelError, OSError) as error:
        return Check(name, "fail", f"{purpose}; {_sentence(error)}", remedy)
    return Check(name, "ok", _first_line(result.stdout or result.stderr))


def _sentence(error: Exception) -> str:
    return " ".join((error.message if isinstance(error, PodkeelError) else str(error)).split())


def _first_line(output: bytes) -> str:
    return output.decode(errors="replace").strip().partition("\n")[0].strip()


async def _cgroups(configuration: Configuration) -> list[Check]:
    try:
        hierarchies = discover()
        tree = CgroupTree.of_host(configuration.runtime.cgroup_driver, hierarchies)
        missing = tree.missing_controllers()
    except (PodkeelError, OSError) as error:
        return [Check("cgroups", "fail", _sentence(error), "mount the cgroup file system at /sys/fs/cgroup")]
    detail = f"version {tree.version}, {tree.driver} driver"
    if missing:
        remedy = "enable them on the kernel's command line (cgroup_enable=…) or mount them"
        return [Check("cgroups", "fail", f"{detail}; no {', '.join(missing)} controller", remedy)]
    checks = [Check("cgroups", "ok", detail)]
    if tree.version == 1 and hierarchies.unified is not None:
        unified = Path(hierarchies.unified)
        held = (unified / "cgroup.controllers").read_text().split()
        if held:
            remedy = "; ".join(f"mount -t cgroup -o {name} {name} {unified.parent}/{name}" for name in held)
            detail = f"cgroup v1, but the cgroup2 mount {unified} holds {', '.join(held)}: crun refuses to run so"
            checks.append(Check("cgroup2 controllers", "warn", detail, f"mkdir the folders, then {remedy}"))
    return checks


async def _handlers(configuration: Configuration) -> list[Check]:
    """Each runtime handler runs one container, in its own run folder."""
    try:
        tree = CgroupTree.of_host(configuration.runtime.cgroup_driver)
    except (PodkeelError, OSError):
        return []  # the check of cgroups reports this
    folder = Path(tempfile.mkdtemp(prefix="podkeel-check-", dir=_existing(Path(configuration.runtime.run_dir))))
    parent = f"/{folder.name}"
    options = msgspec.structs.replace(
        configuration.runtime, run_dir=str(folder), cgroup_parent=parent, default_runtime=""
    )
    try:
        layout = Layout.of(options)
        layout.run.joinpath("oci").mkdir()
        handlers = Handlers(options, layout, tree, new_agent_id())
        await handlers.probe()
    except (PodkeelError, OSError) as error:
        return [Check("runtimes", "fail", _sentence(error))]
    finally:
        await in_thread(_remove_folder, folder)
        await in_thread(tree.remove, parent)
    support = CheckpointSupport(configuration.checkpoint, handlers)
    support.begin()
    await support.known()
    return [*_handler_checks(configuration.runtime, handlers), _checkpoint_check(support)]


def _checkpoint_check(support: CheckpointSupport) -> Check:
    """Whether checkpoints work. Nothing else needs CRIU, so a node without it is no failure."""
    if support.problem:
        return Check("checkpoints", "ok", f"not possible: {support.problem}")
    told = [f"{name}: {why}" for name, why in support.report()["podsAndRestores"].items()]
    return Check("checkpoints", "ok", f"CRIU {support.version}; {'; '.join(told)}")


def _handler_checks(options: RuntimeOptions, handlers: Handlers) -> list[Check]:
    checks: list[Check] = []
    named = options.default_runtime
    default = named or (handlers.default.name if handlers.default is not None else "")
    for name in options.handlers:
        remark = ", the default" if name == default else ""
        if name not in handlers.failures:
            checks.append(_working_handler(handlers.get(name), remark))
            continue
        needed = name == named or handlers.default is None
        remedy = f"apt-get install {name}" if "not installed" in handlers.failures[name] else ""
        detail = " ".join(handlers.failures[name].split())
        checks.append(Check(f"runtime {name}", "fail" if needed else "warn", detail + remark, remedy))
    return checks


def _working_handler(runtime: OciRuntime, remark: str) -> Check:
    """What a handler does if a link leads a working directory out of a container (CVE-2024-21626 and similar ones)."""
    name, detail = f"runtime {runtime.name}", f"{runtime.features.version}{remark}"
    if runtime.directories.refuses_outside:
        return Check(name, "ok", detail)
    detail += "; it does not look where links lead a working directory"
    if runtime.directories.enters_descriptors:
        return Check(name, "warn", f"{detail}: the agent does so for it, before commands and before starts", _LOOKING)
    state: State = "fail" if remark else "warn"
    return Check(name, state, f"{detail}, nor takes one from the agent: containers could leave by it", _LOOKING)


def _remove_folder(folder: Path) -> None:
    for target in mounts.mounts_below(folder):
        mounts.unmount(target)
    remove_tree(folder)


async def _kernel(configuration: Configuration) -> list[Check]:
    data = _existing(Path(configuration.runtime.data_dir))
    overlay_error = await in_fresh_thread(kernel_check.overlay_error, data)
    release = os.uname().release
    numbers = re.match(r"(\d+)\.(\d+)", release)
    version = (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)
    checks = [
        Check("kernel", "ok", release)
        if version >= (5, 10)
        else Check("kernel", "fail", f"{release} is older than 5.10", "install a newer kernel"),
        Check("overlay", "ok", f"mounts on {data}")
        if not overlay_error
        else Check("overlay", "fail", overlay_error, "modprobe overlay, or put the data folder on ext4 or xfs"),
        Check("idmapped mounts", "ok", "volumes of pods with user namespaces")
        if version >= (5, 12)
        else Check("idmapped mounts", "warn", "no: pods with user namespaces are refused", "a kernel from 5.12 on"),
    ]
    return checks + [
        Check(name, "ok", good) if present() else Check(name, "warn", bad, remedy)
        for name, present, good, bad, remedy in kernel_check.FEATURES
    ]


async def _network(configuration: Configuration) -> list[Check]:
    links_error = await in_fresh_thread(kernel_check.links_error)
    checks = [
        Check("bridge and veth", "ok", "made in a network namespace")
        if not links_error
        else Check("bridge and veth", "fail", links_error, "modprobe bridge veth"),
        await _nftables(),
        _pod_network(configuration.network),
        *await _firewalls(configuration.network),
    ]
    forwarding = Path("/proc/sys/net/ipv4/ip_forward").read_text().strip() == "1"
    detail = "on" if forwarding else "off: the agent switches it on when it makes its bridge"
    return [*checks, Check("ip forwarding", "ok" if forwarding else "warn", detail)]


def _pod_network(options: NetworkOptions) -> Check:
    """The network that pods would be connected to, and whether its CNI plugins exist."""
    try:
        folder = Path(options.cni_config_dir)
        found, broken = (None, ()) if options.mode == "built-in" else search_folder(folder)
        if found is None and broken:
            raise InvalidArgumentError(broken[0])
        if found is None:
            if options.mode == "cni":
                problem = f"{options.cni_config_dir} holds no CNI configuration: pods wait until it does"
                return Check("pod network", "warn", problem, "install the cluster's network plugin")
            return Check("pod network", "ok", f"built in, bridge {options.bridge}")
        runner = PluginRunner(options.cni_bin_dirs, options.cni_timeout_seconds)
        for plugin in found.plugins:
            runner.find(plugin.type)
    except PodkeelError as error:
        return Check("pod network", "fail", _sentence(error), "see docs/networking.md")
    if broken:
        problem = f"CNI network {found.name} from {found.path}; skipped: {'; '.join(broken)}"
        return Check("pod network", "warn", " ".join(problem.split()), "correct or remove the skipped files")
    return Check("pod network", "ok", f"CNI network {found.name} from {found.path}")


async def _firewalls(options: NetworkOptions) -> list[Check]:
    """Whether other firewalls of the node let packets of pods on the bridge through."""
    if _pod_network(options).detail.startswith("CNI"):
        return []  # CNI plugins do this for their networks
    try:
        found = await find_obstacles(options.bridge, parse_ranges(options.pod_cidrs))
    except PodkeelError as error:
        return [Check("other firewalls", "warn", f"cannot be read: {_sentence(error)}")]
    if not found:
        return [Check("other firewalls", "ok", "none that drops what pods send")]
    return [Check("other firewalls", "fail" if item.certain else "warn", item.problem, item.remedy) for item in found]


async def _nftables() -> Check:
    """A ruleset like the agent's, which the kernel checks and does not keep."""
    try:
        await processes.run(["nft", "--check", "-f", "-"], stdin=kernel_check.RULESET, timeout=_COMMAND_SECONDS)
    except (PodkeelError, OSError) as error:
        return Check(
            "nftables", "fail", _sentence(error), "modprobe nf_tables nft_nat nft_masq; apt-get install nftables"
        )
    return Check("nftables", "ok", "sets, maps, masquerading")


async def _folders(configuration: Configuration) -> list[Check]:
    runtime = configuration.runtime
    hooks = await in_fresh_thread(_hooks, runtime.hooks_dirs)
    return [_run_folder(Path(runtime.run_dir)), _data_folder(Path(runtime.data_dir)), *hooks]


def _hooks(folders: Sequence[str]) -> list[Check]:
    """OCI hooks of the node; nothing where there are none."""
    hooks = HooksDir(folders)
    good = len(hooks.read())
    remedy = "correct the file (oci-hooks(5) has the format) or remove it"
    wrong = [Check("OCI hook", "warn", f"{path} is left out: {why}", remedy) for path, why in hooks.problems.items()]
    return [*wrong, *([Check("OCI hooks", "ok", f"{good} in {', '.join(folders)}")] if good else [])]


def _run_folder(folder: Path) -> Check:
    filesystem = mounts.mount_holding(str(_existing(folder))).filesystem
    if filesystem == "tmpfs":
        return Check("run folder", "ok", f"{folder} on tmpfs")
    detail = f"{folder} is on {filesystem}: what a reboot should take would stay"
    return Check("run folder", "warn", detail, "put runtime.run_dir on a tmpfs, such as /run")


def _data_folder(folder: Path) -> Check:
    usage = os.statvfs(_existing(folder))
    free, inodes = usage.f_bavail * usage.f_frsize, usage.f_favail
    detail = f"{folder}: {free / (1 << 30):.1f} GiB free"
    remedy = "free space, or move runtime.data_dir"
    if free < _TOO_FEW_BYTES:
        return Check("data folder", "fail", detail, remedy)
    if free < _SCARCE_BYTES:
        return Check("data folder", "warn", detail, remedy)
    if 0 < inodes < _SCARCE_INODES:
        return Check("data folder", "warn", f"{detail}, but only {inodes} inodes", remedy)
    return Check("data folder", "ok", detail)


def _existing(folder: Path) -> Path:
    """The nearest folder above that exists, free of symbolic links."""
    return next(path.resolve() for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())


async def _limits(_configuration: Configuration) -> list[Check]:
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = hard != resource.RLIM_INFINITY and hard < _USUAL_OPEN_FILES
    remedy = "LimitNOFILE=1048576 in the systemd unit, or ulimit -Hn" if few else ""
    files = Check("open files", "warn" if few else "ok", f"hard limit {hard if hard >= 0 else 'none'}", remedy)
    if os.geteuid() != 0:
        detail = f"runs as user {os.geteuid()}: runtimes, kernel, network and folders were not tried"
        return [files, Check("root", "fail", detail, "run it as root")]
    return [files]


def run_check(configuration: Configuration) -> list[Check]:
    """``check_host`` for a program without a loop."""
    ServiceManager.of_environment()
    return asyncio.run(check_host(configuration))
