"""The disk of each virtual machine with the project, its .venv and the Python of that; and room for tests."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.vm.image import PYTHONS, MissingError, copy, make_disk, run

_NOT_COPIED = (".git", ".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis", "bench-results")
_DEBIAN_13 = Path(__file__).parents[2] / "scripts/test_debian13.sh"


@dataclass(frozen=True)
class Sources:
    """The disk, where a virtual machine has to mount the project, and where the Python on the disk, if it has one.

    A .venv holds absolute paths: it works only where it was made.
    """

    disk: Path
    project: Path
    python: Path | None


def make_source_disk(disk: Path, project: Path, scratch: Path, *, suite: str, committed: bool) -> Sources:
    """Copy ``project`` as it is now on disk or, if ``committed``, as its last commit is. Raises MissingError.

    The .venv is this machine's if it has the Python of Debian's ``suite``, or one that is copied with it. For another
    Debian 13 it is that of the root file system of ``make test-debian13``.
    """
    tree = scratch / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    python = Path(sys.base_prefix) if Path(sys.base_prefix) != Path("/usr") else None
    if sys.version_info[:2] == PYTHONS[suite] or (python and suite == "bookworm"):
        _copy_here(project, tree, committed=committed)
        if python:
            copy(python, tree / "python", ("test", "idlelib", "*.a"))
    elif suite == "trixie":
        project = _copy_from_debian_13(tree, committed=committed)
        python = None
    else:
        raise MissingError(
            f"Debian {suite} has Python {PYTHONS[suite][0]}.{PYTHONS[suite][1]}, and .venv has "
            f"{sys.version_info[0]}.{sys.version_info[1]} of /usr: test on Debian 13 (make test-vm SUITE=trixie)"
        )
    make_disk(disk, tree, "8G")
    shutil.rmtree(tree)
    return Sources(disk, project, python)


def _copy_here(project: Path, tree: Path, *, committed: bool) -> None:
    if committed:
        run(["git", "clone", "--quiet", "--shared", project, tree / "project"])
        shutil.rmtree(tree / "project/.git")
        copy(project / ".venv", tree / "project/.venv", ())
        for stub in (project / "proto").rglob("*_pb2*.py*"):
            if stub.parent.name == "__pycache__":  # it does not exist in the copy, which is compiled below
                continue
            shutil.copy(stub, tree / "project" / stub.relative_to(project))
    else:
        copy(project, tree / "project", _NOT_COPIED)
    # Python is slow there: it need not compile what each agent loads.
    compile_all: list[str | Path] = [sys.executable, "-m", "compileall", "-q", "-x", r"/\.venv/"]
    compile_all += ["-s", tree / "project", "-p", project]
    run([*compile_all, tree / "project"])


def _copy_from_debian_13(tree: Path, *, committed: bool) -> Path:
    """Copy the project, compiled, from the root file system of Debian 13; return its path there."""
    print("preparing the project in the root file system of make test-debian13", flush=True)
    command: list[str | Path] = [_DEBIAN_13, "--prepare", *(["--committed"] if committed else [])]
    place = Path(run(command).strip().splitlines()[-1])
    copy(place, tree / "project", _NOT_COPIED)
    return Path("/") / place.name
