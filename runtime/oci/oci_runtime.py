"""Calls an OCI runtime: crun, runc or one with the same commands. conmon calls its ``create``."""

from __future__ import annotations

import contextlib
import errno
import logging
import re
import shutil
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from host import processes, untrusted_json
from host.concurrency.threads import in_thread
from host.errors import CommandError, NotFoundError, PodkeelError
from host.files import mounts
from host.files.removal import remove_tree
from host.untrusted_json import JsonError
from runtime.oci.directory_probe import TRIED_SCHEDULING, DirectoryBehaviour, probe_behaviour, run_detached
from runtime.oci.sealed_program import SealedProgram
from runtime.options import HandlerOptions

_COMMAND_SECONDS = 60.0
_log = logging.getLogger("podkeel.handlers")
# Messages of crun, runc and youki about a missing program, or a file that cannot be executed. Other errors, such as a
# failed mount, end with the same words, so the end alone is not enough.
_CANNOT_RUN = re.compile(
    r"executable file [\s\S]*not found|open executable|cannot find executable|failed to find executable"
    r"|exec format error|^exec container process |(^|: )exec: \"|(^|: )exec /\S+: "
    r"|^the path `[^`]*` (exists but it is not executable|is not a regular file)",
    re.IGNORECASE | re.MULTILINE,
)
# The kernel's error for an invalid limit in a cgroup's file, and the OCI runtimes' error for a limit that kills at
# once.
_REFUSED_LIMIT = re.compile(
    r"""writ\w+ .*(cpu|cpuset|memory|pids|hugetlb|blkio|io)\.[\w.]+.*: (invalid argument|.* result out of range)"""
    r"""|memory limit (could be )?too low|unable to set memory limit""",
    re.IGNORECASE | re.DOTALL,
)
# Errors of the request, such as a path through a file. A problem of the node never causes these messages.
_REFUSED_REQUEST = re.compile(
    r"(not a directory|is a directory|file name too long|too many levels of symbolic links|invalid argument|file exists"
    r"|mkdir /(?:proc|sys)\S*: read-only file system|result out of range|argument list too long)\W*$"
    r"|\bchdir (to cwd|`)",
    re.IGNORECASE | re.MULTILINE,
)
_LOGFMT_ERROR = re.compile(r'level=(?:error|fatal) msg="((?:[^"\\]|\\.)*)"')


class _Enabled(msgspec.Struct):
    enabled: bool | None = None


class _MemoryPolicy(msgspec.Struct):
    modes: list[str] | None = None


class _IntelRdt(msgspec.Struct):
    schemata: bool | None = None
    monitoring: bool | None = None


class _LinuxFeatures(msgspec.Struct, rename="camel"):
    namespaces: list[str] | None = None
    net_devices: _Enabled | None = None
    memory_policy: _MemoryPolicy | None = None
    intel_rdt: _IntelRdt | None = None


class _Features(msgspec.Struct, rename="camel"):
    """The needed part of what a runtime's ``features`` command prints (OCI runtime specification, "Features")."""

    mount_options: list[str] | None = None
    linux: _LinuxFeatures | None = None


_NAMESPACES = ("cgroup", "ipc", "mount", "network", "pid", "user", "uts")


class RuntimeFeatures(msgspec.Struct, frozen=True):
    """The abilities of a runtime handler, for Status and for refusing requests.

    ``scheduler`` and ``io_priority`` were tested. ``memory_policies`` are modes of set_mempolicy(2).
    """

    recursive_read_only_mounts: bool = False
    user_namespaces: bool = False
    version: str = ""
    namespaces: tuple[str, ...] = _NAMESPACES
    scheduler: bool = False
    io_priority: bool = False
    net_devices: bool = False
    memory_policies: tuple[str, ...] = ()
    rdt_schemata: bool = False
    rdt_monitoring: bool = False

    @property
    def is_crun(self) -> bool:
        """Whether it is crun, which supports more than the OCI specification."""
        return self.version.startswith("crun ")


