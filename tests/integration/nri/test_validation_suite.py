"""What critest, the CRI validation suite, expects of NRI: each of its specs, with a plugin that subscribes as its own.

Its stub asks for the events that its plugin has methods for, and never for all. Where a spec waits two seconds for an
event that must not come, these tests cause another event and look at what came before it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import grpc
import pytest

from proto.nri.v1alpha1 import nri_pb2
from proto.runtime.v1 import cri_pb2
from tests.integration.nri.test_events import Held, Refusing
from tests.support.agent import AgentProcess, wait_for
from tests.support.nri import Acting, Recorder, connected
from tests.support.pods import container_config, run_container, sandbox_config

UNKNOWN = "nri-test-invalid-request-unknown-id"
SUBSCRIBED = (
    "RunPodSandbox",
    "StopPodSandbox",
    "RemovePodSandbox",
    "CreateContainer",
    "StartContainer",
    "StopContainer",
    "RemoveContainer",
)


class SuitePlugin(Recorder):
    """The suite's plugin: seven events, or those that are given; the time of each request is kept."""

    def __init__(
        self, agent: AgentProcess, name: str, index: str, acting: Acting, events: tuple[str, ...] = SUBSCRIBED
    ) -> None:
        super().__init__(agent.nri_socket, index, name, acting)
        self.times: list[float] = []
        self.mask = sum(1 << (number - 1) for name, number in _numbers() if name in events)

    def Configure(self, request: nri_pb2.ConfigureRequest) -> nri_pb2.ConfigureResponse:
        assert request.registration_timeout > 0
        assert request.request_timeout > 0
        return nri_pb2.ConfigureResponse(events=self.mask)

    def take(self, event: str, request: Any) -> Any:
        self.times.append(time.monotonic())
        return super().take(event, request)


def _numbers() -> Iterator[tuple[str, int]]:
    for name, number in nri_pb2.Event.items():
        yield "".join(word.capitalize() for word in name.split("_")), number


def plugged(agent: AgentProcess, name: str, index: str = "00", **acting: Any) -> AbstractContextManager[SuitePlugin]:
    return connected(SuitePlugin(agent, name, index, acting))


def listed_pods(agent: AgentProcess) -> dict[str, str]:
    """Names of pods by id."""
    pods = agent.client.call("ListPodSandbox", cri_pb2.ListPodSandboxRequest()).items
    return {pod.id: pod.metadata.name for pod in pods}


def listed_containers(agent: AgentProcess, sandbox_id: str) -> list[Any]:
    given = cri_pb2.ListContainersRequest(filter=cri_pb2.ContainerFilter(pod_sandbox_id=sandbox_id))
    return list(agent.client.call("ListContainers", given).containers)


def make(agent: AgentProcess, sandbox_id: str, sandbox: Any, name: str, *command: str) -> str:
    config = container_config(name, *(command or ("sleep", "1000")))
    return agent.client.create(sandbox_id, config, sandbox)


# pod sandbox lifecycle


def test_plugins_get_run_stop_and_remove_of_a_pod_in_this_order(agent: AgentProcess) -> None:
    with plugged(agent, "cri-test-nri-pod-lifecycle") as plugin:
        sandbox = sandbox_config(agent, "lifecycle")
        sandbox.metadata.namespace, sandbox.metadata.uid = "ns-1", "uid-1"
        sandbox_id = agent.client.run_sandbox(sandbox)
        agent.client.stop_sandbox(sandbox_id)
        agent.client.remove_sandbox(sandbox_id)
        assert plugin.told == [(name, sandbox_id) for name in ("RunPodSandbox", "StopPodSandbox", "RemovePodSandbox")]
    for _, request in plugin.requests:
        pod = request.pod
        assert (pod.id, pod.name, pod.namespace, pod.uid) == (sandbox_id, "lifecycle", "ns-1", "uid-1")


# container lifecycle


