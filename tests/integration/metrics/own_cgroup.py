"""A cgroup of the tests' own, in every hierarchy, with real loads inside."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import pytest

from host.cgroups import Hierarchies
from metrics.cgroups.files import DescriptorBudget
from metrics.cgroups.reader import Cgroup
from tests.support.agent import SOON

T = TypeVar("T")
BUDGET = DescriptorBudget(1000)


class OwnCgroup:
    """A cgroup made in every hierarchy, with loads inside."""

    def __init__(self, hierarchies: Hierarchies, path: str) -> None:
        self.hierarchies = hierarchies
        self.path = path
        self.folders = [Path(root + path) for root in self._roots()]
        self.loads: list[subprocess.Popen[bytes]] = []
        for folder in self.folders:
            folder.mkdir()
            for name in ("cpuset.cpus", "cpuset.mems"):
                if "cpuset" in hierarchies.v1 and folder.parent == Path(hierarchies.v1["cpuset"]):
                    (folder / name).write_text((folder.parent / name).read_text())
        self.reader = Cgroup(path, hierarchies, BUDGET)

    def _roots(self) -> list[str]:
        roots = dict.fromkeys(self.hierarchies.v1.values())
        return [*roots, self.hierarchies.unified] if self.hierarchies.unified is not None else list(roots)

    def on_v1(self, controller: str) -> bool:
        """Which version the controller is on; skips the test if it is on neither."""
        if controller in self.hierarchies.v1:
            return True
        controllers = Path(f"{self.hierarchies.unified}{self.path}/cgroup.controllers").read_text().split()
        if controller not in controllers:
            pytest.skip(f"controller {controller} is not available to new cgroups here")
        return False

    def write(self, controller: str, v1: tuple[str, str], v2: tuple[str, str]) -> None:
        """Set a limit by the file and value of the version in use."""
        name, value = v1 if self.on_v1(controller) else v2
        root = self.hierarchies.v1.get(controller) or self.hierarchies.unified
        Path(f"{root}{self.path}/{name}").write_text(value)

    def run(self, command: Sequence[str]) -> subprocess.Popen[bytes]:
        """Start a command whose every page and nanosecond counts here; its output is readable."""
        waiting = ("/bin/sh", "-c", 'read _; exec "$@"', "load", *command)
        load = subprocess.Popen(waiting, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.loads.append(load)
        for folder in self.folders:
            (folder / "cgroup.procs").write_text(str(load.pid))
        assert load.stdin is not None
        load.stdin.write(b"\n")
        load.stdin.flush()
        return load

    def end_loads(self) -> None:
        """Kill and reap what runs."""
        for load in self.loads:
            load.kill()
            load.communicate()
        self.loads.clear()

    def remove(self) -> None:
        """Remove the cgroup and those below it."""
        self.end_loads()
        for folder in self.folders:
            for below, _, _ in os.walk(folder, topdown=False):
                wait_for(partial(_removed, Path(below)))


def _removed(folder: Path) -> bool:
    with contextlib.suppress(OSError):  # busy until the last process is wholly gone
        folder.rmdir()
    return not folder.exists()


def wait_for(condition: Callable[[], bool], seconds: float = SOON) -> None:
    """Until the kernel's numbers show what must come; AssertionError if they do not."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the expected state did not come"
        time.sleep(0.01)


def present(value: T | None) -> T:
    """The value, which must be there."""
    assert value is not None
    return value
