"""Exec, attach and port-forward with the streams that the validation suite and crictl open."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from proto.runtime.v1 import cri_pb2
from tests.integration.agent.streams import arrives, exit_code, spdy
from tests.integration.conformance.support import Pod, exited
from tests.integration.streaming.spdy_client import SpdyClient
from tests.integration.streaming.test_port_forward import open_pair
from tests.support.agent import AgentProcess, wait_for
from tests.support.pods import sandbox_config, shared_pids
from tests.support.ports import free_port

PORT_FORWARD = ("portforward.k8s.io",)
PAGE = ("sh", "-c", "mkdir /www; echo main page > /www/index.html; exec httpd -f -h /www -p $PORT")


@pytest.fixture
def plain(agent: AgentProcess) -> Pod:
    """Processes shared, as where nothing is said."""
    config = sandbox_config(agent)
    shared_pids(config)
    return Pod.run(agent, config)


def _container(*command: str, **fields: object) -> cri_pb2.ContainerConfig:
    config = cri_pb2.ContainerConfig(
        metadata=cri_pb2.ContainerMetadata(name="main"), image=cri_pb2.ImageSpec(image="busybox"), command=command
    )
    for field, value in fields.items():
        setattr(config, field, value)
    return config


def _url(pod: Pod, call: str, container_id: str, **fields: object) -> str:
    request = getattr(cri_pb2, f"{call}Request")(container_id=container_id, **fields)
    return str(pod.agent.client.call(call, request).url)


async def test_exec_of_output_only(plain: Pod) -> None:
    container_id = plain.start(_container("top"))
    url = _url(plain, "Exec", container_id, cmd=["echo", "-n", "hello"], stdout=True, stderr=True)
    async with spdy(url, "stdout", "stderr") as (client, ids):
        assert exit_code(await client.status(ids["error"])) == 0
        assert await client.streams[ids["stdout"]].text() == "hello"
        assert await client.streams[ids["stderr"]].text() == ""


async def test_exec_on_a_terminal_whose_input_stays_open(plain: Pod) -> None:
    container_id = plain.start(_container("top"))
    url = _url(plain, "Exec", container_id, cmd=["echo", "-n", "hello"], stdin=True, stdout=True, tty=True)
    async with spdy(url, "stdin", "stdout", "resize") as (client, ids):
        assert exit_code(await client.status(ids["error"])) == 0
        assert "hello" in await client.streams[ids["stdout"]].text()


async def test_attach_to_a_shell_that_ends_with_its_input(plain: Pod) -> None:
    container_id = plain.start(_container("/bin/sh", stdin=True, stdin_once=True))
    url = _url(plain, "Attach", container_id, stdin=True, stdout=True, stderr=True)
    async with spdy(url, "stdin", "stdout", "stderr") as (client, ids):
        await client.send(ids["stdin"], b"echo -n hello\n")
        await arrives(client, ids["stdout"], b"hello")
        await client.send(ids["stdin"], b"", fin=True)
        assert exit_code(await client.status(ids["error"])) == 0
        assert await client.streams[ids["stdout"]].text() == "hello"
        assert await client.streams[ids["stderr"]].text() == ""
    assert exited(plain.agent, container_id).exit_code == 0


@pytest.fixture(params=["pod", "node"])
def serving(agent: AgentProcess, request: pytest.FixtureRequest) -> Iterator[tuple[Pod, int]]:
    """A pod, on its own network or on the node's, that serves a page."""
    config = sandbox_config(agent)
    on_node = request.param == "node"
    port = free_port() if on_node else 80
    if on_node:
        config.linux.security_context.namespace_options.network = cri_pb2.NODE
    config.port_mappings.add(container_port=port)
    pod = Pod.run(agent, config)
    container = _container(*PAGE)
    container.linux.security_context.namespace_options.CopyFrom(config.linux.security_context.namespace_options)
    container.envs.add(key="PORT", value=str(port).encode())
    container_id = pod.start(container)
    fetch = ("wget", "-qO-", f"http://127.0.0.1:{port}/")
    wait_for(lambda: agent.client.exec(container_id, *fetch).stdout == b"main page\n", what="the page")
    yield pod, port


async def test_port_forward_to_a_web_server(serving: tuple[Pod, int]) -> None:
    pod, port = serving
    request = cri_pb2.PortForwardRequest(pod_sandbox_id=pod.id)
    client = await SpdyClient.connect(str(pod.agent.client.call("PortForward", request).url), PORT_FORWARD)
    try:
        for number in range(2):
            data, error = await open_pair(client, port, number)
            client.send_now(data, b"GET / HTTP/1.0\r\n\r\n")
            answer = await client.streams[data].text()
            assert answer.startswith("HTTP/1.1 200")
            assert answer.endswith("main page\n")
            assert await client.streams[error].text() == ""
    finally:
        await client.close()
