"""Traces of calls for OpenTelemetry (the optional extra ``otel``; imported only where an endpoint is configured).

A span per call, named and described after the semantic conventions for RPC servers, continues the caller's trace (W3C
Trace Context in the call's metadata); its children are the stages that the call went through.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import grpc

from cri.config.options import TracingOptions
from cri.methods import Call
from cri.telemetry.span_attributes import attributes_of
from cri.version import VERSION
from host.concurrency.threads import in_stats_thread
from host.errors import InvalidArgumentError
from host.stages import Operation, Stage, gathered_operations
from runtime.state.state import State

try:
    from opentelemetry.context import Context
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
    from opentelemetry.trace import Span, SpanKind, StatusCode, Tracer, set_span_in_context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ImportError as error:
    raise InvalidArgumentError(
        f"tracing.endpoint is set, but its packages are not installed ({error}): pip install 'podkeel[otel]'"
    ) from error

QUEUE_SPANS = 4096
BATCH_SPANS = 256
SEND_EVERY_MS = 1000
EXPORT_SECONDS = 10.0
LAST_EXPORT_SECONDS = 2.0
COMPLAIN_EVERY_SECONDS = 300.0

_log = logging.getLogger("podkeel.tracing")

# Codes that the semantic conventions count as errors of a server; the others are errors of its clients.
_SERVER_ERRORS = frozenset(
    (
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DATA_LOSS,
    )
)


class CallTracing:
    """Makes the spans of calls. For calls that are not sampled nothing is collected."""

    def __init__(self, state: State, tracer: Tracer) -> None:
        self._state = state
        self._tracer = tracer
        self._propagator = TraceContextTextMapPropagator()

    @contextmanager
    def observe(self, call: Call) -> Iterator[None]:
        """The span of a call, which ends with it."""
        span = self._tracer.start_span(
            f"{call.service}/{call.method}",
            self._caller(call),
            SpanKind.SERVER,
            {"rpc.system": "grpc", "rpc.service": call.service, "rpc.method": call.method},
        )
        if not span.is_recording():
            yield
            return
        before = attributes_of(self._state, call)
        with gathered_operations() as operations:
            try:
                yield
            finally:
                # A removed object is known only before, a new one only afterwards.
                span.set_attributes({**before, **attributes_of(self._state, call)})
                _end(span, call)
                if operations:  # a span takes some 50 µs, and the end of a large pod has hundreds of stages
                    asyncio.get_running_loop().run_in_executor(None, self._stages, span, operations)

    def _caller(self, call: Call) -> Context:
        carrier = {key: value for key, value in call.context.invocation_metadata() or () if isinstance(value, str)}
        return self._propagator.extract(carrier, Context())

    def _stages(self, parent: Span, operations: Sequence[Operation]) -> None:
        within = set_span_in_context(parent, Context())
        for operation in operations:
            for stage in operation.stages:
                self._stage(within, operation, stage)

    def _stage(self, within: Context, operation: Operation, stage: Stage) -> None:
        attributes = {"podkeel.operation": operation.name, "podkeel.stage": stage.name}
        if operation.subject:
            attributes["podkeel.subject"] = operation.subject
        name = f"{operation.name}.{stage.name}"
        span = self._tracer.start_span(name, within, SpanKind.INTERNAL, attributes, start_time=stage.started)
        if stage.failed:
            span.set_status(StatusCode.ERROR)
        if stage.seconds is None:  # the call was cancelled, but other callers wait for the same work
            span.end()
        else:
            span.end(stage.started + int(stage.seconds * 1e9))


def _end(span: Span, call: Call) -> None:
    span.set_attribute("rpc.grpc.status_code", int(call.code.value[0]))
    if call.code in _SERVER_ERRORS:
        span.set_status(StatusCode.ERROR, call.details)
    elif call.details:
        span.set_attribute("podkeel.error", call.details)
    span.end()


@asynccontextmanager
async def tracing(state: State, options: TracingOptions) -> AsyncIterator[CallTracing]:
    """Trace the calls of the block. Raises InvalidArgumentError for certificates that cannot be used.

    Spans wait in a bounded queue for a thread that sends them; while the collector cannot be reached they are lost.
    """
    credentials = _credentials(options)
    complaints = logging.getLogger("opentelemetry")
    complaints.handlers[:] = [_Complaints(options.endpoint)]
    complaints.propagate = False
    exporter = await in_stats_thread(
        OTLPSpanExporter,
        endpoint=options.endpoint,
        insecure=not options.tls,
        credentials=credentials,
        timeout=EXPORT_SECONDS,
    )
    processor = BatchSpanProcessor(exporter, QUEUE_SPANS, SEND_EVERY_MS, BATCH_SPANS)
    provider = TracerProvider(
        ParentBasedTraceIdRatio(options.sampling_rate_per_million / 1_000_000),
        Resource.create({"service.name": "podkeel", "service.version": VERSION, "host.name": socket.gethostname()}),
        shutdown_on_exit=False,
    )
    provider.add_span_processor(processor)
    _log.info("tracing: sending traces to %s", options.endpoint)
    try:
        yield CallTracing(state, provider.get_tracer("podkeel", VERSION))
    finally:
        await _send_the_rest(processor, exporter)


async def _send_the_rest(processor: BatchSpanProcessor, exporter: OTLPSpanExporter) -> None:
    """Send the rest of the queue to the collector, but only for a short time: it may be down."""
    sent = asyncio.Event()
    loop = asyncio.get_running_loop()

    def send() -> None:
        processor.shutdown()  # type: ignore[no-untyped-call]  # OpenTelemetry left the annotation out
        loop.call_soon_threadsafe(sent.set)

    threading.Thread(target=send, name="last-spans", daemon=True).start()
    try:
        async with asyncio.timeout(LAST_EXPORT_SECONDS):
            await sent.wait()
    except TimeoutError:
        await in_stats_thread(exporter.shutdown)  # which ends exports that wait for the collector
        await sent.wait()


def _credentials(options: TracingOptions) -> grpc.ChannelCredentials | None:
    files = {"tls_ca": options.tls_ca, "tls_certificate": options.tls_certificate, "tls_key": options.tls_key}
    if not options.tls:
        given = [name for name, path in files.items() if path]
        if given:
            raise InvalidArgumentError(
                f"tracing: {given[0]} is without effect: set tracing.tls = true, or leave it out"
            )
        return None
    if bool(options.tls_certificate) != bool(options.tls_key):
        raise InvalidArgumentError("tracing: tls_certificate and tls_key belong together: give both, or neither")
    contents: dict[str, bytes | None] = {}
    for name, path in files.items():
        try:
            contents[name] = Path(path).read_bytes() if path else None
        except OSError as error:
            raise InvalidArgumentError(f"tracing.{name} {path} cannot be read: {error.strerror}") from error
    return grpc.ssl_channel_credentials(contents["tls_ca"], contents["tls_key"], contents["tls_certificate"])


class _Complaints(logging.Handler):
    """Reduces OpenTelemetry's messages about failed exports, one for each batch, to a line from time to time."""

    def __init__(self, endpoint: str) -> None:
        super().__init__(logging.WARNING)
        self._endpoint = endpoint
        self._quiet_until = 0.0

    def emit(self, record: logging.LogRecord) -> None:
        now = time.monotonic()
        if now >= self._quiet_until:
            self._quiet_until = now + COMPLAIN_EVERY_SECONDS
            _log.warning("tracing: %s does not accept traces, they are lost: %s", self._endpoint, record.getMessage())
