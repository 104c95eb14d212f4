"""Runtime handlers: several side by side in one agent, one with a separate wrapper, one that does not work."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from proto.runtime.v1 import cri_pb2
from runtime.cgroups.tree import CgroupTree
from tests.integration.agent.hardening import init_pid
from tests.support.agent import AgentProcess, running_agent, wait_for
from tests.support.pods import container_config, log_lines, remove_all_pods, sandbox_config

WEIGHTS = ("blkio.weight", "blkio.bfq.weight", "io.weight", "io.bfq.weight")
RUNTIME_DEFAULT = cri_pb2.SecurityProfile.RuntimeDefault


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the third handler's program, state and profile are."""
    return tmp_path_factory.mktemp("handlers")


@pytest.fixture(scope="module")
def agent_with_handlers(
    tmp_path_factory: pytest.TempPathFactory, folder: Path, busybox: Path
) -> Iterator[AgentProcess]:
    real = shutil.which("runc")
    if real is None:
        pytest.skip("runc is not installed")
    wrapper = folder / "wrapper"
    wrapper.write_text(f'#!/bin/sh\necho "$@" >> {folder}/calls\n[ "$1" = --only-ours ] && shift\nexec {real} "$@"\n')
    wrapper.chmod(0o755)
    rule = {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1}
    (folder / "profile.json").write_text(json.dumps({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule]}))
    (folder / "broken").write_text("#!/bin/sh\necho this one is broken >&2\nexit 1\n")
    (folder / "broken").chmod(0o755)
    options = f"""
umask = "0027"
io_weight = 50

[runtime.handlers.wrapped]
path = "{wrapper}"
root = "{folder}/state"
arguments = ["--only-ours"]
allowed_annotations = ["vendor.io/*", "run.oci.*"]
seccomp_profile = "{folder}/profile.json"
privileged_without_host_devices = true
io_weight = 300

[runtime.handlers.broken]
path = "{folder}/broken"

[runtime.handlers.missing]
path = "{folder}/missing"
"""
    with running_agent(tmp_path_factory.mktemp("agent"), busybox, options=options) as agent:
        yield agent


@pytest.fixture
def agent(agent_with_handlers: AgentProcess) -> Iterator[AgentProcess]:
    yield agent_with_handlers
    remove_all_pods(agent_with_handlers.client)
    assert agent_with_handlers.client.findings() == []


def start(agent: AgentProcess, handler: str, *command: str, **pod: Any) -> tuple[str, str]:
    """A new pod of that handler with one started container; their ids."""
    sandbox = sandbox_config(agent, **pod)
    sandbox_id = agent.client.run_sandbox(sandbox, handler)
    config = container_config("main", *(command or ("sleep", "1000")))
    config.linux.security_context.seccomp.profile_type = RUNTIME_DEFAULT
    container_id = agent.client.create(sandbox_id, config, sandbox)
    agent.client.start(container_id)
    return sandbox_id, container_id


def information(agent: AgentProcess, container_id: str) -> dict[str, Any]:
    request = cri_pb2.ContainerStatusRequest(container_id=container_id, verbose=True)
    answer: dict[str, Any] = json.loads(agent.client.call("ContainerStatus", request).info["info"])
    return answer


def working(agent: AgentProcess) -> list[str]:
    return [handler.name for handler in agent.client.call("Status", cri_pb2.StatusRequest()).runtime_handlers]


def test_status_lists_those_that_work_and_says_why_others_do_not(agent: AgentProcess) -> None:
    names = working(agent)
    assert names[0] == ""
    assert {"runc", "wrapped"} <= set(names[1:])
    assert not {"broken", "missing"} & set(names)
    verbose = agent.client.call("Status", cri_pb2.StatusRequest(verbose=True))
    failed = json.loads(verbose.info["podkeel"])["failedHandlers"]
    assert "this one is broken" in failed["broken"]
    assert "is not installed" in failed["missing"]


@pytest.mark.parametrize(
    ("handler", "words"),
    [("broken", "this one is broken"), ("missing", "is not installed"), ("unheard-of", "is not configured")],
)
def test_handlers_that_do_not_work_are_refused(agent: AgentProcess, handler: str, words: str) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        agent.client.run_sandbox(sandbox_config(agent), handler)
    assert repr(handler) in (refused.value.details() or "")
    assert words in (refused.value.details() or "")
    assert not agent.client.call("ListPodSandbox", cri_pb2.ListPodSandboxRequest()).items


def test_pods_of_two_runtimes_side_by_side(agent: AgentProcess) -> None:
    handlers = [name for name in ("crun", "runc") if name in working(agent)]
    if len(handlers) < 2:
        pytest.skip("only one OCI runtime works here")
    pods = {handler: start(agent, handler) for handler in handlers}
    for handler, (sandbox_id, container_id) in pods.items():
        assert agent.client.sandbox_status(sandbox_id).runtime_handler == handler
        assert (agent.run / "oci" / handler / container_id).is_dir()
        assert agent.client.output(container_id, "echo", handler).strip() == handler
        resources = cri_pb2.LinuxContainerResources(cpu_shares=300)
        request = cri_pb2.UpdateContainerResourcesRequest(container_id=container_id, linux=resources)
        agent.client.call("UpdateContainerResources", request)
        assert agent.client.status(container_id).resources.linux.cpu_shares == 300
    agent.restart()
    for _, container_id in pods.values():
        assert agent.client.output(container_id, "echo", "still").strip() == "still"
        agent.client.stop(container_id)
        assert agent.client.status(container_id).exit_code == 137


