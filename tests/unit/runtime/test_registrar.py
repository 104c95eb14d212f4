"""Names of pods and containers: who gets one, who joins, who is refused, and when a name is free again."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from host.errors import AlreadyExistsError, PodkeelError, WrongStateError
from proto.runtime.v1 import cri_pb2
from runtime.layout import ContainerFolder, SandboxFolder
from runtime.state.container import Container, ContainerRecord, ContainerState
from runtime.state.registrar import (
    ContainerRequest,
    PodRegistrar,
    PodRequest,
    container_registrar,
    pod_registrar,
)
from runtime.state.sandbox import Sandbox, SandboxRecord, SandboxState


def a_request(*, hostname: str = "", attempt: int = 0, handler: str = "") -> PodRequest:
    metadata = cri_pb2.PodSandboxMetadata(name="web", namespace="default", uid="1", attempt=attempt)
    return PodRequest(cri_pb2.PodSandboxConfig(metadata=metadata, hostname=hostname), handler)


def a_sandbox(request: PodRequest, state: SandboxState = SandboxState.READY) -> Sandbox:
    record = SandboxRecord(state=state, created_at=1, handler="crun", requested_handler=request.handler, boot_id="b")
    return Sandbox("a" * 64, request.config, record, SandboxFolder(Path("/run/pod")))


class Making:
    """A creation that begins and waits for the test. When it is cancelled, its undo waits for the test too."""

    def __init__(self, request: PodRequest, error: Exception | None = None) -> None:
        self.sandbox = a_sandbox(request)
        self.error = error
        self.begun, self.go = asyncio.Event(), asyncio.Event()
        self.undoing, self.undone = asyncio.Event(), asyncio.Event()

    async def __call__(self) -> Sandbox:
        assert not self.begun.is_set(), "made twice"
        self.begun.set()
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.undoing.set()
            await self.undone.wait()
            raise
        if self.error is not None:
            raise self.error
        return self.sandbox

    async def never(self) -> Sandbox:
        raise AssertionError("a second making was begun")


def call(names: PodRegistrar, request: PodRequest, making: Making) -> asyncio.Task[Sandbox]:
    return asyncio.create_task(names.run(request, making))


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_equal_requests_get_one_pod_while_it_is_made_and_afterwards() -> None:
    names, making = pod_registrar(), Making(a_request())
    first = call(names, a_request(), making)
    await making.begun.wait()
    assert len(names) == 1
    second = asyncio.create_task(names.run(a_request(), making.never))
    await settle()
    making.go.set()
    assert await first is await second is making.sandbox
    assert len(names) == 0
    assert await names.run(a_request(), making.never) is making.sandbox


@pytest.mark.parametrize("other", [a_request(hostname="h"), a_request(handler="runc")])
async def test_another_request_of_the_same_name_is_refused(other: PodRequest) -> None:
    names, making = pod_registrar(), Making(a_request())
    first = call(names, a_request(), making)
    await making.begun.wait()
    with pytest.raises(AlreadyExistsError, match="sandbox default/web attempt 0 is being made with another conf"):
        await names.run(other, making.never)
    making.go.set()
    await first
    with pytest.raises(AlreadyExistsError, match=r"sandbox aaaaaaaaaaaaa \(default/web\) is there with another conf"):
        await names.run(other, making.never)


async def test_another_attempt_is_another_name() -> None:
    names, first, second = pod_registrar(), Making(a_request()), Making(a_request(attempt=1))
    calls = [call(names, a_request(), first), call(names, a_request(attempt=1), second)]
    first.go.set()
    second.go.set()
    assert await asyncio.gather(*calls) == [first.sandbox, second.sandbox]


@pytest.mark.parametrize("closing", [False, True])
async def test_a_stopped_pod_keeps_its_name_until_it_is_released(closing: bool) -> None:
    names, making = pod_registrar(), Making(a_request())
    old = a_sandbox(a_request(), SandboxState.READY if closing else SandboxState.NOT_READY)
    old.closing = closing
    names.adopt(old)
    with pytest.raises(AlreadyExistsError, match="was stopped and not removed: raise"):
        await names.run(a_request(), making.never)
    names.release(old)
    making.go.set()
    assert await names.run(a_request(), making) is making.sandbox
    names.release(old)  # again, when the name is another pod's
    assert await names.run(a_request(), making.never) is making.sandbox


@pytest.mark.parametrize("state", [SandboxState.MAKING, SandboxState.REMOVING])
async def test_what_clients_do_not_see_takes_no_name(state: SandboxState) -> None:
    names, making = pod_registrar(), Making(a_request())
    names.adopt(a_sandbox(a_request(), state))
    making.go.set()
    assert await names.run(a_request(), making) is making.sandbox


async def test_what_is_removed_while_its_making_ends_takes_no_name() -> None:
    names, removed, made = pod_registrar(), Making(a_request()), Making(a_request())
    removed.sandbox = a_sandbox(a_request(), SandboxState.REMOVING)
    removed.go.set()
    made.go.set()
    await names.run(a_request(), removed)
    assert await names.run(a_request(hostname="h"), made) is made.sandbox


async def test_all_callers_get_the_error_of_a_failed_creation_and_the_name_is_free() -> None:
    names, failing, made = pod_registrar(), Making(a_request(), PodkeelError("no network")), Making(a_request())
    calls = [call(names, a_request(), failing)]
    await failing.begun.wait()
    calls.append(asyncio.create_task(names.run(a_request(), failing.never)))
    await settle()
    failing.go.set()
    errors = await asyncio.gather(*calls, return_exceptions=True)
    assert [str(error) for error in errors] == ["no network"] * 2
    made.go.set()
    assert await names.run(a_request(hostname="h"), made) is made.sandbox


async def test_a_creation_continues_without_its_first_caller() -> None:
    names, making = pod_registrar(), Making(a_request())
    first = call(names, a_request(), making)
    await making.begun.wait()
    second = asyncio.create_task(names.run(a_request(), making.never))
    await settle()
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    making.go.set()
    assert await second is making.sandbox


async def test_after_its_last_caller_a_making_is_undone_before_the_next_one_begins() -> None:
    names, left, made = pod_registrar(), Making(a_request()), Making(a_request())
    only = call(names, a_request(), left)
    await left.begun.wait()
    only.cancel()
    await left.undoing.wait()
    next_one = call(names, a_request(hostname="h"), made)
    await settle()
    assert not made.begun.is_set()
    left.undone.set()
    made.go.set()
    assert await next_one is made.sandbox
    with pytest.raises(asyncio.CancelledError):
        await only


async def test_a_making_is_cancelled_by_its_identity_and_undone() -> None:
    names, making, other = pod_registrar(), Making(a_request()), Making(a_request(attempt=1))
    calls = [call(names, a_request(), making), call(names, a_request(attempt=1), other)]
    await making.begun.wait()
    await other.begun.wait()
    cancelling = asyncio.create_task(names.cancel(lambda identity: identity == a_request().identity))
    await making.undoing.wait()
    await settle()
    assert not cancelling.done()
    making.undone.set()
    await cancelling
    with pytest.raises(WrongStateError, match="its making was ended"):
        await calls[0]
    other.go.set()
    assert await calls[1] is other.sandbox


async def test_after_the_drain_nothing_begins() -> None:
    names, making = pod_registrar(), Making(a_request())
    caller = call(names, a_request(), making)
    await making.begun.wait()
    draining = asyncio.create_task(names.drain())
    await making.undoing.wait()
    making.undone.set()
    await draining
    for ended in (caller, asyncio.create_task(names.run(a_request(attempt=1), making.never))):
        with pytest.raises(WrongStateError, match="the agent is stopping"):
            await ended


async def test_containers_have_their_names_within_their_pod() -> None:
    names = container_registrar()
    pod, other_pod = a_sandbox(a_request()), a_sandbox(a_request(attempt=1))
    other_pod.id = "b" * 64
    config = cri_pb2.ContainerConfig(metadata=cri_pb2.ContainerMetadata(name="main"))
    record = ContainerRecord(
        state=ContainerState.RUNNING, created_at=1, handler="", boot_id="", image_id="", image_ref="", cgroup=""
    )
    container = Container("c" * 64, pod, config, record, ContainerFolder(Path("/run/c")))
    twin = Container("d" * 64, other_pod, config, record, ContainerFolder(Path("/run/d")))
    names.adopt(container)

    async def make_twin() -> Container:
        return twin

    assert await names.run(ContainerRequest(pod, config), make_twin) is container
    assert await names.run(ContainerRequest(other_pod, config), make_twin) is twin
    changed = cri_pb2.ContainerConfig(metadata=config.metadata, working_dir="/else")
    with pytest.raises(AlreadyExistsError, match=r"\(default/web/main\) is there with another configuration"):
        await names.run(ContainerRequest(pod, changed), make_twin)
    record.state = ContainerState.EXITED
    with pytest.raises(AlreadyExistsError, match="has exited: raise"):
        await names.run(ContainerRequest(pod, config), make_twin)
