from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.bystander import Bystander
from tests.faults.node_state import assert_whole
from tests.support.agent import AgentProcess
from tests.support.image_builder import BuiltImage, busybox_layer, entry, make_tar
from tests.support.pods import remove_all_pods
from tests.support.registry import Registry, run_registry

# With a weight, so that every pod passes the stage that sets it, even if this kernel does not support weights.
ONE_HANDLER = 'io_weight = 200\n[runtime.handlers.crun]\npath = "crun"\n'


class FaultyAgent(AgentProcess):
    """An agent whose faults can be changed while it runs."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, options=ONE_HANDLER)
        self._faults = folder / "faults"
        self.plant("")

    def plant(self, faults: str) -> None:
        """Set the faults from now on."""
        self._faults.write_text(faults)

    def start(self, faults: str = "") -> None:
        super().start(faults or f"@{self._faults}")

    def revive(self) -> None:
        """Wait until a fault has killed the agent, and start it without faults."""
        self.wait_dead()
        self.plant("")
        self.start()


class Stage:
    """An agent with faults, a pod that must not be affected, and images for the agent."""

    def __init__(self, agent: FaultyAgent, bystander: Bystander, archive: Path, reference: str) -> None:
        self.agent = agent
        self.bystander = bystander
        self.archive = archive
        self.reference = reference

    def assert_whole(self) -> None:
        """Assert that store and node agree, and that the bystander was not disturbed."""
        assert_whole(self.agent)
        self.bystander.assert_undisturbed()


@pytest.fixture(scope="session")
def registry() -> Iterator[Registry]:
    with run_registry() as running:
        yield running


@pytest.fixture(scope="session")
def _stage(tmp_path_factory: pytest.TempPathFactory, busybox: Path, registry: Registry) -> Iterator[Stage]:
    folder = tmp_path_factory.mktemp("faulty")
    image = BuiltImage((busybox_layer(), make_tar([entry("only/here", "x" * 100_000)])), {"Cmd": ["sh"]})
    archive = folder / "image.tar"
    image.write_oci(archive, "example.org/imported:1")
    reference = registry.push(image, "test/pulled")
    agent = FaultyAgent(folder)
    try:
        agent.start()
        agent.import_busybox(busybox)
        yield Stage(agent, Bystander(agent), archive, reference)
    finally:
        agent.reset()


@pytest.fixture
def stage(_stage: Stage) -> Iterator[Stage]:
    """The shared agent of the fault tests. Before and after a test it has only the bystander, and no difference."""
    agent = _stage.agent
    agent.plant("")
    if agent.process is None or agent.process.poll() is not None:
        agent.kill()
        agent.start()
    yield _stage
    agent.plant("")
    if agent.process is None or agent.process.poll() is not None:
        agent.kill()
        agent.start()
    remove_all_pods(agent.client, keep=_stage.bystander.sandbox_id)
    _stage.assert_whole()
