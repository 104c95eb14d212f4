"""What the conformance tests share."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

import grpc
import pytest

from proto.runtime.v1 import cri_pb2
from tests.support.agent import AgentProcess, wait_for
from tests.support.pods import container_config

UNKNOWN_ID = "f" * 64
SLEEP = ("sleep", "1000")


@contextlib.contextmanager
def refused(code: grpc.StatusCode, text: str = "") -> Iterator[None]:
    """The block must fail with this code, and with ``text`` (a regular expression) in the message."""
    with pytest.raises(grpc.RpcError) as raised:
        yield
    assert raised.value.code() is code, raised.value
    message = raised.value.details()
    assert message and "Traceback" not in message
    assert re.search(text, message), message


@dataclass(frozen=True)
class Pod:
    """A running sandbox of a test."""

    agent: AgentProcess
    config: cri_pb2.PodSandboxConfig
    id: str

    @classmethod
    def run(cls, agent: AgentProcess, config: cri_pb2.PodSandboxConfig) -> Pod:
        return cls(agent, config, agent.client.run_sandbox(config))

    def create(self, config: cri_pb2.ContainerConfig) -> str:
        return self.agent.client.create(self.id, config, self.config)

    def start(self, config: cri_pb2.ContainerConfig) -> str:
        container_id = self.create(config)
        self.agent.client.start(container_id)
        return container_id

    def sleeping(self, name: str = "main") -> str:
        return self.start(container_config(name, *SLEEP))

    def finished(self, config: cri_pb2.ContainerConfig) -> cri_pb2.ContainerStatus:
        """Run a container to its end."""
        return exited(self.agent, self.start(config))

    def printed(self, config: cri_pb2.ContainerConfig) -> str:
        """What a container printed until its end, which must be a good one."""
        status = self.finished(config)
        text = log_text(status.log_path)
        assert status.exit_code == 0, (status, text)
        return text


def exited(agent: AgentProcess, container_id: str) -> cri_pb2.ContainerStatus:
    """Wait for the end of a container."""
    client = agent.client
    wait_for(lambda: client.status(container_id).state == cri_pb2.CONTAINER_EXITED, 20, "the container's end")
    return client.status(container_id)


def log_text(path: str) -> str:
    """The output in a log; lines of both streams in the order in which they were complete."""
    text = ""
    begun = {"stdout": "", "stderr": ""}
    with open(path, encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        for line in file:
            _, stream, tag, rest = line.split(" ", 3)
            begun[stream] += rest if tag == "F" else rest.removesuffix("\n")
            if tag == "F":
                text += begun[stream]
                begun[stream] = ""
    return text + begun["stdout"] + begun["stderr"]
