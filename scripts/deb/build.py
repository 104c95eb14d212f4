#!/usr/bin/env python3
"""``make deb``: builds dist/podkeel_VERSION_amd64.deb for Debian 12 and 13.

The package carries an environment for the Python of each of these releases, below /usr/lib/podkeel/pythonX.Y: the wheel
of this repository and the locked dependencies (requirements.txt), whose hashes are checked when they are fetched here.
Installing needs no network. One package for both releases keeps working while a node is upgraded from 12 to 13.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
PYTHONS = ("3.11", "3.13")  # of Debian 12 and 13
PLATFORM = "x86_64-manylinux_2_36"  # glibc of Debian 12
LIBRARY = Path("usr/lib/podkeel")
DEPENDS = (
    # One of the carried ones: neither 3.12 nor 3.14.
    *("python3 (>= 3.11)", "python3 (<< 3.14)", "python3 (<< 3.12) | python3 (>= 3.13)"),
    *("crun | runc", "conmon", "catatonit", "nftables"),
    *("libc6 (>= 2.36)", "libgcc-s1", "libstdc++6", "libseccomp2", "init-system-helpers"),
)
CONTROL = """\
Package: podkeel
Version: {version}
Architecture: amd64
Section: admin
Priority: optional
Maintainer: The Podkeel project <podkeel@localhost>
Installed-Size: {kibibytes}
Depends: {depends}
Recommends: ca-certificates, kmod, iproute2
Suggests: apparmor, containernetworking-plugins, criu
Description: Kubernetes node agent (Container Runtime Interface)
 Podkeel serves the Container Runtime Interface to kubelet and crictl. It starts
 containers by crun or runc, with one conmon for each of them, and connects pods
 by nftables or CNI plugins. Containers run on while it is restarted or upgraded.
 .
 The installation starts nothing: `systemctl enable --now podkeel` does.
 It can be installed beside containerd, CRI-O or Docker.
