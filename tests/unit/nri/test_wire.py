"""Frames, ttrpc and the calls of a plugin, against the sample stub on the other end of a real socket."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message_factory import GetMessageClass

from host.errors import InvalidArgumentError, PodkeelError
from manifests.nri import stub
from proto.nri.v1alpha1 import nri_pb2
from proto.ttrpc.v1 import ttrpc_pb2
from runtime.nri.plugins import events, ttrpc
from runtime.nri.plugins.budget import Budget
from runtime.nri.plugins.decoding import Decoder
from runtime.nri.plugins.encoding import EventRequest
from runtime.nri.plugins.plugin import ALL_EVENTS, Plugin, PluginLostError, Shared
from runtime.nri.plugins.trunk import PAYLOAD_LIMIT, Trunk
from tests.support.nri import EVENTS
from tests.unit.nri.stubs import run_in_thread

SECONDS = 60.0


async def no_updates(plugin: Plugin, request: nri_pb2.UpdateContainersRequest) -> nri_pb2.UpdateContainersResponse:
    return nri_pb2.UpdateContainersResponse(failed=request.update)


class Agent:
    """The agent's end of a trunk, the other end as a plain socket."""

    def __init__(self, plugin: Plugin, trunk: Trunk, other: socket.socket) -> None:
        self.plugin = plugin
        self.trunk = trunk
        self.other = other
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()


@pytest.fixture
async def agent() -> AsyncIterator[Agent]:
    ours, theirs = socket.socketpair()
    ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    found: list[Agent] = []

    def connected(trunk: Trunk) -> None:
        found.append(Agent(Plugin(trunk, no_updates, Shared()), trunk, theirs))

    def is_gone(why: str) -> None:
        found[0].plugin.close(why)
        ended.set_result(why)

    await asyncio.get_running_loop().create_connection(lambda: Trunk(connected, is_gone), sock=ours)
    found[0].ended = ended
    yield found[0]
    found[0].plugin.close("the test is over")
    await ended
    theirs.close()


def running(agent: Agent, plugin_class: type[Any], name: str = "sample", index: str = "10") -> Any:
    """The stub's plugin on the other end, in a separate thread."""
    plugin = plugin_class(name, index, connected=agent.other)
    run_in_thread(plugin)
    return plugin


def frame(connection: int, payload: bytes) -> bytes:
    return struct.pack(">II", connection, len(payload)) + payload


def request(stream: int, method: str, message: Any = None, *, service: str = "Runtime", flags: int = 0) -> bytes:
    payload = message.SerializeToString() if message is not None else b""
    body = ttrpc_pb2.Request(
        service=f"nri.pkg.api.v1alpha1.{service}", method=method, payload=payload
    ).SerializeToString()
    return frame(2, struct.pack(">IIBB", len(body), stream, 1, flags) + body)


async def response(other: socket.socket) -> tuple[int, ttrpc_pb2.Response]:
    """The next response on the second connection."""

    def read() -> tuple[int, ttrpc_pb2.Response]:
        with other.makefile("rb", buffering=0) as file:
            header = file.read(18)
            assert header is not None
            connection, _, length, stream, kind, _ = struct.unpack(">IIIIBB", header)
            assert (connection, kind) == (2, 2)
            return stream, ttrpc_pb2.Response.FromString(file.read(length) if length else b"")

    other.settimeout(SECONDS)
    return await asyncio.to_thread(read)


REGISTRATION = nri_pb2.RegisterPluginRequest(plugin_name="sample", plugin_idx="10")


async def test_a_plugin_registers_is_configured_and_answers(agent: Agent) -> None:
    class Sample(stub.Plugin):
        def CreateContainer(self, request: nri_pb2.CreateContainerRequest) -> nri_pb2.CreateContainerResponse:
            answer = nri_pb2.CreateContainerResponse()
            answer.adjust.env.add(key="SEEN", value=request.container.name)
            return answer

        def StopContainer(self, request: nri_pb2.StopContainerRequest) -> None:
            raise ValueError("not now")

    running(agent, Sample)
    await agent.plugin.registered(SECONDS)
    assert agent.plugin.title == "10-sample"
    await agent.plugin.configure(nri_pb2.ConfigureRequest(runtime_name="podkeel"), SECONDS)
    assert agent.plugin.events == 1 << (nri_pb2.CREATE_CONTAINER - 1) | 1 << (nri_pb2.STOP_CONTAINER - 1)
    assert agent.plugin.wants(nri_pb2.CREATE_CONTAINER)
    assert not agent.plugin.wants(nri_pb2.RUN_POD_SANDBOX)
    created = await agent.plugin.notify(
        events.CREATE_CONTAINER,
        nri_pb2.CreateContainerRequest(container=nri_pb2.Container(name="web")),
        SECONDS,
    )
    assert created is not None
    assert [(entry.key, entry.value) for entry in created.adjust.env] == [("SEEN", "web")]
    with pytest.raises(PodkeelError, match="10-sample: StopContainer: not now"):
        await agent.plugin.notify(
            events.STOP_CONTAINER,
            nri_pb2.StopContainerRequest(),
            SECONDS,
        )
    assert agent.plugin.calls.by_method["StopContainer"].errors == 1
    assert not agent.plugin.closed


