"""A blocking client for any CRI socket, with short methods for the calls of tests."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grpc
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from proto.podkeel.v1 import agent_pb2
from proto.runtime.v1 import cri_pb2

CALL_SECONDS = 60.0


class CriClient:
    """Call with ``client.call("RunPodSandbox", request)``. Raises ``grpc.RpcError``."""

    def __init__(self, address: str) -> None:
        options = [("grpc.max_receive_message_length", 64 << 20), ("grpc.default_authority", "localhost")]
        options += [("grpc.enable_retries", 0), ("grpc.use_local_subchannel_pool", 1)]
        self._path = address.removeprefix("unix://")
        self._channel = grpc.insecure_channel(address, options=options)
        self._calls: dict[str, tuple[Any, bool]] = {}
        for file in (cri_pb2.DESCRIPTOR, agent_pb2.DESCRIPTOR):
            for service in file.services_by_name.values():
                for method in service.methods:
                    make = self._channel.unary_stream if method.server_streaming else self._channel.unary_unary
                    self._calls[method.name] = (
                        make(
                            f"/{service.full_name}/{method.name}",
                            request_serializer=lambda message: message.SerializeToString(),
                            response_deserializer=GetMessageClass(method.output_type).FromString,
                        ),
                        method.server_streaming,
                    )

    def call(
        self, name: str, request: Message, timeout: float = CALL_SECONDS, metadata: Sequence[tuple[str, str]] = ()
    ) -> Any:
        """Make one unary call."""
        return self._calls[name][0](request, timeout=timeout, metadata=metadata)

    def future(self, name: str, request: Message, timeout: float = CALL_SECONDS) -> Any:
        """Start a unary call. The caller waits for it or cancels it."""
        return self._calls[name][0].future(request, timeout=timeout)

    def stream(self, name: str, request: Message, timeout: float | None = CALL_SECONDS) -> Iterator[Any]:
        """The responses of a streaming call. The iterator is the call and can be cancelled."""
        responses: Iterator[Any] = self._calls[name][0](request, timeout=timeout)
        return responses

    def wait_ready(self, seconds: float, alive: Callable[[], bool] = lambda: True) -> None:
        """Wait until the server answers, while ``alive`` returns true. Raises TimeoutError.

        The channel is not used before, because after a failed attempt it would wait a second or more for the next.
        """
        deadline = time.monotonic() + seconds
        while not self._is_listened_on():
            if time.monotonic() > deadline or not alive():
                raise TimeoutError(f"no agent listens on {self._path}")
            time.sleep(0.01)
        self._calls["Version"][0](cri_pb2.VersionRequest(), timeout=seconds, wait_for_ready=True)

    def _is_listened_on(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(self._path)
            except (FileNotFoundError, ConnectionRefusedError):
                return False
        return True

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    # Calls that most tests need.

    def run_sandbox(self, config: cri_pb2.PodSandboxConfig, handler: str = "") -> str:
        """Call RunPodSandbox and return the id."""
        request = cri_pb2.RunPodSandboxRequest(config=config, runtime_handler=handler)
        return str(self.call("RunPodSandbox", request).pod_sandbox_id)

    def create(self, sandbox_id: str, config: cri_pb2.ContainerConfig, sandbox: cri_pb2.PodSandboxConfig) -> str:
        """Call CreateContainer and return the id."""
        request = cri_pb2.CreateContainerRequest(pod_sandbox_id=sandbox_id, config=config, sandbox_config=sandbox)
        return str(self.call("CreateContainer", request).container_id)

    def start(self, container_id: str) -> None:
        """Call StartContainer."""
        self.call("StartContainer", cri_pb2.StartContainerRequest(container_id=container_id))

    def stop(self, container_id: str, timeout: int = 0) -> None:
        """Call StopContainer."""
        self.call("StopContainer", cri_pb2.StopContainerRequest(container_id=container_id, timeout=timeout))

    def remove(self, container_id: str) -> None:
        """Call RemoveContainer."""
        self.call("RemoveContainer", cri_pb2.RemoveContainerRequest(container_id=container_id))

    def stop_sandbox(self, sandbox_id: str) -> None:
        """Call StopPodSandbox."""
        self.call("StopPodSandbox", cri_pb2.StopPodSandboxRequest(pod_sandbox_id=sandbox_id))

    def remove_sandbox(self, sandbox_id: str) -> None:
        """Call RemovePodSandbox."""
        self.call("RemovePodSandbox", cri_pb2.RemovePodSandboxRequest(pod_sandbox_id=sandbox_id))

    def status(self, container_id: str) -> cri_pb2.ContainerStatus:
        """Call ContainerStatus."""
        request = cri_pb2.ContainerStatusRequest(container_id=container_id)
        status: cri_pb2.ContainerStatus = self.call("ContainerStatus", request).status
        return status

    def sandbox_status(self, sandbox_id: str) -> cri_pb2.PodSandboxStatus:
        """Call PodSandboxStatus."""
        request = cri_pb2.PodSandboxStatusRequest(pod_sandbox_id=sandbox_id)
        status: cri_pb2.PodSandboxStatus = self.call("PodSandboxStatus", request).status
        return status

    def exec(self, container_id: str, *command: str, timeout: int = 20) -> cri_pb2.ExecSyncResponse:
        """Call ExecSync."""
        request = cri_pb2.ExecSyncRequest(container_id=container_id, cmd=command, timeout=timeout)
        response: cri_pb2.ExecSyncResponse = self.call("ExecSync", request)
        return response

    def output(self, container_id: str, *command: str) -> str:
        """The output of a command in a container. Fails the test if the command fails."""
        response = self.exec(container_id, *command)
        assert response.exit_code == 0, response
        return response.stdout.decode()

    def findings(self) -> list[str]:
        """The differences that the agent finds between its store and the node."""
        response = self.call("Check", agent_pb2.CheckRequest())
        return [f"{finding.kind} {finding.object} {finding.problem}" for finding in response.findings]