@pytest.mark.parametrize("fails", [False, True], ids=["is stopped", "ends with an error"])
def test_plugins_get_create_start_stop_and_remove_of_a_container(agent: AgentProcess, fails: bool) -> None:
    with plugged(agent, "cri-test-nri-ctr-lifecycle") as plugin:
        sandbox = sandbox_config(agent)
        sandbox_id = agent.client.run_sandbox(sandbox)
        plugin.told.clear()
        plugin.requests.clear()
        command = ("sh", "-c", "exit 1") if fails else ("sh", "-c", "trap 'exit 0' TERM; while :; do sleep 0.02; done")
        container_id = make(agent, sandbox_id, sandbox, "named", *command)
        agent.client.start(container_id)
        if fails:
            wait_for(lambda: agent.client.status(container_id).state == cri_pb2.CONTAINER_EXITED)
            assert agent.client.status(container_id).exit_code == 1
            wait_for(lambda: "StopContainer" in plugin.events_of(container_id))  # without any call that removes it
        else:
            agent.client.stop(container_id, 60)
        agent.client.remove(container_id)
        expected = ["CreateContainer", "StartContainer", "StopContainer", "RemoveContainer"]
        assert plugin.told == [(event, container_id) for event in expected]
        assert plugin.times == sorted(plugin.times)
    for _, request in plugin.requests:
        assert (request.container.name, request.container.pod_sandbox_id) == ("named", sandbox_id)
        assert (request.pod.id, request.pod.name) == (sandbox_id, sandbox.metadata.name)


# RunPodSandbox contract


def test_a_pod_is_not_seen_and_gets_no_containers_while_its_hook_is_in_progress(agent: AgentProcess) -> None:
    held, sandbox = Held(), sandbox_config(agent)
    with ThreadPoolExecutor() as pool, plugged(agent, "cri-test-nri-block-run", RunPodSandbox=held):
        running = pool.submit(agent.client.run_sandbox, sandbox)
        assert held.reached.wait(10)
        assert held.object_id not in listed_pods(agent)
        with pytest.raises(grpc.RpcError, match="not found"):
            agent.client.sandbox_status(held.object_id)
        with pytest.raises(grpc.RpcError):
            make(agent, held.object_id, sandbox, "while-blocked")
        assert not running.done()
        held.release.set()
        sandbox_id = running.result(10)
        assert sandbox_id == held.object_id
        assert agent.client.sandbox_status(sandbox_id).state == cri_pb2.SANDBOX_READY
        make(agent, sandbox_id, sandbox, "after-hook")


def test_a_pod_whose_hook_fails_leaves_nothing_and_is_made_by_the_next_call(agent: AgentProcess) -> None:
    with plugged(agent, "cri-test-nri-run-error", RunPodSandbox=Refusing()) as plugin:
        sandbox = sandbox_config(agent, "retried")
        with pytest.raises(grpc.RpcError, match="not today"):
            agent.client.run_sandbox(sandbox)
        attempted = next(object_id for event, object_id in plugin.told if event == "RunPodSandbox")
        pods = listed_pods(agent)
        assert attempted not in pods
        assert "retried" not in pods.values()
        sandbox_id = agent.client.run_sandbox(sandbox)
        assert agent.client.sandbox_status(sandbox_id).state == cri_pb2.SANDBOX_READY


# StopPodSandbox contract


def test_containers_have_ended_and_the_pod_can_be_looked_at_while_the_stop_hook_is_in_progress(
    agent: AgentProcess,
) -> None:
    held = Held()
    with ThreadPoolExecutor() as pool, plugged(agent, "cri-test-nri-stop-state", StopPodSandbox=held):
        sandbox_id, _ = run_container(agent, "sleep", "1000")
        stopping = pool.submit(agent.client.stop_sandbox, sandbox_id)
        assert held.reached.wait(10)
        containers = listed_containers(agent, sandbox_id)
        assert [one.state for one in containers] == [cri_pb2.CONTAINER_EXITED]
        assert agent.client.sandbox_status(sandbox_id).id == sandbox_id
        held.release.set()
        stopping.result(10)
        agent.client.remove_sandbox(sandbox_id)


