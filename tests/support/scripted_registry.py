"""A registry whose answers a test sets exactly. It runs in threads, so that real agents can pull from it."""

from __future__ import annotations

import contextlib
import json
import ssl
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from tests.support.image_builder import OCI_CONFIG, OCI_LAYER, OCI_MANIFEST, descriptor, digest_of, entry, make_tar


@dataclass
class Request:
    """One received request."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes

    @property
    def path(self) -> str:
        """The path without the query."""
        return urlsplit(self.target).path


@dataclass
class Answer:
    """An answer in the HTTP version ``protocol``.

    A body of several pieces is sent without Content-Length, until the client stops reading. A header may have several
    values.
    """

    body: bytes | Iterable[bytes] = b""
    content_type: str = ""
    status: int = 200
    headers: Mapping[str, str | Sequence[str]] = field(default_factory=dict)
    protocol: str = "HTTP/1.1"


Script = Callable[[Request], Answer]


@dataclass
class ScriptedRegistry:
    """``answers`` are by path; ``seen`` are the requests so far; ``sent`` counts the body bytes by path."""

    host: str = ""
    scheme: str = "http"
    answers: dict[str, Answer | Script] = field(default_factory=dict)
    seen: list[Request] = field(default_factory=list)
    sent: dict[str, int] = field(default_factory=dict)

    @property
    def address(self) -> str:
        """Its address with the scheme."""
        return f"{self.scheme}://{self.host}"

    def offer(self, repository: str, manifest: bytes, content_type: str, *blobs: bytes, tag: str = "latest") -> str:
        """Serve a manifest or index under a tag and its digest, and blobs. Returns the image's reference."""
        answer = Answer(manifest, content_type, headers={"Docker-Content-Digest": digest_of(manifest)})
        self.answers[f"/v2/{repository}/manifests/{tag}"] = answer
        self.answers[f"/v2/{repository}/manifests/{digest_of(manifest)}"] = answer
        for blob in blobs:
            self.answers[f"/v2/{repository}/blobs/{digest_of(blob)}"] = Answer(blob, "application/octet-stream")
        return f"{self.host}/{repository}:{tag}"

    def offer_image(self, repository: str, config: object = None, **manifest: object) -> str:
        """Serve an image of one small layer with members added to its config file and manifest."""
        content, kind, blobs = small_image(config, **manifest)
        return self.offer(repository, content, kind, *blobs)

    def requests(self, part: str) -> list[Request]:
        """The requests with ``part`` in their target."""
        return [request for request in self.seen if part in request.target]


def small_image(config: object = None, **manifest: object) -> tuple[bytes, str, tuple[bytes, ...]]:
    """Manifest, its type and the blobs of an image of one small layer. ``config`` adds to its config file."""
    layer = make_tar([entry("etc/name", "small")])
    file = {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": [digest_of(layer)]}}
    file.update(config if isinstance(config, dict) else {})
    encoded = json.dumps(file).encode()
    document = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": descriptor(OCI_CONFIG, encoded),
        "layers": [descriptor(OCI_LAYER, layer)],
        **manifest,
    }
    return json.dumps(document).encode(), OCI_MANIFEST, (encoded, layer)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    registry: ScriptedRegistry

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore clients that disconnect."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def _answer(self) -> None:
        registry = self.server.registry
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        request = Request(self.command, self.path, dict(self.headers.items()), body)
        registry.seen.append(request)
        found = registry.answers.get(request.path, Answer(status=404))
        answer = found(request) if callable(found) else found
        self.protocol_version = answer.protocol
        self.send_response(answer.status)
        if answer.content_type:
            self.send_header("Content-Type", answer.content_type)
        for name, values in answer.headers.items():
            for value in [values] if isinstance(values, str) else values:
                self.send_header(name, value)
        if isinstance(answer.body, bytes):
            self.send_header("Content-Length", str(len(answer.body)))
            pieces: Iterable[bytes] = (answer.body,)
        else:
            self.send_header("Connection", "close")
            pieces = answer.body
        self.end_headers()
        if self.command == "HEAD":
            return
        for piece in pieces:
            self.wfile.write(piece)
            registry.sent[request.path] = registry.sent.get(request.path, 0) + len(piece)

    def __getattr__(self, name: str) -> Callable[[], None]:
        if name.startswith("do_"):
            return self._answer
        raise AttributeError(name)

    def log_request(self, *_: object) -> None:
        """Do not log requests."""


@contextlib.contextmanager
def run_scripted_registry(*, tls: ssl.SSLContext | None = None) -> Iterator[ScriptedRegistry]:
    """Run a scripted registry on a free loopback port."""
    server = _Server(("127.0.0.1", 0), _Handler)
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    server.registry = ScriptedRegistry(f"127.0.0.1:{server.server_address[1]}", "https" if tls else "http")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server.registry
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
