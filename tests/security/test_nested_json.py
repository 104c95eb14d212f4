"""JSON with thousands of nested levels is refused wherever it is read: no internal error, no traceback.

Tests of manifests, configs and registry answers are in test_image_documents.py and test_registry_answers.py.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from proto.runtime.v1 import cri_pb2
from tests.integration.agent.refusals import refused
from tests.support.agent import AgentProcess, running_agent, wait_for
from tests.support.cni_plugins import PluginFolders, result
from tests.support.pods import container_config, remove_all_pods, sandbox_config
from tests.support.scripted_registry import Answer, run_scripted_registry

FOLDER = Path("/var/run/cdi")
LIST = "[" * 3000 + "]" * 3000
OBJECT = '{"a":' * 3000 + "1" + "}" * 3000
BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))

CDI_FILES = {
    "list.json": f'{{"cdiVersion": "0.6.0", "kind": "KIND", "devices": {LIST}}}',
    "object.json": f'{{"cdiVersion": "0.6.0", "kind": "KIND", "devices": [], "annotations": {OBJECT}}}',
    "list.yaml": f"kind: KIND\ndevices: {LIST}\n",
    "object.yaml": f"kind: KIND\ndevices: {OBJECT}\n",
    "indented.yaml": "kind: KIND\n" + "".join(f"{' ' * depth}a:\n" for depth in range(1000)),
    "bomb.yaml": f"kind: KIND\n{BOMB}devices: *a39\n",
    "numbers.json": '{"cdiVersion": "0.6.0", "kind": "KIND", "devices": [{"name": "x", "containerEdits": '
    '{"deviceNodes": [{"path": "/dev/x", "type": "c", "major": 99999999999999999999, "minor": 1}]}}]}',
}


@pytest.mark.parametrize("name", CDI_FILES)
def test_cdi_descriptions(quiet_log: AgentProcess, name: str) -> None:
    agent = quiet_log
    kind = f"pkt{secrets.token_hex(3)}.example/device"
    new = not FOLDER.exists()
    FOLDER.mkdir(parents=True, exist_ok=True)
    file = FOLDER / f"{kind.partition('.')[0]}-{name}"
    try:
        file.write_text(CDI_FILES[name].replace("KIND", kind))
        sandbox = sandbox_config(agent)
        sandbox_id = agent.client.run_sandbox(sandbox)
        config = container_config("main", "true")
        config.CDI_devices.add(name=f"{kind}=x")
        create = partial(agent.client.create, sandbox_id, config, sandbox)
        refused("INVALID_ARGUMENT", f"{kind}=x", file.name, call=create)
    finally:
        file.unlink()
        if new:
            FOLDER.rmdir()


SECCOMP_PROFILES = {
    "list": f'{{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": {LIST}}}',
    "object": f'{{"defaultAction": "SCMP_ACT_ALLOW", "more": {OBJECT}}}',
    "number": '{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_ERRNO", '
    '"args": [{"index": 1, "value": 99999999999999999999, "op": "SCMP_CMP_EQ"}]}]}',
    "negative": '{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_ERRNO", '
    '"errnoRet": -1}]}',
}


@pytest.mark.parametrize("name", SECCOMP_PROFILES)
def test_seccomp_profiles(quiet_log: AgentProcess, tmp_path: Path, name: str) -> None:
    agent = quiet_log
    profile = tmp_path / "profile.json"
    profile.write_text(SECCOMP_PROFILES[name])
    sandbox = sandbox_config(agent)
    sandbox_id = agent.client.run_sandbox(sandbox)
    config = container_config("main", "true")
    context = config.linux.security_context.seccomp
    context.profile_type = cri_pb2.SecurityProfile.Localhost
    context.localhost_ref = str(profile)
    create = partial(agent.client.create, sandbox_id, config, sandbox)
    refused("INVALID_ARGUMENT", str(profile), call=create)


@pytest.fixture
def surrounded(tmp_path: Path, busybox: Path) -> Iterator[tuple[AgentProcess, PluginFolders]]:
    """An agent whose OCI runtime, CNI plugins and credentials file all return nested JSON."""
    (tmp_path / "cni").mkdir()
    folders = PluginFolders(tmp_path / "cni")
    nested = tmp_path / "nested.json"
    nested.write_text(f'{{"mountOptions": {LIST}, "linux": {OBJECT}}}')
    runtime = tmp_path / "runtime"
    runtime.write_text(f'#!/bin/sh\n[ "$1" = features ] && exec cat {nested}\nexec crun "$@"\n')
    runtime.chmod(0o755)
    credentials = tmp_path / "credentials.json"
    credentials.write_text(f'{{"auths": {OBJECT}}}')
    options = f"""
[network]
mode = "cni"
cni_config_dir = "{folders.configurations}"
cni_bin_dirs = ["{folders.programs}"]

[images]
credentials_file = "{credentials}"

[runtime.handlers.nested]
path = "{runtime}"
"""
    with running_agent(tmp_path, busybox, options=options) as agent:
        yield agent, folders
        remove_all_pods(agent.client)
        assert agent.tracebacks(0) == []


def test_runtimes_plugins_and_credentials(surrounded: tuple[AgentProcess, PluginFolders]) -> None:
    agent, folders = surrounded
    status = agent.client.call("Status", cri_pb2.StatusRequest())
    assert "nested" in [handler.name for handler in status.runtime_handlers]

    def message() -> str:
        conditions = agent.client.call("Status", cri_pb2.StatusRequest()).status.conditions
        return str(next(condition.message for condition in conditions if condition.type == "NetworkReady"))

    (folders.configurations / "10-test.conflist").write_text(f'{{"name": "net", "plugins": {LIST}}}')
    wait_for(lambda: "nests more than" in message(), what="the complaint about the configuration")
    sandbox = sandbox_config(agent)
    folders.configure(folders.script("nested", ADD=f"printf '%s' '{{\"ips\": {LIST}}}'"))
    wait_for(lambda: not message(), what="NetworkReady")
    refused("INVALID_ARGUMENT", "nested", "nests more than", call=partial(agent.client.run_sandbox, sandbox))
    folders.script("nested", ADD=result())
    agent.client.run_sandbox(sandbox, "nested")
    with run_scripted_registry() as registry:
        name = registry.offer_image("private")
        challenge = {"WWW-Authenticate": f'Bearer realm="{registry.address}/token"'}
        registry.answers["/v2/private/manifests/latest"] = Answer(status=401, headers=challenge)
        request = cri_pb2.PullImageRequest(image=cri_pb2.ImageSpec(image=name))
        pull = partial(agent.client.call, "PullImage", request)
        refused("INVALID_ARGUMENT", "credentials.json", "nests more than", call=pull)
