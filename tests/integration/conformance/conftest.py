from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping

import pytest

from proto.runtime.v1 import cri_pb2
from tests.integration.conformance.support import Pod
from tests.support.agent import AgentProcess
from tests.support.image_builder import busybox_image
from tests.support.pods import sandbox_config
from tests.support.registry import Registry, run_registry

if os.geteuid() != 0:
    pytest.skip("needs root", allow_module_level=True)

MakeImage = Callable[[str, Mapping[str, object]], str]


@pytest.fixture(scope="session")
def registry() -> Iterator[Registry]:
    with run_registry() as running:
        yield running


@pytest.fixture
def pod(agent: AgentProcess) -> Pod:
    return Pod.run(agent, sandbox_config(agent))


@pytest.fixture
def image(agent: AgentProcess, registry: Registry) -> Iterator[MakeImage]:
    """Makes a busybox image with a given configuration and pulls it; removed after the test."""
    made: list[str] = []

    def make(name: str, config: Mapping[str, object]) -> str:
        reference = registry.push(busybox_image(config), f"made/{name}")
        agent.client.call("PullImage", cri_pb2.PullImageRequest(image=cri_pb2.ImageSpec(image=reference)))
        made.append(reference)
        return reference

    yield make
    for reference in made:
        agent.client.call("RemoveImage", cri_pb2.RemoveImageRequest(image=cri_pb2.ImageSpec(image=reference)))


@pytest.fixture
def privileged(agent: AgentProcess) -> Pod:
    config = sandbox_config(agent)
    config.linux.security_context.privileged = True
    return Pod.run(agent, config)
