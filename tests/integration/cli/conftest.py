from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

import pytest

from tests.integration.cli.terminals import Start, Terminal, starting
from tests.support.agent import AgentProcess


@pytest.fixture
def start(agent: AgentProcess) -> Iterator[Start]:
    """Starts a command; what still runs after the test is killed."""
    with starting(agent.command(), {**os.environ, "PODKEEL_SOCKET": agent.address}) as start:
        yield start


@pytest.fixture
def terminal(start: Start) -> Iterator[Callable[..., Terminal]]:
    with contextlib.ExitStack() as stack:

        def make(*words: str, **size: int) -> Terminal:
            made = Terminal(start, *words, **size)
            stack.callback(made.close)
            return made

        yield make
