"""Users, capabilities, seccomp, privileged containers and devices, looked at from inside."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from proto.runtime.v1 import cri_pb2
from runtime.specgen.capabilities import NAMES
from runtime.specgen.facts import HandlerFacts
from runtime.specgen.node_facts import NodeFacts
from tests.integration.spec.conftest import Run
from tests.unit.spec.requests import Image, container, privileged_sandbox, secured

RUNTIME_DEFAULT = cri_pb2.SecurityProfile(profile_type="RuntimeDefault")


def _bits(status: str, name: str) -> set[str]:
    line = next(line for line in status.splitlines() if line.startswith(name + ":"))
    value = int(line.split()[1], 16)
    return {capability for bit, capability in enumerate(NAMES) if value >> bit & 1}


@pytest.mark.parametrize(
    ("fields", "image_user", "seen"),
    [
        ({}, "app", "1000 1000 1000 29 50"),
        ({}, "1001:staff", "1001 50 50"),
        ({"run_as_user": {"value": 1000}, "run_as_group": {"value": 7}}, "", "1000 7 7 29 50"),
        ({"run_as_username": "app", "supplemental_groups": [5, 9]}, "root", "1000 1000 1000 5 9 29 50"),
        (
            {"run_as_user": {"value": 1000}, "supplemental_groups": [9], "supplemental_groups_policy": "Strict"},
            "",
            "1000 1000 1000 9",
        ),
    ],
)
def test_user_and_groups(run: Run, fields: dict[str, object], image_user: str, seen: str) -> None:
    result = run("echo $(id -u) $(id -g) $(id -G)", config=secured(**fields), image=Image(user=image_user))
    assert result.output.strip() == seen
    user = result.built.user
    assert [str(user.uid), str(user.gid), *map(str, user.supplemental_groups)] == seen.split()


def test_capabilities_are_added_dropped_and_made_ambient(run: Run) -> None:
    wanted = cri_pb2.Capability(
        drop_capabilities=["ALL"], add_capabilities=["net_admin"], add_ambient_capabilities=["CAP_NET_BIND_SERVICE"]
    )
    config = secured(capabilities=wanted, run_as_user={"value": 1000}, no_new_privs=True)
    status = run("cat /proc/self/status", config=config).output
    assert _bits(status, "CapBnd") == {"CAP_NET_ADMIN", "CAP_NET_BIND_SERVICE"}
    assert _bits(status, "CapEff") == {"CAP_NET_BIND_SERVICE"}  # ambient alone survives as another user
    assert _bits(status, "CapAmb") == {"CAP_NET_BIND_SERVICE"}
    assert "NoNewPrivs:\t1" in status


def test_all_capabilities_are_those_the_node_has(run: Run, node: NodeFacts) -> None:
    status = run("cat /proc/self/status", config=secured(capabilities={"add_capabilities": ["ALL"]})).output
    assert _bits(status, "CapEff") == node.capabilities


def test_privileged(run: Run, node: NodeFacts) -> None:
    config = secured(
        privileged=True, seccomp=RUNTIME_DEFAULT, masked_paths=["/proc/keys"], readonly_paths=["/proc/sys"]
    )
    look = """
echo @status; cat /proc/self/status
echo @dev; ls /dev
echo @mounts; cat /proc/self/mountinfo
echo @mount; mkdir /m && mount -t tmpfs m /m && echo mounted && umount /m
echo @read; dd if=/dev/kmsg of=/dev/null bs=8192 count=1 2>/dev/null; echo $?
echo @end"""
    seen = run(look, config=config, sandbox=privileged_sandbox()).sections()
    assert _bits(seen["status"], "CapEff") == node.capabilities
    assert "Seccomp:\t0" in seen["status"]
    assert seen["mount"] == "mounted"
    assert {name for name in ("kmsg", "loop0", "vda") if Path("/dev", name).exists()} <= set(seen["dev"].split())
    targets = {line.split()[4]: line.split()[5].split(",") for line in seen["mounts"].splitlines()}
    assert "rw" in targets["/sys"]
    assert all("rw" in options for path, options in targets.items() if path.startswith("/sys/fs/cgroup"))
    assert not {"/proc/keys", "/proc/sys"} & set(targets)
    assert seen["read"] == "0"


@pytest.fixture(params=["profile", "compiled"])
def handler(request: pytest.FixtureRequest, runtime: str) -> HandlerFacts:
    if request.param == "compiled" and runtime != "crun":
        pytest.skip("only crun takes a compiled filter")
    return HandlerFacts(runtime, compiled_seccomp=request.param == "compiled")


def test_runtime_default_seccomp(run: Run, handler: HandlerFacts) -> None:
    look = """
echo @status; cat /proc/self/status
echo @unshare; unshare -U true
echo @mount; mount -t tmpfs x /tmp
echo @ordinary; sleep 0; touch /tmp/file && chown 1:1 /tmp/file && cat /tmp/file && (echo forked | cat)
echo @end"""
    result = run(look, config=secured(seccomp=RUNTIME_DEFAULT), handler=handler)
    seen = result.sections()
    assert "Seccomp:\t2" in seen["status"]
    assert "not permitted" in seen["unshare"]
    assert seen["ordinary"] == "forked"
    assert ("run.oci.seccomp_bpf_data" in result.built.spec.annotations) == handler.compiled_seccomp


def test_localhost_seccomp(run: Run, handler: HandlerFacts, tmp_path: Path) -> None:
    profile = tmp_path / "profile.json"
    rule = {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38}
    profile.write_text(json.dumps({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule]}))
    wanted = cri_pb2.SecurityProfile(profile_type="Localhost", localhost_ref=str(profile))
    result = run("mkdir /x; touch /y && echo touched", config=secured(seccomp=wanted), handler=handler)
    assert "not implemented" in result.output
    assert "touched" in result.output


def test_readonly_root(run: Run) -> None:
    config = secured(readonly_rootfs=True)
    result = run("touch /x; echo y > /etc/hosts; echo z > /dev/shm/z && cat /dev/shm/z", config=config)
    assert result.output.count("Read-only") == 2
    assert result.output.splitlines()[-1] == "z"


def test_devices_single_folder_and_permissions(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "devices/deeper"
    folder.mkdir(parents=True)
    os.mknod(tmp_path / "devices/mem-null", 0o020666, os.makedev(1, 3))
    os.mknod(folder / "mem-zero", 0o020600, os.makedev(1, 5))
    (tmp_path / "devices/plain").write_text("no device")
    config = container(
        devices=[
            cri_pb2.Device(host_path="/dev/kmsg", container_path="/dev/log-in", permissions="w"),
            cri_pb2.Device(host_path=str(tmp_path / "devices"), container_path="/dev/set", permissions="rw"),
        ]
    )
    look = """
echo @list; find /dev/set | cat
echo @stat; stat -c '%a %t:%T' /dev/set/deeper/mem-zero
echo @read; head -c 1 /dev/log-in
echo @write; echo "podkeel test" > /dev/log-in && echo written
echo @end"""
    seen = run(look, config=config).sections()
    assert set(seen["list"].split()) == {"/dev/set", "/dev/set/mem-null", "/dev/set/deeper", "/dev/set/deeper/mem-zero"}
    assert seen["stat"] == "600 1:5"
    assert "not permitted" in seen["read"]
    assert seen["write"] == "written"
