"""Driving an OCI runtime (crun, runc or one that takes the same commands); conmon calls its ``create``."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from host import mounts, processes
from host.errors import CommandError, DeadlineError, NotFoundError, PodkeelError
from host.threads import in_thread
from runtime.options import HandlerOptions

_COMMAND_SECONDS = 60.0
_CANNOT_RUN = re.compile(
    r"executable file .*not found|no such file or directory$|permission denied$|exec format error|is a directory$"
    r"|open executable|stat .*: no such file|cannot find executable|not a directory$",
    re.IGNORECASE,
)


class RuntimeFeatures(msgspec.Struct, frozen=True):
    """What a runtime handler can do, for Status and for refusing what it cannot."""

    recursive_read_only_mounts: bool = False
    user_namespaces: bool = False
    idmapped_mounts: bool = False
    version: str = ""


class _LogEntry(msgspec.Struct):
    level: str = ""
    msg: str = ""


@dataclass(frozen=True, slots=True)
class ExecResult:
    """How a command inside a container ended."""

    exit_code: int
    stdout: bytes
    stderr: bytes


class OciRuntime:
    """One configured runtime handler."""

    def __init__(self, name: str, options: HandlerOptions, root: Path, *, systemd_cgroup: bool) -> None:
        self.name = name
        self.options = options
        self.root = Path(options.root) if options.root else root
        self.systemd_cgroup = systemd_cgroup
        self.features = RuntimeFeatures()
        self._program: str | None = None

    @property
    def program(self) -> str:
        """Absolute path of the program. Raises NotFoundError when it is not installed."""
        if self._program is None:
            self._program = shutil.which(self.options.path)
            if self._program is None:
                raise NotFoundError(f"runtime handler {self.name!r}: program {self.options.path!r} is not installed")
        return self._program

    @property
    def arguments(self) -> list[str]:
        """What goes between the program and its subcommand."""
        arguments = [*self.options.arguments, "--root", str(self.root)]
        return [*arguments, "--systemd-cgroup"] if self.systemd_cgroup else arguments

    def command(self, *words: str) -> list[str]:
        """A whole command line."""
        return [self.program, *self.arguments, *words]

    async def start(self, container_id: str) -> None:
        """Let a created container run. Raises CommandError."""
        await processes.run(self.command("start", container_id), timeout=_COMMAND_SECONDS)

    async def delete(self, container_id: str) -> None:
        """Kill what still runs of a container and forget it; unknown to the runtime is fine. Raises CommandError."""
        command = self.command("delete", "--force", container_id)
        result = await processes.run(command, timeout=_COMMAND_SECONDS, check=False)
        if result.status != 0 and (self.root / container_id).exists():
            raise CommandError(command, result.status, result.stderr.decode(errors="replace"))

    async def update(self, container_id: str, resources: bytes) -> None:
        """Change limits: ``resources`` is the OCI ``linux.resources`` object as JSON. Raises CommandError."""
        command = self.command("update", "--resources", "-", container_id)
        await processes.run(command, stdin=resources, timeout=_COMMAND_SECONDS)

    async def execute(
        self, container_id: str, process: bytes, timeout: float | None, pids: Callable[[], Sequence[int]]
    ) -> ExecResult:
        """Run a process (an OCI ``process`` object as JSON) inside a container, to its end.

        Past ``timeout`` seconds, or when cancelled, the process and everything in its session is killed; ``pids`` lists
        those of the container.

        Raises:
            DeadlineError: it took longer than ``timeout``.
            CommandError: the OCI runtime could not start it.
        """
        pid_file = self.root / f"exec-{uuid.uuid4().hex}.pid"
        with contextlib.ExitStack() as stack:
            stack.callback(pid_file.unlink, missing_ok=True)
            process_file = os.memfd_create("process")
            stack.callback(os.close, process_file)
            os.write(process_file, process)
            log_file = os.memfd_create("log")
            stack.callback(os.close, log_file)
            # The runtime's own complaints go to its log, so that they are never taken for the process's output.
            options = [*self.arguments, "--log", "/proc/self/fd/4", "--log-format", "json"]
            words = ["exec", "--process", "/proc/self/fd/3", "--pid-file", str(pid_file), container_id]
            command = [self.program, *options, *words]
            descriptors = {3: process_file, 4: log_file}
            try:
                result = await processes.run(command, descriptors=descriptors, timeout=timeout, check=False)
            except (DeadlineError, asyncio.CancelledError):
                _kill_session(pid_file, pids())
                raise
            if result.status != 0 and (complaint := _errors_in_log(os.pread(log_file, 65536, 0))):
                raise CommandError([self.options.path, "exec", container_id], result.status, complaint)
        exit_code = result.status if result.status >= 0 else 128 - result.status
        return ExecResult(exit_code, result.stdout, result.stderr)

    async def probe(self, init_program: str, cgroup: str, scratch: Path) -> None:
        """Find out whether this runtime works here, by running a container, and what it can do.

        ``init_program`` is a static program that prints its version when given ``--version``; ``scratch`` an existing
        folder. Raises PodkeelError saying what it printed.
        """
        source = shutil.which(init_program)
        if source is None:
            raise NotFoundError(f"{init_program!r} is not installed")
        container_id = f"podkeel-probe-{uuid.uuid4().hex[:12]}"
        bundle = scratch / container_id
        try:
            await in_thread(_make_probe_bundle, bundle, source, cgroup)
            await processes.run(self.command("run", "--bundle", str(bundle), container_id), timeout=30)
        finally:
            mounts.unmount(bundle / "rootfs" / "init")
            with contextlib.suppress(PodkeelError):
                await self.delete(container_id)
            await in_thread(shutil.rmtree, bundle, True)
        self.features = await self._read_features()

    async def _read_features(self) -> RuntimeFeatures:
        version = await processes.run([self.program, "--version"], check=False, timeout=10)
        line = version.stdout.decode(errors="replace").partition("\n")[0].strip()
        features = await processes.run([self.program, "features"], check=False, timeout=10)
        if features.status != 0:
            return RuntimeFeatures(version=line)
        try:
            answer = msgspec.json.decode(features.stdout)
        except msgspec.DecodeError:
            return RuntimeFeatures(version=line)
        linux = answer.get("linux") or {}
        idmapped = bool(((linux.get("mountExtensions") or {}).get("idmap") or {}).get("enabled"))
        return RuntimeFeatures(
            recursive_read_only_mounts="rro" in (answer.get("mountOptions") or []),
            user_namespaces="user" in (linux.get("namespaces") or []) and idmapped,
            idmapped_mounts=idmapped,
            version=line,
        )


def _errors_in_log(log: bytes) -> str:
    """The error messages of an OCI runtime's log in JSON lines."""
    messages = []
    for line in log.splitlines():
        with contextlib.suppress(msgspec.DecodeError):
            entry = msgspec.json.decode(line, type=_LogEntry)
            if entry.level in ("error", "fatal"):
                messages.append(entry.msg)
    return "\n".join(messages)


