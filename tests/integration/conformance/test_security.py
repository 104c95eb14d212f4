"""Privileged, capabilities, seccomp, read-only roots, masked and read-only paths, no_new_privs, devices."""

from __future__ import annotations

import json
from pathlib import Path

import grpc
import pytest

from proto.runtime.v1 import cri_pb2
from tests.integration.conformance.support import Pod, refused
from tests.support.image_builder import busybox_image, entry, folder, make_tar
from tests.support.pods import container_config
from tests.support.registry import Registry

PROFILE = cri_pb2.SecurityProfile
CHOWN, NET_ADMIN, NET_BIND = 0, 12, 10


def _status(pod: Pod, config: cri_pb2.ContainerConfig) -> dict[str, str]:
    config.command[:] = ["cat", "/proc/self/status"]
    lines = pod.printed(config).splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _capabilities(pod: Pod, config: cri_pb2.ContainerConfig, kind: str = "CapEff") -> int:
    return int(_status(pod, config)[kind], 16)


def test_capabilities(pod: Pod) -> None:
    default = _capabilities(pod, container_config("default"))
    assert default & 1 << CHOWN
    assert not default & 1 << NET_ADMIN
    added = container_config("added")
    added.linux.security_context.capabilities.add_capabilities.extend(["NET_ADMIN"])
    assert _capabilities(pod, added) == default | 1 << NET_ADMIN
    dropped = container_config("dropped")
    dropped.linux.security_context.capabilities.drop_capabilities.extend(["CAP_CHOWN"])
    assert _capabilities(pod, dropped) == default & ~(1 << CHOWN)
    only = container_config("only")
    only.linux.security_context.capabilities.drop_capabilities.append("ALL")
    only.linux.security_context.capabilities.add_capabilities.append("NET_BIND_SERVICE")
    assert _capabilities(pod, only) == 1 << NET_BIND
    everything = container_config("all")
    everything.linux.security_context.capabilities.add_capabilities.append("ALL")
    assert _capabilities(pod, everything) == int(_own_status()["CapBnd"], 16)
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "NO_SUCH"):
        wrong = container_config("wrong", "true")
        wrong.linux.security_context.capabilities.add_capabilities.append("NO_SUCH")
        pod.create(wrong)


def _own_status() -> dict[str, str]:
    lines = Path("/proc/self/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def test_ambient_capabilities_reach_users(pod: Pod) -> None:
    config = container_config("ambient")
    config.linux.security_context.run_as_user.value = 1000
    config.linux.security_context.capabilities.add_ambient_capabilities.append("NET_BIND_SERVICE")
    assert _capabilities(pod, config, "CapEff") == 1 << NET_BIND
    plain = container_config("plain")
    plain.linux.security_context.run_as_user.value = 1000
    assert _capabilities(pod, plain, "CapEff") == 0


def test_privileged(privileged: Pod) -> None:
    config = container_config("main")
    config.linux.security_context.privileged = True
    status = _status(privileged, config)
    assert int(status["CapEff"], 16) == int(_own_status()["CapBnd"], 16)
    assert status["Seccomp"] == "0"
    script = "test -e /dev/loop-control -o -e /dev/kmsg -o -e /dev/fuse && touch /sys/fs/cgroup/x 2>/dev/null; "
    script += "mount | grep ' /sys ' | grep -c 'rw,'; mount -t tmpfs none /tmp && echo mounted"
    looks = container_config("looks", "sh", "-c", script)
    looks.linux.security_context.privileged = True
    assert privileged.printed(looks).split() == ["1", "mounted"]


def test_not_privileged(pod: Pod) -> None:
    script = "mount -t tmpfs none /tmp && exit 9; mount | grep ' /sys ' | grep -c 'ro,'; test ! -e /dev/kmsg"
    assert "1" in pod.printed(container_config("main", "sh", "-c", script)).splitlines()


def test_read_only_root(pod: Pod) -> None:
    config = container_config("main", "sh", "-c", "touch /file && exit 9; touch /dev/shm/file && echo ok")
    config.linux.security_context.readonly_rootfs = True
    assert "ok" in pod.printed(config).splitlines()
    assert pod.finished(container_config("writable", "touch", "/file")).exit_code == 0


def test_masked_and_read_only_paths(pod: Pod) -> None:
    config = container_config("given", "sh", "-c", "ls /home; cat /etc/passwd; touch /tmp/file; test ! -e /tmp/file")
    context = config.linux.security_context
    context.masked_paths.extend(["/home", "/etc/passwd", "/no/such/path"])
    context.readonly_paths.extend(["/tmp", "/no/such/either"])
    seen = pod.printed(config)
    assert "user" not in seen
    assert "root:" not in seen
    assert "Read-only file system" in seen


def _named(config: cri_pb2.ContainerConfig, name: str) -> cri_pb2.ContainerConfig:
    copy = cri_pb2.ContainerConfig()
    copy.CopyFrom(config)
    copy.metadata.name = name
    copy.log_path = f"{name}.log"
    return copy


def test_no_new_privileges(pod: Pod) -> None:
    config = container_config("main")
    config.linux.security_context.no_new_privs = True
    assert _status(pod, config)["NoNewPrivs"] == "1"
    assert _status(pod, container_config("other"))["NoNewPrivs"] == "0"


@pytest.mark.parametrize(
    ("kind", "mode"),
    [(PROFILE.RuntimeDefault, "2"), (PROFILE.Unconfined, "0"), (None, "0")],
)
def test_seccomp(pod: Pod, kind: cri_pb2.SecurityProfile.ProfileType | None, mode: str) -> None:
    config = container_config("main")
    if kind is not None:
        config.linux.security_context.seccomp.profile_type = kind
    assert _status(pod, config)["Seccomp"] == mode


def test_seccomp_profile_of_the_node(pod: Pod, tmp_path: Path) -> None:
    rule = {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1}
    profile = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule]}
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(profile))
    config = container_config("main", "sh", "-c", "mkdir /tmp/new && exit 9; touch /tmp/file && echo ok")
    config.linux.security_context.seccomp.profile_type = PROFILE.Localhost
    config.linux.security_context.seccomp.localhost_ref = str(path)
    assert "ok" in pod.printed(config).splitlines()
    path.unlink()
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "profile.json"):
        pod.create(_named(config, "missing"))