async def test_a_plugin_without_the_specific_call_gets_the_state_change(agent: Agent) -> None:
    seen: list[tuple[int, str]] = []

    class Old(stub.Plugin):
        def StateChange(self, request: nri_pb2.StateChangeEvent) -> None:
            seen.append((request.event, request.container.name))

    running(agent, Old)
    await agent.plugin.registered(SECONDS)
    for name in ("a", "b"):
        answer = await agent.plugin.notify(
            events.START_CONTAINER,
            nri_pb2.StartContainerRequest(container=nri_pb2.Container(name=name)),
            SECONDS,
        )
        assert answer is None
    assert seen == [(nri_pb2.START_CONTAINER, "a"), (nri_pb2.START_CONTAINER, "b")]
    counted = agent.plugin.calls.by_method.items()
    assert {name: count.calls for name, count in counted} == {"StartContainer": 1, "StateChange": 2}


@pytest.mark.parametrize("method", [*nri_pb2.DESCRIPTOR.services_by_name["Plugin"].methods], ids=lambda one: one.name)
def test_requests_of_events_are_encoded_as_their_messages(method: MethodDescriptor) -> None:
    pod, container = nri_pb2.PodSandbox(id="p" * 300, name="web"), nri_pb2.Container(id="c", env=["A=1"] * 50)
    parts = {"pod": pod, "container": container} if "container" in method.input_type.fields_by_name else {"pod": pod}
    request = EventRequest(*(part.SerializeToString() for part in parts.values()))
    if method.name in EVENTS:
        kind = GetMessageClass(method.input_type)
        assert kind.FromString(request.encoded) == kind(**parts)
    change = nri_pb2.StateChangeEvent.FromString(request.state_change(nri_pb2.REMOVE_CONTAINER))
    assert change == nri_pb2.StateChangeEvent(event=nri_pb2.REMOVE_CONTAINER, **parts)


async def test_the_stub_gives_state_changes_of_older_agents_to_the_methods_of_the_events(agent: Agent) -> None:
    seen: list[tuple[str, str, str]] = []

    class Current(stub.Plugin):
        def RunPodSandbox(self, request: nri_pb2.RunPodSandboxRequest) -> None:
            seen.append((type(request).__name__, request.pod.name, ""))

        def StartContainer(self, request: nri_pb2.StartContainerRequest) -> None:
            seen.append((type(request).__name__, request.pod.name, request.container.name))

    running(agent, Current)
    await agent.plugin.registered(SECONDS)
    pod, container = nri_pb2.PodSandbox(name="p"), nri_pb2.Container(name="c")
    for event in (nri_pb2.RUN_POD_SANDBOX, nri_pb2.START_CONTAINER, nri_pb2.REMOVE_CONTAINER):
        change = nri_pb2.StateChangeEvent(event=event, pod=pod, container=container)
        await agent.plugin.call("StateChange", change, nri_pb2.Empty, SECONDS)
    assert seen == [("RunPodSandboxRequest", "p", ""), ("StartContainerRequest", "p", "c")]


async def test_a_flood_of_frames_for_unknown_connections_closes_the_trunk(agent: Agent) -> None:
    flood = frame(77, b"") * 5000
    await asyncio.to_thread(agent.other.sendall, flood)
    assert "frames that are empty or for unknown connections" in await agent.ended


async def test_a_flood_of_answers_to_no_call_closes_the_trunk(agent: Agent) -> None:
    answer = struct.pack(">IIBB", 0, 99, 2, 0)
    await asyncio.to_thread(agent.other.sendall, frame(1, answer) * 300)
    assert "answers to calls that do not exist" in await agent.ended


