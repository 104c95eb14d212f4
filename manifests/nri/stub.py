"""A small stub for plugins of the Node Resource Interface, over blocking sockets.

A plugin is a subclass of ``Plugin`` with a method for each event that it handles, named as the event
(``CreateContainer``, ``StopPodSandbox``, …). The method gets the request message and returns the response message, or
None for an empty one. ``run`` registers the plugin and handles events until the agent closes the connection::

    class Quiet(Plugin):
        def CreateContainer(self, request):
            answer = nri_pb2.CreateContainerResponse()
            answer.adjust.env.add(key="QUIET", value="1")
            return answer

    Quiet("quiet", "10").run()

``Configure``, ``Synchronize`` and ``Shutdown`` may be overridden too. An exception of a method is sent as an error and
fails the agent's operation. ``update_containers`` makes the agent change or evict containers at any time; call it from
another thread than ``run``. The messages are those of ``proto/nri/v1alpha1/nri.proto``.
"""

from __future__ import annotations

import contextlib
import os
import queue
import re
import socket
import struct
import threading
from typing import Any

from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from proto.nri.v1alpha1 import nri_pb2
from proto.ttrpc.v1 import ttrpc_pb2

__all__ = ["Plugin", "nri_pb2"]

SOCKET = "/var/run/nri/nri.sock"

_SERVICE = nri_pb2.DESCRIPTOR.services_by_name["Plugin"]
_AGENT = nri_pb2.DESCRIPTOR.services_by_name["Runtime"].full_name
_TO_PLUGIN, _TO_AGENT = 1, 2  # connections of the trunk
_REQUEST, _RESPONSE = 1, 2  # kinds of ttrpc messages
_UNKNOWN, _UNIMPLEMENTED = 2, 12  # codes of a status
_FRAME, _HEADER = struct.Struct(">II"), struct.Struct(">IIBB")


class Plugin:
    """One plugin. If the agent starts it, the agent sets its name and the two digits of its index.

    ``run`` connects to ``path``, unless there is a socket already: ``connected``, or one from the agent that starts it.
    """

    def __init__(self, name: str, index: str, path: str = SOCKET, *, connected: socket.socket | None = None) -> None:
        self.name = os.environ.get("NRI_PLUGIN_NAME", name)
        self.index = os.environ.get("NRI_PLUGIN_IDX", index)
        self._path = path
        self._sending = threading.Lock()
        self._answers: queue.Queue[ttrpc_pb2.Response] = queue.Queue()
        self._received = {_TO_PLUGIN: bytearray(), _TO_AGENT: bytearray()}
        self._stream = -1
        if connected is None and (descriptor := int(os.environ.get("NRI_PLUGIN_SOCKET", "0"))):
            connected = socket.socket(fileno=descriptor)
        self._connected = connected is not None
        self._socket = connected or socket.socket(socket.AF_UNIX)

    def Configure(self, request: nri_pb2.ConfigureRequest) -> nri_pb2.ConfigureResponse:
        """Return the events that this class has methods for."""
        numbers = dict(nri_pb2.Event.items())
        wanted = [numbers.get(_event_name(method.name)) for method in _SERVICE.methods if hasattr(self, method.name)]
        return nri_pb2.ConfigureResponse(events=sum(1 << (number - 1) for number in wanted if number))

    def Synchronize(self, request: nri_pb2.SynchronizeRequest) -> Message | None:
        """Receive the existing pods and containers. ``more``: another message follows."""
        return nri_pb2.SynchronizeResponse(more=request.more)

    def Shutdown(self, request: nri_pb2.Empty) -> Message | None:
        """Called when the agent stops."""

    def StateChange(self, request: nri_pb2.StateChangeEvent) -> None:
        """Receive an event from containerd 1.7 and other older agents, and call the method with its name."""
        for method in _SERVICE.methods:
            if dict(nri_pb2.Event.items()).get(_event_name(method.name)) == request.event:
                message: Any = GetMessageClass(method.input_type)(pod=request.pod)
                if "container" in message.DESCRIPTOR.fields_by_name:
                    message.container.CopyFrom(request.container)
                getattr(self, method.name, lambda _: None)(message)

    def run(self) -> None:
        """Register and handle events until the agent closes the connection. Raises OSError if no agent listens."""
        with self._socket:
            if not self._connected:
                self._socket.connect(self._path)
            reader = threading.Thread(target=self._read, name="nri")
            reader.start()
            registration = nri_pb2.RegisterPluginRequest(
                plugin_name=self.name, plugin_idx=self.index, NRI_version="v0.12.0"
            )
            self._call("RegisterPlugin", registration)
            reader.join()

    def update_containers(self, request: nri_pb2.UpdateContainersRequest) -> nri_pb2.UpdateContainersResponse:
        """Ask the agent to change or evict containers. The answer holds the updates that failed."""
        return nri_pb2.UpdateContainersResponse.FromString(self._call("UpdateContainers", request))

    def close(self) -> None:
        """Close the connection, which the agent may have closed already."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def _call(self, method: str, request: Message) -> bytes:
        self._stream += 2
        body = ttrpc_pb2.Request(service=_AGENT, method=method, payload=request.SerializeToString())
        self._send(_TO_AGENT, self._stream, _REQUEST, body)
        response = self._answers.get()
        if response.status.code:
            raise RuntimeError(f"{method}: {response.status.message}")
        return response.payload

    def _send(self, connection: int, stream: int, kind: int, body: Message) -> None:
        data = body.SerializeToString()
        message = _HEADER.pack(len(data), stream, kind, 0) + data
        with self._sending:
            self._socket.sendall(_FRAME.pack(connection, len(message)) + message)

    def _read(self) -> None:
        with contextlib.suppress(ConnectionError), self._socket.makefile("rb") as trunk:
            while len(header := trunk.read(_FRAME.size)) == _FRAME.size:
                connection, length = _FRAME.unpack(header)
                received = self._received[connection]
                received += trunk.read(length)
                while len(received) >= _HEADER.size:
                    size, stream, _, _ = _HEADER.unpack_from(received)
                    if len(received) < _HEADER.size + size:
                        break
                    body = bytes(received[_HEADER.size : _HEADER.size + size])
                    del received[: _HEADER.size + size]
                    self._take(connection, stream, body)
        ended = ttrpc_pb2.Response(status=ttrpc_pb2.Status(code=_UNKNOWN, message="the agent closed the connection"))
        self._answers.put(ended)

    def _take(self, connection: int, stream: int, body: bytes) -> None:
        if connection == _TO_AGENT:
            self._answers.put(ttrpc_pb2.Response.FromString(body))
        else:
            self._send(_TO_PLUGIN, stream, _RESPONSE, self._answer(ttrpc_pb2.Request.FromString(body)))

    def _answer(self, request: ttrpc_pb2.Request) -> ttrpc_pb2.Response:
        response = ttrpc_pb2.Response()
        work: Any = getattr(self, request.method, None)
        if request.method not in _SERVICE.methods_by_name or work is None:
            response.status.code = _UNIMPLEMENTED
            response.status.message = f"{self.name} has no {request.method}"
            return response
        message = GetMessageClass(_SERVICE.methods_by_name[request.method].input_type).FromString(request.payload)
        try:
            answer = work(message)
        except Exception as error:
            response.status.code, response.status.message = _UNKNOWN, str(error)
        else:
            response.payload = answer.SerializeToString() if answer is not None else b""
        return response


def _event_name(method: str) -> str:
    """``RUN_POD_SANDBOX`` for ``RunPodSandbox``."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", method).upper()
