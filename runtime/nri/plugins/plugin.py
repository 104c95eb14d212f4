"""One plugin: its connection, its registration, and calls to it with their time limits."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeVar, cast

from google.protobuf.message import DecodeError, Message

from host.errors import InvalidArgumentError, PodkeelError, UnavailableError
from proto.nri.v1alpha1 import nri_pb2
from runtime.nri.plugins import ttrpc
from runtime.nri.plugins.budget import Budget
from runtime.nri.plugins.calls import CallCount, Calls, CallTotals
from runtime.nri.plugins.decoding import Decoder
from runtime.nri.plugins.encoding import EventRequest
from runtime.nri.plugins.events import EventCall
from runtime.nri.plugins.trunk import Trunk

PLUGIN_SERVICE, RUNTIME_SERVICE = 1, 2
"""The connections of a trunk: the plugin serves the first, the agent serves the second."""

ALL_EVENTS = (1 << (nri_pb2.LAST - 1)) - 1
_NAME_LIMIT = 128
_ENDED_BY_DEADLINE = 0.9  # part of the time limit: the Go stub ends a call when the limit is over
_PACKAGE = nri_pb2.DESCRIPTOR.package
_INDEX = re.compile(r"[0-9]{2}")
_log = logging.getLogger("podkeel.nri")

Answer = TypeVar("Answer", bound=Message)
UpdateContainers = Callable[["Plugin", nri_pb2.UpdateContainersRequest], Awaitable[nri_pb2.UpdateContainersResponse]]


class PluginLostError(PodkeelError):
    """A plugin was closed: it took too long or its connection ended. The operation continues without it."""


@dataclass(frozen=True, slots=True)
class Shared:
    """The objects that all plugins of an agent share."""

    totals: CallTotals = field(default_factory=CallTotals)
    budget: Budget = field(default_factory=Budget)
    decoder: Decoder = field(default_factory=Decoder)


class Plugin:
    """A plugin at the other end of a trunk.

    ``updates`` is called when the plugin calls UpdateContainers. ``events`` is the mask of the events that it wants.
    ``closed`` is the reason why it was closed. ``admitted_at`` is when it was synchronised, in nanoseconds since the
    epoch.
    """

    def __init__(
        self, trunk: Trunk, updates: UpdateContainers, shared: Shared, *, name: str = "", index: str = ""
    ) -> None:
        self.name = name
        self.index = index
        self.started_by_agent = bool(name)
        self.events = 0
        self.calls = Calls()
        self.closed = ""
        self.admitted_at = 0
        self._shared = shared
        self._trunk = trunk
        self._share = shared.budget.share(self.close)
        self._updates = updates
        self._registered: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._without: set[int] = set()
        self._counts: dict[str, tuple[CallCount, CallCount]] = {}  # the plugin's and those of all with its title
        share, decoder, limit = self._share, shared.decoder, ttrpc.FIRST_BODY_LIMIT
        service = f"{_PACKAGE}.Plugin"
        self._client = ttrpc.Client(trunk, PLUGIN_SERVICE, service, share=share, decoder=decoder, limit=limit)
        handlers = {"RegisterPlugin": self._register, "UpdateContainers": self._update_containers}
        service = f"{_PACKAGE}.Runtime"
        self._server = ttrpc.Server(
            trunk, RUNTIME_SERVICE, service, handlers, share=share, decoder=decoder, limit=limit
        )

    @property
    def title(self) -> str:
        """The index and name of the plugin, for messages, metrics and the owners of fields."""
        return f"{self.index}-{self.name}"

    def wants(self, event: int) -> bool:
        """Whether the plugin asked for an event."""
        return bool(self.events >> (event - 1) & 1)

    async def registered(self, seconds: float) -> None:
        """Wait until the plugin has registered. Raises PluginLostError after ``seconds``, or if it disconnects."""
        try:
            async with asyncio.timeout(seconds):
                await asyncio.shield(self._registered)
        except TimeoutError:
            self.close(f"it did not register within {seconds:g} s")
            raise PluginLostError(self.closed) from None
        if self.closed:
            raise PluginLostError(self.closed)

    async def _register(self, payload: bytes) -> bytes:
        request = nri_pb2.RegisterPluginRequest.FromString(payload)
        if self._registered.done():
            raise InvalidArgumentError("the plugin has registered already")
        name, index = (self.name, self.index) if self.started_by_agent else (request.plugin_name, request.plugin_idx)
        if not name or len(name) > _NAME_LIMIT or not name.isprintable():
            raise InvalidArgumentError(
                f"plugin_name {name[:_NAME_LIMIT]!r} is empty, has control characters or is longer than {_NAME_LIMIT}"
            )
        if not _INDEX.fullmatch(index):
            raise InvalidArgumentError(f"plugin_idx {index[:8]!r} of plugin {name!r} is not two digits, as in 10")
        self.name, self.index = name, index
        self._client.allow_large()
        self._server.allow_large()
        self._registered.set_result(None)
        return nri_pb2.Empty().SerializeToString()

    async def _update_containers(self, payload: bytes) -> bytes:
        if not self.events:
            raise InvalidArgumentError("the plugin is not configured yet: wait for Configure and Synchronize")
        request = await self._shared.decoder.decode(nri_pb2.UpdateContainersRequest, payload)
        return (await self._updates(self, request)).SerializeToString()

    async def configure(self, request: nri_pb2.ConfigureRequest, seconds: float) -> None:
        """Send the configuration and get the wanted events. Raises PodkeelError and closes the plugin."""
        try:
            answer = await self.call("Configure", request, nri_pb2.ConfigureResponse, seconds)
            if answer.events & ~ALL_EVENTS:
                raise InvalidArgumentError(f"it asks for events that do not exist: mask {answer.events:#x}")
        except PodkeelError as error:
            self.close(f"Configure failed: {error}")
            raise
        self.events = answer.events or ALL_EVENTS

    async def notify(self, event: EventCall[Answer], request: Message | EventRequest, seconds: float) -> Answer | None:
        """Send an event by its own method, or by StateChange if the plugin does not have that method.

        Returns None if the event has no answer. Raises PluginLostError if the plugin is closed meanwhile. Raises
        PodkeelError with the plugin's message if it answers with an error.
        """
        number, method = event.number, event.method
        if number not in self._without:
            try:
                return await self.call(method, request, event.answer, seconds)
            except ttrpc.CallError as error:
                if error.code != ttrpc.UNIMPLEMENTED:
                    raise PodkeelError(f"plugin {self.title}: {method}: {error}") from error
                self._without.add(number)
        if number == nri_pb2.VALIDATE_CONTAINER_ADJUSTMENT:  # this event is newer than StateChange
            self.events &= ~(1 << (number - 1))
            return None
        try:
            await self.call("StateChange", _state_change(number, request), nri_pb2.Empty, seconds)
        except ttrpc.CallError as error:
            if error.code != ttrpc.UNIMPLEMENTED:
                raise PodkeelError(f"plugin {self.title}: StateChange for {method}: {error}") from error
            self.events &= ~(1 << (number - 1))  # it has neither method: do not send it this event again
        return None

    async def call(
        self, method: str, request: Message | EventRequest | bytes, answer: type[Answer], seconds: float
    ) -> Answer:
        """Make one call, and count its duration.

        Raises CallError, PluginLostError if the plugin was closed because of the call, and InvalidArgumentError for an
        answer that has too many fields.
        """
        if self.closed:
            raise PluginLostError(self.closed)
        begin, failure = time.monotonic(), ""
        try:
            payload = await self._client.call(method, _encoded(request), seconds)
            return await self._shared.decoder.decode(answer, payload) if payload else answer()
        except ttrpc.CallError as error:
            if error.code == ttrpc.DEADLINE_EXCEEDED and time.monotonic() - begin >= seconds * _ENDED_BY_DEADLINE:
                failure = f"{method} took longer than {seconds:g} s"
                raise self._lost(failure) from None
            failure = str(error) if error.code != ttrpc.UNIMPLEMENTED else ""
            raise
        except TimeoutError:
            failure = f"{method} took longer than {seconds:g} s"
            raise self._lost(failure) from None
        except UnavailableError as error:
            failure = str(error)
            raise self._lost(failure) from None
        except DecodeError:
            failure = f"its answer to {method} is not a message of NRI"
            raise self._lost(failure) from None
        except InvalidArgumentError as error:
            failure = f"NRI plugin {self.title} answers {error.message}"
            raise InvalidArgumentError(failure) from None
        finally:
            self._count(method, time.monotonic() - begin, failure)

    def _count(self, method: str, seconds: float, failure: str) -> None:
        counts = self._counts.get(method)
        if counts is None:
            counts = self.calls.count(method), self._shared.totals.count(self.title, method)
            self._counts[method] = counts
        for count in counts:
            count.add(seconds, failed=bool(failure))
        if failure:
            self.calls.last_error = f"{method}: {failure}"

    def _lost(self, why: str) -> PluginLostError:
        self.close(why)
        return PluginLostError(f"plugin {self.title}: {why}")

    def close(self, why: str) -> None:
        """End the connection. Calls that are running fail."""
        if self.closed:
            return
        self.closed = why
        self._share.end()
        self._server.close()
        self._client.close(why)
        self._trunk.close(why)
        if not self._registered.done():
            self._registered.set_result(None)


def _encoded(request: Message | EventRequest | bytes) -> bytes:
    if isinstance(request, bytes):
        return request
    return request.encoded if isinstance(request, EventRequest) else request.SerializeToString()


def _state_change(event: int, request: Message | EventRequest) -> bytes:
    """The request of StateChange for an event whose own request is ``request``."""
    if isinstance(request, EventRequest):
        return request.state_change(event)
    change = nri_pb2.StateChangeEvent(event=cast(nri_pb2.Event, event))
    for name in ("pod", "container"):
        if name in request.DESCRIPTOR.fields_by_name and request.HasField(name):
            getattr(change, name).CopyFrom(getattr(request, name))
    return change.SerializeToString()
