"""AppArmor profiles, seen from inside the containers they confine."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from proto.runtime.v1 import cri_pb2
from runtime.specgen.security.apparmor import DEFAULT_NAME
from tests.integration.conformance.support import SLEEP, Pod, refused
from tests.support.pods import container_config

LOADED = Path("/sys/kernel/security/apparmor/profiles")
OWN = "podkeel-test-profile"
Profile = cri_pb2.SecurityProfile

if not LOADED.exists():
    pytest.skip("needs AppArmor in the kernel: make test-vm runs this", allow_module_level=True)


@pytest.fixture
def own_profile() -> Iterator[str]:
    """A profile of the node's administrator: /tmp may not be written."""
    text = f"profile {OWN} flags=(attach_disconnected) {{ file, capability, network, signal, deny /tmp/** w, }}"
    subprocess.run(["apparmor_parser", "--replace"], input=text.encode(), check=True)
    yield OWN
    subprocess.run(["apparmor_parser", "--remove"], input=text.encode(), check=True)


def confined(profile: Profile | None, old: str = "") -> cri_pb2.ContainerConfig:
    config = container_config("main", *SLEEP)
    if profile is not None:
        config.linux.security_context.apparmor.CopyFrom(profile)
    config.linux.security_context.apparmor_profile = old
    return config


def label(pod: Pod, container_id: str, process: str = "1") -> str:
    return pod.agent.client.output(container_id, "cat", f"/proc/{process}/attr/current").strip()


DEFAULT = f"{DEFAULT_NAME} (enforce)"


@pytest.mark.parametrize(
    ("profile", "old", "expected"),
    [
        (None, "", DEFAULT),
        (Profile(profile_type=Profile.RuntimeDefault), "unconfined", DEFAULT),
        (None, "runtime/default", DEFAULT),
        (Profile(profile_type=Profile.Unconfined), "", "unconfined"),
        (None, "unconfined", "unconfined"),
        (Profile(profile_type=Profile.Localhost, localhost_ref=OWN), "", f"{OWN} (enforce)"),
        (None, f"localhost/{OWN}", f"{OWN} (enforce)"),
    ],
    ids=["unsaid", "default", "old default", "unconfined", "old unconfined", "localhost", "old localhost"],
)
def test_first_and_executed_processes_are_confined(
    pod: Pod, own_profile: str, profile: Profile | None, old: str, expected: str
) -> None:
    container_id = pod.start(confined(profile, old))
    assert label(pod, container_id) == expected
    assert label(pod, container_id, "self") == expected


def test_a_privileged_container_is_not_confined(privileged_pod: Pod) -> None:
    config = confined(Profile(profile_type=Profile.RuntimeDefault))
    config.linux.security_context.privileged = True
    assert label(privileged_pod, privileged_pod.start(config)) == "unconfined"


def test_a_profile_that_is_not_loaded_is_refused(pod: Pod) -> None:
    for config in (confined(Profile(profile_type=Profile.Localhost, localhost_ref=OWN)), confined(None, "localhost/x")):
        with refused(grpc.StatusCode.INVALID_ARGUMENT, "is not loaded: load it with apparmor_parser"):
            pod.create(config)


def test_an_own_profile_denies_what_it_names(pod: Pod, own_profile: str) -> None:
    container_id = pod.start(confined(Profile(profile_type=Profile.Localhost, localhost_ref=own_profile)))
    answer = pod.agent.client.exec(container_id, "sh", "-c", "touch /root/fine && touch /tmp/denied")
    assert (answer.exit_code, answer.stderr) == (1, b"touch: /tmp/denied: Permission denied\n")


@pytest.mark.parametrize(
    "command",
    [
        "mount -t tmpfs none /tmp",
        "mount --bind /etc /tmp",
        "mount -o remount,rw /sys",
        "echo 1 > /proc/sys/vm/drop_caches",
        "echo 10 > /proc/sys/kernel/printk",
        "echo h > /proc/sysrq-trigger",
        "cat /proc/sysrq-trigger",
        "echo 1 > /proc/irq/default_smp_affinity",
        "echo 0 > /sys/kernel/mm/ksm/run",
        "ls /sys/kernel/security/apparmor",
        "ls /sys/firmware/acpi",
    ],
)
def test_the_default_denies_also_those_who_may_do_more(privileged_pod: Pod, command: str) -> None:
    """All capabilities and no masked paths, /sys writable: only the profile limits it."""
    answer = _with_everything_but_the_profile(privileged_pod, DEFAULT_NAME, command)
    assert answer.exit_code != 0
    assert b"ermission denied" in answer.stderr, answer


def test_without_the_profile_the_same_succeeds(privileged_pod: Pod) -> None:
    command = "mount -t tmpfs none /tmp && echo h > /proc/sysrq-trigger && ls /sys/firmware/acpi"
    assert _with_everything_but_the_profile(privileged_pod, "", command).exit_code == 0


def _with_everything_but_the_profile(pod: Pod, profile: str, command: str) -> cri_pb2.ExecSyncResponse:
    config = confined(Profile(profile_type=Profile.Localhost if profile else Profile.Unconfined, localhost_ref=profile))
    config.linux.security_context.capabilities.add_capabilities.append("ALL")
    config.mounts.add(container_path="/sys", host_path="/sys", propagation=cri_pb2.PROPAGATION_PRIVATE)
    return pod.agent.client.exec(pod.start(config), "sh", "-c", command)


def test_the_default_leaves_usual_work_alone(pod: Pod) -> None:
    script = (
        "echo x > /tmp/file && chmod 600 /tmp/file && mkdir /tmp/folder && "
        "sleep 1000 & kill -9 $! && echo 100 > /proc/self/oom_score_adj && mkfifo /tmp/pipe && "
        "ps >/dev/null && cat /proc/meminfo /sys/fs/cgroup/cgroup.controllers >/dev/null && "
        "(nc -l -p 8080 </dev/null & sleep 0.2; echo hello | nc 127.0.0.1 8080)"
    )
    answer = pod.agent.client.exec(pod.start(confined(None)), "sh", "-c", script)
    assert (answer.exit_code, answer.stderr) == (0, b"")


def test_the_stop_signal_reaches_a_confined_container(pod: Pod) -> None:
    config = container_config("main", "sh", "-c", "trap 'exit 3' TERM; while :; do sleep 0.05; done")
    container_id = pod.start(config)
    pod.agent.client.output(container_id, "true")
    pod.agent.client.stop(container_id, timeout=20)
    assert pod.agent.client.status(container_id).exit_code == 3
