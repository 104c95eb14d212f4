"""One virtual machine: booted, followed while it runs its suites, and ended."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

from tests.vm.image import Image
from tests.vm.sources import Sources
from tests.vm.suites import Machine, write_suites

_MASKED = ("apparmor.service", "docker-registry.service", "apt-daily.timer", "apt-daily-upgrade.timer")
# The kernel's options for each security module. Denials are not enforced with SELinux: Debian's policy knows neither
# our tests nor the programs they start; what the kernel would decide can be asked.
_SECURITY = {
    "apparmor": ("apparmor=1", "security=apparmor"),
    "selinux": ("selinux=1", "security=selinux", "enforcing=0", "audit=0"),
}

# This machine is not attacked; for the same reason its disk need not keep anything.
_FASTER = ("mitigations=off",)
# On a busy host the timer's interrupts come too late for the kernel's check of it, which ends in a panic.
_PATIENT = ("no_timer_check",)

# The first line that virtme-ng runs as root once systemd is up; the shared folder is mounted at /mnt.
_GUEST = """#!/bin/sh
set -e
export PATH=/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin HOME=/root
mkdir -p /run/sources {project} {python}
mount /dev/vdb /run/sources
mount --bind /run/sources/project {project}
[ ! -d /run/sources/python ] || mount --bind /run/sources/python {python}
mkdir -p /run/sources/tmp
chmod 1777 /run/sources/tmp
mount --bind /run/sources/tmp /tmp
cd {project}
exec .venv/bin/python -m tests.vm.guest /mnt {seconds} {patience}
"""


def boot(
    machine: Machine,
    *,
    image: Image,
    sources: Sources,
    results: Path,
    deadline: float,
    patience: float,
    stop: threading.Event,
) -> None:
    """Run the machine's suites until they end, until ``deadline`` of the monotonic clock, or a ``stop``.

    ``sources`` has the disk that holds them; logs, and ``result.json`` if it came to its end, are left in ``results``.
    """
    results.mkdir(parents=True)
    python = sources.python or "/run/sources"
    write_suites(machine.suites, results / "suites.json")
    seconds = deadline - time.monotonic()
    script = results / "guest.sh"
    script.write_text(
        _GUEST.format(project=sources.project, python=python, seconds=int(seconds) - 60, patience=patience)
    )
    script.chmod(0o755)
    root, disk = (sources.disk.with_name(f"{machine.name}-{part}.ext4") for part in ("root", "sources"))
    for source, copy in ((image.root_disk, root), (sources.disk, disk)):
        subprocess.run(["cp", "--sparse=always", source, copy], check=True)
    console = results / "console.typescript"
    # virtme-ng wants a terminal, which script(1) gives it.
    command = shlex.join(_command(image, root, disk, results, machine.security))
    environment = {**os.environ, "PATH": f"{image.virtme}:{os.environ['PATH']}"}
    process = subprocess.Popen(
        ["script", "--quiet", "--flush", "--command", command, str(console)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,
    )
    try:
        _follow(process, results, deadline, stop)
    finally:
        _end(process)
        root.unlink()
        disk.unlink()


def _command(image: Image, root: Path, disk: Path, results: Path, security: str) -> list[str]:
    command = [
        str(image.virtme / "vng"),
        "--run",
        str(image.kernel),
        "--disable-kvm",
        "--force-9p",
        "--systemd",
        "--rw",
    ]
    command += ["--root-disk", str(root), "--root-fstype", "ext4", f"--rwdir=mnt={results}"]
    command += [f"--qemu-opts=-drive if=virtio,file={disk},format=raw,cache=unsafe"]
    command += ["--busybox", shutil.which("busybox") or "busybox", "--cpus", "2", "--memory", "4G", "--verbose"]
    for option in (*_SECURITY[security], *_FASTER, *_PATIENT, *(f"systemd.mask={unit}" for unit in _MASKED)):
        command += ["--append", option]
    return [*command, "--exec", "/mnt/guest.sh"]


def _follow(machine: subprocess.Popen[bytes], results: Path, deadline: float, stop: threading.Event) -> None:
    """Print what fails, and which suite runs, while the machine does."""
    seen: dict[Path, int] = {}
    while machine.poll() is None and time.monotonic() < deadline and not (results / "result.json").exists():
        if stop.wait(2):
            return
        for log in sorted(results.glob("*.log"), key=lambda path: path.stat().st_mtime):
            if log not in seen:
                print(f"{log.stem} …", flush=True)
            lines = log.read_text(errors="replace").splitlines()
            for line in lines[seen.get(log, 0) :]:
                if line.startswith("failed"):
                    print(f"  {line}", flush=True)
            seen[log] = len(lines)


def _end(machine: subprocess.Popen[bytes]) -> None:
    """Give the machine the time to power off, then kill what is left of it: all that descends from ``machine``."""
    processes = _descendants(machine.pid)
    with contextlib.suppress(subprocess.TimeoutExpired):
        machine.wait(timeout=20)
    for descriptor in processes:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        os.close(descriptor)
    machine.wait()


def _descendants(pid: int) -> list[int]:
    """Pidfds of a process and of those below it, some of which lead separate sessions."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found and child not in found}:
        found |= more
    descriptors = []
    for each in found:
        with contextlib.suppress(ProcessLookupError):
            descriptors.append(os.pidfd_open(each))
    return descriptors
