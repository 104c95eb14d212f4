"""The same container without an agent: calls the OCI runtime directly, for comparison."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from host import processes as host_processes
from tests.bench.samples import Samples
from tests.bench.workload import EXEC_COMMAND


class BareRuntime:
    """Runs copies of one running container's bundle, with the same spec, root file system and joined namespaces.

    This process must be a child subreaper: containers become its children when the runtime's ``create`` ends.
    """

    def __init__(self, runtime: str, bundle: Path, folder: Path, cgroup_parent: str) -> None:
        program = shutil.which(runtime)
        if program is None:
            raise FileNotFoundError(f"OCI runtime {runtime!r} is not on the PATH")
        self.program = program
        self._state = folder / "bare-state"
        self._bundle = folder / "bare-bundle"
        self._pid_file = folder / "bare.pid"
        self._bundle.mkdir()
        self._cgroup_parent = cgroup_parent
        self._specification: dict[str, Any] = json.loads((bundle / "config.json").read_text())
        root = Path(self._specification["root"]["path"])
        self._specification["root"]["path"] = str(root if root.is_absolute() else bundle / root)
        self._count = 0

    def cycle(self, samples: Samples) -> None:
        """Run create, start, exec, kill and delete. Adds the duration of each, and the sums for the goals."""
        name, create = self._prepare()
        try:
            with samples.timed("create+start"):
                self._run("create", create, samples)
                self._run("start", ("start", name), samples)
            self._run("exec", ("exec", name, *EXEC_COMMAND), samples)
            init = int(self._pid_file.read_text())
            with samples.timed("kill+delete"):
                with samples.timed("kill"):
                    self._call(("kill", name, "KILL"))
                    os.waitpid(init, 0)
                self._run("delete", ("delete", name), samples)
        except BaseException:
            self._call(("delete", "--force", name))
            raise

    @contextlib.contextmanager
    def running(self) -> Iterator[Callable[[Samples], None]]:
        """Run one container for the block. Provides a function that runs a command in it and adds ``exec in one``."""
        name, create = self._prepare()
        try:
            self._run("create", create, Samples())
            self._run("start", ("start", name), Samples())
            yield lambda samples: self._run("exec in one", ("exec", name, *EXEC_COMMAND), samples)
        finally:
            self._call(("delete", "--force", name))
            os.waitpid(int(self._pid_file.read_text()), 0)

    def _prepare(self) -> tuple[str, tuple[str, ...]]:
        """The name of the next container and the arguments that create it."""
        self._count += 1
        name = f"bare-{os.getpid()}-{self._count}"
        self._specification["linux"]["cgroupsPath"] = f"{self._cgroup_parent}/{name}"
        (self._bundle / "config.json").write_text(json.dumps(self._specification))
        return name, ("create", "--bundle", str(self._bundle), "--pid-file", str(self._pid_file), name)

    def version(self, samples: Samples, count: int) -> None:
        """Start the runtime ``count`` times without work, to measure the cost of the process alone."""
        for _ in range(count):
            self._run("--version", ("--version",), samples)

    def _run(self, name: str, words: Sequence[str], samples: Samples) -> None:
        begin = time.perf_counter_ns()
        status = self._call(words)
        samples.add(name, (time.perf_counter_ns() - begin) / 1e6)
        if status != 0:
            raise RuntimeError(f"{self.program} {' '.join(words)} ended with status {status}")

    def _call(self, words: Sequence[str]) -> int:
        pid = host_processes.spawn((self.program, "--root", str(self._state), *words), descriptors={2: 2})
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
