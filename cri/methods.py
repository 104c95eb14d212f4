"""Turns the services of the .proto files into gRPC handlers, one for every call, all instrumented in the same way."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol

import grpc
import grpc.aio
from google.protobuf.descriptor import FileDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from cri.enums import require_known
from cri.errors import status_of
from host.errors import PodkeelError, UnsupportedError
from host.files import descriptors
from host.files.descriptors import Use

_log = logging.getLogger("podkeel.calls")

_NOTHING = object()

# Calls that kubelet repeats all the time are logged at level debug only.
_QUIET = re.compile(r"^(Version|Status|RuntimeConfig|ImageFsInfo|List.*|Stream.*|.*Status|.*Stats|ExecSync)$")


@dataclass(slots=True, eq=False)
class Call:
    """One call; ``response`` (of a unary one), ``code`` and ``details`` are known at its end, ``seconds`` after it."""

    service: str
    method: str
    request: Any
    context: grpc.aio.ServicerContext[Any, Any]
    response: Any = None
    code: grpc.StatusCode = grpc.StatusCode.CANCELLED
    details: str = ""
    begin: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        """How long it has taken up to now."""
        return time.perf_counter() - self.begin


class CallObserver(Protocol):
    """An observer of calls, such as metrics or traces."""

    def observe(self, call: Call) -> AbstractContextManager[None]:
        """A context around the call. At its end ``call`` has the result."""


# Calls that hold descriptors for a long time, or create objects that do: with few left they are refused, so that stops
# work.
_NEEDS = {
    **dict.fromkeys(("RunPodSandbox", "CreateContainer", "StartContainer", "RestorePod"), Use.MAKING),
    **dict.fromkeys(("ExecSync", "Exec", "Attach", "PortForward"), Use.STREAMS_AND_IMAGES),
    **dict.fromkeys(("PullImage", "Pull", "ImportImage", "ExportImages", "PushImage"), Use.STREAMS_AND_IMAGES),
    "CheckImages": Use.STREAMS_AND_IMAGES,
    "ImageFromCheckpoint": Use.STREAMS_AND_IMAGES,
    "CheckpointContainer": Use.STREAMS_AND_IMAGES,
    "CheckpointPod": Use.STREAMS_AND_IMAGES,
}

# Calls that this version does not have: they return UNIMPLEMENTED. It has all of the CRI.
NOT_BUILT: frozenset[str] = frozenset()

Begin = Callable[[Any, "grpc.aio.ServicerContext[Any, Any]"], Call]


def service_handlers(file: FileDescriptor, services: dict[str, object], observers: Sequence[CallObserver]) -> list[Any]:
    """gRPC handlers for every call of every service of ``file``.

    A call ``RunPodSandbox`` is the method ``run_pod_sandbox`` of the object in ``services``. Unary methods take the
    request and return a response message or its bytes; streaming ones are async generators of the same. Calls in
    ``NOT_BUILT`` answer UNIMPLEMENTED. Raises TypeError for a call that has neither a method nor a place in that list,
    or both. So a misspelt method stops the start.
    """
    handlers = []
    for name, service in services.items():
        descriptor = file.services_by_name[name]
        table = {method.name: _handler(method, service, observers) for method in descriptor.methods}
        handlers.append(grpc.method_handlers_generic_handler(descriptor.full_name, table))
    return handlers


def snake_case(name: str) -> str:
    """``RunPodSandbox`` as ``run_pod_sandbox``."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def _handler(method: MethodDescriptor, service: object, observers: Sequence[CallObserver]) -> Any:
    request_class = GetMessageClass(method.input_type)
    name = snake_case(method.name)
    call = getattr(service, name, None)
    if (call is None) is not (method.name in NOT_BUILT):
        fault = "has no" if call is None else "is declared as not built, but has the"
        raise TypeError(f"{method.full_name} {fault} method {name!r} in {type(service).__name__}")

    def begin(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Call:
        return Call(method.containing_service.full_name, method.name, request, context)

    if method.server_streaming:
        stream = _streaming(begin, call or _absent_stream(method.name), observers)
        return grpc.unary_stream_rpc_method_handler(stream, request_class.FromString, _serialize)
    unary = _unary(begin, call or _absent(method.name), observers)
    return grpc.unary_unary_rpc_method_handler(unary, request_class.FromString, _serialize)


def _serialize(response: Message | bytes) -> bytes:
    return response if isinstance(response, bytes) else response.SerializeToString()


def _unary(begin: Begin, method: Callable[[Any], Awaitable[Any]], observers: Sequence[CallObserver]) -> Any:
    async def handle(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        call = begin(request, context)
        with _observed(call, observers):
            try:
                _admit(call)
                call.response = await method(request)
                call.code = grpc.StatusCode.OK
            except Exception as error:
                _fail(call, error)
        if call.code is not grpc.StatusCode.OK:
            await context.abort(call.code, call.details)
        return call.response

    return handle


def _streaming(begin: Begin, method: Callable[[Any], AsyncIterator[Any]], observers: Sequence[CallObserver]) -> Any:
    async def handle(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
        call = begin(request, context)
        with _observed(call, observers):
            try:
                _admit(call)
                async for response in _announced(method(request), context):
                    yield response
                call.code = grpc.StatusCode.OK
            except Exception as error:
                _fail(call, error)
        if call.code is not grpc.StatusCode.OK:
            await context.abort(call.code, call.details)

    return handle


def _admit(call: Call) -> None:
    """Raise InvalidArgumentError for a request that cannot be decoded, LimitError if descriptors are short."""
    require_known(call.request)
    need = _NEEDS.get(call.method)
    if need is not None:
        descriptors.require(call.method, need)


def _observed(call: Call, observers: Sequence[CallObserver]) -> ExitStack:
    stack = ExitStack()
    for observer in observers:
        stack.enter_context(observer.observe(call))
    return stack


async def _announced(responses: AsyncIterator[Any], context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
    """The responses. Headers are sent before the first one, so that the client sees that its stream is open."""
    first = asyncio.ensure_future(anext(responses, _NOTHING))
    try:
        await asyncio.sleep(0)  # run the generator until it waits: then its subscription is active
        await context.send_initial_metadata(())
        response = await first
    finally:
        first.cancel()
    while response is not _NOTHING:
        yield response
        response = await anext(responses, _NOTHING)


def _fail(call: Call, error: Exception) -> None:
    name = call.method
    code, message = call.code, call.details = status_of(error)
    if code is grpc.StatusCode.INTERNAL and not isinstance(error, PodkeelError):
        _log.error("%s: %s", name, error, exc_info=error)
    elif not _QUIET.match(name):
        _log.warning("%s: %s: %s", name, code.name, message)
    else:
        _log.debug("%s: %s: %s", name, code.name, message)


def _absent(name: str) -> Callable[[Any], Awaitable[Any]]:
    async def refuse(_request: Any) -> Any:
        raise UnsupportedError(f"{name} is not built yet in this version of Podkeel")

    return refuse


def _absent_stream(name: str) -> Callable[[Any], AsyncIterator[Any]]:
    async def refuse(_request: Any) -> AsyncIterator[Any]:
        raise UnsupportedError(f"{name} is not built yet in this version of Podkeel")
        yield

    return refuse