async def test_a_plugin_that_hangs_is_closed_after_its_time(agent: Agent) -> None:
    waiting = threading.Event()

    class Slow(stub.Plugin):
        def StartContainer(self, request: nri_pb2.StartContainerRequest) -> None:
            waiting.wait(SECONDS)

    running(agent, Slow)
    await agent.plugin.registered(SECONDS)
    try:
        with pytest.raises(PluginLostError, match=r"StartContainer took longer than 0.2 s"):
            await agent.plugin.notify(
                events.START_CONTAINER,
                nri_pb2.StartContainerRequest(),
                0.2,
            )
    finally:
        waiting.set()
    assert "0.2 s" in await agent.ended
    with pytest.raises(PluginLostError):
        await agent.plugin.call("Shutdown", nri_pb2.Empty(), nri_pb2.Empty, SECONDS)


async def test_a_call_with_a_short_time_ends_while_one_with_a_long_time_waits(agent: Agent) -> None:
    share = Budget().share(agent.trunk.close)
    client = ttrpc.Client(agent.trunk, 7, "Service", share=share, decoder=Decoder())
    slow = asyncio.create_task(client.call("Slow", b"x" * 200, SECONDS))
    await asyncio.sleep(0)
    sent = await asyncio.to_thread(agent.other.recv, 4096)
    asked = ttrpc_pb2.Request(service="Service", method="Slow", payload=b"x" * 200, timeout_nano=int(SECONDS * 1e9))
    assert ttrpc_pb2.Request.FromString(sent[18:]) == asked
    for _ in range(2):
        with pytest.raises(TimeoutError):
            await client.call("Quick", b"", 0.02)
    agent.other.sendall(frame(7, struct.pack(">IIBB", 0, 1, 2, 0)))
    assert await slow == b""
    client.close("the test is over")


@pytest.mark.parametrize(("at_the_end", "lost"), [(True, True), (False, False)])
async def test_a_deadline_that_a_plugin_answers_is_its_time_limit_only_when_that_is_over(
    agent: Agent, at_the_end: bool, lost: bool
) -> None:
    """The stub of Go cancels what runs when the time that the request names is over, and may be the first to say so."""

    def answer() -> None:
        agent.other.recv(4096)
        if at_the_end:
            time.sleep(0.95)
        status = ttrpc_pb2.Status(code=ttrpc.DEADLINE_EXCEEDED, message="context deadline exceeded")
        body = ttrpc_pb2.Response(status=status).SerializeToString()
        agent.other.sendall(frame(1, struct.pack(">IIBB", len(body), 1, 2, 0) + body))

    answering = asyncio.create_task(asyncio.to_thread(answer))
    with pytest.raises(PluginLostError if lost else PodkeelError) as raised:
        await agent.plugin.notify(events.START_CONTAINER, nri_pb2.StartContainerRequest(), 1.0 if lost else 60.0)
    await answering
    assert isinstance(raised.value, PluginLostError) is lost
    assert bool(agent.plugin.closed) is lost


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (nri_pb2.RegisterPluginRequest(plugin_name="", plugin_idx="10"), "plugin_name '' is empty"),
        (nri_pb2.RegisterPluginRequest(plugin_name="x\n", plugin_idx="10"), "control characters"),
        (nri_pb2.RegisterPluginRequest(plugin_name="x" * 1000, plugin_idx="10"), "longer than 128"),
        (nri_pb2.RegisterPluginRequest(plugin_name="x", plugin_idx="1"), "not two digits"),
        (nri_pb2.RegisterPluginRequest(plugin_name="x", plugin_idx="१२"), "not two digits"),
    ],
)
async def test_a_registration_that_is_wrong_is_refused(
    agent: Agent, message: nri_pb2.RegisterPluginRequest, reason: str
) -> None:
    agent.other.sendall(request(1, "RegisterPlugin", message))
    stream, answer = await response(agent.other)
    assert stream == 1
    assert reason in answer.status.message
    agent.other.sendall(request(3, "RegisterPlugin", REGISTRATION))
    assert (await response(agent.other))[1].status.code == ttrpc.OK
    await agent.plugin.registered(SECONDS)
    agent.other.sendall(request(5, "RegisterPlugin", REGISTRATION))
    assert "registered already" in (await response(agent.other))[1].status.message
    agent.other.sendall(request(7, "UpdateContainers", nri_pb2.UpdateContainersRequest()))
    assert "not configured yet" in (await response(agent.other))[1].status.message


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (request(1, "Nothing"), ttrpc.UNIMPLEMENTED),
        (request(1, "RegisterPlugin", REGISTRATION, service="Plugin"), ttrpc.UNIMPLEMENTED),
        (request(1, "RegisterPlugin", REGISTRATION, flags=2), ttrpc.UNIMPLEMENTED),
        (frame(2, struct.pack(">IIBB", 3, 1, 1, 0) + b"\xff\xff\xff"), ttrpc.INVALID_ARGUMENT),
        (
            frame(2, struct.pack(">IIBB", (4 << 20) + 1, 1, 1, 0) + bytes(4 << 20)) + frame(2, b"x"),
            ttrpc.RESOURCE_EXHAUSTED,
        ),
    ],
)
async def test_a_bad_call_is_answered_and_the_next_one_served(agent: Agent, data: bytes, code: int) -> None:
    sender = asyncio.create_task(asyncio.to_thread(agent.other.sendall, data))
    stream, answer = await response(agent.other)
    await sender
    assert (stream, answer.status.code) == (1, code)
    agent.other.sendall(request(3, "RegisterPlugin", REGISTRATION))
    assert (await response(agent.other))[1].status.code == ttrpc.OK


