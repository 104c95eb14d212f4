"""The parts of the virtual machine, made once and kept: a root file system, the kernel, virtme-ng."""

from __future__ import annotations

import hashlib
import lzma
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import IO

PYTHONS = {"bookworm": (3, 11), "trixie": (3, 13)}
"""The releases of Debian that can be booted, by the names of their package suites, and the Python of each."""
SUITE = "trixie" if (sys.base_prefix, sys.version_info[:2]) == ("/usr", PYTHONS["trixie"]) else "bookworm"
"""The release that is booted if none is named: the one that can use this machine's .venv."""
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


class MissingError(Exception):
    """Something that the virtual machine needs is missing; the message says what to do."""


@dataclass(frozen=True)
class Image:
    """The paths of the parts."""

    root_disk: Path
    kernel: Path
    virtme: Path


def prepare(cache: Path, suite: str) -> Image:
    """Make what is not in ``cache`` yet for Debian's ``suite``, which takes one to two minutes. Raises MissingError."""
    _need_programs()
    key = hashlib.sha256(repr((suite, PACKAGES, POLICY.read_text())).encode()).hexdigest()[:12]
    folder = cache / key
    if not (folder / "complete").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        _make_root(folder, suite)
        (folder / "complete").touch()
    virtme = cache / VIRTME
    if not (virtme / "bin/vng").exists():
        run([sys.executable, "-m", "venv", "--clear", virtme])
        run([virtme / "bin/pip", "install", "--quiet", "--disable-pip-version-check", VIRTME])
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


def _make_root(folder: Path, suite: str) -> None:
    """Debian with systemd as a disk, and its kernel with the modules beside it."""
    print(f"making a Debian {suite} root file system in {folder}", flush=True)
    tree = folder / "tree"
    run(["mmdebstrap", "--quiet", "--variant=minbase", f"--include={','.join(PACKAGES)}", suite, tree])
    shutil.copy(POLICY, tree / "podkeel.cil")
    run(["chroot", tree, "semodule", "--install", "/podkeel.cil"])
    modules = next((tree / "usr/lib/modules").iterdir())
    kernel = folder / "kernel/lib/modules" / modules.name  # where virtme-ng looks for modules
    kernel.parent.mkdir(parents=True)
    shutil.move(modules, kernel)
    _decompress_modules(kernel)
    shutil.copy(tree / "boot" / f"vmlinuz-{modules.name}", kernel / "vmlinuz")
    for file in (tree / "boot").iterdir():
        if file.is_file():
            file.unlink()
    make_disk(folder / "root.ext4", tree, "2G")
    shutil.rmtree(tree)


def _decompress_modules(kernel: Path) -> None:
    """Decompress the modules, because virtme-ng cannot load compressed ones of Debian 13 before the root is mounted."""
    compressed = list(kernel.rglob("*.ko.xz"))
    for module in compressed:
        module.with_suffix("").write_bytes(lzma.decompress(module.read_bytes()))
        module.unlink()
    if compressed:
        run(["depmod", "--basedir", kernel.parents[2], kernel.name])


def copy(source: Path, target: Path, excluded: tuple[str, ...]) -> None:
    """Copy a folder without the ``excluded`` names, which are patterns of tar."""
    target.mkdir(parents=True)
    read = ["tar", "-C", str(source), *(f"--exclude={name}" for name in excluded), "-cf", "-", "."]
    with subprocess.Popen(read, stdout=subprocess.PIPE) as reader:
        run(["tar", "-C", target, "-xf", "-"], stdin=reader.stdout)


def make_disk(disk: Path, tree: Path, size: str) -> None:
    """Make an ext4 file system of that size in a sparse file, with the content of ``tree``."""
    disk.unlink(missing_ok=True)
    run(["truncate", f"--size={size}", disk])
    run(["mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=1,lazy_journal_init=1", "-d", tree, disk])


def run(command: list[str | Path], stdin: IO[bytes] | None = None) -> str:
    """Run a command to its end and return its output. Raises MissingError if it fails."""
    words = [str(word) for word in command]
    done = subprocess.run(words, stdin=stdin, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise MissingError(f"{' '.join(words[:3])} … failed: {done.stderr.strip()[-2000:]}")
    return done.stdout
