"""The part of a Kubernetes API server that kubectl needs for the streams of one pod: discovery, the pod, a proxy.

It forwards streams byte by byte to the agent's streaming server, as API server and kubelet do.
"""

from __future__ import annotations

import json
import socket
import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, urlsplit

_VERSION = {"major": "1", "minor": "32", "gitVersion": "v1.32.4", "platform": "linux/amd64"}
_POD_KIND = {"name": "pods", "singularName": "pod", "namespaced": True, "kind": "Pod", "verbs": ["get"]}
_CHUNK = 65536
Query = dict[str, list[str]]
# Returns the streaming server's URL for a subresource (exec, attach, portforward) of the pod, with the query's options.
Streams = Callable[[str, Query], str]


def _documents(pod: str, containers: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {
        "/version": _VERSION,
        "/api": {"kind": "APIVersions", "versions": ["v1"]},
        "/apis": {"kind": "APIGroupList", "apiVersion": "v1", "groups": []},
        "/api/v1": {"kind": "APIResourceList", "groupVersion": "v1", "resources": [_POD_KIND]},
        f"/api/v1/namespaces/default/pods/{pod}": {
            "kind": "Pod",
            "apiVersion": "v1",
            "metadata": {"name": pod, "namespace": "default", "uid": f"uid-{pod}"},
            "spec": {"containers": [{"name": name, **fields} for name, fields in containers.items()]},
            "status": {"phase": "Running"},
        },
    }


class _Handler(socketserver.BaseRequestHandler):
    server: _Server

    def handle(self) -> None:
        connection: socket.socket = self.request
        while head := _read_head(connection):
            request, _, fields = head.partition(b"\r\n")
            target = urlsplit(request.split(b" ")[1].decode())
            if target.path in self.server.documents:
                _answer(connection, "200 OK", self.server.documents[target.path])
            elif target.path.startswith(f"{self.server.pod_path}/"):
                subresource = target.path.rpartition("/")[2]
                url = self.server.streams(subresource, parse_qs(target.query))
                self.server.upgrades.append(_field(fields, "upgrade"))
                _pass_on(connection, request.split(b" ")[0], urlsplit(url), fields)
                return
            else:
                message = f"{target.path} is not here"
                status = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404}
                _answer(connection, "404 Not Found", {**status, "message": message})


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True

    def __init__(self, pod: str, containers: dict[str, dict[str, Any]], streams: Streams) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.documents = _documents(pod, containers)
        self.pod_path = f"/api/v1/namespaces/default/pods/{pod}"
        self.streams = streams
        self.upgrades: list[str] = []


def _read_head(connection: socket.socket) -> bytes:
    """A request without body, up to its empty line. Empty at the end of the connection."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        byte = connection.recv(1)
        if not byte:
            return b""
        head += byte
    return head


def _field(fields: bytes, name: str) -> str:
    lines = (line.partition(":") for line in fields.decode().split("\r\n"))
    return next((value.strip().lower() for key, _, value in lines if key.lower() == name), "")


def _answer(connection: socket.socket, status: str, document: Any) -> None:
    body = json.dumps(document).encode()
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body)


def _pass_on(connection: socket.socket, method: bytes, url: Any, fields: bytes) -> None:
    target = f"{url.path}?{url.query}" if url.query else url.path
    with socket.create_connection((url.hostname, url.port)) as streaming:
        streaming.sendall(b"%s %s HTTP/1.1\r\n%s" % (method, target.encode(), fields))
        back = threading.Thread(target=_pump, args=(streaming, connection), daemon=True)
        back.start()
        _pump(connection, streaming)
        back.join()


def _pump(source: socket.socket, target: socket.socket) -> None:
    try:
        while chunk := source.recv(_CHUNK):
            target.sendall(chunk)
        target.shutdown(socket.SHUT_WR)
    except OSError:  # one connection has ended, so this ends the other one too
        for end in (source, target):
            _shut(end)


def _shut(end: socket.socket) -> None:
    try:
        end.shutdown(socket.SHUT_RDWR)
    except OSError:
        return


@dataclass(frozen=True)
class ApiServer:
    """The server's address, and the protocols that streams were upgraded to."""

    url: str
    upgrades: list[str]


@contextmanager
def api_server(pod: str, containers: dict[str, dict[str, Any]], streams: Streams) -> Iterator[ApiServer]:
    """Serve a pod in the namespace ``default`` with these containers (fields by name)."""
    with _Server(pod, containers, streams) as server:
        serving = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        serving.start()
        try:
            yield ApiServer(f"http://127.0.0.1:{server.server_address[1]}", server.upgrades)
        finally:
            server.shutdown()
            serving.join()