def test_a_second_stop_causes_no_event_and_a_stopped_pod_gets_no_containers(agent: AgentProcess) -> None:
    with plugged(agent, "cri-test-nri-stop-idempotent") as plugin:
        sandbox = sandbox_config(agent)
        sandbox_id = agent.client.run_sandbox(sandbox)
        agent.client.stop_sandbox(sandbox_id)
        assert plugin.events_of(sandbox_id) == ["RunPodSandbox", "StopPodSandbox"]
        agent.client.stop_sandbox(sandbox_id)
        with pytest.raises(grpc.RpcError):
            make(agent, sandbox_id, sandbox, "reuse-after-stop")
        agent.client.run_sandbox(sandbox_config(agent))  # whose event comes after all of those
        assert plugin.events_of(sandbox_id) == ["RunPodSandbox", "StopPodSandbox"]
        assert [event for event, _ in plugin.told].count("CreateContainer") == 0


# CreateContainer contract


def test_a_container_is_not_seen_while_its_hook_is_in_progress(agent: AgentProcess) -> None:
    held, sandbox = Held(), sandbox_config(agent)
    with ThreadPoolExecutor() as pool, plugged(agent, "cri-test-nri-create", CreateContainer=held):
        sandbox_id = agent.client.run_sandbox(sandbox)
        creating = pool.submit(make, agent, sandbox_id, sandbox, "block-create")
        assert held.reached.wait(10)
        assert listed_containers(agent, sandbox_id) == []
        with pytest.raises(grpc.RpcError, match="not found"):
            agent.client.status(held.object_id)
        held.release.set()
        container_id = creating.result(10)
        assert container_id == held.object_id
        assert agent.client.status(container_id).state == cri_pb2.CONTAINER_CREATED


def test_a_container_whose_hook_fails_leaves_nothing_and_another_one_lives_as_usual(agent: AgentProcess) -> None:
    with plugged(agent, "cri-test-nri-create", CreateContainer=Refusing()) as plugin:
        sandbox = sandbox_config(agent)
        sandbox_id = agent.client.run_sandbox(sandbox)
        with pytest.raises(grpc.RpcError, match="not today"):
            make(agent, sandbox_id, sandbox, "create-error")
        failed = next(object_id for event, object_id in plugin.told if event == "CreateContainer")
        assert listed_containers(agent, sandbox_id) == []
        for name in ("create-retry", "create-error"):
            container_id = make(agent, sandbox_id, sandbox, name)
            agent.client.start(container_id)
            agent.client.stop(container_id)
            agent.client.remove(container_id)
        assert plugin.events_of(failed) == ["CreateContainer", "StopContainer", "RemoveContainer"]


# plugin synchronization


def test_a_late_plugin_gets_what_is_there_and_then_events_of_what_comes(agent: AgentProcess) -> None:
    with plugged(agent, "cri-test-nri-sync-first"):
        sandbox = sandbox_config(agent)
        sandbox_id = agent.client.run_sandbox(sandbox)
        first = make(agent, sandbox_id, sandbox, "first")
        agent.client.start(first)
        with plugged(agent, "cri-test-nri-sync-second", "10") as second:
            assert sandbox_id in [pod.id for pod in second.pods]
            assert first in [container.id for container in second.containers]
            later = make(agent, sandbox_id, sandbox, "later")
            agent.client.start(later)
            assert second.events_of(later) == ["CreateContainer", "StartContainer"]


def test_no_container_is_lost_that_is_made_around_the_synchronisation(agent: AgentProcess) -> None:
    reached, release = threading.Event(), threading.Event()

    def hold(_request: Any) -> None:
        reached.set()
        release.wait(4)

    sandbox = sandbox_config(agent)

    def live(name: str) -> str:
        container_id = make(agent, sandbox_id, sandbox, name)
        agent.client.start(container_id)
        return container_id

    second = SuitePlugin(agent, "cri-test-nri-sync3-second", "10", {"Synchronize": hold})
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor())
        stack.enter_context(plugged(agent, "cri-test-nri-sync-first"))
        sandbox_id = agent.client.run_sandbox(sandbox)
        ids = [live(f"before{number}") for number in range(2)]
        threading.Thread(target=second.run, daemon=True).start()
        stack.callback(second.close)
        assert reached.wait(10)
        during = [pool.submit(live, f"during{number}") for number in range(3)]
        wait_for(lambda: all(call.running() for call in during))
        release.set()
        assert second.synchronised.wait(10)
        ids += [call.result(20) for call in during]
        ids += [live(f"after{number}") for number in range(2)]
        known = [container.id for container in second.containers]
        known += [object_id for event, object_id in second.told if event == "CreateContainer"]
        assert sorted(known) == sorted(ids)  # each exactly once
        for container_id in ids[2:]:
            assert second.events_of(container_id)[-1] == "StartContainer"


