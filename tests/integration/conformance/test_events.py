"""GetContainerEvents."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from proto.runtime.v1 import cri_pb2
from runtime.state.events import QUEUE_LIMIT
from tests.integration.conformance.support import Pod, exited
from tests.support.agent import AgentProcess, wait_for
from tests.support.pods import container_config, sandbox_config

CREATED = cri_pb2.CONTAINER_CREATED_EVENT
STARTED = cri_pb2.CONTAINER_STARTED_EVENT
STOPPED = cri_pb2.CONTAINER_STOPPED_EVENT
DELETED = cri_pb2.CONTAINER_DELETED_EVENT


class Watcher:
    """One subscriber."""

    def __init__(self, agent: AgentProcess) -> None:
        self.events: list[cri_pb2.ContainerEventResponse] = []
        self._stream: Any = agent.client.stream("GetContainerEvents", cri_pb2.GetEventsRequest(), timeout=None)
        self._thread = threading.Thread(target=self._read)
        self._thread.start()
        # The call says nothing before its first event, so there must be one to know that it listens.
        probe = sandbox_config(agent)
        while not self.events:
            sandbox_id = agent.client.run_sandbox(probe)
            agent.client.remove_sandbox(sandbox_id)
        self.probed = sandbox_id

    def _read(self) -> None:
        try:
            for event in self._stream:
                self.events.append(event)
        except grpc.RpcError as error:
            assert error.code() is grpc.StatusCode.CANCELLED, error

    def wait(self, kind: cri_pb2.ContainerEventType, subject: str) -> None:
        wait_for(
            lambda: any((e.container_event_type, e.container_id) == (kind, subject) for e in self.events),
            what=f"event {kind} of {subject}",
        )

    def of(self, subject: str) -> list[cri_pb2.ContainerEventResponse]:
        return [event for event in self.events if event.container_id == subject]

    def end(self) -> None:
        self._stream.cancel()
        self._thread.join()


@pytest.fixture
def watchers(agent: AgentProcess) -> Iterator[list[Watcher]]:
    made = [Watcher(agent) for _ in range(3)]
    for watcher in made:
        watcher.wait(DELETED, made[-1].probed)
        watcher.events.clear()
    yield made
    for watcher in made:
        watcher.end()


def test_every_subscriber_sees_everything_in_order(agent: AgentProcess, watchers: list[Watcher]) -> None:
    pod = Pod.run(agent, sandbox_config(agent))
    container_id = pod.start(container_config("main", "sh", "-c", "exit 3"))
    exited(agent, container_id)
    agent.client.remove(container_id)
    agent.client.stop_sandbox(pod.id)
    agent.client.remove_sandbox(pod.id)
    for watcher in watchers:
        watcher.wait(DELETED, pod.id)
        seen = [(event.container_id, event.container_event_type) for event in watcher.events]
        assert seen == [
            (pod.id, CREATED),
            (pod.id, STARTED),
            (container_id, CREATED),
            (container_id, STARTED),
            (container_id, STOPPED),
            (container_id, DELETED),
            (pod.id, STOPPED),
            (pod.id, DELETED),
        ]
        times = [event.created_at for event in watcher.events]
        assert times == sorted(times)


def test_events_carry_the_statuses_of_their_moment(agent: AgentProcess, watchers: list[Watcher]) -> None:
    watcher = watchers[0]
    pod = Pod.run(agent, sandbox_config(agent, labels={"a": "b"}))
    address = agent.client.sandbox_status(pod.id).network.ip
    first = pod.sleeping("first")
    second = pod.start(container_config("second", "sh", "-c", "exit 3"))
    exited(agent, second)
    agent.client.stop_sandbox(pod.id)
    watcher.wait(STOPPED, pod.id)
    (_, sandbox_started, sandbox_stopped) = watcher.of(pod.id)
    assert sandbox_started.pod_sandbox_status.network.ip == address
    assert dict(sandbox_started.pod_sandbox_status.labels) == {"a": "b"}
    assert sandbox_stopped.pod_sandbox_status.state == cri_pb2.SANDBOX_NOTREADY
    created, started, stopped = watcher.of(second)
    for event in (created, started, stopped):
        assert event.pod_sandbox_status.id == pod.id
        assert [status.id for status in event.containers_statuses] == [first, second]
        assert event.containers_statuses[0].state == cri_pb2.CONTAINER_RUNNING
    assert created.containers_statuses[1].state == cri_pb2.CONTAINER_CREATED
    ended = stopped.containers_statuses[1]
    assert (ended.state, ended.exit_code, ended.reason) == (cri_pb2.CONTAINER_EXITED, 3, "Error")
    assert sandbox_stopped.containers_statuses[0].exit_code == 137
    agent.client.remove(second)
    watcher.wait(DELETED, second)
    assert [status.id for status in watcher.of(second)[-1].containers_statuses] == [first]
    agent.client.remove_sandbox(pod.id)
    watcher.wait(DELETED, pod.id)
    assert not watcher.of(pod.id)[-1].containers_statuses
    assert watcher.of(pod.id)[-1].pod_sandbox_status.metadata == pod.config.metadata


def test_failed_start_is_an_end(agent: AgentProcess, watchers: list[Watcher]) -> None:
    pod = Pod.run(agent, sandbox_config(agent))
    container_id = pod.create(container_config("main", "/no/such"))
    with pytest.raises(grpc.RpcError):
        agent.client.start(container_id)
    watchers[0].wait(STOPPED, container_id)
    assert [event.container_event_type for event in watchers[0].of(container_id)] == [CREATED, STOPPED]


def test_subscriber_that_does_not_read_is_closed_so_that_it_lists_again(agent: AgentProcess) -> None:
    config = sandbox_config(agent, annotations={"large": "x" * 20_000})
    config.linux.security_context.namespace_options.network = cri_pb2.NODE
    config.linux.security_context.namespace_options.ipc = cri_pb2.NODE
    stream: Any = agent.client.stream("GetContainerEvents", cri_pb2.GetEventsRequest(), timeout=None)
    heard = threading.Thread(target=next, args=(stream,))
    heard.start()
    while heard.is_alive():  # until the subscription is known to be there
        agent.client.remove_sandbox(agent.client.run_sandbox(config))
    quick = Watcher(agent)
    try:
        for _ in range(QUEUE_LIMIT // 4 + 40):  # four events each
            agent.client.remove_sandbox(agent.client.run_sandbox(config))
        with pytest.raises(grpc.RpcError) as raised:
            for _ in stream:
                pass
        assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        wait_for(lambda: len(quick.events) >= QUEUE_LIMIT, what="all events for the one who reads")
    finally:
        quick.end()
