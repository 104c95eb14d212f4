"""GetContainerEvents under load: nothing lost and nothing out of order, and a bound for those who do not read."""

from __future__ import annotations

import os
import re
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from proto.runtime.v1 import cri_pb2
from tests.support.agent import AgentProcess, running_agent, wait_for
from tests.support.cri import CriClient
from tests.support.pods import container_config, sandbox_config

CYCLES = int(os.environ.get("PODKEEL_TEST_CYCLES", "300"))
CLIENTS = 3
KINDS = [
    cri_pb2.CONTAINER_CREATED_EVENT,
    cri_pb2.CONTAINER_STARTED_EVENT,
    cri_pb2.CONTAINER_STOPPED_EVENT,
    cri_pb2.CONTAINER_DELETED_EVENT,
]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, busybox: Path) -> Iterator[AgentProcess]:
    options = '[metrics]\naddress = "127.0.0.1:0"\n'
    with running_agent(tmp_path_factory.mktemp("events"), busybox, options=options) as running:
        yield running


@pytest.fixture
def agent(served: AgentProcess) -> Iterator[AgentProcess]:
    yield served
    wait_for(lambda: metric(served, "podkeel_event_subscribers") == 0, what="the end of the subscriptions")


def metric(agent: AgentProcess, name: str) -> int:
    url = re.findall(r"http://127\.0\.0\.1:\d+/metrics", agent.log.read_text())[-1]
    with urllib.request.urlopen(url, timeout=20) as answer:
        return int(float(re.findall(rf"^{name} (\S+)", answer.read().decode(), re.MULTILINE)[0]))


class Subscriber:
    """A separate connection that asks for events; ``read`` receives them, in a thread, until the stream ends."""

    def __init__(self, agent: AgentProcess) -> None:
        before = metric(agent, "podkeel_event_subscribers")
        self.client = CriClient(agent.address)
        self.stream: Any = self.client.stream("GetContainerEvents", cri_pb2.GetEventsRequest(), timeout=None)
        self.events: list[tuple[str, int, int]] = []
        self.end: grpc.RpcError | None = None
        self.reading = threading.Thread(target=self._read)
        wait_for(lambda: metric(agent, "podkeel_event_subscribers") == before + 1, what="the subscription")

    def read(self) -> None:
        self.reading.start()

    def _read(self) -> None:
        try:
            for event in self.stream:
                self.events.append((event.container_id, event.container_event_type, event.created_at))
        except grpc.RpcError as error:
            self.end = error

    def close(self) -> None:
        self.stream.cancel()
        if self.reading.ident is not None:
            self.reading.join()
        self.client.close()


def cycles(agent: AgentProcess, count: int, **sandbox_fields: Any) -> list[str]:
    """Make, start and remove ``count`` containers of one pod, several at once; the ids."""
    sandbox = sandbox_config(agent, **sandbox_fields)
    sandbox_id = agent.client.run_sandbox(sandbox)

    def cycle(number: int) -> str:
        container_id = agent.client.create(sandbox_id, container_config(f"c{number}", "true"), sandbox)
        agent.client.start(container_id)
        agent.client.remove(container_id)
        return container_id

    with ThreadPoolExecutor(CLIENTS) as pool:
        ids = list(pool.map(cycle, range(count)))
    agent.client.remove_sandbox(sandbox_id)
    return [*ids, sandbox_id]


def test_three_readers_get_every_event_in_the_same_order(agent: AgentProcess) -> None:
    subscribers = [Subscriber(agent) for _ in range(3)]
    try:
        for subscriber in subscribers:
            subscriber.read()
        ids = cycles(agent, CYCLES)
        for subscriber in subscribers:
            wait_for(lambda s=subscriber: len(s.events) >= 4 * len(ids), 60, "the last event")
            by_object: dict[str, list[int]] = {}
            for object_id, kind, _ in subscriber.events:
                by_object.setdefault(object_id, []).append(kind)
            assert by_object == dict.fromkeys(ids, KINDS)
            times = [moment for _, _, moment in subscriber.events]
            assert times == sorted(times)
            assert subscriber.events == subscribers[0].events
    finally:
        for subscriber in subscribers:
            subscriber.close()


def test_a_client_that_does_not_read_is_closed_with_the_reason_and_others_continue(agent: AgentProcess) -> None:
    reader, stalled = Subscriber(agent), Subscriber(agent)
    dropped = metric(agent, "podkeel_event_subscribers_dropped_total")
    try:
        reader.read()
        # Kubelet's annotations can be large: so the queue is bounded in bytes too, and is full sooner.
        ids = cycles(agent, 25, annotations={"note": "x" * 200_000})
        wait_for(lambda: len(reader.events) >= 4 * len(ids), 60, "the last event")
        assert {object_id for object_id, _, _ in reader.events} == set(ids)
        wait_for(lambda: metric(agent, "podkeel_event_subscribers") == 1, what="the end of the stalled subscription")
        assert metric(agent, "podkeel_event_subscribers_dropped_total") == dropped + 1
        stalled.read()
        wait_for(lambda: stalled.end is not None, what="the end of the stalled stream")
        assert stalled.end is not None
        assert stalled.end.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "list, and subscribe again" in str(stalled.end.details())
        assert stalled.events == reader.events[: len(stalled.events)]
        assert reader.end is None
    finally:
        reader.close()
        stalled.close()


def test_the_agents_end_ends_the_streams(agent: AgentProcess) -> None:
    subscriber = Subscriber(agent)
    subscriber.read()
    agent.stop()
    try:
        wait_for(lambda: not subscriber.reading.is_alive(), what="the end of the stream")
    finally:
        subscriber.close()
        agent.start()
