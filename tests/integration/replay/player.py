"""Plays a recording against a running agent: same requests in the same order, and waits where the world had changed."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.json_format import MessageToDict, ParseDict
from google.protobuf.message_factory import GetMessageClass

from host.files.mounts import mount_table
from proto.runtime.v1 import cri_pb2
from tests.integration.replay import recording, volumes
from tests.integration.replay.recording import Entry, Json, Names
from tests.support.agent import AgentProcess, wait_for
from tests.support.cri import CriClient

METHODS = {
    method.name: (GetMessageClass(method.input_type), GetMessageClass(method.output_type))
    for service in cri_pb2.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}


@dataclass
class Exchange:
    """A call as it was sent here, what the recorded agent answered (our names put in) and what ours answered."""

    entry: Entry
    request: Any
    expected: Json
    answer: Json = field(default_factory=dict)
    code: str = ""
    message: str = ""
    notes: dict[str, str] = field(default_factory=dict)


@dataclass
class Played:
    """A whole recording, played."""

    exchanges: list[Exchange]
    recorded_events: list[Json]
    events: list[Json]
    ended_alone: set[str]
    sandboxes: dict[str, cri_pb2.PodSandboxConfig]
    containers: dict[str, cri_pb2.ContainerConfig]

    def of(self, method: str) -> list[Exchange]:
        found = [exchange for exchange in self.exchanges if exchange.entry.method == method]
        assert found, f"{method} is not in the recording"
        return found


class Player:
    """Plays one recording; kubelet's files are below ``kubelet``."""

    def __init__(self, agent: AgentProcess, name: str, names: Names, kubelet: Path) -> None:
        self._agent = agent
        self._client = agent.client
        self._name = name
        self._names = names
        self._kubelet = kubelet
        self._sandboxes: dict[str, cri_pb2.PodSandboxConfig] = {}
        self._containers: dict[str, cri_pb2.ContainerConfig] = {}

    def play(self) -> Played:
        """Send everything; errors are kept with their exchange."""
        exchanges: list[Exchange] = []
        recorded_events: list[Json] = []
        events = _Events(self._client)
        for group in _together(recording.entries(self._name)):
            if group[0].item is not None:
                recorded_events.append(group[0].item)
            elif group[0].method == "GetContainerEvents":
                events.start()
            else:
                exchanges += self._exchange(group)
        return Played(
            exchanges,
            [self._names.put(item) for item in recorded_events],
            events.end([*self._sandboxes, *self._containers]),
            {self._names.known(recorded) for recorded in recording.ended_alone(self._name)},
            self._sandboxes,
            self._containers,
        )

    def _exchange(self, group: list[Entry]) -> list[Exchange]:
        calls = []
        for entry in group:
            request = ParseDict(self._names.put(entry.request), METHODS[entry.method][0]())
            self._before(entry, request)
            calls.append((entry, request, self._client.future(entry.method, request)))
        return [self._finish(entry, request, call) for entry, request, call in calls]

    def _before(self, entry: Entry, request: Any) -> None:
        if entry.method == "CreateContainer":
            request.sandbox_config.CopyFrom(self._sandboxes[request.pod_sandbox_id])
            volumes.prepare(request.config, self._kubelet)
        for recorded in _exited_in(entry):
            ours = self._names.known(recorded)
            wait_for(lambda ours=ours: self._has_exited(ours), 30, f"the end of container {ours}")

    def _has_exited(self, container_id: str) -> bool:
        return self._client.status(container_id).state == cri_pb2.CONTAINER_EXITED

    def _finish(self, entry: Entry, request: Any, call: Any) -> Exchange:
        exchange = Exchange(entry, request, {})
        try:
            answer = call.result()
        except grpc.RpcError as error:
            exchange.code, exchange.message = error.code().name, error.details() or ""
        else:
            exchange.answer = MessageToDict(answer, preserving_proto_field_name=True)
            self._learn(exchange)
        exchange.expected = self._names.put(entry.response or {})
        if entry.method == "UpdateContainerResources":
            exchange.notes = limits_of(self._client, request.container_id)
        return exchange

    def _learn(self, exchange: Exchange) -> None:
        for key, configs in (("pod_sandbox_id", self._sandboxes), ("container_id", self._containers)):
            if exchange.entry.method in ("RunPodSandbox", "CreateContainer") and key in exchange.answer:
                ours = exchange.answer[key]
                self._names.learn((exchange.entry.response or {})[key], ours)
                configs[ours] = exchange.request.config


def _together(entries: Iterable[Entry]) -> Iterator[list[Entry]]:
    """Calls that were under way at the same time: stops that follow each other."""
    group: list[Entry] = []
    for entry in entries:
        if group and not (group[0].method == entry.method == "StopContainer"):
            yield group
            group = []
        group.append(entry)
    if group:
        yield group


def _exited_in(entry: Entry) -> list[str]:
    response = entry.response or {}
    shown = [response.get("status", {}), *response.get("containers", [])]
    return [status["id"] for status in shown if status.get("state") == "CONTAINER_EXITED"]


def limits_of(client: CriClient, container_id: str) -> dict[str, str]:
    """What the kernel holds a container to, by the names of the cgroup files of either version."""
    answer = client.call("ContainerStatus", cri_pb2.ContainerStatusRequest(container_id=container_id, verbose=True))
    cgroup = json.loads(answer.info["info"])["cgroup"]
    found = {}
    for entry in mount_table():
        if entry.filesystem in ("cgroup", "cgroup2"):
            for name in ("memory.limit_in_bytes", "memory.max", "cpu.cfs_quota_us", "cpu.shares", "cpu.max"):
                path = Path(entry.target) / cgroup.lstrip("/") / name
                if path.exists():
                    found[name] = path.read_text().strip()
    return found


class _Events:
    """The event stream, read beside the calls."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._stream: Any = None
        self._items: list[Json] = []
        self._thread = threading.Thread(target=self._read)

    def start(self) -> None:
        self._stream = self._client.stream("GetContainerEvents", cri_pb2.GetEventsRequest(), timeout=None)
        self._thread.start()

    def _read(self) -> None:
        try:
            for event in self._stream:
                self._items.append(MessageToDict(event, preserving_proto_field_name=True))
        except grpc.RpcError as error:
            assert error.code() is grpc.StatusCode.CANCELLED, error

    def end(self, removed: Iterable[str]) -> list[Json]:
        """What came until each of the removed sandboxes and containers was said to be deleted."""
        if self._stream is None:
            return []
        wait_for(lambda: self._deleted().issuperset(removed), what="the event of the last removal")
        self._stream.cancel()
        self._thread.join()
        return self._items

    def _deleted(self) -> set[str]:
        deleted = "CONTAINER_DELETED_EVENT"
        return {item["container_id"] for item in self._items if item.get("container_event_type") == deleted}
