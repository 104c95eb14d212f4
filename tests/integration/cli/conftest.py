from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.integration.cli.terminals import Start, Terminal
from tests.support.agent import AgentProcess


@pytest.fixture
def start(agent: AgentProcess) -> Iterator[Start]:
    """Starts a command; what still runs after the test is killed."""
    started: list[subprocess.Popen[bytes]] = []

    def run_it(*words: str, prefix: tuple[str, ...] = (), **streams: Any) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "PODKEEL_SOCKET": agent.address}
        command = [*prefix, *agent.command(*words)]
        started.append(subprocess.Popen(command, env=environment, **streams))
        return started[-1]

    yield run_it
    for process in started:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                stream.close()


@pytest.fixture
def terminal(start: Start) -> Iterator[Callable[..., Terminal]]:
    with contextlib.ExitStack() as stack:

        def make(*words: str, **size: int) -> Terminal:
            made = Terminal(start, *words, **size)
            stack.callback(made.close)
            return made

        yield make