def test_a_handler_with_its_own_root_and_arguments(agent: AgentProcess, folder: Path) -> None:
    _, container_id = start(agent, "wrapped")
    assert (folder / "state" / container_id).is_dir()
    assert agent.client.output(container_id, "echo", "hello").strip() == "hello"
    agent.client.stop(container_id)
    agent.client.remove(container_id)
    assert not (folder / "state" / container_id).exists()
    calls = [line.split() for line in (folder / "calls").read_text().splitlines() if container_id in line]
    assert all(call[:3] == ["--only-ours", "--root", f"{folder}/state"] for call in calls)
    assert {"create", "start", "exec", "delete"} <= {word for call in calls for word in call}


def test_its_own_default_seccomp_profile(agent: AgentProcess) -> None:
    script = "mkdir /new && echo made || echo refused"
    for handler, expected in (("runc", "made"), ("wrapped", "refused")):
        _, container_id = start(agent, handler, "sh", "-c", script)
        path = agent.client.status(container_id).log_path
        wait_for(lambda path=path: {"made", "refused"} & set(log_lines(path)), what="the container's word")
        assert expected in log_lines(path)


def test_only_allowed_annotations_reach_the_runtime(agent: AgentProcess) -> None:
    given = {"vendor.io/a": "1", "other.io/b": "2", "run.oci.hooks.stdout": "/etc/owned"}
    for handler, expected in (("runc", {}), ("wrapped", {"vendor.io/a": "1"})):
        sandbox_id, container_id = start(agent, handler, annotations=given)
        annotations = information(agent, container_id)["runtimeSpec"]["annotations"]
        assert {key: value for key, value in annotations.items() if key in given} == expected
        assert dict(agent.client.sandbox_status(sandbox_id).annotations) == given


def test_the_configured_umask_holds_for_every_process(agent: AgentProcess) -> None:
    for handler in (name for name in ("crun", "runc") if name in working(agent)):
        _, container_id = start(agent, handler, "sh", "-c", "umask; touch /first; exec sleep 1000")
        path = agent.client.status(container_id).log_path
        wait_for(lambda path=path: log_lines(path), what="the container's word")
        assert log_lines(path) == ["0027"]
        look = "umask; mkdir /second; stat -c %a /first /second"
        assert agent.client.output(container_id, "sh", "-c", look).split() == ["0027", "640", "750"]


def test_pods_count_for_disks_what_their_handler_says(agent: AgentProcess) -> None:
    """The weight is the pod's and counts against other pods; a pod with a given parent has it too."""
    tree = CgroupTree.of_host(agent.cgroup_driver)
    for handler, expected in (("wrapped", "300"), ("runc", "50")):
        sandbox_id, container_id = start(agent, handler)
        parent = json.loads(
            agent.client.call(
                "PodSandboxStatus", cri_pb2.PodSandboxStatusRequest(pod_sandbox_id=sandbox_id, verbose=True)
            ).info["info"]
        )["cgroupParent"]
        if tree.driver == "systemd":
            told = subprocess.run(
                ["systemctl", "show", "--property=IOWeight", "--value", parent.rpartition("/")[2]],
                check=True,
                capture_output=True,
                text=True,
            )
            assert told.stdout.strip() == expected
        root = tree.mounts["unified" if tree.version == 2 else "blkio"]
        folder = root / tree.parent_path(parent).lstrip("/")
        assert str(init_pid(agent, container_id)) in "".join(file.read_text() for file in folder.rglob("cgroup.procs"))
        weights = {name: (folder / name).read_text().split()[-1] for name in WEIGHTS if (folder / name).exists()}
        if not weights:
            assert "io_weight: cannot be set" in agent.log.read_text()
        elif tree.driver == "cgroupfs":  # systemd has a different scale for BFQ
            assert set(weights.values()) == {expected}
        agent.client.stop_sandbox(sandbox_id)
        assert not folder.exists()


def test_pods_of_a_handler_that_is_no_more_can_be_removed(tmp_path: Path, busybox: Path) -> None:
    options = '[runtime.handlers.gone]\npath = "runc"\n'
    with running_agent(tmp_path, busybox, options=options) as agent:
        sandbox_id, container_id = start(agent, "gone")
        configuration = tmp_path / "config.toml"
        configuration.write_text(configuration.read_text().replace(options, ""))
        agent.restart()
        with pytest.raises(grpc.RpcError) as refused:
            agent.client.exec(container_id, "true")
        assert "'gone' is not configured" in (refused.value.details() or "")
        assert agent.client.sandbox_status(sandbox_id).state == cri_pb2.SANDBOX_READY
        agent.client.stop(container_id)
        assert agent.client.status(container_id).exit_code == 137
        agent.client.remove_sandbox(sandbox_id)
        assert agent.client.findings() == []


def test_privileged_without_the_host_s_devices(agent: AgentProcess) -> None:
    listed = {}
    for handler in ("runc", "wrapped"):
        sandbox = sandbox_config(agent)
        sandbox.linux.security_context.privileged = True
        sandbox_id = agent.client.run_sandbox(sandbox, handler)
        config = container_config("main", "sleep", "1000")
        config.linux.security_context.privileged = True
        container_id = agent.client.create(sandbox_id, config, sandbox)
        agent.client.start(container_id)
        listed[handler] = agent.client.output(container_id, "ls", "/dev").split()
    assert "kmsg" in listed["runc"]
    assert "kmsg" not in listed["wrapped"]