"""
PAGES = {"podkeel": 1, "podkeel-check": 8}
SHELLS = {
    "bash": "usr/share/bash-completion/completions/podkeel",
    "zsh": "usr/share/zsh/vendor-completions/_podkeel",
    "fish": "usr/share/fish/vendor_completions.d/podkeel.fish",
}


def main() -> int:
    """Build the package; prints its path."""
    need_programs()
    with tempfile.TemporaryDirectory(prefix="podkeel-deb-") as folder:
        work = Path(folder)
        tree = work / "tree"
        tools = make_tools(work / "tools")
        os.environ["SOURCE_DATE_EPOCH"] = source_date()
        wheel = build_wheel(tools, work)
        for python in PYTHONS:
            install_environment(tools, wheel, tree / LIBRARY / f"python{python}", python)
        version = debian_version(wheel.name.split("-")[1])
        install_files(tree)
        make_pages(tools, tree, version)
        make_completions(tools, tree)
        normalize_modes(tree)
        write_control(tree, version)
        target = ROOT / "dist" / f"podkeel_{version}_amd64.deb"
        target.parent.mkdir(exist_ok=True)
        run("dpkg-deb", "--root-owner-group", "-Zzstd", "-z10", "--build", tree, target)
    print(target)
    return 0


def need_programs() -> None:
    """Install what Debian has and this build needs, or end with a message."""
    missing = [program for program in ("dpkg-deb", "go-md2man") if shutil.which(program) is None]
    if missing and os.geteuid() == 0 and shutil.which("apt-get"):
        packages = {"dpkg-deb": "dpkg", "go-md2man": "go-md2man"}
        run("apt-get", "install", "-y", "-qq", "--no-install-recommends", *(packages[name] for name in missing))
    elif missing:
        sys.exit(f"deb: these programs are missing: {', '.join(missing)}; on Debian, install them as root")


def make_tools(folder: Path) -> Path:
    """An environment with the locked build tools; returns its folder of programs."""
    run(sys.executable, "-m", "venv", folder)
    locked = ("--require-hashes", "--only-binary=:all:", "-r", HERE / "build-requirements.txt")
    run(folder / "bin/pip", "install", "--quiet", "--disable-pip-version-check", *locked)
    return folder / "bin"


def source_date() -> str:
    """The time of the last commit, else of now: files of a package built twice have the same times."""
    done = subprocess.run(
        ["git", "-c", f"safe.directory={ROOT}", "-C", ROOT, "log", "-1", "--format=%ct"],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or str(int((ROOT / "pyproject.toml").stat().st_mtime))


def build_wheel(tools: Path, folder: Path) -> Path:
    """The wheel of this repository."""
    run(tools / "python", "-m", "hatchling", "build", "--target", "wheel", "--directory", folder, where=ROOT)
    (wheel,) = folder.glob("*.whl")
    return wheel


def install_environment(tools: Path, wheel: Path, target: Path, python: str) -> None:
    """Install the locked dependencies and the wheel for one version of Python, which need not be here."""
    uv: list[str | Path] = [tools / "uv", "pip", "install", "--quiet", "--target", target]
    uv += ["--link-mode", "copy", "--no-deps"]
    uv += ["--python-version", python, "--python-platform", PLATFORM, "--only-binary", ":all:"]
    run(*uv, "--require-hashes", "--requirement", HERE / "requirements.txt")
    run(*uv, wheel)
    for needless in ("bin", "share", ".lock"):
        path = target / needless
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    for record in [*target.glob("*.dist-info/RECORD"), *target.glob("*.dist-info/direct_url.json")]:
        record.unlink()  # dpkg has the list of files, and the wheel's path is that of the build


def debian_version(version: str) -> str:
    """A version of PEP 440 as one of Debian, with the same order: 1.2.0rc1+3.gabc is 1.2.0~rc1+3.gabc."""
    return re.sub(r"^([\d.]+)(a|b|rc)(?=\d)", r"\1~\2", version)


def install_files(tree: Path) -> None:
    """The command, its configuration, the units of systemd, the documents."""
    copy(HERE / "command.py", tree / "usr/bin/podkeel")
    copy(HERE / "config.toml", tree / "etc/podkeel/config.toml")
    copy(HERE / "podkeel.tmpfiles", tree / "usr/lib/tmpfiles.d/podkeel.conf")
    for unit in ("podkeel.service", "podkeel.socket"):
        target = tree / "usr/lib/systemd/system" / unit
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(installed_unit((ROOT / "manifests/systemd" / unit).read_text()))
    documents = tree / "usr/share/doc/podkeel"
    copy(ROOT / "README.md", documents / "README.md")
    write_gzip(documents / "changelog.gz", (ROOT / "CHANGELOG.md").read_bytes())
    for document in sorted(ROOT.glob("docs/*.md")):
        copy(document, documents / "docs" / document.name)
    shutil.copytree(ROOT / "manifests", documents / "examples", ignore=shutil.ignore_patterns("systemd", "__pycache__"))
    (documents / "copyright").write_text(
        "Podkeel is distributed under the Apache License, Version 2.0: /usr/share/common-licenses/Apache-2.0\n"
        "The licenses of the Python packages below /usr/lib/podkeel are in their *.dist-info folders there.\n"
    )


def installed_unit(text: str) -> str:
    """A unit of the repository with the paths of the package."""
    text = re.sub(r"\A# /etc/systemd/system/(podkeel\.\w+)(.*)\n", r"# \1\2\n", text)
    text = re.sub(r"^# Adjust to where .*\n", "", text, flags=re.MULTILINE)
    text = text.replace("file:///opt/podkeel/README.md", "man:podkeel(1) file:///usr/share/doc/podkeel/README.md")
    text = text.replace("/opt/podkeel/.venv/bin/podkeel", "/usr/bin/podkeel")
    if "/opt/" in text:
        sys.exit("deb: a unit in manifests/systemd names a path below /opt that this script does not know")
    return text


def make_pages(tools: Path, tree: Path, version: str) -> None:
    """Manual pages: podkeel(1), podkeel-check(8) of the command line, podkeel.toml(5) of docs/configuration.md."""
    folder = tree / "usr/share/man"
    for name, section in PAGES.items():
        page = run(tools / "python", HERE / "pages.py", name, version, environment=modules(tree))
        write_gzip(folder / f"man{section}" / f"{name}.{section}.gz", run("go-md2man", given=page))
    configuration = (ROOT / "docs/configuration.md").read_text()
    heading, _, rest = configuration.partition("\n")
    if heading != "# Configuration":
        sys.exit("deb: docs/configuration.md begins with another heading than this script knows")
    links = re.sub(r"\[([^\]]+)\]\((?!https?:)[^)]+\)", r"\1", rest)  # to other documents
    shown = re.sub(r"^(#+) ", lambda match: f"{match[1][1:]} ", links, flags=re.MULTILINE)
    name = "# NAME\n\npodkeel.toml - configuration of Podkeel, /etc/podkeel/config.toml\n\n# DESCRIPTION\n"
    source = f'% PODKEEL.TOML 5 "" "podkeel {version}" "Podkeel"\n{name}{shown}'
    write_gzip(folder / "man5/podkeel.toml.5.gz", run("go-md2man", given=source.encode()))


def make_completions(tools: Path, tree: Path) -> None:
    """Completions of each shell."""
    for shell, place in SHELLS.items():
        command = (tools / "shtab", "--shell", shell, "--prog", "podkeel", "podkeel.cli.arguments.parser.build_parser")
        target = tree / place
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(run(*command, environment=modules(tree)))


def modules(tree: Path) -> dict[str, str]:
    """The environment of a program that imports Podkeel's command line, which needs no dependency."""
    return {"PYTHONPATH": str(tree / LIBRARY / f"python{PYTHONS[0]}"), "PYTHONDONTWRITEBYTECODE": "1"}


