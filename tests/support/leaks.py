"""Lists what a test run could leave on the machine, so that the state before and after can be compared."""

from __future__ import annotations

import contextlib
import os
import stat
import subprocess
from pathlib import Path

from host.files import mounts
from host.files.procfs import all_pids, command_line, read_bounded

_NAMES = ("podkeel", "pkt")
_DEVICES = (
    "null",
    "zero",
    "full",
    "random",
    "urandom",
    "tty",
    "ptmx",
    "console",
    "kmsg",
    "fuse",
    "net/tun",
    "shm",
    "pts",
)


def traces() -> set[str]:
    """Mounts, links, nftables tables, cgroups, run folders and processes with a name that Podkeel or its tests use.

    Also owner and mode of the node's devices, which must not change.
    """
    found = {f"mount {entry.target}" for entry in mounts.mount_table() if _ours(entry.target)}
    found |= {f"link {link.name}" for link in Path("/sys/class/net").iterdir() if link.name.startswith("pk")}
    tables = subprocess.run(["nft", "list", "tables"], capture_output=True, text=True, check=False).stdout
    found |= {f"nftables {line}" for line in tables.splitlines() if _ours(line)}
    found |= {f"folder {path}" for path in Path("/run").glob("podkeel*")}
    found |= {f"cgroup {path}" for path in _cgroups()}
    return found | _processes() | _devices()


def _devices() -> set[str]:
    found = set()
    for name in _DEVICES:
        with contextlib.suppress(FileNotFoundError):
            status = Path("/dev", name).stat()
            owner = f"{status.st_uid}:{status.st_gid}"
            kind = f"{stat.filemode(status.st_mode)} {os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
            found.add(f"device /dev/{name} is {kind} of {owner}, which it was not before")
    return found


def _ours(text: str) -> bool:
    return any(name in text for name in _NAMES)


def _cgroups() -> set[str]:
    roots = [entry.target for entry in mounts.mount_table() if entry.filesystem in ("cgroup", "cgroup2")]
    return {entry.path for root in roots for entry in os.scandir(root) if entry.is_dir() and "podkeel" in entry.name}


def _is_of_this_run(pid: int, namespaces: int) -> bool:
    """Whether a process is in at most so many nested PID namespaces. Processes of other runs are in one more."""
    for line in read_bounded(f"/proc/{pid}/status", 65536).split(b"\n"):
        if line.startswith(b"NSpid:"):
            return len(line.split()) - 1 <= namespaces
    return False


def _processes() -> set[str]:
    """conmon processes in this PID namespace, which other test runs do not share, and the init processes of pods."""
    found = set()
    for pid in all_pids():
        words = command_line(pid)
        is_conmon = read_bounded(f"/proc/{pid}/comm", 64) == b"conmon\n" and _is_of_this_run(pid, 1)
        is_init = words[0].startswith(b"podkeel-pod-init") and _is_of_this_run(pid, 2)
        if is_conmon or is_init:
            found.add(f"process {pid} {b' '.join(words[:3]).decode(errors='replace')}")
    return found
