"""A command with a terminal delays only itself, whichever root its container has made."""

from __future__ import annotations

import asyncio
from pathlib import Path

from proto.runtime.v1 import cri_pb2
from tests.integration.agent.streams import Running, exit_code, resize, run, spdy
from tests.support.agent import SOON, AgentProcess, wait_for
from tests.support.pods import container_config, sandbox_config

SECONDS = SOON


def with_the_node_s_root(agent: AgentProcess) -> Running:
    """A container with host PID whose first process has the node's own mount as its root."""
    sandbox = sandbox_config(agent)
    sandbox.linux.security_context.privileged = True
    config = container_config("main", "chroot", f"/proc/{agent.pid()}/root", "sleep", "1000")
    config.linux.security_context.privileged = True
    for context in (sandbox.linux.security_context, config.linux.security_context):
        context.namespace_options.pid = cri_pb2.NODE
    sandbox_id = agent.client.run_sandbox(sandbox, "crun")
    container_id = agent.client.create(sandbox_id, config, sandbox)
    agent.client.start(container_id)
    running = Running(agent, sandbox_id, container_id)
    there = Path("/").stat()

    def has_it() -> bool:
        [pid] = running.processes()
        root = Path(f"/proc/{pid}/root").stat()
        return (root.st_dev, root.st_ino) == (there.st_dev, there.st_ino)

    wait_for(has_it, what="the node's root")
    return running


async def size_of_terminal(container: Running, *command: str) -> str:
    url = container.exec_url(*command, streams="stdout", tty=True)
    async with spdy(url, "stdout", "resize") as (client, ids):
        resize(client, ids["resize"], 80, 24)
        assert exit_code(await client.status(ids["error"])) == 0
        return await client.streams[ids["stdout"]].text()


async def test_programs_of_the_node_are_not_delayed(own_agent: AgentProcess) -> None:
    container = await asyncio.to_thread(with_the_node_s_root, own_agent)
    try:
        async with asyncio.timeout(SECONDS):
            assert await size_of_terminal(container, "stty", "size") == "24 80\r\n"
    except TimeoutError:
        own_agent.kill()  # otherwise nothing can be executed any more, also not by this test
        raise
    assert own_agent.tracebacks() == []


async def test_programs_of_2_gib_can_be_executed(quiet_log: AgentProcess) -> None:
    container = run(quiet_log, handler="crun")
    script = "cp /bin/busybox /stty && truncate -s 3G /stty"
    request = cri_pb2.ExecSyncRequest(container_id=container.id, cmd=["sh", "-c", script])
    assert quiet_log.client.call("ExecSync", request).exit_code == 0
    assert await size_of_terminal(container, "/stty", "size") == "24 80\r\n"


async def test_no_fanotify_mark_is_left(quiet_log: AgentProcess) -> None:
    container = run(quiet_log, handler="crun")
    for _ in range(5):
        await size_of_terminal(container, "stty", "size")
    files = Path(f"/proc/{quiet_log.pid()}/fd")
    wait_for(lambda: not [file for file in files.iterdir() if "fanotify" in str(file.readlink())], what="no fanotify")
