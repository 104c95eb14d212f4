from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.agent import AgentProcess
from tests.support.checkpoints import abilities, no_new_images

__all__ = ["no_new_images"]


@pytest.fixture(scope="session")
def able(shared_agent: AgentProcess) -> dict[str, str]:
    return abilities(shared_agent)


@pytest.fixture(params=["crun", "runc"])
def handler(request: pytest.FixtureRequest, able: dict[str, str], agent: AgentProcess) -> Iterator[str]:
    """Each runtime handler in turn that can make checkpoints on this machine."""
    why = able.get(request.param, "it does not work here")
    if why != "able":
        pytest.skip(f"{request.param} cannot make checkpoints here: {why}")
    yield request.param


@pytest.fixture
def crun(able: dict[str, str]) -> str:
    """The handler crun, where it can make checkpoints."""
    why = able.get("crun", "it does not work here")
    if why != "able":
        pytest.skip(f"crun cannot make checkpoints here: {why}")
    return "crun"