class OciRuntime:
    """One configured runtime handler.

    ``exec_prefix`` comes before the command line of an ``exec``.
    """

    def __init__(
        self, name: str, options: HandlerOptions, root: Path, *, program_link: Path, systemd_cgroup: bool
    ) -> None:
        self.name = name
        self.options = options
        self.root = Path(options.root) if options.root else root
        self.systemd_cgroup = systemd_cgroup
        self.features = RuntimeFeatures()
        self.exec_prefix: list[str] = []
        self.directories = DirectoryBehaviour()
        self._program: str | None = None
        self._program_link = program_link
        self._sealed: SealedProgram | None = None

    @property
    def program(self) -> str:
        """The absolute path of the program. Raises NotFoundError if it is not installed."""
        if self._program is None:
            self._program = shutil.which(self.options.path)
            if self._program is None:
                raise NotFoundError(f"runtime handler {self.name!r}: program {self.options.path!r} is not installed")
        return self._program

    def executable(self) -> str:
        """The path to execute: the program, or its copy in memory, which starts sooner. Blocks."""
        if self._sealed is not None:
            try:
                return self._sealed.path()
            except OSError as error:
                if error.errno == errno.ETXTBSY:
                    self.stop_using_copy()
        return self.program

    def stop_using_copy(self) -> None:
        """Execute the program itself from now on, because a container keeps its copy from being executed."""
        if self._sealed is not None:
            _log.warning(
                "runtime handler %s: a container opened the copy of %s for writing: using the file",
                self.name,
                self.program,
            )
            self._sealed = None  # not closed, because conmon may be about to execute it

    @property
    def arguments(self) -> list[str]:
        """The arguments between the program and its subcommand."""
        arguments = [*self.options.arguments, "--root", str(self.root)]
        return [*arguments, "--systemd-cgroup"] if self.systemd_cgroup else arguments

    def command(self, *words: str) -> Callable[[], list[str]]:
        """A function that returns the complete command line. It blocks: ``processes`` calls it in a thread."""
        return lambda: [self.executable(), *self.arguments, *words]

    def shown(self, *words: str) -> list[str]:
        """The command line for messages."""
        return [self.program, *self.arguments, *words]

    async def start(self, container_id: str) -> None:
        """Start a created container. Raises CommandError."""
        await processes.run(self.command("start", container_id), timeout=_COMMAND_SECONDS)

    async def delete(self, container_id: str) -> None:
        """Kill the rest of a container and delete its state. A container that the runtime does not know is no error.

        Raises CommandError.
        """
        words = ("delete", "--force", container_id)
        result = await processes.run(self.command(*words), timeout=_COMMAND_SECONDS, check=False)
        if result.status != 0 and (self.root / container_id).exists():
            raise CommandError(self.shown(*words), result.status, result.stderr.decode(errors="replace"))

    async def update(self, container_id: str, resources: bytes) -> None:
        """Change limits: ``resources`` is the OCI ``linux.resources`` object as JSON. Raises CommandError."""
        command = self.command("update", "--resources", "-", container_id)
        await processes.run(command, stdin=resources, timeout=_COMMAND_SECONDS)

    async def identify(self) -> None:
        """Read the runtime's own version and features, without running a container. Raises PodkeelError."""
        await processes.run([self.program, "--version"], timeout=10)
        self.features = await self._read_features()

    async def probe(self, init_program: str, cgroup: str, scratch: Path) -> None:
        """Test whether this runtime works here, and what it supports, by running a container.

        ``init_program`` is a static program that waits for its end if it is the first process, and otherwise ends.
        ``scratch`` is an existing folder. Raises PodkeelError with the output of the runtime.
        """
        source = await in_thread(shutil.which, init_program)
        if source is None:
            raise NotFoundError(f"{init_program!r} is not installed")
        self.features = await self._read_features()
        if self.features.is_crun:
            await self._seal()
        async with self._probe_container(source, cgroup, scratch) as (bundle, container_id):
            pid = await run_detached(self, bundle, container_id)
            try:
                self.directories, scheduling = await probe_behaviour(self, pid, container_id)
                self.features = msgspec.structs.replace(
                    self.features, scheduler=scheduling.scheduler, io_priority=scheduling.io_priority
                )
            except (PodkeelError, OSError) as error:
                _log.warning("runtime handler %s: working directories cannot be tested: %s", self.name, error)

    @asynccontextmanager
    async def _probe_container(self, init_program: str, cgroup: str, scratch: Path) -> AsyncIterator[tuple[Path, str]]:
        """A bundle whose container runs ``init_program -P``, and its id. Both are removed in the end."""
        container_id = f"podkeel-probe-{uuid.uuid4().hex[:12]}"
        bundle = scratch / container_id
        try:
            await in_thread(_make_probe_bundle, bundle, init_program, cgroup)
            yield bundle, container_id
        finally:
            with contextlib.suppress(PodkeelError):
                await self.delete(container_id)
            await in_thread(mounts.unmount, bundle / "rootfs" / "init")
            await in_thread(remove_tree, bundle)

    async def _seal(self) -> None:
        """Execute a sealed copy from now on, if the host allows executing memory files."""
        sealed = SealedProgram(Path(self.program), self._program_link)
        try:
            await processes.run([await in_thread(sealed.path), "--version"], timeout=10)
        except (OSError, PodkeelError) as error:
            sealed.close()
            _log.info("runtime handler %s: the program cannot run from memory, using the file: %s", self.name, error)
        else:
            self._sealed = sealed

    async def _read_features(self) -> RuntimeFeatures:
        version = await processes.run([self.program, "--version"], check=False, timeout=10)
        line = version.stdout.decode(errors="replace").partition("\n")[0].strip()
        features = await processes.run([self.program, "features"], check=False, timeout=10)
        try:
            answer = untrusted_json.decode(features.stdout, _Features) if features.status == 0 else None
        except JsonError:
            answer = None
        if answer is None or answer == _Features():
            return _features_by_version(line)
        linux = answer.linux or _LinuxFeatures()
        rdt = linux.intel_rdt or _IntelRdt()
        return RuntimeFeatures(
            recursive_read_only_mounts="rro" in (answer.mount_options or ()),
            user_namespaces="user" in (linux.namespaces or ()),
            version=line,
            namespaces=tuple(linux.namespaces or _NAMESPACES),
            net_devices=linux.net_devices is not None and linux.net_devices.enabled is True,
            memory_policies=tuple(linux.memory_policy.modes or ()) if linux.memory_policy is not None else (),
            rdt_schemata=rdt.schemata is True,
            rdt_monitoring=rdt.monitoring is True,
        )


