"""The events of pods and containers: the number, the method and the answer of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from google.protobuf.message import Message

from proto.nri.v1alpha1 import nri_pb2

Answer = TypeVar("Answer", bound=Message)


@dataclass(frozen=True, slots=True)
class EventCall(Generic[Answer]):
    """One event: its number, its method of the Plugin service, and the type of the answer."""

    number: nri_pb2.Event
    method: str
    answer: type[Answer]


RUN_POD_SANDBOX = EventCall(nri_pb2.RUN_POD_SANDBOX, "RunPodSandbox", nri_pb2.RunPodSandboxResponse)
UPDATE_POD_SANDBOX = EventCall(nri_pb2.UPDATE_POD_SANDBOX, "UpdatePodSandbox", nri_pb2.UpdatePodSandboxResponse)
POST_UPDATE_POD_SANDBOX = EventCall(
    nri_pb2.POST_UPDATE_POD_SANDBOX, "PostUpdatePodSandbox", nri_pb2.PostUpdatePodSandboxResponse
)
STOP_POD_SANDBOX = EventCall(nri_pb2.STOP_POD_SANDBOX, "StopPodSandbox", nri_pb2.StopPodSandboxResponse)
REMOVE_POD_SANDBOX = EventCall(nri_pb2.REMOVE_POD_SANDBOX, "RemovePodSandbox", nri_pb2.RemovePodSandboxResponse)
CREATE_CONTAINER = EventCall(nri_pb2.CREATE_CONTAINER, "CreateContainer", nri_pb2.CreateContainerResponse)
VALIDATE_CONTAINER_ADJUSTMENT = EventCall(
    nri_pb2.VALIDATE_CONTAINER_ADJUSTMENT, "ValidateContainerAdjustment", nri_pb2.ValidateContainerAdjustmentResponse
)
POST_CREATE_CONTAINER = EventCall(
    nri_pb2.POST_CREATE_CONTAINER, "PostCreateContainer", nri_pb2.PostCreateContainerResponse
)
START_CONTAINER = EventCall(nri_pb2.START_CONTAINER, "StartContainer", nri_pb2.StartContainerResponse)
POST_START_CONTAINER = EventCall(nri_pb2.POST_START_CONTAINER, "PostStartContainer", nri_pb2.PostStartContainerResponse)
UPDATE_CONTAINER = EventCall(nri_pb2.UPDATE_CONTAINER, "UpdateContainer", nri_pb2.UpdateContainerResponse)
POST_UPDATE_CONTAINER = EventCall(
    nri_pb2.POST_UPDATE_CONTAINER, "PostUpdateContainer", nri_pb2.PostUpdateContainerResponse
)
STOP_CONTAINER = EventCall(nri_pb2.STOP_CONTAINER, "StopContainer", nri_pb2.StopContainerResponse)
REMOVE_CONTAINER = EventCall(nri_pb2.REMOVE_CONTAINER, "RemoveContainer", nri_pb2.RemoveContainerResponse)
