"""Which states sandboxes and containers may go to, and what is in memory and in the store afterwards."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from host.database import Database
from host.errors import NotFoundError, PodkeelError, WrongStateError
from proto.runtime.v1 import cri_pb2
from runtime.layout import Layout
from runtime.state.container import Container, ContainerRecord, ContainerState
from runtime.state.rows import Store
from runtime.state.sandbox import Sandbox, SandboxRecord, SandboxState
from runtime.state.schema import MIGRATIONS
from runtime.state.state import State

POD_ID, CONTAINER_ID = "a" * 64, "c" * 64
BOOT = "of this test"
AGENT = "f" * 8
LAYOUT = Layout(Path("/data"), Path("/run"))

SANDBOX_MOVES = {
    (SandboxState.MAKING, SandboxState.READY),
    (SandboxState.READY, SandboxState.NOT_READY),
    (SandboxState.READY, SandboxState.REMOVING),
    (SandboxState.NOT_READY, SandboxState.NOT_READY),
    (SandboxState.NOT_READY, SandboxState.REMOVING),
    (SandboxState.REMOVING, SandboxState.NOT_READY),
}
CONTAINER_MOVES = {
    (ContainerState.MAKING, ContainerState.CREATED),
    (ContainerState.CREATED, ContainerState.RUNNING),
    (ContainerState.CREATED, ContainerState.EXITED),
    (ContainerState.RUNNING, ContainerState.EXITED),
    (ContainerState.EXITED, ContainerState.REMOVING),
    (ContainerState.REMOVING, ContainerState.EXITED),
}


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    opened = Database(tmp_path / "store.db", {"runtime": MIGRATIONS})
    yield opened
    opened.close()


@pytest.fixture
def state(database: Database) -> State:
    return State(Store(database, LAYOUT), LAYOUT, AGENT, BOOT)


def a_sandbox(state: SandboxState) -> Sandbox:
    config = cri_pb2.PodSandboxConfig(metadata=cri_pb2.PodSandboxMetadata(name="web", namespace="default", uid="1"))
    record = SandboxRecord(
        state=state, created_at=1, handler="crun", requested_handler="", boot_id=BOOT, cgroup_parent="/pods/web"
    )
    return Sandbox(POD_ID, config, record, LAYOUT.sandbox(POD_ID))


def a_container(sandbox: Sandbox, state: ContainerState) -> Container:
    config = cri_pb2.ContainerConfig(metadata=cri_pb2.ContainerMetadata(name="main"))
    record = ContainerRecord(
        state=state,
        created_at=2,
        handler="crun",
        boot_id=BOOT,
        image_id="i",
        image_ref="r",
        cgroup=f"/pods/web/{CONTAINER_ID}",
    )
    return Container(CONTAINER_ID, sandbox, config, record, LAYOUT.container(CONTAINER_ID))


async def written(database: Database) -> tuple[Sandbox | None, Container | None]:
    """The pod and the container as an agent finds them that starts now."""
    sandboxes, containers = await State(Store(database, LAYOUT), LAYOUT, AGENT, BOOT).load()
    return next(iter(sandboxes), None), next(iter(containers), None)


def refuse_updates(database: Database) -> None:
    """Make every change of a row fail, as with a broken disk."""
    with sqlite3.connect(database.path) as connection:
        for table in ("sandboxes", "containers"):
            connection.execute(
                f"CREATE TRIGGER refuse_{table} BEFORE UPDATE ON {table} BEGIN SELECT RAISE(ABORT, 'broken'); END"
            )


@pytest.mark.parametrize("to", SandboxState)
@pytest.mark.parametrize("before", SandboxState)
async def test_moves_of_sandboxes(state: State, database: Database, before: SandboxState, to: SandboxState) -> None:
    sandbox = a_sandbox(before)
    await state.add(sandbox)
    sandbox.record.addresses = ("10.0.0.1",)
    if (before, to) in SANDBOX_MOVES:
        await state.move(sandbox, to)
    else:
        with pytest.raises(WrongStateError, match=f"default/web.* is {before}: it cannot become {to}"):
            await state.move(sandbox, to)
    after = to if (before, to) in SANDBOX_MOVES else before
    row, _ = await written(database)
    assert row is not None
    assert (sandbox.record.state, row.record.state) == (after, after)
    assert row.record.addresses == (("10.0.0.1",) if (before, to) in SANDBOX_MOVES else ())


@pytest.mark.parametrize("to", ContainerState)
@pytest.mark.parametrize("before", ContainerState)
async def test_moves_of_containers(
    state: State, database: Database, before: ContainerState, to: ContainerState
) -> None:
    sandbox = a_sandbox(SandboxState.READY)
    container = a_container(sandbox, before)
    await state.add(sandbox)
    await state.add(container)
    container.record.exit_code = 7
    if (before, to) in CONTAINER_MOVES:
        await state.move(container, to)
    else:
        with pytest.raises(WrongStateError, match=f"default/web/main.* is {before}: it cannot become {to}"):
            await state.move(container, to)
    after = to if (before, to) in CONTAINER_MOVES else before
    _, row = await written(database)
    assert row is not None
    assert (container.record.state, row.record.state) == (after, after)
    assert row.record.exit_code == (7 if (before, to) in CONTAINER_MOVES else 0)


async def test_a_commit_that_fails_leaves_the_new_state(state: State, database: Database) -> None:
    sandbox = a_sandbox(SandboxState.READY)
    container = a_container(sandbox, ContainerState.RUNNING)
    await state.add(sandbox)
    await state.add(container)
    sandbox.list_item = container.list_item = b"as it was"
    refuse_updates(database)
    with pytest.raises(PodkeelError):
        await state.move(container, ContainerState.EXITED)
    with pytest.raises(PodkeelError):
        await state.move(sandbox, SandboxState.NOT_READY)
    assert (container.record.state, sandbox.record.state) == (ContainerState.EXITED, SandboxState.NOT_READY)
    assert [container.list_item, sandbox.list_item] == [None, None]
    row, container_row = await written(database)
    assert row is not None
    assert container_row is not None
    assert (container_row.folder, row.folder) == (container.folder, sandbox.folder)
    assert (container_row.record.state, row.record.state) == (ContainerState.RUNNING, SandboxState.READY)


async def test_what_cannot_be_removed_is_seen_again_until_the_next_start(state: State, database: Database) -> None:
    sandbox = a_sandbox(SandboxState.NOT_READY)
    container = a_container(sandbox, ContainerState.EXITED)
    await state.add(sandbox)
    await state.add(container)
    await state.move(container, ContainerState.REMOVING)
    await state.move(sandbox, SandboxState.REMOVING)
    assert (list(state.visible_sandboxes()), list(state.visible_containers())) == ([], [])
    state.take_back(container)
    state.take_back(sandbox)
    assert (list(state.visible_sandboxes()), list(state.visible_containers())) == ([sandbox], [container])
    assert (container.record.state, sandbox.record.state) == (ContainerState.EXITED, SandboxState.NOT_READY)
    row, container_row = await written(database)
    assert row is not None
    assert container_row is not None
    assert (container_row.record.state, row.record.state) == (ContainerState.REMOVING, SandboxState.REMOVING)


@pytest.mark.parametrize("before", [ContainerState.RUNNING, ContainerState.EXITED])
async def test_taking_back_changes_nothing_that_is_not_being_removed(state: State, before: ContainerState) -> None:
    container = a_container(a_sandbox(SandboxState.READY), before)
    state.take_back(container)
    state.take_back(container.sandbox)
    assert (container.record.state, container.sandbox.record.state) == (before, SandboxState.READY)


async def test_members_of_a_pod(state: State, database: Database) -> None:
    sandbox = a_sandbox(SandboxState.READY)
    container = a_container(sandbox, ContainerState.MAKING)
    await state.add(sandbox)
    await state.add(container)
    assert state.containers_of(sandbox) == [container]
    with pytest.raises(NotFoundError):
        state.get_container(CONTAINER_ID)  # clients do not see it yet
    await state.move(container, ContainerState.CREATED)
    assert state.get_container(CONTAINER_ID[:8]) is container
    await state.delete(container)
    assert state.containers_of(sandbox) == [container]  # for the event of its end
    state.forget(container)
    state.forget(container)
    assert state.containers_of(sandbox) == []
    await state.delete(sandbox)
    state.forget(sandbox)
    assert state.containers_of(sandbox) == []
    assert await written(database) == (None, None)
