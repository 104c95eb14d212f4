"""``podkeel reset`` in processes that are forked from one which has loaded its modules: most agents of tests need one,
and loading takes longer than resetting. ``python -m tests.support.resets`` is that process.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import threading
import traceback
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Reset:
    """How one reset ended, and what it wrote."""

    status: int
    output: str


class Resets:
    """The process that runs them, started when the first is asked for; its standard input closed ends it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def run(self, *words: str) -> Reset:
        """Run ``podkeel`` with these words, in the environment and the working folder of this process."""
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                command = (sys.executable, "-m", "tests.support.resets")
                self._process = subprocess.Popen(command, cwd=_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            request = {"words": words, "environment": dict(os.environ), "folder": str(Path.cwd())}
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            return Reset(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        """End the process, if it runs. It does nothing between two requests."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def _answer(words: list[str], environment: dict[str, str], folder: str) -> Reset:
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(write_end, 1)
        os.dup2(write_end, 2)
        os.close(read_end)
        os.close(write_end)
        os._exit(_run(words, environment, folder))
    os.close(write_end)
    with open(read_end, encoding="utf-8", errors="replace") as reader:
        output = reader.read()
    return Reset(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), output)


def _run(words: list[str], environment: dict[str, str], folder: str) -> int:
    from cli.main import main as podkeel

    try:
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        return podkeel(words)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def main() -> None:
    """Answer requests, a line each, until there are no more."""
    for name in ("cli.main", "cli.agent.reset", "cri.reset"):
        importlib.import_module(name)
    assert "grpc" not in sys.modules, "a process that has gRPC loaded must not fork"
    for line in sys.stdin.buffer:
        done = _answer(**json.loads(line))
        sys.stdout.write(json.dumps({"status": done.status, "output": done.output}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
