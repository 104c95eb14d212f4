"""One agent for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.agent import AgentProcess, running_agent


@pytest.fixture(scope="package")
def shared_agent(tmp_path_factory: pytest.TempPathFactory, busybox: Path) -> Iterator[AgentProcess]:
    with running_agent(tmp_path_factory.mktemp("nri"), busybox) as made:
        yield made
