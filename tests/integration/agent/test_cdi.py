"""CDI devices through the CRI: described where drivers do it, seen from the container and from the host."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from proto.runtime.v1 import cri_pb2
from tests.integration.conformance.support import SLEEP, Pod, refused
from tests.support.agent import AgentProcess
from tests.support.pods import container_config, sandbox_config

FOLDER = Path("/var/run/cdi")

DESCRIPTION = """
cdiVersion: 0.8.0
kind: {kind}
containerEdits:
  env: [DRIVER=loaded]
devices:
- name: log
  containerEdits:
    env: [DEVICE=log]
    additionalGids: [4711]
    deviceNodes:
    - {{path: /dev/vendor/log, hostPath: /dev/kmsg, permissions: w}}
    mounts:
    - {{hostPath: {library}, containerPath: /opt/driver, options: [ro, nosuid]}}
    hooks:
    - {{hookName: createRuntime, path: {hook}, args: [hook, made]}}
- name: network
  containerEdits:
    netDevices: [{{hostInterfaceName: eth9, name: eth1}}]
"""


@pytest.fixture
def kind(tmp_path: Path) -> Iterator[str]:
    """The kind of described devices: a driver's library, its hook and its description are there."""
    library = tmp_path / "library"
    library.mkdir()
    (library / "driver.so").write_text("driver\n")
    hook = tmp_path / "hook"
    hook.write_text(f"#!/bin/sh\ncat > {tmp_path}/$1\n")
    hook.chmod(0o755)
    kind = f"pkt{secrets.token_hex(3)}.example/device"
    new = not FOLDER.exists()
    FOLDER.mkdir(parents=True, exist_ok=True)
    file = FOLDER / f"{kind.partition('.')[0]}.yaml"
    file.write_text(DESCRIPTION.format(kind=kind, library=library, hook=hook))
    yield kind
    file.unlink()
    if new:
        FOLDER.rmdir()


@pytest.mark.parametrize("asked", ["field", "annotation", "both"])
@pytest.mark.parametrize("handler", ["crun", "runc"])
def test_device_from_inside_and_outside(
    agent: AgentProcess, handler: str, asked: str, kind: str, tmp_path: Path
) -> None:
    sandbox = sandbox_config(agent)
    pod = Pod(agent, sandbox, agent.client.run_sandbox(sandbox, handler))
    config = container_config("main", *SLEEP)
    config.linux.security_context.run_as_user.value = 1000
    if asked != "annotation":
        config.CDI_devices.add(name=f"{kind}=log")
    if asked != "field":
        config.annotations["cdi.k8s.io/plugin"] = f"{kind}=log"
    container_id = pod.start(config)
    client = agent.client
    assert client.output(container_id, "sh", "-c", "echo $DRIVER $DEVICE").split() == ["loaded", "log"]
    assert "4711" in client.output(container_id, "id", "-G").split()
    assert client.output(container_id, "stat", "-c", "%F %u %t:%T", "/dev/vendor/log").split() == [
        *("character", "special", "file"),
        *("1000", "1:b"),
    ]
    assert client.output(container_id, "cat", "/opt/driver/driver.so") == "driver\n"
    assert client.exec(container_id, "touch", "/opt/driver/new").exit_code != 0
    opened = client.exec(container_id, "sh", "-c", ": > /dev/vendor/log && ! head -c 1 /dev/vendor/log")
    assert opened.exit_code == 0, opened.stderr
    assert json.loads((tmp_path / "made").read_text())["id"] == container_id


def test_devices_that_cannot_be_given_are_refused(agent: AgentProcess, kind: str) -> None:
    pod = Pod.run(agent, sandbox_config(agent))
    for name, code, words in (
        (f"{kind}=network", grpc.StatusCode.UNIMPLEMENTED, "netDevices"),
        (f"{kind}=other", grpc.StatusCode.INVALID_ARGUMENT, "not described by any file"),
        ("log", grpc.StatusCode.INVALID_ARGUMENT, "vendor.com/class=name"),
    ):
        config = container_config("main", *SLEEP)
        config.CDI_devices.add(name=name)
        with refused(code, words):
            pod.create(config)
    assert not agent.client.call("ListContainers", cri_pb2.ListContainersRequest()).containers