async def test_a_message_before_the_registration_has_a_lower_limit(agent: Agent) -> None:
    sender = asyncio.create_task(asyncio.to_thread(agent.other.sendall, request(1, "Nothing" * 20_000)))
    _, answer = await response(agent.other)
    await sender
    assert (answer.status.code, answer.status.message) == (
        ttrpc.RESOURCE_EXHAUSTED,
        "the message is larger than 65536 bytes",
    )
    agent.other.sendall(request(3, "RegisterPlugin", REGISTRATION))
    assert (await response(agent.other))[1].status.code == ttrpc.OK
    sender = asyncio.create_task(asyncio.to_thread(agent.other.sendall, request(5, "Nothing" * 20_000)))
    assert (await response(agent.other))[1].status.code == ttrpc.UNIMPLEMENTED
    await sender


async def test_bytes_in_any_pieces_and_for_unknown_connections_are_taken_in_order(agent: Agent) -> None:
    data = frame(7, b"nobody's" * 100) + request(1, "RegisterPlugin", REGISTRATION) + frame(0, b"")
    for byte in data:
        agent.other.sendall(bytes((byte,)))
        await asyncio.sleep(0)
    assert (await response(agent.other))[1].status.code == ttrpc.OK
    await agent.plugin.registered(SECONDS)


async def test_a_frame_over_the_limit_ends_the_trunk(agent: Agent) -> None:
    agent.other.sendall(struct.pack(">II", 2, PAYLOAD_LIMIT + 1))
    assert f"the limit is {PAYLOAD_LIMIT}" in await agent.ended
    with pytest.raises(PluginLostError):
        await agent.plugin.registered(SECONDS)


async def test_a_plugin_that_leaves_fails_what_is_under_way(agent: Agent) -> None:
    agent.other.sendall(request(1, "RegisterPlugin", REGISTRATION))
    await response(agent.other)
    await agent.plugin.registered(SECONDS)
    call = asyncio.create_task(agent.plugin.call("Shutdown", nri_pb2.Empty(), nri_pb2.Empty, SECONDS))
    await asyncio.sleep(0)
    agent.other.shutdown(socket.SHUT_RDWR)
    with pytest.raises(PluginLostError, match="closed the connection"):
        await call


async def test_a_plugin_that_does_not_register_in_time_is_closed(agent: Agent) -> None:
    with pytest.raises(PluginLostError, match=r"did not register within 0.05 s"):
        await agent.plugin.registered(0.05)
    assert "did not register" in await agent.ended


async def test_a_plugin_that_floods_without_reading_is_not_read_any_more(agent: Agent) -> None:
    agent.other.setblocking(False)
    data = request(1, "Nothing" * 9_000) * 20
    sent = 0
    while not agent.trunk.closed and sent < 64 << 20:
        try:
            sent += agent.other.send(data)
        except BlockingIOError:
            if agent.trunk.paused:
                break
            await asyncio.sleep(0)
        except BrokenPipeError:
            break
    assert sent < 64 << 20


async def test_events_that_do_not_exist_are_refused(agent: Agent) -> None:
    class Odd(stub.Plugin):
        def Configure(self, request: nri_pb2.ConfigureRequest) -> nri_pb2.ConfigureResponse:
            return nri_pb2.ConfigureResponse(events=ALL_EVENTS + 1)

    running(agent, Odd)
    await agent.plugin.registered(SECONDS)
    with pytest.raises(InvalidArgumentError, match="events that do not exist"):
        await agent.plugin.configure(nri_pb2.ConfigureRequest(), SECONDS)
    assert "Configure failed" in await agent.ended