def _features_by_version(line: str) -> RuntimeFeatures:
    """The features of a runtime without a ``features`` command. crun got both the command and mount options in 1.8."""
    match = re.match(r"crun version (\d+)\.(\d+)", line)
    able = match is not None and (int(match[1]), int(match[2])) >= (1, 8)
    return RuntimeFeatures(recursive_read_only_mounts=able, user_namespaces=able, version=line)


def refused_limit(complaint: str) -> bool:
    """Whether an OCI runtime's error is about a limit that the kernel refuses, or that is too low to start."""
    return _REFUSED_LIMIT.search(complaint) is not None


def refused_request(complaint: str) -> bool:
    """Whether an error of an OCI runtime is caused by the request and not by the node."""
    return refused_limit(complaint) or _REFUSED_REQUEST.search(complaint) is not None


def naming(program: str, complaint: str) -> str:
    """The error ``complaint`` of an OCI runtime, with the name of the program, which not all of them include."""
    return complaint if program in complaint else f'exec "{program}": {complaint}'


def plain_message(output: str) -> str:
    """The error of an OCI runtime, without the format of log lines (runc writes logfmt)."""
    found = [re.sub(r"\\(.)", r"\1", message) for message in _LOGFMT_ERROR.findall(output)]
    return "\n".join(found) or output


def cannot_run_program(message: str, program: str = "") -> bool:
    """Whether an OCI runtime's message says that ``program`` (or any program) cannot be executed."""
    if program and f"cannot open `{program}`: " in message:  # crun 1.21; of mounts it says the same with their paths
        return True
    return _CANNOT_RUN.search(message) is not None


def _make_probe_bundle(bundle: Path, program: str, cgroup: str) -> None:
    rootfs = bundle / "rootfs"
    for name in ("proc", "dev", "host"):
        (rootfs / name).mkdir(parents=True)
    (rootfs / "init").touch(mode=0o755)
    mounts.bind(program, rootfs / "init")
    kinds = ("pid", "network", "ipc", "uts", "mount")
    spec = {
        "ociVersion": "1.0.2",
        "root": {"path": "rootfs", "readonly": True},
        "process": {
            "args": ["/init", "-P"],
            "cwd": "/",
            "user": {"uid": 0, "gid": 0},
            "noNewPrivileges": True,
            **TRIED_SCHEDULING,
        },
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/host", "type": "bind", "source": "/proc", "options": ["rbind", "ro"]},
        ],
        "linux": {"namespaces": [{"type": kind} for kind in kinds], "cgroupsPath": cgroup},
    }
    (bundle / "config.json").write_bytes(msgspec.json.encode(spec))
