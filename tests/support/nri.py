"""NRI plugins for tests, based on the stub for plugin authors."""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from google.protobuf.message import Message

from manifests.nri import stub
from proto.nri.v1alpha1 import nri_pb2
from proto.ttrpc.v1 import ttrpc_pb2
from tests.support.agent import wait_for

MANIFESTS = Path(__file__).parents[2] / "manifests/nri"
EVENTS = [method.name for method in nri_pb2.DESCRIPTOR.services_by_name["Plugin"].methods]
EVENTS = [name for name in EVENTS if name not in ("Configure", "Synchronize", "Shutdown", "StateChange")]
Acting = Mapping[str, Callable[[Any], Any]]


class Recorder(stub.Plugin):
    """Records its events as (event, id of the container or else of the pod), with their requests.

    ``acting`` maps an event to a function that gets the request and returns the answer or raises.
    """

    def __init__(self, path: Path, index: str = "10", name: str = "recorder", acting: Acting | None = None) -> None:
        super().__init__(name, index, str(path))
        self.told: list[tuple[str, str]] = []
        self.requests: list[tuple[str, Any]] = []
        self.pods: list[nri_pb2.PodSandbox] = []
        self.containers: list[nri_pb2.Container] = []
        self.synchronised = threading.Event()
        self.ended = threading.Event()
        self.acting = acting or {}

    def Synchronize(self, request: nri_pb2.SynchronizeRequest) -> Message:
        self.pods += request.pods
        self.containers += request.containers
        if "Synchronize" in self.acting:
            self.acting["Synchronize"](request)
        if not request.more:
            self.synchronised.set()
        return nri_pb2.SynchronizeResponse(more=request.more)

    def take(self, event: str, request: Any) -> Message | None:
        """Record one event and call its function."""
        has_container = "container" in request.DESCRIPTOR.fields_by_name
        self.told.append((event, request.container.id if has_container else request.pod.id))
        self.requests.append((event, request))
        answer: Message | None = self.acting[event](request) if event in self.acting else None
        return answer

    def run(self) -> None:
        try:
            super().run()
        finally:
            self.ended.set()

    def raw_call(self, body: bytes) -> ttrpc_pb2.Response:
        """Call the agent with ``body`` as the encoded request. Returns the response."""
        self._stream += 2
        message = struct.pack(">IIBB", len(body), self._stream, 1, 0) + body
        with self._sending:
            self._socket.sendall(struct.pack(">II", 2, len(message)) + message)
        return self._answers.get(timeout=20)

    def events_of(self, object_id: str) -> list[str]:
        """The names of the events of one pod or container, in order."""
        return [event for event, told in self.told if told == object_id]

    def last(self, event: str) -> Any:
        """The last request of an event."""
        return [request for name, request in self.requests if name == event][-1]


def _method(event: str) -> Any:
    return lambda self, request: self.take(event, request)


for _event in EVENTS:
    setattr(Recorder, _event, _method(_event))


Connected = TypeVar("Connected", bound=Recorder)


@contextmanager
def connected(plugin: Connected) -> Iterator[Connected]:
    """Run a plugin in a thread during the block. It is synchronised when the block begins."""
    thread = threading.Thread(target=plugin.run, daemon=True)
    thread.start()
    try:
        wait_for(lambda: plugin.synchronised.is_set() or plugin.ended.is_set())
        assert plugin.synchronised.is_set(), "the agent did not take the plugin"
        yield plugin
    finally:
        plugin.close()
        thread.join(10)