def _hostname_profile(folder: Path) -> str:
    """A profile as short as people write them: no architectures, no errno."""
    rule = {"names": ["sethostname"], "action": "SCMP_ACT_ERRNO"}
    path = folder / "hostname.json"
    path.write_text(json.dumps({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule]}))
    return str(path)


def test_profile_applies_with_any_capabilities(pod: Pod, tmp_path: Path) -> None:
    for name, kind, expected in (("free", PROFILE.Unconfined, 0), ("held", PROFILE.Localhost, 1)):
        config = container_config(name, "sleep", "60")
        context = config.linux.security_context
        context.capabilities.add_capabilities.append("SYS_ADMIN")
        context.seccomp.profile_type = kind
        if kind == PROFILE.Localhost:
            context.seccomp.localhost_ref = _hostname_profile(tmp_path)
        answer = pod.agent.client.exec(pod.start(config), "hostname", "another")
        assert (answer.exit_code != 0) == expected, answer
        assert not expected or b"Operation not permitted" in answer.stderr


def test_privileged_passes_over_profiles(privileged: Pod, tmp_path: Path) -> None:
    config = container_config("main", "sleep", "60")
    context = config.linux.security_context
    context.privileged = True
    context.seccomp.profile_type = PROFILE.Localhost
    context.seccomp.localhost_ref = _hostname_profile(tmp_path)
    assert privileged.agent.client.output(privileged.start(config), "hostname", "another") == ""


def test_links_of_the_pod_are_managed_with_the_capability_only(pod: Pod) -> None:
    able = container_config("able", "sleep", "60")
    able.linux.security_context.capabilities.add_capabilities.append("NET_ADMIN")
    client, command = pod.agent.client, ("brctl", "addbr", "foobar")
    assert client.exec(pod.start(container_config("unable", "sleep", "60")), *command).exit_code != 0
    assert client.output(pod.start(able), *command) == ""


def test_programs_with_the_set_user_id_bit_work_unless_told_otherwise(pod: Pod, registry: Registry) -> None:
    busybox = entry("suid/passwd", Path("/bin/busybox").read_bytes(), mode=0o4755)
    reference = registry.push(busybox_image({}, [make_tar([folder("suid"), busybox])]), "made/suid")
    spec = cri_pb2.ImageSpec(image=reference)
    pod.agent.client.call("PullImage", cri_pb2.PullImageRequest(image=spec))
    for name, refused_it in (("raises", False), ("stays", True)):
        config = container_config(name, "sleep", "60", image=reference)
        config.linux.security_context.run_as_user.value = 1000
        config.linux.security_context.no_new_privs = refused_it
        answer = pod.agent.client.exec(pod.start(config), "/suid/passwd")
        assert (b"must be suid" in answer.stderr) == refused_it, answer
    pod.agent.client.call("RemoveImage", cri_pb2.RemoveImageRequest(image=spec))


def test_devices(pod: Pod) -> None:
    config = container_config("main", "sh", "-c", "true < /dev/mine && echo read; (true > /dev/mine) || echo refused")
    config.devices.add(host_path="/dev/fuse", container_path="/dev/mine", permissions="r")
    assert [line for line in pod.printed(config).splitlines() if line in ("read", "refused")] == ["read", "refused"]
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "/dev/nosuchdevice"):
        missing = container_config("missing", "true")
        missing.devices.add(host_path="/dev/nosuchdevice", container_path="/dev/mine", permissions="rwm")
        pod.create(missing)
