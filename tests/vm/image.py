"""The parts of the virtual machine, made once and kept: a root file system, the kernel, virtme-ng; and its sources."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import IO

SUITE = "bookworm"
VIRTME = "virtme-ng==1.42"
PACKAGES = (
    *("systemd", "systemd-sysv", "dbus", "udev", "kmod", "procps", "linux-image-amd64", "apparmor"),
    *("crun", "runc", "conmon", "catatonit", "nftables", "iproute2", "busybox-static", "ca-certificates"),
    *(
        "docker-registry",
        "python3",
        "util-linux",
        "libcap2-bin",
        "selinux-policy-default",
        "policycoreutils",
        "xfsprogs",
    ),
)
POLICY = Path(__file__).with_name("selinux.cil")
# What this needs of the host: a program of each package.
HOST_PACKAGES = {
    "qemu-system-x86_64": "qemu-system-x86",
    "mmdebstrap": "mmdebstrap",
    "mkfs.ext4": "e2fsprogs",
    "cpio": "cpio",
    "depmod": "kmod",
    "busybox": "busybox-static",
    "script": "bsdutils",
}
_NOT_COPIED = (".git", ".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis", "bench-results")


class MissingError(Exception):
    """Something that the virtual machine needs is missing; the message says what to do."""


@dataclass(frozen=True)
class Image:
    """The paths of the parts."""

    root_disk: Path
    kernel: Path
    virtme: Path


def prepare(cache: Path) -> Image:
    """Make what is not in ``cache`` yet, which takes one to two minutes. Raises MissingError."""
    _need_programs()
    key = hashlib.sha256(repr((SUITE, PACKAGES, POLICY.read_text())).encode()).hexdigest()[:12]
    folder = cache / key
    if not (folder / "complete").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        _make_root(folder)
        (folder / "complete").touch()
    virtme = cache / VIRTME
    if not (virtme / "bin/vng").exists():
        _run([sys.executable, "-m", "venv", "--clear", virtme])
        _run([virtme / "bin/pip", "install", "--quiet", "--disable-pip-version-check", VIRTME])
    return Image(folder / "root.ext4", next((folder / "kernel").glob("lib/modules/*/vmlinuz")), virtme / "bin")


def _need_programs() -> None:
    if os.geteuid() != 0:
        raise MissingError("it needs root, to make the root file system")
    missing = sorted({package for program, package in HOST_PACKAGES.items() if shutil.which(program) is None})
    if missing and shutil.which("apt-get"):
        print(f"installing {' '.join(missing)}", flush=True)
        command = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *missing]
        done = subprocess.run(
            command,
            env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
            stdout=subprocess.DEVNULL,
            check=False,
        )
        if done.returncode == 0:
            return
    if missing:
        raise MissingError(f"these Debian packages are missing and could not be installed: {' '.join(missing)}")


def _make_root(folder: Path) -> None:
    """Debian with systemd as a disk, and its kernel with the modules beside it."""
    print(f"making a Debian {SUITE} root file system in {folder}", flush=True)
    tree = folder / "tree"
    _run(["mmdebstrap", "--quiet", "--variant=minbase", f"--include={','.join(PACKAGES)}", SUITE, tree])
    shutil.copy(POLICY, tree / "podkeel.cil")
    _run(["chroot", tree, "semodule", "--install", "/podkeel.cil"])
    modules = next((tree / "usr/lib/modules").iterdir())
    kernel = folder / "kernel/lib/modules" / modules.name  # where virtme-ng looks for modules
    kernel.parent.mkdir(parents=True)
    shutil.move(modules, kernel)
    shutil.copy(tree / "boot" / f"vmlinuz-{modules.name}", kernel / "vmlinuz")
    for file in (tree / "boot").iterdir():
        if file.is_file():
            file.unlink()
    _make_disk(folder / "root.ext4", tree, "2G")
    shutil.rmtree(tree)


def make_source_disk(disk: Path, project: Path, scratch: Path, *, committed: bool) -> None:
    """A disk with the project in ``project``, its .venv and the Python of that; and room for tests.

    The project is as it is now on disk or, if only what is ``committed`` is wanted, as its last commit is.
    """
    tree = scratch / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    if committed:
        _run(["git", "clone", "--quiet", "--shared", project, tree / "project"])
        shutil.rmtree(tree / "project/.git")
        _copy(project / ".venv", tree / "project/.venv", ())
        for stub in (project / "proto").rglob("*_pb2*.py*"):
            if stub.parent.name == "__pycache__":  # it does not exist in the copy, which is compiled below
                continue
            shutil.copy(stub, tree / "project" / stub.relative_to(project))
    else:
        _copy(project, tree / "project", _NOT_COPIED)
    # Python is slow there: it need not compile what each agent loads.
    compile_all: list[str | Path] = [sys.executable, "-m", "compileall", "-q", "-x", r"/\.venv/"]
    compile_all += ["-s", tree / "project", "-p", project]
    _run([*compile_all, tree / "project"])
    if (base := Path(sys.base_prefix)) != Path("/usr"):
        _copy(base, tree / "python", ("test", "idlelib", "*.a"))
    _make_disk(disk, tree, "8G")
    shutil.rmtree(tree)


def _copy(source: Path, target: Path, excluded: tuple[str, ...]) -> None:
    target.mkdir(parents=True)
    read = ["tar", "-C", str(source), *(f"--exclude={name}" for name in excluded), "-cf", "-", "."]
    with subprocess.Popen(read, stdout=subprocess.PIPE) as reader:
        _run(["tar", "-C", target, "-xf", "-"], stdin=reader.stdout)


def _make_disk(disk: Path, tree: Path, size: str) -> None:
    disk.unlink(missing_ok=True)
    _run(["truncate", f"--size={size}", disk])
    _run(["mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=1,lazy_journal_init=1", "-d", tree, disk])


def _run(command: list[str | Path], stdin: IO[bytes] | None = None) -> None:
    words = [str(word) for word in command]
    done = subprocess.run(words, stdin=stdin, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise MissingError(f"{' '.join(words[:3])} … failed: {done.stderr.strip()[-2000:]}")