def cannot_run_program(message: str) -> bool:
    """Whether an OCI runtime's message says that the container's program cannot be executed."""
    return any(_CANNOT_RUN.search(line.strip()) for line in message.splitlines()) and "mount" not in message


def _kill_session(pid_file: Path, pids: Sequence[int]) -> None:
    """Kill the process named in ``pid_file`` and all of ``pids`` that are in its session or descend from it."""
    try:
        leader = int(pid_file.read_text())
    except (OSError, ValueError):
        return
    doomed = {leader}
    parents = {pid: _parent_and_session(pid) for pid in pids}
    grown = True
    while grown:
        found = {pid for pid, (parent, session) in parents.items() if parent in doomed or session in doomed} - doomed
        doomed |= found
        grown = bool(found)
    for pid in doomed:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _parent_and_session(pid: int) -> tuple[int, int]:
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            fields = stat.read().rpartition(b")")[2].split()
    except OSError:
        return (0, 0)
    return (int(fields[1]), int(fields[3]))


def _make_probe_bundle(bundle: Path, program: str, cgroup: str) -> None:
    rootfs = bundle / "rootfs"
    for name in ("proc", "dev"):
        (rootfs / name).mkdir(parents=True)
    (rootfs / "init").touch(mode=0o755)
    mounts.bind(program, rootfs / "init")
    kinds = ("pid", "network", "ipc", "uts", "mount")
    spec = {
        "ociVersion": "1.0.2",
        "root": {"path": "rootfs", "readonly": True},
        "process": {"args": ["/init", "--version"], "cwd": "/", "user": {"uid": 0, "gid": 0}, "noNewPrivileges": True},
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
        "linux": {"namespaces": [{"type": kind} for kind in kinds], "cgroupsPath": cgroup},
    }
    (bundle / "config.json").write_bytes(msgspec.json.encode(spec))
