"""NRI plugins for the benchmark, in a separate process: ``python -m tests.bench.nri_plugins SOCKET COUNT``.

One plugin subscribes to every event and changes nothing. It is a bare loop over its socket, so that its own time is
about that of a plugin in a compiled language. Several plugins use the stub of ``manifests/nri``, and subscribe to an
event that the benchmark never causes. The process prints a line when all are synchronised, and ends when its standard
input is closed.
"""

from __future__ import annotations

import socket
import struct
import sys
import threading
from typing import Any

from manifests.nri import stub
from proto.nri.v1alpha1 import nri_pb2
from proto.ttrpc.v1 import ttrpc_pb2

_HEADER = struct.Struct(">IIIIBB")  # of a frame, and of the one ttrpc message in it
_TTRPC_HEADER = 10  # bytes of it
_TO_PLUGIN, _TO_AGENT, _REQUEST, _RESPONSE = 1, 2, 1, 2
_EMPTY_ANSWER = 0  # bytes of its body


class Everything:
    """Subscribes to every event, and answers each without reading it. ``synchronised`` is set once events may come."""

    def __init__(self, path: str) -> None:
        self.synchronised = threading.Event()
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(path)

    def run(self) -> None:
        """Register, and answer until the agent closes the connection."""
        registration = nri_pb2.RegisterPluginRequest(plugin_name="bench", plugin_idx="00", NRI_version="v0.12.0")
        request = ttrpc_pb2.Request(
            service="nri.pkg.api.v1alpha1.Runtime", method="RegisterPlugin", payload=registration.SerializeToString()
        )
        self._send(_TO_AGENT, 1, _REQUEST, request.SerializeToString())
        received = b""
        while data := self._socket.recv(1 << 16):
            received = self._take(received + data)

    def _take(self, received: bytes) -> bytes:
        """Answer the whole messages of ``received``, and return the rest."""
        at = 0
        while len(received) - at >= _HEADER.size:
            connection, length, size, stream, _, _ = _HEADER.unpack_from(received, at)
            end = at + _HEADER.size + size
            if length != size + _TTRPC_HEADER:
                raise SystemExit("the agent splits messages, which this plugin cannot read")
            if len(received) < end:
                break
            if connection == _TO_PLUGIN and self.synchronised.is_set():
                self._socket.sendall(_HEADER.pack(_TO_PLUGIN, _TTRPC_HEADER, _EMPTY_ANSWER, stream, _RESPONSE, 0))
            elif connection == _TO_PLUGIN:
                self._prepare(stream, ttrpc_pb2.Request.FromString(received[at + _HEADER.size : end]))
            at = end
        return received[at:]

    def _prepare(self, stream: int, request: ttrpc_pb2.Request) -> None:
        """Answer Configure or Synchronize."""
        if request.method == "Configure":
            configure = nri_pb2.ConfigureRequest.FromString(request.payload)
            # Agents older than 0.10 have no updates of pods and no validators. 0 means every event.
            events = 0 if configure.NRI_version else (1 << nri_pb2.REMOVE_CONTAINER) - 1
            payload = nri_pb2.ConfigureResponse(events=events).SerializeToString()
        else:
            more = nri_pb2.SynchronizeRequest.FromString(request.payload).more
            payload = nri_pb2.SynchronizeResponse(more=more).SerializeToString()
            if not more:
                self.synchronised.set()
        self._send(_TO_PLUGIN, stream, _RESPONSE, ttrpc_pb2.Response(payload=payload).SerializeToString())

    def _send(self, connection: int, stream: int, kind: int, body: bytes) -> None:
        header = _HEADER.pack(connection, _TTRPC_HEADER + len(body), len(body), stream, kind, 0)
        self._socket.sendall(header + body)


class Idle(stub.Plugin):
    """Subscribes to PostUpdatePodSandbox."""

    def __init__(self, name: str, index: str, path: str) -> None:
        super().__init__(name, index, path)
        self.synchronised = threading.Event()

    def Synchronize(self, request: nri_pb2.SynchronizeRequest) -> nri_pb2.SynchronizeResponse:
        self.synchronised.set()
        return nri_pb2.SynchronizeResponse(more=request.more)

    def PostUpdatePodSandbox(self, _request: Any) -> None:
        return


def main() -> None:
    """Connect the plugins and wait for the end of standard input."""
    path, count = sys.argv[1], int(sys.argv[2])
    if count == 1:
        plugins: list[Everything | Idle] = [Everything(path)]
    else:
        plugins = [Idle(f"bench{number}", f"{number:02}", path) for number in range(count)]
    for plugin in plugins:  # one after the other, because at most 32 may be unregistered at the same time
        threading.Thread(target=plugin.run, daemon=True).start()
        if not plugin.synchronised.wait(30):
            raise SystemExit("the agent did not take a plugin")
    print("synchronised", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