def normalize_modes(tree: Path) -> None:
    """Modes that do not depend on the umask of the build."""
    for path in [tree, *tree.rglob("*")]:
        if not path.is_symlink():
            executable = path.is_dir() or path == tree / "usr/bin/podkeel"
            path.chmod(0o755 if executable else 0o644)


def write_control(tree: Path, version: str) -> None:
    """The folder DEBIAN: control, conffiles, md5sums and the maintainer scripts."""
    files = sorted(path for path in tree.rglob("*") if path.is_file())
    kibibytes = sum(path.stat().st_size + 1023 >> 10 for path in files)
    folder = tree / "DEBIAN"
    folder.mkdir()
    control = CONTROL.format(version=version, kibibytes=kibibytes, depends=", ".join(DEPENDS))
    (folder / "control").write_text(control)
    (folder / "conffiles").write_text("/etc/podkeel/config.toml\n")
    (folder / "md5sums").write_text("".join(checksums(tree, files)))
    for script in ("postinst", "prerm", "postrm"):
        copy(HERE / script, folder / script)
        (folder / script).chmod(0o755)


def checksums(tree: Path, files: Iterable[Path]) -> Iterable[str]:
    """The lines of md5sums, which dpkg --verify reads."""
    for path in files:
        name = path.relative_to(tree)
        if name.parts[0] != "etc":
            yield f"{hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()}  {name}\n"


def copy(source: Path, target: Path) -> None:
    """Copy one file."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def write_gzip(path: Path, content: bytes) -> None:
    """Write a compressed file without its time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content, mtime=0))


def run(
    *command: str | Path,
    where: Path | None = None,
    given: bytes | None = None,
    environment: dict[str, str] | None = None,
) -> bytes:
    """Run a command and return its output; ends the build with the command line if it fails."""
    words: Sequence[str] = [str(word) for word in command]
    everything = {**os.environ, **(environment or {})}
    done = subprocess.run(words, cwd=where, input=given, env=everything, stdout=subprocess.PIPE, check=False)
    if done.returncode != 0:
        sys.exit(f"deb: failed with status {done.returncode}: {' '.join(words)}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