# invalid CRI requests


def invalid_container(agent: AgentProcess, sandbox_id: str, sandbox: Any) -> None:
    config = container_config("x", "sleep", "1")
    config.ClearField("metadata")
    agent.client.create(sandbox_id, config, sandbox)


def unknown_container(agent: AgentProcess) -> None:
    with pytest.raises(grpc.RpcError):
        agent.client.start(UNKNOWN)
    agent.client.stop(UNKNOWN)
    agent.client.remove(UNKNOWN)


def unknown_pod(agent: AgentProcess) -> None:
    agent.client.stop_sandbox(UNKNOWN)
    agent.client.remove_sandbox(UNKNOWN)


Attempt = Callable[[AgentProcess, str, Any], Any]
INVALID: dict[str, tuple[bool, Attempt]] = {
    "a container in no pod": (True, lambda agent, _, sandbox: make(agent, UNKNOWN, sandbox, "x")),
    "a container without metadata": (True, invalid_container),
    "a pod without metadata": (True, lambda agent, *_: agent.client.run_sandbox(cri_pb2.PodSandboxConfig())),
    "a pod that is there": (False, lambda agent, _, sandbox: agent.client.run_sandbox(sandbox)),
    "an unknown container": (False, lambda agent, *_: unknown_container(agent)),
    "an unknown pod": (False, lambda agent, *_: unknown_pod(agent)),
}


@pytest.mark.parametrize("what", INVALID)
def test_plugins_do_not_get_invalid_requests(agent: AgentProcess, what: str) -> None:
    fails, attempt = INVALID[what]
    with plugged(agent, "cri-test-nri-invalid-req") as plugin:
        sandbox = sandbox_config(agent)
        sandbox_id = agent.client.run_sandbox(sandbox)
        if fails:
            with pytest.raises(grpc.RpcError):
                attempt(agent, sandbox_id, sandbox)
        else:
            assert attempt(agent, sandbox_id, sandbox) in (None, sandbox_id)
        agent.client.stop_sandbox(sandbox_id)  # whose event comes after all that the request could have caused
        assert plugin.told == [("RunPodSandbox", sandbox_id), ("StopPodSandbox", sandbox_id)]


# multi-plugin ordering


def test_plugins_are_asked_in_the_order_of_their_indices_and_the_pod_waits_for_the_last(agent: AgentProcess) -> None:
    order: list[str] = []
    held, sandbox = Held(), sandbox_config(agent)

    def low(_request: Any) -> None:
        order.append("low")

    def high(request: Any) -> None:
        order.append("high enters")
        held(request)
        order.append("high leaves")

    with ThreadPoolExecutor() as pool, plugged(agent, "cri-test-nri-multi-order-high", "11", RunPodSandbox=high):
        with plugged(agent, "cri-test-nri-multi-order-low", "10", RunPodSandbox=low):
            running = pool.submit(agent.client.run_sandbox, sandbox)
            assert held.reached.wait(10)
            assert order == ["low", "high enters"]
            assert not running.done()
            assert held.object_id not in listed_pods(agent)
            with pytest.raises(grpc.RpcError, match="not found"):
                agent.client.sandbox_status(held.object_id)
            held.release.set()
            assert running.result(10) == held.object_id
            assert order == ["low", "high enters", "high leaves"]
            assert agent.client.sandbox_status(held.object_id).state == cri_pb2.SANDBOX_READY
