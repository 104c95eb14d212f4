from __future__ import annotations

import gc
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from proto.runtime.v1 import cri_pb2
from tests.support.agent import RESETS, SOON, AgentProcess, build_busybox, running_agent
from tests.support.leaks import traces

# Without bytecode on disk each agent that a test starts would compile all of its modules.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# How fast examples are made says how busy the machine is, and nothing of the code.
hypothesis.settings.register_profile(
    "podkeel", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow], print_blob=True
)
hypothesis.settings.load_profile("podkeel")

# A run in the background of a shell ignores SIGINT, and all that it starts would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Let the collections below look only at what tests make: they take milliseconds."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """What a module leaves open fails its last test at the latest, and none of another module."""
    yield
    if nextitem is None or nextitem.path != item.path:
        gc.collect()


@pytest.fixture(scope="session", autouse=True)
def nothing_left_behind() -> Iterator[None]:
    before = traces()
    yield
    RESETS.close()
    # The kernel takes links apart in the background once their namespaces are gone.
    deadline = time.monotonic() + SOON
    while (left := sorted(traces() - before)) and time.monotonic() < deadline:
        time.sleep(0.2)
    if left:
        pytest.fail("left on the machine by this run:\n" + "\n".join(left))


@pytest.fixture(scope="session")
def busybox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_busybox(tmp_path_factory.mktemp("busybox"))


@pytest.fixture(scope="session")
def shared_agent(tmp_path_factory: pytest.TempPathFactory, busybox: Path) -> Iterator[AgentProcess]:
    with running_agent(tmp_path_factory.mktemp("agent"), busybox) as agent:
        yield agent


@pytest.fixture
def agent(shared_agent: AgentProcess) -> Iterator[AgentProcess]:
    """The shared agent, empty of pods before and after, with nothing its store does not know and no unhandled error."""
    logged = shared_agent.log.stat().st_size
    yield shared_agent
    from tests.support.pods import remove_all_pods

    remove_all_pods(shared_agent.client)
    # The kernel takes links apart in the background, behind the namespaces of all that run on this machine.
    deadline = time.monotonic() + SOON
    while (findings := shared_agent.client.findings()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert findings == []
    assert shared_agent.tracebacks(logged) == []


@pytest.fixture
def own_agent(tmp_path: Path, busybox: Path) -> Iterator[AgentProcess]:
    """An agent of the test's own, which may be killed and restarted."""
    with running_agent(tmp_path, busybox) as agent:
        yield agent


@pytest.fixture(params=["crun", "runc"])
def handler(request: pytest.FixtureRequest, agent: AgentProcess) -> str:
    """Each OCI runtime in turn, as the name of a runtime handler of the shared agent."""
    handlers = agent.client.call("Status", cri_pb2.StatusRequest()).runtime_handlers
    if request.param not in [handler.name for handler in handlers]:
        pytest.skip(f"{request.param} does not work here")
    return str(request.param)
