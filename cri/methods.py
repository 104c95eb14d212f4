"""Turns the services of the .proto files into gRPC handlers, one for every call, all instrumented alike."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Protocol

import grpc
import grpc.aio
from google.protobuf.descriptor import FileDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from cri.errors import status_of
from host.errors import PodkeelError, UnsupportedError

_log = logging.getLogger("podkeel.calls")

_NOTHING = object()

# Whatever a kubelet asks over and over is logged only where somebody looks for it.
_QUIET = re.compile(r"^(Version|Status|RuntimeConfig|ImageFsInfo|List.*|Stream.*|.*Status|.*Stats|ExecSync)$")


class CallObserver(Protocol):
    """Is told of every call."""

    def began(self, method: str) -> None:
        """A call begins."""

    def ended(self, method: str, code: grpc.StatusCode, seconds: float) -> None:
        """A call ends."""


def service_handlers(file: FileDescriptor, services: dict[str, object], observer: CallObserver) -> list[Any]:
    """gRPC handlers for every call of every service of ``file``.

    A call ``RunPodSandbox`` is the method ``run_pod_sandbox`` of the object in ``services``; one the object does not
    have answers UNIMPLEMENTED. Unary methods take the request and return a response message or its bytes; streaming
    ones are async generators of the same.
    """
    handlers = []
    for name, service in services.items():
        methods = file.services_by_name[name].methods
        table = {method.name: _handler(method, service, observer) for method in methods}
        handlers.append(grpc.method_handlers_generic_handler(f"{file.package}.{name}", table))
    return handlers


def snake_case(name: str) -> str:
    """``RunPodSandbox`` as ``run_pod_sandbox``."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def _handler(method: MethodDescriptor, service: object, observer: CallObserver) -> Any:
    request_class = GetMessageClass(method.input_type)
    call = getattr(service, snake_case(method.name), None)
    if method.server_streaming:
        stream = _streaming(method.name, call or _absent_stream(method.name), observer)
        return grpc.unary_stream_rpc_method_handler(stream, request_class.FromString, _serialize)
    unary = _unary(method.name, call or _absent(method.name), observer)
    return grpc.unary_unary_rpc_method_handler(unary, request_class.FromString, _serialize)


def _serialize(response: Message | bytes) -> bytes:
    return response if isinstance(response, bytes) else response.SerializeToString()


def _unary(name: str, call: Callable[[Any], Awaitable[Any]], observer: CallObserver) -> Any:
    async def handle(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        observer.began(name)
        begin = time.perf_counter()
        code = grpc.StatusCode.CANCELLED
        try:
            response = await call(request)
            code = grpc.StatusCode.OK
        except Exception as error:
            code, message = _report(name, error)
            await context.abort(code, message)
        else:
            return response
        finally:
            observer.ended(name, code, time.perf_counter() - begin)

    return handle


def _streaming(name: str, call: Callable[[Any], AsyncIterator[Any]], observer: CallObserver) -> Any:
    async def handle(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
        observer.began(name)
        begin = time.perf_counter()
        code = grpc.StatusCode.CANCELLED
        try:
            async for response in _announced(call(request), context):
                yield response
            code = grpc.StatusCode.OK
        except Exception as error:
            code, message = _report(name, error)
            await context.abort(code, message)
        finally:
            observer.ended(name, code, time.perf_counter() - begin)

    return handle


async def _announced(responses: AsyncIterator[Any], context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
    """The responses, after headers that tell the client before the first of them that its stream is served."""
    first = asyncio.ensure_future(anext(responses, _NOTHING))
    try:
        await asyncio.sleep(0)  # the stream runs up to where it waits: a subscription is in force then
        await context.send_initial_metadata(())
        response = await first
    finally:
        first.cancel()
    while response is not _NOTHING:
        yield response
        response = await anext(responses, _NOTHING)


def _report(name: str, error: Exception) -> tuple[grpc.StatusCode, str]:
    code, message = status_of(error)
    if not isinstance(error, PodkeelError):
        _log.error("%s: %s", name, error, exc_info=error)
    elif not _QUIET.match(name):
        _log.warning("%s: %s: %s", name, code.name, message)
    else:
        _log.debug("%s: %s: %s", name, code.name, message)
    return code, message


def _absent(name: str) -> Callable[[Any], Awaitable[Any]]:
    async def refuse(_request: Any) -> Any:
        raise UnsupportedError(f"{name} is not built yet in this version of Podkeel")

    return refuse


def _absent_stream(name: str) -> Callable[[Any], AsyncIterator[Any]]:
    async def refuse(_request: Any) -> AsyncIterator[Any]:
        raise UnsupportedError(f"{name} is not built yet in this version of Podkeel")
        yield

    return refuse
