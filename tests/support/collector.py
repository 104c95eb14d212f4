"""An OpenTelemetry collector that receives spans by OTLP over gRPC and stores them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span


@dataclass(frozen=True)
class Received:
    """A span, with its attributes and those of its resource."""

    span: Span
    attributes: dict[str, Any]
    resource: dict[str, Any]


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """``address`` is its address on loopback. ``spans`` are the received spans."""

    def __init__(self, credentials: grpc.ServerCredentials | None = None) -> None:
        self.spans: list[Received] = []
        self._server = grpc.server(ThreadPoolExecutor(2))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)  # type: ignore[no-untyped-call]  # generated without annotations
        if credentials is None:
            port = self._server.add_insecure_port("127.0.0.1:0")
        else:
            port = self._server.add_secure_port("127.0.0.1:0", credentials)
        self.address = f"127.0.0.1:{port}"

    def Export(
        self, request: trace_service_pb2.ExportTraceServiceRequest, _context: object
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        """Receive spans."""
        for part in request.resource_spans:
            resource = _plain(part.resource.attributes)
            for scope in part.scope_spans:
                self.spans += [Received(span, _plain(span.attributes), resource) for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()

    def named(self, *suffixes: str) -> list[Received]:
        """The spans whose names end with one of ``suffixes``."""
        return [received for received in self.spans if received.span.name.endswith(suffixes)]

    @contextlib.contextmanager
    def serving(self) -> Iterator[Collector]:
        """Listen during the block."""
        self._server.start()
        try:
            yield self
        finally:
            self._server.stop(None).wait()


def _plain(attributes: Any) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in attributes}
