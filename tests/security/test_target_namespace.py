"""A container that targets another one joins its PID namespace, never that of a process that reuses its pid."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from host.processes import open_namespace, start_time
from proto.runtime.v1 import cri_pb2
from tests.integration.agent.hardening import init_pid, like_kubelets
from tests.security.conftest import pod_config
from tests.support.agent import AgentProcess


def namespaces_held(agent: AgentProcess) -> int:
    links = [str(entry.readlink()) for entry in Path(f"/proc/{agent.pid()}/fd").iterdir() if entry.is_symlink()]
    return sum(link.startswith("pid:[") for link in links)


def test_the_runtime_gets_the_namespace_by_a_descriptor(
    quiet_log: AgentProcess, handler: str, user_namespace: bool
) -> None:
    """The agent checks which process the descriptor belongs to, and closes it once the container exists."""
    client = quiet_log.client
    sandbox = pod_config(quiet_log, user_namespace=user_namespace)
    sandbox.linux.security_context.namespace_options.pid = cri_pb2.CONTAINER
    sandbox_id = client.run_sandbox(sandbox, handler)
    before = namespaces_held(quiet_log)
    target, debugger = like_kubelets("target"), like_kubelets("debugger")
    target.linux.security_context.namespace_options.CopyFrom(sandbox.linux.security_context.namespace_options)
    client.start(target_id := client.create(sandbox_id, target, sandbox))
    debugger.linux.security_context.namespace_options.CopyFrom(sandbox.linux.security_context.namespace_options)
    debugger.linux.security_context.namespace_options.pid = cri_pb2.TARGET
    debugger.linux.security_context.namespace_options.target_id = target_id
    client.start(debugger_id := client.create(sandbox_id, debugger, sandbox))
    joined = {Path(f"/proc/{init_pid(quiet_log, one)}/ns/pid").readlink() for one in (target_id, debugger_id)}
    assert len(joined) == 1
    spec = json.loads((quiet_log.run / "containers" / debugger_id / "config.json").read_text())
    [path] = [namespace["path"] for namespace in spec["linux"]["namespaces"] if namespace["type"] == "pid"]
    assert path.startswith(f"/proc/{quiet_log.pid()}/fd/")
    assert namespaces_held(quiet_log) == before


def test_the_namespace_of_another_process_with_the_pid_is_not_opened() -> None:
    with subprocess.Popen(["sleep", "1000"]) as process:
        started = start_time(process.pid)
        assert started is not None
        assert open_namespace(process.pid, started + 1, "pid") is None
        descriptor = open_namespace(process.pid, started, "pid")
        assert descriptor is not None
        assert os.fstat(descriptor).st_ino == Path(f"/proc/{process.pid}/ns/pid").stat().st_ino
        os.close(descriptor)
        process.kill()
    assert open_namespace(process.pid, started, "pid") is None
