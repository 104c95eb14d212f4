"""One agent for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.agent import AgentProcess, running_agent
from tests.support.pods import remove_all_pods


@pytest.fixture(scope="package")
def served(tmp_path_factory: pytest.TempPathFactory, busybox: Path) -> Iterator[AgentProcess]:
    with running_agent(tmp_path_factory.mktemp("nri"), busybox) as made:
        yield made


@pytest.fixture
def agent(served: AgentProcess) -> Iterator[AgentProcess]:
    yield served
    remove_all_pods(served.client)
    assert served.tracebacks() == []
    assert served.client.findings() == []
