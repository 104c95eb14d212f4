"""Restored processes never run without the limits and device rules of their new container."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import grpc
import pytest

from proto.runtime.v1 import cri_pb2
from tests.support.agent import AgentProcess, running_agent
from tests.support.checkpoints import (
    abilities,
    checkpoint,
    image_of,
    lines_of,
    no_new_images,
    run_with,
    wait_for_lines,
)
from tests.support.pods import container_config, sandbox_config, wait_for_log

__all__ = ["no_new_images"]

_LOOP_CONTROL = (10, 237)


@pytest.fixture
def crun(agent: AgentProcess) -> None:
    why = abilities(agent).get("crun", "it does not work here")
    if why != "able":
        pytest.skip(f"crun cannot make checkpoints here: {why}")


def saved(agent: AgentProcess, folder: Path, *command: str) -> str:
    """An image of a container that was checkpointed while it executed ``command``."""
    sandbox_id, container_id = run_with(agent, "crun", *command)
    wait_for_log(agent.client, container_id)
    wait_for_lines(agent, container_id, 2)
    checkpoint(agent, container_id, folder / "it.tar")
    agent.client.remove_sandbox(sandbox_id)
    return image_of(agent, folder / "it.tar")


def restored(agent: AgentProcess, image: str, **resources: int) -> str:
    sandbox = sandbox_config(agent)
    config = container_config("main", image=image)
    for name, value in resources.items():
        setattr(config.linux.resources, name, value)
    return agent.client.create(agent.client.run_sandbox(sandbox, "crun"), config, sandbox)


@pytest.mark.usefixtures("crun")
def test_no_process_runs_without_device_rules(agent: AgentProcess, tmp_path: Path) -> None:
    try:
        os.close(os.open("/dev/loop-control", os.O_RDONLY))
    except OSError as error:
        pytest.skip(f"this machine has no device to try it with: /dev/loop-control: {error.strerror}")
    # It tries all the time, also at the moment when CRIU starts it, and reports each change of the rules.
    attempt = "{ true < /node; } 2>/dev/null && echo opened"
    look = '{ read r < /sys/fs/cgroup/devices/devices.list; } 2>/dev/null; [ "$r" = "$o" ] || echo rules $r; o=$r'
    attempts = f"i=0; while :; do {attempt}; {look}; i=$((i+1)); [ $((i%2000)) = 0 ] && echo $i; done"
    script = f"mknod /node c {_LOOP_CONTROL[0]} {_LOOP_CONTROL[1]}; echo ready; set -f; {attempts}"
    image = saved(agent, tmp_path, "sh", "-c", script)
    for _ in range(3):
        container_id = restored(agent, image)
        agent.client.start(container_id)
        wait_for_lines(agent, container_id, 2)
        reported = [line for line in lines_of(agent, container_id) if not line.isdigit()]
        assert not [line for line in reported if line == "opened" or "*:* rwm" in line], reported


@pytest.mark.usefixtures("crun")
def test_no_memory_is_restored_beyond_the_limit(agent: AgentProcess, tmp_path: Path) -> None:
    keeps = "(head -c 200m /dev/zero | tail -c 200m | while :; do sleep 1; done) & "
    image = saved(agent, tmp_path, "sh", "-c", f"{keeps} sleep 2; echo ready; while :; do echo x; sleep 0.05; done")
    container_id = restored(agent, image, memory_limit_in_bytes=32 << 20, memory_swap_limit_in_bytes=32 << 20)
    with pytest.raises(grpc.RpcError):
        agent.client.start(container_id)
    assert agent.client.status(container_id).state == cri_pb2.CONTAINER_EXITED


@pytest.mark.usefixtures("crun")
def test_the_limits_are_exact_once_it_runs(agent: AgentProcess, tmp_path: Path) -> None:
    image = saved(agent, tmp_path, "sh", "-c", "echo ready; while :; do echo x; sleep 0.05; done")
    container_id = restored(agent, image, memory_limit_in_bytes=96 << 20, oom_score_adj=321, cpu_quota=30_000)
    agent.client.start(container_id)
    wait_for_lines(agent, container_id, 2)
    files = "/sys/fs/cgroup/memory/memory.limit_in_bytes /sys/fs/cgroup/cpu/cpu.cfs_quota_us"
    version_2 = "/sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max"
    shown = agent.client.output(container_id, "sh", "-c", f"cat {files} 2>/dev/null || cat {version_2}")
    assert shown.split()[:2] == [str(96 << 20), "30000"]
    assert agent.client.output(container_id, "cat", "/proc/1/oom_score_adj") == "321\n"
    assert not (agent.run / "containers" / container_id / "limits").exists()


def test_the_limits_are_set_before_criu_begins(tmp_path: Path, busybox: Path) -> None:
    seen, wrapper = tmp_path / "seen", tmp_path / "crun"
    # The limits of the cgroups that contain the restore and all its processes.
    files = ("devices/$(of devices)/devices.list", "memory/$(of memory)/memory.limit_in_bytes")
    look = 'of() { sed -n "s/.*:$1://p" /proc/self/cgroup; }; cd /sys/fs/cgroup; ' + f"cat {' '.join(files)} > {seen}"
    wrapper.write_text(f'#!/bin/sh\ncase " $* " in *" restore "*) ({look}) ;; esac\nexec {shutil.which("crun")} "$@"\n')
    wrapper.chmod(0o755)
    (tmp_path / "agent").mkdir()
    options = f'[runtime.handlers.watched]\npath = "{wrapper}"\n'
    with running_agent(tmp_path / "agent", busybox, options=options) as agent:
        why = abilities(agent).get("watched", "it does not work here")
        if why != "able":
            pytest.skip(f"crun cannot make checkpoints here: {why}")
        if not Path("/sys/fs/cgroup/devices").is_dir():
            pytest.skip("the cgroup hierarchy is of version 2: device rules cannot be read")
        image = saved(agent, tmp_path, "sh", "-c", "echo ready; while :; do echo x; sleep 0.05; done")
        sandbox = sandbox_config(agent)
        config = container_config("main", image=image)
        config.linux.resources.memory_limit_in_bytes = 96 << 20
        container_id = agent.client.create(agent.client.run_sandbox(sandbox, "watched"), config, sandbox)
        agent.client.start(container_id)
        wait_for_lines(agent, container_id, 2)
        *rules, memory = seen.read_text().split("\n")[:-1]
        assert "c 1:3 rwm" in rules
        assert not [rule for rule in rules if rule.startswith("a ") or "*:* rwm" in rule]
        assert 96 << 20 <= int(memory) <= 192 << 20
